"""Statistics of every column of a table, gathered in one pass of bounded memory: what the roles are inferred from.

N rows of a chunk, V kept values of a column, S rows of the sample.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pandas as pd

from mmbert_core.data.dates import AmbiguousDate, seconds_of
from mmbert_core.data.encoding import MISSING_DATES, number_of
from mmbert_core.data.features import MAX_FLOAT32
from mmbert_core.tables.table import Chunk

MAX_KEPT_VALUES = 4096  # distinct values of a column that are counted; of more, a random sample is
MAX_VALUE_CHARACTERS = 200  # of a kept value
MAX_SAMPLE_ROWS, MAX_SAMPLE_CELLS, MAX_SAMPLE_CHARACTERS = 20_000, 2_000_000, 2**26
MAX_SAMPLED_CELL = 20_000  # characters of a cell in the sample
BLOCK_ROWS = 8192  # after each so many, columns that are no numbers (dates) are not read as such further
MAX_DATE_CHARACTERS = 50
MAX_BAD_SHARE = 0.1  # of a column's cells: with more that are no numbers (dates), it is another kind of column
WIDE_LETTERS = range(0x3040, 0xA000)  # Chinese and Japanese: written without spaces, about two letters a word


class DistinctValues:
    """How many distinct values a column has, and how often each occurs, from the values with the smallest hashes.

    These are a random sample of the distinct values, and their number follows from the largest of their hashes
    (Bar-Yossef et al. 2002). That hash can only fall, so a kept value was kept since its first row: its count is exact.
    """

    def __init__(self) -> None:
        self.hashes = np.zeros(0, np.uint64)  # [V] ascending
        self.counts = np.zeros(0, np.int64)  # [V]
        self.texts: dict[int, str] | None = {}  # hash -> value, while all values are kept

    @property
    def is_exact(self) -> bool:
        """Whether all distinct values are kept."""
        return self.texts is not None

    @property
    def num_distinct(self) -> int:
        """Exact up to MAX_KEPT_VALUES, then an estimate with a standard error of 1.6 %."""
        if self.is_exact:
            return len(self.hashes)
        return round((len(self.hashes) - 1) / (float(self.hashes[-1]) / 2.0**64))

    @property
    def num_repeated(self) -> int:
        """Kept values that occur more than once."""
        return int((self.counts > 1).sum())

    def counts_by_text(self) -> dict[str, int] | None:
        """Value -> number of its cells, the most frequent first; None where there are more than are kept."""
        if self.texts is None:
            return None
        order = np.argsort(-self.counts, kind="stable")
        return {self.texts[int(self.hashes[index])]: int(self.counts[index]) for index in order}

    def update(self, cells: Sequence[str], hashes: np.ndarray) -> None:
        """Count non-empty `cells`; `hashes` [N] are theirs."""
        if not self.is_exact:
            hashes = hashes[hashes <= self.hashes[-1]]
        found, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        if self.texts is not None:
            for position in np.flatnonzero(~np.isin(found, self.hashes)):
                self.texts[int(found[position])] = cells[first[position]][:MAX_VALUE_CHARACTERS]
        merged, index = np.unique(np.concatenate([self.hashes, found]), return_inverse=True)
        totals = np.bincount(index, np.concatenate([self.counts, counts]), len(merged)).astype(np.int64)
        if len(merged) > MAX_KEPT_VALUES:
            self.texts = None
        self.hashes, self.counts = merged[:MAX_KEPT_VALUES], totals[:MAX_KEPT_VALUES]


@dataclass
class BadCells:
    """The cells of a column that cannot be read as its type."""

    count: int = 0
    first: str = ""  # the first of them
    first_row: str = ""  # its file and row

    def add(self, cell: str, count: int, row: Callable[[], str]) -> None:
        if not self.count:
            self.first, self.first_row = cell[:MAX_VALUE_CHARACTERS], row()
        self.count += count


@dataclass
class NumberStatistics:
    """A column read as numbers, in the notation that a numeric column may have."""

    num_numbers: int = 0
    bad: BadCells = field(default_factory=BadCells)
    minimum: float = math.inf
    maximum: float = -math.inf
    are_whole: bool = True
    are_increasing: bool = True  # each number is larger than that of the row before
    is_refuted: bool = False  # too many cells are none: the column has not been read to its end

    def update(self, cells: Sequence[str], rows: Callable[[int], str]) -> None:
        """Read non-empty `cells`; `rows(i)` is file and row of cell i, for messages."""
        if self.is_refuted:
            return
        numbers = self._parse(cells, rows)
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers):
            steps = np.diff(numbers, prepend=self.maximum)
            self.are_increasing &= bool((steps > 0).all())
            self.are_whole &= bool((numbers % 1 == 0).all())
            self.minimum = min(self.minimum, float(numbers.min()))
            self.maximum = max(self.maximum, float(numbers.max()))
            self.num_numbers += len(numbers)

    def refute(self) -> None:
        """Stop to read the column as numbers if too many cells are none."""
        self.is_refuted = self.bad.count > MAX_BAD_SHARE * (self.num_numbers + self.bad.count)

    def _parse(self, cells: Sequence[str], rows: Callable[[int], str]) -> np.ndarray:
        """The numbers [N] float64, NaN where missing or not a number."""
        with suppress(ValueError):  # fast path: valid numbers only
            numbers = np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
            if "_" not in "".join(cells) and not (np.abs(numbers) > MAX_FLOAT32).any():
                return numbers
        numbers = np.full(len(cells), math.nan)
        for index, cell in enumerate(cells):
            try:
                numbers[index] = number_of(cell)
            except ValueError:
                self.bad.add(cell, 1, partial(rows, index))
        return numbers


@dataclass
class DateStatistics:
    """A column read as dates."""

    num_dates: int = 0
    bad: BadCells = field(default_factory=BadCells)
    ambiguous: BadCells = field(default_factory=BadCells)  # such as 03/04/2019
    num_day_first: int = 0  # such as 24/09/2019
    num_month_first: int = 0  # such as 09/24/2019
    earliest: float = math.inf  # seconds from 1970-01-01, of dates of which only one can be meant
    latest: float = -math.inf
    is_refuted: bool = False

    def update(self, cells: Sequence[str], rows: Callable[[int], str]) -> None:
        """Read non-empty `cells`; `rows(i)` is file and row of cell i, for messages."""
        if self.is_refuted:
            return
        for cell, count in Counter(cells).items():
            self._read(cell, count, row=lambda cell=cell: rows(cells.index(cell)))

    def refute(self) -> None:
        """Stop to read the column as dates if too many cells are none."""
        self.is_refuted = self.bad.count > MAX_BAD_SHARE * (self.num_dates + self.bad.count)

    def _read(self, cell: str, count: int, row: Callable[[], str]) -> None:
        try:
            if len(cell) > MAX_DATE_CHARACTERS:
                raise ValueError(cell)
            if cell.strip().lower() in MISSING_DATES:
                return
            seconds = seconds_of(cell)
        except AmbiguousDate:
            self.ambiguous.add(cell, count, row)
            self.num_dates += count
            return
        except ValueError:
            self.bad.add(cell, count, row)
            return
        self.num_dates += count
        self.earliest, self.latest = min(self.earliest, seconds), max(self.latest, seconds)
        if not cell.strip()[:4].isdigit():  # the year is not first
            self.num_day_first += count * (not _is_date(cell, "month_first"))
            self.num_month_first += count * (not _is_date(cell, "day_first"))


def _is_date(cell: str, order: str) -> bool:
    try:
        seconds_of(cell, order)
    except ValueError:
        return False
    return True


@dataclass
class ColumnStatistics:
    """What is known of one column after the pass."""

    name: str
    num_rows: int = 0
    num_empty: int = 0
    values: DistinctValues = field(default_factory=DistinctValues)
    numbers: NumberStatistics = field(default_factory=NumberStatistics)
    dates: DateStatistics = field(default_factory=DateStatistics)
    fingerprint: int = 0  # equal for columns with the same cells
    sample: list[str] = field(default_factory=list)  # S cells, "" where missing; those of the same rows in all columns

    @property
    def num_present(self) -> int:
        return self.num_rows - self.num_empty

    @property
    def num_distinct(self) -> int:
        """Distinct values, without the empty cell; see `DistinctValues.num_distinct`."""
        return min(self.values.num_distinct, self.num_present)

    @property
    def distinct_share(self) -> float:
        """Distinct values per non-empty cell, 0..1."""
        return self.num_distinct / max(1, self.num_present)

    @cached_property
    def present_sample(self) -> list[str]:
        return [cell for cell in self.sample if cell]

    @cached_property
    def mean_characters(self) -> float:
        return float(np.mean([len(cell) for cell in self.present_sample] or [0]))

    @cached_property
    def mean_words(self) -> float:
        return float(np.mean([num_words(cell) for cell in self.present_sample] or [0]))

    def update(self, cells: Sequence[str], row_location: Callable[[int], str]) -> None:
        """Count the N `cells` of consecutive rows; `row_location(i)` is file and row of cell i, for messages."""
        present = [cell for cell in cells if cell]
        positions = None if len(present) == len(cells) else [index for index, cell in enumerate(cells) if cell]
        hashes = pd.util.hash_array(np.array(present, dtype=object), categorize=False) if present else _NO_HASHES
        weights = np.arange(self.num_rows, self.num_rows + len(cells), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        weights = weights if positions is None else weights[positions]
        self.fingerprint = (self.fingerprint + int((hashes * weights).sum(dtype=np.uint64))) % 2**64
        self.num_rows += len(cells)
        self.num_empty += len(cells) - len(present)
        if not present:
            return

        def rows(index: int) -> str:
            return row_location(index if positions is None else positions[index])

        self.values.update(present, hashes)
        self.numbers.update(present, rows)
        self.dates.update(present, rows)


_NO_HASHES = np.zeros(0, np.uint64)


def num_words(cell: str) -> float:
    """Words of a text: pieces between spaces and, for Chinese and Japanese, half of the letters."""
    num_pieces = len(cell.split())
    if cell.isascii():
        return num_pieces
    return max(num_pieces, sum(ord(letter) in WIDE_LETTERS for letter in cell) / 2)


class RowSample:
    """A uniform random sample of rows, of bounded size: those with the smallest random numbers."""

    def __init__(self, num_columns: int, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._max_rows = max(100, min(MAX_SAMPLE_ROWS, MAX_SAMPLE_CELLS // max(1, num_columns)))
        self._limit = math.inf  # rows with larger random numbers are not in the sample
        self._rows: list[tuple[float, int, list[str]]] = []  # random number, index in the table, cells
        self._num_seen = self._num_characters = 0

    def update(self, columns: Sequence[Sequence[str]]) -> None:
        """Add the rows of a chunk, given as columns."""
        numbers = self._generator.random(len(columns[0]) if columns else 0)
        for index in np.flatnonzero(numbers < self._limit):
            cells = [column[index][:MAX_SAMPLED_CELL] for column in columns]
            self._rows.append((float(numbers[index]), self._num_seen + int(index), cells))
            self._num_characters += sum(map(len, cells))
        self._num_seen += len(numbers)
        if len(self._rows) > 2 * self._max_rows:
            self._drop()
        while self._num_characters > MAX_SAMPLE_CHARACTERS and self._max_rows > 1:
            self._max_rows = max(1, min(self._max_rows, len(self._rows)) // 2)
            self._drop()

    def columns(self) -> list[list[str]]:
        """The cells of each column, S of each, in the order of the table."""
        self._drop()
        rows = [cells for _, _, cells in sorted(self._rows, key=lambda row: row[1])]
        return [list(column) for column in zip(*rows, strict=True)]

    def _drop(self) -> None:
        if len(self._rows) > self._max_rows:
            self._rows = sorted(self._rows, key=lambda row: row[0])[: self._max_rows]
            self._limit = self._rows[-1][0]
            self._num_characters = sum(sum(map(len, cells)) for _, _, cells in self._rows)


@dataclass(frozen=True)
class TableStatistics:
    """The statistics of all columns, in the order of the table."""

    num_rows: int
    columns: dict[str, ColumnStatistics]


def gather_statistics(chunks: Iterable[Chunk], *, seed: int = 0) -> TableStatistics:
    """The statistics of a table, from its chunks in order: those of files, or one that holds a data frame.

        gather_statistics(read_chunks([path], header_of(path)))
        gather_statistics([frame_to_chunk(frame, list(frame.columns))])

    Memory does not grow with the number of rows: at most MAX_KEPT_VALUES counts a column, and a sample of at most
    MAX_SAMPLE_ROWS rows, which `seed` decides.
    """
    columns: dict[str, ColumnStatistics] = {}
    sample = None
    num_rows = 0
    for chunk in chunks:
        columns = columns or {name: ColumnStatistics(name) for name in chunk.cells}
        sample = sample or RowSample(len(columns), seed)
        for start, end in _blocks(num_rows, len(chunk)):
            for name, column in columns.items():
                column.update(chunk.cells[name][start:end], partial(_location, chunk, start))
            if (num_rows + end) % BLOCK_ROWS == 0:
                _refute(columns)
        sample.update(list(chunk.cells.values()))
        num_rows += len(chunk)
    _refute(columns)
    if sample is not None:
        for column, cells in zip(columns.values(), sample.columns(), strict=False):
            column.sample = cells
    return TableStatistics(num_rows, columns)


def _blocks(first_row: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """(start, end) in a chunk that begins at row `first_row`: its blocks end at multiples of BLOCK_ROWS of the table.

    What is found out about a column then does not depend on the chunks.
    """
    start = 0
    while start < num_rows:
        end = min(num_rows, start + BLOCK_ROWS - (first_row + start) % BLOCK_ROWS)
        yield start, end
        start = end


def _location(chunk: Chunk, start: int, index: int) -> str:
    return chunk.row_location(start + index)


def _refute(columns: Mapping[str, ColumnStatistics]) -> None:
    for column in columns.values():
        column.numbers.refute()
        column.dates.refute()
