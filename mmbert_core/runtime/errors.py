"""The package's exceptions, the phase of a run in which one was raised, and values in messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_CHARACTERS = 80  # characters of a value in a message


class InputError(ValueError):
    """A mistake in the config or the data that the user can correct.

    The message is one line: which file, row and column (or which key), what was expected, what was found.
    The command line prints it unchanged and exits with code 2, before anything is trained or overwritten.
    """


class RunError(RuntimeError):
    """A failure of a run that one line explains: a full disk, a loss that is not finite. Exit code 1, no traceback."""


class PeerError(RuntimeError):
    """Another rank has failed and reports the cause, or is gone. This rank ends without a report of its own."""


class Stopped(BaseException):
    """A signal asked the run to stop, and no work is lost. Exit code 75. `except Exception` does not catch it."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Set the attribute `phase` of an error that the block raises to `name`, unless an inner phase has set it."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "phase"):
            error.phase = name  # type: ignore[attr-defined]
        raise


def format_for_message(value: object, limit: int = MAX_CHARACTERS) -> str:
    """The `repr` of a value on one line of at most `limit` characters."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)  # a cell may have millions of characters
    except ValueError:  # Python refuses to write whole numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def list_for_message(values: Sequence[object], limit: int = 10) -> str:
    """The first `limit` values, each as `format_for_message` writes it, separated by commas."""
    return ", ".join(map(format_for_message, values[:limit])) + (", ..." if len(values) > limit else "")


def shorten(message: str, limit: int) -> str:
    """A message on one line of at most `limit` characters."""
    line = " ".join(message[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
