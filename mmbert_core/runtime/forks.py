"""Locks that a fork waits for, and one CPU thread in a forked process.

A fork copies the memory and only the calling thread. The threads of OpenMP (PyTorch) and of the tokenizers library
are missing in the child, and its first parallel loop would wait for them forever; a tokenizer or a model that another
thread was using would stay in the state of that moment. So:

1. before the fork: wait for the threads that hold a lock of `lock_of`, and for those that held one and are ending
2. in the child: one thread for PyTorch and none for tokenizers, before anything can start a parallel loop
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"  # read by the tokenizers library at each call
# Set, so that the library does not warn at a fork: `_after_in_child` does what it asks for.
os.environ.setdefault(TOKENIZER_THREADS, "true")

# How long the process's set of threads must stay the same before the ended ones count as gone, and the longest wait.
SECONDS_UNCHANGED, MAX_SECONDS_ENDING = 0.05, 2.0

_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()
_acquired = threading.local()  # `.locks`: those that the forking thread took before its fork
_users: dict[int, threading.Thread] = {}  # threads that have computed, by the system's number
_forked = False


def lock_of(owner: object) -> threading.RLock:
    """The lock of an object, the same for each call. A fork in another thread waits until it is free."""
    with _locks_guard:
        return _locks.setdefault(owner, threading.RLock())


@contextmanager
def exclusively(lock: threading.RLock) -> Iterator[None]:
    """Hold a lock of `lock_of` while this thread computes."""
    with lock:
        _users[threading.get_native_id()] = threading.current_thread()
        yield


def is_forked() -> bool:
    """Whether this process is a copy of one that had imported this module."""
    return _forked


def _before() -> None:
    with _locks_guard:  # not held while waiting: the thread that is waited for may ask for a lock itself
        locks = list(_locks.values())
    _acquired.locks = []
    for lock in locks:  # in the order of their creation, so that two forks at once do not wait for each other
        lock.acquire()
        _acquired.locks.append(lock)
    _wait_for_ending_threads()


def _wait_for_ending_threads() -> None:
    """Wait until threads that computed and have ended are gone, and so are the OpenMP threads that ended with them.

    After Python is done with a thread, its end frees the buffers of the matrix library (MKL) under a lock of that
    library. A fork at that moment copies the lock as held: 13 of 100 children would wait for it forever.
    """
    ended = {number for number, thread in list(_users.items()) if not thread.is_alive()}
    deadline = time.monotonic() + MAX_SECONDS_ENDING
    threads, since = _native_threads(), time.monotonic()
    while ended and time.monotonic() < deadline and (ended & threads or time.monotonic() - since < SECONDS_UNCHANGED):
        time.sleep(0.002)
        if (now := _native_threads()) != threads:
            threads, since = now, time.monotonic()
    for number in ended:
        _users.pop(number, None)


def _native_threads() -> set[int]:
    """Numbers of all threads of this process; none where the system has no list of them."""
    try:
        return set(map(int, os.listdir("/proc/self/task")))
    except OSError:
        return set()


def _release() -> None:
    for lock in _acquired.__dict__.pop("locks", []):
        lock.release()


def _after_in_child() -> None:
    global _forked, _locks_guard
    _forked = True
    _users.clear()
    _locks_guard = threading.Lock()  # another thread may have held it
    _release()
    os.environ[TOKENIZER_THREADS] = "false"
    torch.set_num_threads(1)  # in the thread that forked: the pool that is gone was this thread's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_after_in_child)
