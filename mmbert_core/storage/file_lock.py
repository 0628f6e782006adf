"""An exclusive lock on an open file. The system releases it when the process ends, even by a crash."""

import fcntl
import time
from typing import TextIO

SECONDS_BETWEEN_TRIES = 0.05


def lock_file(stream: TextIO, *, seconds: float | None = 0.0) -> bool:
    """Take the lock, waiting at most `seconds` (None: forever) for another process. Returns whether it was taken.

    Raises `OSError` on a file system without locks, such as some network and user-space ones.
    """
    if seconds is None:
        fcntl.flock(stream, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(SECONDS_BETWEEN_TRIES)
