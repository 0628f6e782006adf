"""The matrix of faults and bad inputs: each row is a test that counts.

pytest runs small counts, `tests.faults.report` the full ones.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_SECONDS = 60.0  # a job that takes longer to end counts as a hang


@dataclass
class Figures:
    """What one row measured: `held` of `tried` cases did what they must."""

    tried: int = 0
    held: int = 0
    rows_lost: int = 0
    rows_repeated: int = 0
    wrongly_accepted: int = 0  # bad inputs that were accepted without an error
    seconds: list[float] = field(default_factory=list)  # from the fault to the end of the last process, each time
    problems: list[str] = field(default_factory=list)  # what did not hold, with enough to find out why
    notes: list[str] = field(default_factory=list)  # figures for the document's last column

    def count(self, holds: bool, problem: str = "") -> bool:
        """Count one case; `problem` is what was wrong if it did not hold."""
        self.tried += 1
        self.held += bool(holds)
        if not holds:
            self.problems.append(problem)
        return bool(holds)

    def refused(self, is_refused: bool, problem: str = "") -> bool:
        """Count one bad input; if it was not refused, it was wrongly accepted."""
        self.wrongly_accepted += not is_refused
        return self.count(is_refused, problem)

    def check(self) -> None:
        """Raises AssertionError unless every case held, without lost or repeated rows, wrong acceptance or hang."""
        assert self.tried > 0, "nothing was tried"
        assert not self.problems and self.held == self.tried, f"{self.held} of {self.tried} held: " + "; ".join(
            self.problems
        )
        assert (self.rows_lost, self.rows_repeated, self.wrongly_accepted) == (0, 0, 0), self
        assert max(self.seconds, default=0.0) <= MAX_SECONDS, self.seconds


@dataclass(frozen=True)
class Row:
    """One test of one row of the matrix."""

    name: str  # F1 ... S6
    injected: str  # what goes wrong, for the document
    required: str  # what must happen then
    measure: Callable[..., Figures]
    full: dict[str, Any]  # keyword arguments of the full counts; the function's defaults are the small ones
    marker: str | None  # "gpu": not run without a GPU


ROWS: list[Row] = []


def row(
    name: str, injected: str, required: str, *, full: dict[str, Any] | None = None, marker: str | None = None
) -> Callable:
    """Register `test_<name>...(tmp_path, count=small) -> Figures` as a row, and as a test that checks its figures."""

    def register(measure: Callable[..., Figures]) -> Callable[..., None]:
        ROWS.append(Row(name, injected, required, measure, full or {}, marker))

        @functools.wraps(measure)
        def test(*arguments: Any, **options: Any) -> None:
            measure(*arguments, **options).check()

        return test

    return register
