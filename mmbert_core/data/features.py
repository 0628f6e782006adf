"""Statistics and vocabularies of the tabular columns, fitted on the training rows only.

N rows of a table, B rows of a batch, F numeric columns and units of dates, I missing-indicators, K categorical columns.
C columns of a table's numbers: numeric columns, then date columns in seconds; without dates the F columns.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from mmbert_core.data.dates import DATES_JSON, DateColumns
from mmbert_core.data.number_encoding import MAX_EDGE, MAX_EDGES, quantile_edges, robust_scale
from mmbert_core.data.splits import select_rows
from mmbert_core.runtime.errors import InputError, list_for_message
from mmbert_core.storage.schema import array, boolean, nullable, number, record, text
from mmbert_core.tables.cells import index_by_form, normal_form
from mmbert_core.tables.table import Roles

MISSING, UNSEEN, FIRST_CATEGORY = 0, 1, 2  # indices of a categorical column
POOLED = -1  # of rare values where unseen cells are counted; in the model rare values have the index UNSEEN
MAX_UNSEEN_SHARE = 0.2  # of a column's cells; if more are unseen, they are probably written in another way
LIMIT_MARGIN = 0.1  # share of the training range; numbers further outside it are limited
RANGES = ("minimums", "maximums")  # fields that folders of version 0.2 and older may lack
ENCODING = ("scales", "edges")  # fields of runs with column_encoding piecewise_linear, absent in others
POOLING = "pooled"  # field of runs with min_category_count above 1, absent in others
DATES = "dates"  # field of runs with date_field_list, absent in others
OPTIONAL = (*RANGES, *ENCODING, POOLING, DATES)
FAR_STDS = 20  # standard deviations; numbers further from the mean are reported if the range is unknown
MAX_FLOAT32 = float(np.finfo(np.float32).max)  # the model computes in float32
MAX_EXAMPLES, MAX_EXAMINED = 3, 100_000  # unseen values in a message; unseen cells searched for them
FEATURES_JSON = record(
    {
        "number_names": array(text(), distinct=True),
        "medians": array(number()),
        "has_indicator": array(boolean),
        "means": array(number()),
        "stds": array(number(above=0)),
        "category_names": array(text(), distinct=True),
        "categories": array(array(text(non_empty=True), distinct=True)),
    },
    {
        **{name: nullable(array(number())) for name in RANGES},
        "scales": array(number(0)),
        "edges": array(array(number())),
        POOLING: array(array(text(non_empty=True), distinct=True)),
        DATES: DATES_JSON,
    },
)


Values = tuple[tuple[str, ...], ...]  # of each categorical column


@dataclass(frozen=True)
class Features:
    """Statistics and vocabularies of the training rows. All fields are (nested) tuples: lists in features.json."""

    number_names: tuple[str, ...]  # F, the units of dates after the numeric columns
    medians: tuple[float, ...]  # F, replaces a missing number
    has_indicator: tuple[bool, ...]  # F, whether the column had a missing cell in the training rows
    means: tuple[float, ...]  # F + I, of the output columns
    stds: tuple[float, ...]  # F + I, population standard deviation; 1 for a constant column
    category_names: tuple[str, ...]  # K
    # K, sorted normal forms of the values in the training rows; the j-th has index FIRST_CATEGORY + j
    categories: tuple[tuple[str, ...], ...]
    # F, of the numbers in the training rows; None: unknown, as in older folders
    minimums: tuple[float, ...] | None = None
    maximums: tuple[float, ...] | None = None
    # F; None without piecewise-linear encoding. See `number_encoding`
    scales: tuple[float, ...] | None = None
    edges: tuple[tuple[float, ...], ...] | None = None
    # K, sorted normal forms of values with too few training rows: their index is UNSEEN. None: no minimum
    pooled: tuple[tuple[str, ...], ...] | None = None
    dates: DateColumns | None = None  # None: no date columns

    @classmethod
    def fit(
        cls,
        numbers: np.ndarray,
        codes: np.ndarray,
        vocabularies: Sequence[Sequence[str]],
        roles: Roles,
        *,
        rows: np.ndarray | None = None,
        source: str = "training rows",
        with_edges: bool = False,
        min_category_count: int = 1,
    ) -> "Features":
        """Fit on `numbers` [N, C] float64 (NaN = missing) and `codes` [N, K] into `vocabularies`.

        `rows` (sorted) are the training rows, None: all. `source` begins messages. `with_edges`: also fit `scales` and
        `edges`. Values of fewer than `min_category_count` rows are pooled. One column at a time is in memory, also of
        a memory-mapped table. Raises `InputError` for a numeric column without any value.
        """
        rows = np.arange(len(numbers)) if rows is None else rows
        dates = None
        if roles.dates:
            dates = DateColumns.fit(numbers[:, len(roles.numbers) :], roles.dates, rows=rows, source=source)
        number_names = roles.numbers + (dates.unit_names if dates else ())
        medians, has_indicator, means, stds = [], [], [], []
        minimums, maximums, scales, edges, indicator_stats = [], [], [], [], []
        for index, name in enumerate(number_names):
            column = _column_of(numbers, index, rows, dates)  # [N]
            missing = np.isnan(column)
            if missing.all():
                found = f"found no value in any of {len(column)} rows"
                raise InputError(f"{source}, column {name!r}: expected numbers, {found}")
            medians.append(float(np.median(column[~missing])))
            has_indicator.append(bool(missing.any()))
            minimums.append(float(np.nanmin(column)))
            maximums.append(float(np.nanmax(column)))
            mean, std = _mean_and_std(np.where(missing, medians[-1], column))
            means.append(mean)
            stds.append(std)
            if with_edges:
                scales.append(robust_scale(column[~missing]))
                edges.append(quantile_edges(column[~missing]))
            if has_indicator[-1]:
                indicator_stats.append(_mean_and_std(missing.astype(np.float64)))
        counts = [_category_counts(select_rows(codes[:, k], rows), values) for k, values in enumerate(vocabularies)]
        categories, pooled = _split_rare(counts, min_category_count)
        return cls(
            number_names=number_names,
            medians=tuple(medians),
            has_indicator=tuple(has_indicator),
            means=tuple(means + [mean for mean, _ in indicator_stats]),
            stds=tuple(stds + [std for _, std in indicator_stats]),
            category_names=roles.categories,
            categories=categories,
            minimums=tuple(minimums),
            maximums=tuple(maximums),
            scales=tuple(scales) if with_edges else None,
            edges=tuple(edges) if with_edges else None,
            pooled=pooled if min_category_count > 1 else None,
            dates=dates,
        )

    @property
    def plain_number_names(self) -> tuple[str, ...]:
        """The numeric columns without the units of dates."""
        return self.number_names[: len(self.number_names) - (len(self.dates.unit_names) if self.dates else 0)]

    @property
    def num_numbers(self) -> int:
        """Width of the model's numeric input: F + I."""
        return len(self.means)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of indices of each categorical column, MISSING and UNSEEN included."""
        return tuple(len(values) + FIRST_CATEGORY for values in self.categories)

    @cached_property
    def _medians_and_indicators(self) -> tuple[np.ndarray, np.ndarray]:
        """Medians [F], and the columns [I] that have an indicator."""
        return np.array(self.medians, dtype=np.float64), np.flatnonzero(np.array(self.has_indicator, dtype=bool))

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Lowest and highest number of the model's input, float64 [F] each: the training range and a margin.

        Outside them the model would extrapolate, and a single extreme number would dominate the prediction. A column
        that was constant in training has that constant as both limits, because its weights were not trained.
        None: unknown.
        """
        if self.minimums is None or self.maximums is None:
            return None
        low, high = np.array(self.minimums, dtype=np.float64), np.array(self.maximums, dtype=np.float64)
        margin = LIMIT_MARGIN * (high - low)
        return np.maximum(low - margin, -MAX_FLOAT32), np.minimum(high + margin, MAX_FLOAT32)

    def number_column(self, numbers: np.ndarray, index: int, rows: np.ndarray) -> np.ndarray:
        """The raw numbers of the numeric column or unit of a date `index` at `rows`, of a table's `numbers` [N, C]."""
        return _column_of(numbers, index, rows, self.dates)

    def raw_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """A table's numbers [B, C] -> numeric columns and units of dates [B, F]."""
        return numbers if self.dates is None else self.dates.expand(numbers)

    def transform_numbers(self, raw: np.ndarray) -> np.ndarray:
        """A table's numbers [B, C] (NaN = missing) -> float32 [B, F + I].

        Limited, imputed with medians, then the indicators. Not standardised: that is the model's first layer.
        """
        raw = self.raw_numbers(raw)
        medians, with_indicator = self._medians_and_indicators
        missing = np.isnan(raw)
        if self.limits is not None:
            low, high = self.limits
            raw = np.where(raw < low, low, np.where(raw > high, high, raw))
        output = np.empty((len(raw), self.num_numbers), dtype=np.float32)
        output[:, : raw.shape[1]] = np.where(missing, medians, raw)
        output[:, raw.shape[1] :] = missing[:, with_indicator]
        return output

    def category_lookup(self, vocabularies: Sequence[Sequence[str]], *, pooled_index: int = UNSEEN) -> list[np.ndarray]:
        """For each categorical column an int64 array: code of a table's vocabulary -> index in the model's embedding.

        Folders of version 0.2 and older hold categories as written in the training file, not in normal form: an exact
        match comes first, so that their predictions do not change. `pooled_index`: that of pooled values.
        """
        lookups = []
        pooled = self.pooled or ((),) * len(self.categories)
        for values, rare, vocabulary in zip(self.categories, pooled, vocabularies, strict=True):
            index_of = {value: index for index, value in enumerate(values, start=FIRST_CATEGORY)}
            index_of_form = dict.fromkeys(rare, pooled_index) | index_by_form(index_of)
            indices = [
                index_of.get(cell) or index_of_form.get(normal_form(cell), UNSEEN) if cell else MISSING
                for cell in vocabulary
            ]
            lookups.append(np.array(indices, dtype=np.int64))
        return lookups

    def to_json(self) -> dict[str, Any]:
        """Lists; without the fields of ENCODING, POOLING and DATES where these are None."""
        absent = {name for name in (*ENCODING, POOLING, DATES) if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in absent}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Features":
        """From a value that FEATURES_JSON has checked. Raises `InputError` for lengths or ranges that do not fit."""
        num_numbers = len(value["number_names"])
        num_inputs = num_numbers + sum(value["has_indicator"])
        lengths = {"medians": num_numbers, "has_indicator": num_numbers, "means": num_inputs, "stds": num_inputs}
        for key, length in {**lengths, "categories": len(value["category_names"])}.items():
            if len(value[key]) != length:
                raise InputError(f"{key}: expected {length} entries, as the columns have, found {len(value[key])}")
        known = {
            field.name: _tuples(value[field.name])
            for field in fields(cls)
            if field.name in value or field.name not in OPTIONAL
        }
        if (dates := value.get(DATES)) is not None:
            known[DATES] = DateColumns.from_json(dates)
            if known["number_names"][-len(known[DATES].unit_names) :] != known[DATES].unit_names:
                raise InputError("dates: expected their units as the last of number_names")
        if known.get(POOLING) and len(known[POOLING]) != len(value["category_names"]):
            raise InputError(f"{POOLING}: expected an entry for each of {len(value['category_names'])} columns")
        for names in (RANGES, ENCODING):
            given = [known.get(name) for name in names]
            if any(given) and not all(each and len(each) == num_numbers for each in given):
                raise InputError(f"{' and '.join(names)}: expected {num_numbers} entries each, or neither")
        if (low := known.get("minimums")) and bool((np.array(low) > np.array(known["maximums"])).any()):
            raise InputError("minimums: expected none above its maximum")
        if not all(_is_edges(values) for values in known.get("edges") or ()):
            raise InputError(f"edges: expected up to {MAX_EDGES} ascending numbers for each column, none or several")
        return cls(**known)


def _column_of(numbers: np.ndarray, index: int, rows: np.ndarray, dates: DateColumns | None) -> np.ndarray:
    """Column `index` of the numbers with the units of dates, at `rows`."""
    return select_rows(numbers[:, index], rows) if dates is None else dates.column(numbers, index, rows)


def _category_counts(codes: np.ndarray, vocabulary: Sequence[str]) -> dict[str, int]:
    """Normal form of each value -> its cells among `codes` [N] into `vocabulary`, without missing ones."""
    counts: dict[str, int] = {}
    by_code = np.bincount(codes, minlength=len(vocabulary))
    for code in np.flatnonzero(by_code):
        if vocabulary[code]:
            form = normal_form(vocabulary[code])
            counts[form] = counts.get(form, 0) + int(by_code[code])
    return counts


def _split_rare(counts: Sequence[dict[str, int]], minimum: int) -> tuple[Values, Values]:
    """For each column its values with at least `minimum` cells, and those with fewer, each sorted."""
    kept = [sorted(value for value, count in column.items() if count >= minimum) for column in counts]
    rare = [sorted(value for value, count in column.items() if count < minimum) for column in counts]
    return _tuples(kept), _tuples(rare)


def _is_edges(values: Sequence[float]) -> bool:
    """Whether the values can be edges of bins: none, or several that ascend in float32."""
    ascending = bool((np.diff(np.array(values, dtype=np.float32)) > 0).all())
    return ascending and len(values) != 1 and len(values) <= MAX_EDGES and all(abs(x) <= MAX_EDGE for x in values)


def _tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of the numbers rounded to float32, as the model reads them.

    Computed in float64. Rounding may change them: 1e9 and 1e9 + 1 have a standard deviation of 0.5, but are equal as
    float32.
    """
    rounded = values.astype(np.float32).astype(np.float64)
    if rounded.min() == rounded.max():
        return float(rounded[0]), 1.0
    std = float(np.float32(rounded.std()))
    return float(rounded.mean()), std if std > 0 else 1.0


@dataclass(frozen=True)
class UnseenCells:
    """Cells of one categorical column with a value that no training row has."""

    count: int
    num_cells: int  # of the column, with missing ones
    examples: tuple[str, ...]  # at most MAX_EXAMPLES different values, in order of appearance

    def __add__(self, other: "UnseenCells") -> "UnseenCells":
        """The counts of both sets of rows; the examples of `other` come after these."""
        examples = tuple(dict.fromkeys([*self.examples, *other.examples]))[:MAX_EXAMPLES]
        return UnseenCells(self.count + other.count, self.num_cells + other.num_cells, examples)


@dataclass(frozen=True)
class OutOfRangeCells:
    """Cells of one numeric column beyond its limits; if these are unknown, more than FAR_STDS from the mean."""

    count: int
    num_numbers: int  # of the column, without missing ones

    def __add__(self, other: "OutOfRangeCells") -> "OutOfRangeCells":
        return OutOfRangeCells(self.count + other.count, self.num_numbers + other.num_numbers)


# By column, in the order of the config:
Unseen = dict[str, UnseenCells]
OutOfRange = dict[str, OutOfRangeCells]
Cells = TypeVar("Cells", UnseenCells, OutOfRangeCells)


def unseen_cells(lookup: np.ndarray, codes: np.ndarray, vocabulary: Sequence[str]) -> UnseenCells:
    """Unseen cells of one column: `codes` [N] into `vocabulary`; `lookup` maps a code to the model's index."""
    unseen = codes[lookup[codes] == UNSEEN]
    distinct = dict.fromkeys(unseen[:MAX_EXAMINED].tolist())
    return UnseenCells(len(unseen), len(codes), tuple(vocabulary[code] for code in list(distinct)[:MAX_EXAMPLES]))


def add_by_column(first: dict[str, Cells], second: dict[str, Cells]) -> dict[str, Cells]:
    """The sum for each column; `first` may be empty."""
    return {name: cells + second[name] for name, cells in first.items()} if first else dict(second)


def unseen_lines(name: str, unseen: Unseen, features: Features, *, examples: bool = True) -> list[str]:
    """A line for each column with values that no training row has; it begins with `name`, the rows' source.

    Above MAX_UNSEEN_SHARE of the cells, the values are probably written in another way: with `examples`, the line also
    lists some of them and some values of the training rows.
    """
    lines = []
    for column, values in zip(features.category_names, features.categories, strict=True):
        cells = unseen.get(column)
        if cells is None or not cells.count:
            continue
        problem = f"cells of column {column!r} hold a value that no training row has"
        if cells.count <= MAX_UNSEEN_SHARE * cells.num_cells or not examples:
            lines.append(f"{name}: {cells.count} {problem}")
            continue
        known = f"training rows have {list_for_message(values, MAX_EXAMPLES)}" if values else "training rows have none"
        counts = f"{cells.count:,} of {cells.num_cells:,}"
        lines.append(f"{name}: {counts} {problem}, such as {list_for_message(cells.examples)}; {known}")
    return lines


def out_of_range_cells(features: Features, index: int, numbers: np.ndarray) -> OutOfRangeCells:
    """Cells out of range among the raw `numbers` [N] (NaN = missing) of the numeric column `index`."""
    if features.limits is None:
        outside = np.abs(numbers - features.means[index]) > FAR_STDS * features.stds[index]
    else:
        low, high = features.limits
        outside = (numbers < low[index]) | (numbers > high[index])
    return OutOfRangeCells(int(outside.sum()), int((~np.isnan(numbers)).sum()))


def out_of_range_lines(name: str, outside: OutOfRange, features: Features) -> list[str]:
    """A line for each column with numbers outside the training range; it begins with `name`, the rows' source."""
    lines = []
    for index, column in enumerate(features.number_names):
        cells = outside.get(column)
        if cells is None or not cells.count:
            continue
        counts = f"{name}: column {column!r}: {cells.count:,} of {cells.num_numbers:,} numbers lie"
        if features.limits is None:
            far = f"more than {FAR_STDS} standard deviations from the training mean {features.means[index]:.6g}"
            lines.append(f"{counts} {far}; they were not limited: this older folder has no training range")
            continue
        low, high = (limit[index] for limit in features.limits)
        limits = f"{low:.12g} to {high:.12g}" if low < high else f"{low:.12g}"
        known = f"{features.minimums[index]:.12g} to {features.maximums[index]:.12g}"
        lines.append(f"{counts} outside the training range {known} and were limited to {limits}")
    return lines
