"""The errors that a user or another rank can do something with, and the phase in which an error happened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_SHOWN = 80  # characters of a value in a message


class InputError(ValueError):
    """A mistake in the config or the data that the user can mend.

    The message is one line: which file, row and column (or which key), what was expected, what was found.
    The command line prints it as it is and exits with code 2; nothing has been trained or overwritten by then.
    """


class RunError(RuntimeError):
    """A failure of a run that one line explains: a full disk, a loss that is no number. Exit code 1, no traceback."""


class PeerError(RuntimeError):
    """Another rank has failed, which tells the reason itself, or is gone. This rank only leaves."""


class Stopped(BaseException):
    """A signal asked the run to stop, and nothing is lost. Exit code 75. Like KeyboardInterrupt it passes `except Exception`."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """An error from inside says where it happened, as its attribute `phase`; the innermost phase counts."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "phase"):
            error.phase = name  # type: ignore[attr-defined]
        raise


def format_for_message(value: object, limit: int = MAX_SHOWN) -> str:
    """A value as a message shows it: its `repr`, on one line, at most `limit` characters."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)  # a cell may have millions of characters
    except ValueError:  # Python turns no whole number of more than 4,300 digits into text
        text = "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def list_for_message(values: Sequence[object], limit: int = 10) -> str:
    """The first `limit` values as a message shows them, separated by commas."""
    return ", ".join(map(format_for_message, values[:limit])) + (", ..." if len(values) > limit else "")


def shorten(message: str, limit: int) -> str:
    """A message on one line of at most `limit` characters."""
    line = " ".join(message[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
