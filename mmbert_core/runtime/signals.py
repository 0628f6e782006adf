"""Signals that ask a run to stop.

1. where there is work to save: a signal sets a flag that the training loop reads
2. where no work can be lost: a signal raises an exception
3. a second signal, or a main thread that does not react, ends the process

SIGTERM (torchrun, SLURM), SIGINT (Ctrl-C), SIGHUP (a lost terminal), SIGQUIT and SIGUSR1 (SLURM's --signal, where the
launcher forwards it) mean the same; torchrun forwards the first four by itself.
Python runs a handler between two instructions of the main thread, and not at all while the main thread waits in a
collective. So the handler does nothing that could break what it interrupts, and a thread receives every signal through
a pipe.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmbert_core.runtime.errors import Stopped

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 1.0  # one request may come twice: from SLURM to all processes, and again through torchrun
GRACE_SECONDS = 5.0  # for the main thread to end by itself where there is nothing to save
PARENT_CHECK_SECONDS = 1.0


class _State:
    """The stop signals that this process has received, and what the next one does. `_state` is the one in use."""

    def __init__(self) -> None:
        self.first: int | None = None  # signal number of the first request
        self.deferred = False  # inside `deferred`
        self.leaving = False  # after `ignore`
        self.is_caught = False  # inside `caught`: this process runs a command of this package


_state = _State()
_launcher: int | None = None  # process id of torchrun


def note_launcher() -> None:
    """Remember torchrun's process id, which `caught` watches. Call it early: torchrun must not have ended yet."""
    global _launcher
    _launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return signal.Signals(_state.first).name if _state.first else None


@contextmanager
def caught() -> Iterator[None]:
    """Inside the block, stop signals are handled; if torchrun started this process, its end counts as a SIGTERM.

    For the main thread of a command.
    """
    global _state
    _state = _State()
    _state.is_caught = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and under_nohup)]
    old_handlers = {number: signal.signal(number, _handle) for number in handled}
    old_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, _state), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in old_handlers.items():
            signal.signal(number, signal.SIG_IGN if _state.leaving else handler)
        os.close(writer)
        listener.join()


@contextmanager
def deferred() -> Iterator[None]:
    """For a block with work to save: the first signal only sets the flag that `requested` reads.

    Outside such a block it raises `Stopped` at once.
    """
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def noted() -> Iterator[None]:
    """For a library call in another program's process: the first stop signal inside `deferred` is a request to stop.

    A second signal, and one outside `deferred`, acts as it did before the call. Signals that the program handles or
    ignores itself are not touched. No thread is started, and the old handlers are restored at the end.
    Does nothing inside `caught`. Only the main thread can set handlers: in other threads no signal is noticed.
    """
    global _state
    if _state.is_caught:
        yield
        return
    before_state, _state = _state, _State()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        handlers = {number: handler for number, handler in handlers.items() if handler in defaults}

    def note(number: int, frame: FrameType | None) -> None:
        """In the main thread."""
        if _state.deferred and not _state.first:
            _state.first = number
            logger.info(
                "%s: stopping after the current step; a second signal ends at once", signal.Signals(number).name
            )
            return
        signal.signal(number, handlers[number])
        os.kill(os.getpid(), number)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _state = before_state


def ignore() -> None:
    """Ignore further signals: the work is saved, this process ends, and no signal must change its exit code."""
    _state.leaving = True


def restore_defaults() -> None:
    """Let a signal end this process, for one that waits for nothing else. No effect outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    """In the main thread."""
    _state.first = _state.first or number
    if not _state.deferred and not _state.leaving:
        raise Stopped(f"stopped by {signal.Signals(number).name}; there was nothing to save")


def _listen(reader: int, state: _State) -> None:
    """In a thread: what the main thread cannot do while it waits in native code."""
    launcher = _launcher
    first_time = None  # of the first request: the handler may run much later, when the main thread is busy
    deadline = None  # for the main thread to end where there is nothing to save
    while True:
        ready, _, _ = select.select([reader], [], [], PARENT_CHECK_SECONDS)
        now = time.monotonic()
        if ready:
            numbers = os.read(reader, 64)
            if not numbers:
                os.close(reader)
                return
            for number in filter(lambda number: number in STOP_SIGNALS, numbers):
                state.first, first_time = state.first or number, first_time or now
                if state.leaving:
                    continue
                if now - first_time > SAME_REQUEST_SECONDS:
                    os._exit(128 + number)
                if state.deferred:
                    name = signal.Signals(number).name
                    logger.info("%s: stopping when the current work is done; a second signal ends at once", name)
                else:
                    deadline = deadline or now + GRACE_SECONDS
        if deadline is not None and now > deadline:
            os._exit(EXIT_STOPPED)
        if launcher is not None and os.getppid() != launcher:
            launcher = None
            logger.warning("torchrun is gone")
            if state.first is None:  # else this would count as a second signal
                os.kill(os.getpid(), signal.SIGTERM)
