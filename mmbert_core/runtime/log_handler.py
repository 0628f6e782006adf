"""Log lines on standard error: those of a command, and those of a script that has set up no logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

package_logger = logging.getLogger("mmbert_core")  # the parent of all loggers of the package


class LineHandler(logging.StreamHandler):
    """Plain lines, with the level in front from warnings on. Counts the warnings."""

    num_warnings = 0

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return prefix + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.num_warnings += record.levelno == logging.WARNING
        super().emit(record)


def log_to_stderr(*, is_main: bool) -> None:
    """For a command: the package's lines go to standard error alone; those of ranks other than 0 are errors only."""
    package_logger.handlers[:] = [LineHandler(sys.stderr)]
    package_logger.setLevel(logging.INFO if is_main else logging.ERROR)
    package_logger.propagate = False


@contextmanager
def visible_lines(*, is_main: bool) -> Iterator[None]:
    """For a script or notebook: as `log_to_stderr` while inside, unless logging has a handler, which then decides."""
    if package_logger.hasHandlers():
        yield
        return
    handler, level = LineHandler(sys.stderr), package_logger.level
    package_logger.addHandler(handler)
    package_logger.setLevel(logging.INFO if is_main else logging.ERROR)
    try:
        yield
    finally:
        package_logger.removeHandler(handler)
        package_logger.setLevel(level)
