"""Log lines during work that takes longer than a few seconds."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS_UNTIL_LINE = 5.0  # of `slow_step`
SECONDS_BETWEEN_LINES = 10.0  # of `Progress`


@contextmanager
def slow_step(name: str) -> Iterator[None]:
    """Log that `name` is still running after SECONDS_UNTIL_LINE, then each time its duration has tripled."""
    is_done = threading.Event()

    def watch() -> None:
        seconds = SECONDS_UNTIL_LINE
        wait = seconds
        while not is_done.wait(wait):
            logger.info("%s: %.0f seconds so far", name, seconds)
            wait, seconds = 2 * seconds, 3 * seconds

    watcher = threading.Thread(target=watch, name=f"slow step {name}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()


class Throttle:
    """`is_due` is true at most once every `seconds`: first at once or, with `wait_first`, after `seconds`."""

    def __init__(self, seconds: float, *, wait_first: bool = False) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + (seconds if wait_first else 0.0)

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Progress:
    """Logs rows done and rows per second every few seconds, and the time left where the files' lengths are known."""

    def __init__(self, rows: str, lengths: Sequence[int] | None = None) -> None:
        """`rows`: what is counted, such as "rows scored". `lengths`: the lines of each file (of Parquet: the rows).

        The time left follows from the share of lines read: the number of rows is not known before, as a row may have
        several lines.
        """
        self.lengths, self.num_done = lengths, 0
        self._rows, self._started = rows, time.monotonic()
        self._throttle = Throttle(SECONDS_BETWEEN_LINES, wait_first=True)

    def advance(self, num_rows: int, file: int = 0, position: int = 0) -> None:
        """Count `num_rows` more rows; the last one ends at line (or row) `position` of the file with index `file`."""
        self.num_done += num_rows
        if self._throttle.is_due():
            seconds, left = time.monotonic() - self._started, ""
            if self.lengths is not None:
                left = f", about {format_seconds(self.seconds_left(file, position, seconds))} left"
            logger.info("%d %s, %.0f rows/s%s", self.num_done, self._rows, self.num_done / seconds, left)

    def advance_to(self, num_done: int) -> None:
        """As `advance`, up to a total of `num_done` rows."""
        self.advance(num_done - self.num_done)

    def seconds_left(self, file: int, position: int, seconds: float) -> float:
        """Seconds left, when reading up to line (or row) `position` of file `file` took `seconds`."""
        assert self.lengths is not None
        num_read = sum(self.lengths[:file]) + position
        return seconds * max(0.0, sum(self.lengths) / max(1, num_read) - 1)


def format_seconds(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 2:05, 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
