"""Locks that a fork waits for, and one CPU thread in a forked process.

A fork copies the memory but only the calling thread. The child lacks the threads of OpenMP (PyTorch) and of the
tokenizers library, and its first parallel loop would wait for them forever. A tokenizer or model that another thread
was using would stay in a half-changed state. So:

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
# The library warns at a fork unless this is set; `_after_in_child` turns its threads off, as the warning advises.
os.environ.setdefault(TOKENIZER_THREADS, "true")

SECONDS_UNCHANGED = 0.05  # that the process's set of threads must stay the same before ended threads count as gone
MAX_SECONDS_ENDING = 2.0  # that a fork waits for this

_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()
_acquired = threading.local()  # `.locks`: those that the forking thread took before its fork
_users: dict[int, threading.Thread] = {}  # threads that have held a lock of `exclusively`, by native thread id
_forked = False


def lock_of(owner: object) -> threading.RLock:
    """The lock of an object, the same at each call. A fork in another thread waits until the lock is free."""
    with _locks_guard:
        return _locks.setdefault(owner, threading.RLock())


@contextmanager
def exclusively(lock: threading.RLock) -> Iterator[None]:
    """Hold a lock of `lock_of` while this thread computes."""
    with lock:
        _users[threading.get_native_id()] = threading.current_thread()
        yield


def is_forked() -> bool:
    """Whether this process was forked from one that had imported this module."""
    return _forked


def _before() -> None:
    with _locks_guard:  # released before the wait: a thread that holds a lock may call `lock_of`
        locks = list(_locks.values())
    _acquired.locks = []
    for lock in locks:  # in the order of their creation, so that two forks at once do not wait for each other
        lock.acquire()
        _acquired.locks.append(lock)
    _wait_for_ending_threads()


def _wait_for_ending_threads() -> None:
    """Wait until the threads of `_users` that have ended are gone, and so are their OpenMP threads.

    A thread that Python counts as ended still frees the buffers of the matrix library (MKL), under a lock of that
    library. A fork at that moment copies the held lock, and the child waits for it forever: 13 of 100 forks in a test.
    """
    ended = {native_id for native_id, thread in list(_users.items()) if not thread.is_alive()}
    deadline = time.monotonic() + MAX_SECONDS_ENDING
    threads, since = _native_threads(), time.monotonic()
    while ended and time.monotonic() < deadline and (ended & threads or time.monotonic() - since < SECONDS_UNCHANGED):
        time.sleep(0.002)
        if (now := _native_threads()) != threads:
            threads, since = now, time.monotonic()
    for native_id in ended:
        _users.pop(native_id, None)


def _native_threads() -> set[int]:
    """Native ids of all threads of this process; empty where the system does not list them."""
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
    torch.set_num_threads(1)  # for this thread, whose pool of OpenMP threads does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_after_in_child)
