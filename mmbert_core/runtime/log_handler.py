"""Log lines on standard error, for commands and for scripts that have not set up logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

package_logger = logging.getLogger("mmbert_core")  # the parent of all loggers of the package


class LineHandler(logging.StreamHandler):
    """Writes plain lines, those of warnings and errors with the level in front. Counts the warnings."""

    num_warnings = 0

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return prefix + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.num_warnings += record.levelno == logging.WARNING
        super().emit(record)


def log_to_stderr(*, is_main: bool) -> None:
    """For a command: the package's lines go to standard error and nowhere else. Ranks other than 0 log only errors."""
    package_logger.handlers[:] = [LineHandler(sys.stderr)]
    package_logger.setLevel(logging.INFO if is_main else logging.ERROR)
    package_logger.propagate = False


@contextmanager
def visible_lines(*, is_main: bool) -> Iterator[None]:
    """For a script or notebook: as `log_to_stderr` inside the block, unless the script has set up logging itself."""
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
