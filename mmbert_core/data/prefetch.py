"""Compute the next item of an iterator in a thread while the current one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
END = object()


def prefetch_one(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, each computed while the one before is used.

    An exception is raised when its item would be returned.

    This saves time where computing or using an item releases the GIL: tokenising, reading, waiting for a disk.
    """
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, END)
        while (item := upcoming.result()) is not END:
            upcoming = thread.submit(next, items, END)
            yield item
