"""The next item of an iterator, made by a thread while the one before is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
END = object()


def prefetch_one(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, at most one more than were asked for. What making one raises is raised here, in its turn.

    Pays where making or using an item leaves the interpreter to others: tokenising, reading, waiting for a disk.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, END)
        while (item := coming.result()) is not END:
            coming = thread.submit(next, items, END)
            yield item
