"""Statistics and vocabularies of the tabular columns, fitted on training rows alone. Floor 1; imports errors, splits, table.

N rows of a table, B rows of a batch, F numeric columns, I missing-indicators, K categorical columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from mmbert_core.data.splits import taken
from mmbert_core.data.table import Roles
from mmbert_core.errors import InputError

MISSING, UNSEEN, FIRST_CATEGORY = 0, 1, 2  # indices of a categorical column


@dataclass(frozen=True)
class Features:
    """What was learned from the training rows about the tabular columns. Everything is a tuple, so that it is JSON."""

    number_names: tuple[str, ...]  # F
    medians: tuple[float, ...]  # F, stands in for a missing number
    has_indicator: tuple[bool, ...]  # F, the column had a missing cell in the training rows
    means: tuple[float, ...]  # F + I, of the output columns
    stds: tuple[float, ...]  # F + I, population standard deviation; 1 where there is none
    category_names: tuple[str, ...]  # K
    categories: tuple[tuple[str, ...], ...]  # K, sorted values seen in training; the j-th has index FIRST_CATEGORY + j

    @classmethod
    def fit(
        cls,
        numbers: np.ndarray,
        codes: np.ndarray,
        vocabularies: Sequence[Sequence[str]],
        roles: Roles,
        *,
        rows: np.ndarray | None = None,
        where: str = "training rows",
    ) -> "Features":
        """Fit on `numbers` [N, F] float64 (NaN = missing) and `codes` [N, K] into `vocabularies`; `rows` (sorted) picks the training rows.

        Works column by column, so that a memory-mapped table is never whole in memory.
        Raises `InputError` for a numeric column without any value.
        """
        rows = np.arange(len(numbers)) if rows is None else rows
        medians, has_indicator, means, stds = [], [], [], []
        indicator_stats = []
        for place, name in enumerate(roles.numbers):
            column = taken(numbers[:, place], rows)  # [N]
            missing = np.isnan(column)
            if missing.all():
                raise InputError(f"{where}, column {name!r}: expected numbers, found no value in any of {len(column)} rows")
            medians.append(float(np.median(column[~missing])))
            has_indicator.append(bool(missing.any()))
            mean, std = _mean_and_std(np.where(missing, medians[-1], column))
            means.append(mean)
            stds.append(std)
            if has_indicator[-1]:
                indicator_stats.append(_mean_and_std(missing.astype(np.float64)))
        categories = []
        for place, vocabulary in enumerate(vocabularies):
            counts = np.bincount(taken(codes[:, place], rows), minlength=len(vocabulary))
            categories.append(tuple(sorted(vocabulary[code] for code in np.flatnonzero(counts) if vocabulary[code])))
        return cls(
            number_names=roles.numbers,
            medians=tuple(medians),
            has_indicator=tuple(has_indicator),
            means=tuple(means + [mean for mean, _ in indicator_stats]),
            stds=tuple(stds + [std for _, std in indicator_stats]),
            category_names=roles.categories,
            categories=tuple(categories),
        )

    @property
    def num_numbers(self) -> int:
        """Numeric columns of the model's input: F + I."""
        return len(self.means)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Indices of each categorical column, MISSING and UNSEEN included."""
        return tuple(len(values) + FIRST_CATEGORY for values in self.categories)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.medians, dtype=np.float64), np.flatnonzero(np.array(self.has_indicator, dtype=bool))

    def transform_numbers(self, raw: np.ndarray) -> np.ndarray:
        """Raw numbers [B, F] (NaN = missing) -> float32 [B, F + I]: medians put in, then the indicators. Not standardised."""
        medians, with_indicator = self._arrays
        missing = np.isnan(raw)
        output = np.empty((len(raw), self.num_numbers), dtype=np.float32)
        output[:, : raw.shape[1]] = np.where(missing, medians, raw)
        output[:, raw.shape[1] :] = missing[:, with_indicator]
        return output

    def category_lookup(self, vocabularies: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """For each categorical column an int64 array: code of a table's vocabulary -> index of the model."""
        lookups = []
        for values, vocabulary in zip(self.categories, vocabularies, strict=True):
            index_of = {value: FIRST_CATEGORY + place for place, value in enumerate(values)}
            lookups.append(np.array([index_of.get(value, UNSEEN) if value else MISSING for value in vocabulary], dtype=np.int64))
        return lookups

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Features":
        return cls(**{field.name: _tuples(value[field.name]) for field in fields(cls)})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and population deviation of what the model will see: float32 numbers, summed in float64.

    Statistics of the unrounded numbers would standardise 1e9 and 1e9 + 1, equal as float32, to something far from 0.
    """
    rounded = values.astype(np.float32).astype(np.float64)
    if rounded.min() == rounded.max():
        return float(rounded[0]), 1.0
    std = float(np.float32(rounded.std()))
    return float(rounded.mean()), std if std > 0 else 1.0


def unseen_counts(lookups: Sequence[np.ndarray], codes: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(column, cells) for each categorical column of `codes` [N, K] with values that training never saw."""
    for place, (lookup, name) in enumerate(zip(lookups, names, strict=True)):
        count = int((lookup[codes[:, place]] == UNSEEN).sum())
        if count:
            yield name, count
