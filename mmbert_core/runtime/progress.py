"""A line about a step that takes longer than a few seconds, while it runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS_UNTIL_LINE = 5.0


@contextmanager
def slow_step(name: str) -> Iterator[None]:
    """After SECONDS_UNTIL_LINE say that `name` still runs, then each time its duration has tripled.

    A step that is faster says nothing.
    """
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


SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Rows scored, told every few seconds, with the time that is left where the length of the files is known."""

    def __init__(self, lengths: Sequence[int] | None) -> None:
        """`lengths`: lines, or rows, of each file; a row may have several lines, so that only lines tell how much is left."""
        self.lengths, self.done = lengths, 0
        self._started = self._said = time.monotonic()

    def advance(self, num_rows: int, file: int, position: int) -> None:
        """`num_rows` more are scored; the last of them stands at `position`, a line or a row, of a file."""
        self.done += num_rows
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_LINES:
            self._said, seconds = now, now - self._started
            left = (
                ""
                if self.lengths is None
                else f", about {format_seconds(self.seconds_left(file, position, seconds))} left"
            )
            logger.info("%d rows scored, %.0f rows/s%s", self.done, self.done / seconds, left)

    def seconds_left(self, file: int, position: int, seconds: float) -> float:
        """From the share of all lines (of files without lines: rows) up to `position`, which took `seconds`."""
        assert self.lengths is not None
        done = sum(self.lengths[:file]) + position
        return seconds * max(0.0, sum(self.lengths) / max(1, done) - 1)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
