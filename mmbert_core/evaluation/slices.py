"""Metrics on subsets of the rows (slices), ordered from the lowest value.

N rows, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.intervals import bootstrap_intervals
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD

MIN_ROWS = 30  # of a slice; smaller ones are merged
DRAWS, MIN_DRAWS = 300, 100  # of the intervals: there are many slices
WORK = 1_000_000_000  # rows x columns x metrics x draws at most, about a minute; with more, no intervals
MAX_VALUES = 20  # slices of one column
FEW_NUMBERS = 10  # distinct numbers of a column, up to which each is a slice
MAX_LISTED_CLASSES = 9  # of a slice: as many as one bar of a chart can show, with one segment for all others
MISSING, OTHERS = "(missing)", "(all other values)"


@dataclass(frozen=True)
class Slice:
    """The metrics of the rows with one value, or with a number in one range, in a column."""

    column: str
    value: str
    rows: int
    share_of_classes: tuple[float, ...]  # [K]; empty with more than FEW_CLASSES, see `largest_classes`
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    undefined: dict[str, str]
    largest_classes: tuple[tuple[int, float], ...] = ()  # class index and share, largest first

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["share_of_classes" if self.largest_classes else "largest_classes"]
        return values


def slices_of(
    preds: np.ndarray,
    labels: np.ndarray,
    columns: Mapping[str, Sequence[str] | np.ndarray],
    names: Sequence[str],
    *,
    class_names: Sequence[str],
    threshold: float = BINARY_THRESHOLD,
) -> list[Slice]:
    """The metrics `names` with intervals for each slice of each column, ordered by the first of `names`, ascending.

    Slices for which that metric is undefined come last. `preds` [N] (binary) or [N, K], `labels` [N]; a column is N
    texts, or N numbers with NaN for missing ones.
    """
    slices = []
    # each draw of each slice counts all classes: with many classes, more work than the rows
    num_counted = len(labels) + (MAX_VALUES * len(class_names) if len(class_names) > FEW_CLASSES else 0)
    draws = min(DRAWS, WORK // max(1, num_counted * len(columns) * len(names)))
    draws = draws if draws >= MIN_DRAWS else 0
    for column, cells in columns.items():
        rows_of_value = _rows_by_number(cells) if isinstance(cells, np.ndarray) else _rows_by_text(cells)
        for value, rows in rows_of_value:
            slices.append(_slice(column, value, preds[rows], labels[rows], names, class_names, threshold, draws))
    return sorted(slices, key=lambda each: (each.metrics[names[0]] is None, each.metrics[names[0]], -each.rows))


def _slice(
    column: str,
    value: str,
    preds: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    class_names: Sequence[str],
    threshold: float,
    draws: int,
) -> Slice:
    task = "binary" if preds.ndim == 1 else "multiclass"
    result = compute_metrics(
        preds, labels, names, task, len(class_names), "slice", class_names=class_names, threshold=threshold
    )
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    if draws:
        intervals = bootstrap_intervals(preds, labels, names, class_names=class_names, threshold=threshold, draws=draws)
    shares = np.bincount(labels, minlength=len(class_names)) / len(labels)
    is_many = len(class_names) > FEW_CLASSES
    largest = np.argsort(-shares, kind="stable")[:MAX_LISTED_CLASSES].tolist() if is_many else []
    return Slice(
        column=column,
        value=value,
        rows=len(labels),
        share_of_classes=() if is_many else tuple(shares.tolist()),
        largest_classes=tuple((index, float(shares[index])) for index in largest if shares[index]),
        metrics={name: result.values[f"slice/{name}"] for name in names},
        intervals=intervals,
        undefined={key.removeprefix("slice/"): reason for key, reason in result.undefined.items()},
    )


def _rows_by_text(cells: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Values with the indices of their rows, the most frequent first; rare values are one slice."""
    codes, values = pd.factorize(np.array(cells, dtype=object))
    counts = np.bincount(codes, minlength=len(values))
    order = np.argsort(-counts, kind="stable")
    frequent = [index for index in order[:MAX_VALUES] if counts[index] >= MIN_ROWS]
    slices = [(str(values[index]) or MISSING, np.flatnonzero(codes == index)) for index in frequent]
    rest = np.flatnonzero(~np.isin(codes, frequent))
    if frequent and len(rest) >= MIN_ROWS:
        slices.append((OTHERS, rest))
    return slices


def _rows_by_number(numbers: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Values or ranges of `numbers` [N] with the indices of their rows, then those of missing numbers (NaN).

    Up to FEW_NUMBERS distinct numbers are a slice each; more are split into quartiles. A number in at least a quarter
    of the rows, such as the zeros of a count, would fill whole quartiles: it has its own slice and is excluded from
    them. If all rows have the same number, there is no slice of numbers.
    """
    known = ~np.isnan(numbers)
    distinct, counts = np.unique(numbers[known], return_counts=True)
    if len(distinct) < 2:
        return [(MISSING, np.flatnonzero(~known))] if (~known).sum() >= MIN_ROWS else []
    frequent = distinct[counts >= (MIN_ROWS if len(distinct) <= FEW_NUMBERS else known.sum() / 4)]
    slices = [(f"{value:.12g}", np.flatnonzero(numbers == value)) for value in frequent]
    rest = known & ~np.isin(numbers, frequent)
    if len(distinct) <= FEW_NUMBERS:
        slices.append((OTHERS, np.flatnonzero(rest)))
    elif rest.any():
        slices += _quartiles(numbers, rest, frequent)
    slices.append((MISSING, np.flatnonzero(~known)))
    return [(value, rows) for value, rows in slices if len(rows) >= MIN_ROWS]


def _quartiles(numbers: np.ndarray, rest: np.ndarray, frequent: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Quartiles of the rows `rest` [N] bool, named with the `frequent` numbers that they lack."""
    slices = []
    edges = np.unique(np.quantile(numbers[rest], [0, 0.25, 0.5, 0.75, 1]))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        is_last = high == edges[-1]
        rows = rest & (numbers >= low) & ((numbers <= high) if is_last else (numbers < high))
        missing = [f"{value:.12g}" for value in frequent if low <= value < high or (is_last and value == high)]
        without = f" without {', '.join(missing)}" if missing else ""
        name = f"{low:.12g} to {'' if is_last else 'below '}{high:.12g}{without}"
        slices.append((name, np.flatnonzero(rows)))
    return slices
