"""Signals that ask a run to stop.

1. a flag that the training loop reads, where there is work to save
2. an exception, where nothing can be lost
3. at a second signal, or when the main thread does not react: the end of the process

SIGTERM (torchrun, SLURM), SIGINT (Ctrl-C), SIGHUP (a lost terminal), SIGQUIT and SIGUSR1 (SLURM's --signal, where the
launcher forwards it) mean the same; torchrun forwards the first four by itself.
Python runs a handler between two instructions of the main thread, and not at all while that waits in a collective. So
the handler does nothing that could break what it interrupts, and a thread receives every signal through a pipe.
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
GRACE_SECONDS = 5.0  # for the main thread to leave by itself where there is nothing to save
PARENT_CHECK_SECONDS = 1.0


class _State:
    """What is known of the signals of this process; there is one."""

    def __init__(self) -> None:
        self.first: int | None = None  # signal number of the first request
        self.deferred = False
        self.leaving = False
        self.is_caught = False  # inside `caught`: this process is a command of ours


_state = _State()
_launcher: int | None = None  # process id of torchrun


def note_launcher() -> None:
    """Remember the parent of a process that torchrun has started, early, before it can have ended: `caught` watches it."""
    global _launcher
    _launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return signal.Signals(_state.first).name if _state.first else None


@contextmanager
def caught() -> Iterator[None]:
    """Inside, stop signals are handled, and so is the death of torchrun, where it has started this process.

    For the main thread of a command.
    """
    global _state
    _state = _State()
    _state.is_caught = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and under_nohup)]
    before = {number: signal.signal(number, _handle) for number in handled}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, _state), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _state.leaving else handler)
        os.close(writer)
        listener.join()


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal only sets the flag that `requested` reads: there is work to save.

    Outside it raises `Stopped` at once.
    """
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def noted() -> Iterator[None]:
    """For a library call in another program's process: a first stop signal while `deferred` is a request to stop.

    A second one, and one outside `deferred`, does what it did before. Signals that the process handles or ignores by
    itself are left to it. No thread is started and nothing ends the process; afterwards the handlers are the old ones.
    Does nothing inside `caught`. In a thread other than the main one no handler can be set, so no signal is noted.
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
    """Let a signal end this process, which has nothing more to do than wait for that. Main thread only."""
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
    # When this thread received the first request: the handler may run much later, when the main thread is busy.
    first_seconds = None
    deadline = None  # for the main thread to leave where there is nothing to save
    while True:
        ready, _, _ = select.select([reader], [], [], PARENT_CHECK_SECONDS)
        now = time.monotonic()
        if ready:
            numbers = os.read(reader, 64)
            if not numbers:
                os.close(reader)
                return
            for number in filter(lambda number: number in STOP_SIGNALS, numbers):
                state.first, first_seconds = state.first or number, first_seconds or now
                if state.leaving:
                    continue
                if now - first_seconds > SAME_REQUEST_SECONDS:
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
            if state.first is None:  # else a signal has asked for the same, and this would be a second one
                os.kill(os.getpid(), signal.SIGTERM)
