"""Standard streams that do not end a command when their reader is gone or their encoding lacks a character.

A command's results are its files. After `| head`, a closed terminal or a closed descriptor, nobody reads what it
prints; a full disk behind standard output is still an error.
"""

import errno
import faulthandler
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

READER_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET})  # of a pipe, a terminal, a socket


class _StandardFile(io.FileIO):
    """The descriptor of a standard stream. Once its reader is gone, further writes are dropped."""

    def __init__(self, descriptor: int, *, is_required: bool) -> None:
        """`is_required`: a write that fails raises its `OSError`, unless the reader is gone."""
        super().__init__(descriptor, "w", closefd=False)
        self._is_required = is_required

    def write(self, data: Any) -> int:
        """Number of bytes written. Waits while a non-blocking descriptor is full."""
        size = memoryview(data).nbytes
        try:
            while (written := super().write(data)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            if error.errno in READER_GONE:
                discard(self.fileno())
            elif self._is_required:
                raise OSError(error.errno, error.strerror, "standard output") from None
            return size


def protect_streams() -> None:
    """Replace the standard streams of a command's process with ones that may lose their readers.

    Characters that a stream's encoding lacks are written as escapes (`\\xe9`). A crash in native code, such as a bus
    error, prints where it happened to standard error.
    """
    open_closed_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError):  # no descriptor: a stream of the program that embeds this one is kept
            file = _StandardFile(stream.fileno(), is_required=name == "stdout")
            stream.flush()
            buffered = io.BufferedWriter(file)
            at_once = name == "stderr"
            options = {"line_buffering": at_once or stream.isatty(), "write_through": at_once}
            wrapped = io.TextIOWrapper(buffered, encoding=stream.encoding, errors="backslashreplace", **options)
            setattr(sys, name, wrapped)
    with suppress(OSError, ValueError, RuntimeError):
        faulthandler.enable()


def open_closed_streams() -> None:
    """Replace streams that the caller has closed (`>&-`) with ones that read nothing and drop what is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - until the process ends
            setattr(sys, name, stream)


@contextmanager
def until_reader_closes() -> Iterator[None]:
    """For work whose only result is its standard output: end without an error when the reader (`| head`) is gone."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout.fileno())


def discard(descriptor: int) -> None:
    """Drop whatever is written to `descriptor` from now on."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
