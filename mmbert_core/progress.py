"""A line about a step that takes longer than a few seconds, while it runs. Floor 0; imports nothing of ours."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
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
