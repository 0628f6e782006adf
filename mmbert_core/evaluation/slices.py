"""How good the model is on parts of the rows, the worst parts first.

N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.intervals import bootstrap_intervals
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD

MIN_ROWS = 30  # of a slice; smaller ones are put together
DRAWS, MIN_DRAWS = 300, 100  # of the intervals: there are many slices
WORK = 1_000_000_000  # rows x columns x metrics x draws, about: a minute. Slices that would take more have no intervals
MAX_VALUES = 20  # slices of one column
FEW_NUMBERS = 10  # distinct ones, each a slice of its own
LARGEST_CLASSES = 9  # of a slice's rows, as many as one bar shows next to all others
MISSING, OTHERS = "(missing)", "(all other values)"


@dataclass(frozen=True)
class Slice:
    """The rows of one value, or of one quarter of the numbers, of a column."""

    column: str
    value: str
    rows: int
    share_of_classes: tuple[float, ...]  # of more than FEW_CLASSES empty, and the largest are in `largest_classes`
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    undefined: dict[str, str]
    largest_classes: tuple[tuple[int, float], ...] = ()  # index and share

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
    """The metrics `names` with intervals for each slice of each column, ordered by the first of them, undefined ones last.

    `preds` [N] (binary) or [N, K], `labels` [N]. A column is N texts, or N numbers of which NaN is missing.
    """
    made = []
    # every draw of every slice goes through the counts of all classes, which of many classes are more than the rows
    num_counted = len(labels) + (MAX_VALUES * len(class_names) if len(class_names) > FEW_CLASSES else 0)
    draws = min(DRAWS, WORK // max(1, num_counted * len(columns) * len(names)))
    draws = draws if draws >= MIN_DRAWS else 0
    for column, cells in columns.items():
        for value, rows in _numbers(cells) if isinstance(cells, np.ndarray) else _values(cells):
            made.append(_slice(column, value, preds[rows], labels[rows], names, class_names, threshold, draws))
    return sorted(made, key=lambda part: (part.metrics[names[0]] is None, part.metrics[names[0]], -part.rows))


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
    figures = compute_metrics(
        preds, labels, names, task, len(class_names), "slice", class_names=class_names, threshold=threshold
    )
    shares = np.bincount(labels, minlength=len(class_names)) / len(labels)
    is_many = len(class_names) > FEW_CLASSES
    largest = np.argsort(-shares, kind="stable")[:LARGEST_CLASSES].tolist() if is_many else []
    return Slice(
        column=column,
        value=value,
        rows=len(labels),
        share_of_classes=() if is_many else tuple(shares.tolist()),
        largest_classes=tuple((index, float(shares[index])) for index in largest if shares[index]),
        metrics={name: figures.values[f"slice/{name}"] for name in names},
        intervals=bootstrap_intervals(preds, labels, names, class_names=class_names, threshold=threshold, draws=draws)
        if draws
        else dict.fromkeys(names),
        undefined={key.removeprefix("slice/"): reason for key, reason in figures.undefined.items()},
    )


def _values(cells: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Rows by value, the most frequent first; rare values together."""
    codes, values = pd.factorize(np.array(cells, dtype=object))
    counts = np.bincount(codes, minlength=len(values))
    order = np.argsort(-counts, kind="stable")
    own = [index for index in order[:MAX_VALUES] if counts[index] >= MIN_ROWS]
    parts = [(str(values[index]) or MISSING, np.flatnonzero(codes == index)) for index in own]
    rest = np.flatnonzero(~np.isin(codes, own))
    return parts + ([(OTHERS, rest)] if own and len(rest) >= MIN_ROWS else [])


def _numbers(numbers: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows by value where these are few or common, else by quartile; then the missing ones. A number that is the same in all rows makes none.

    A value of a quarter of the rows, such as the zeros of a count, would swallow whole quartiles: it stands alone.
    """
    known = ~np.isnan(numbers)
    distinct, counts = np.unique(numbers[known], return_counts=True)
    if len(distinct) < 2:
        return [(MISSING, np.flatnonzero(~known))] if (~known).sum() >= MIN_ROWS else []
    own = distinct[counts >= (MIN_ROWS if len(distinct) <= FEW_NUMBERS else known.sum() / 4)]
    parts = [(f"{value:.12g}", np.flatnonzero(numbers == value)) for value in own]
    rest = known & ~np.isin(numbers, own)
    if len(distinct) <= FEW_NUMBERS:
        parts.append((OTHERS, np.flatnonzero(rest)))
    elif rest.any():
        edges = np.unique(np.quantile(numbers[rest], [0, 0.25, 0.5, 0.75, 1]))
        for low, high in zip(edges, edges[1:]):
            is_last = high == edges[-1]
            rows = rest & (numbers >= low) & ((numbers <= high) if is_last else (numbers < high))
            besides = [f"{value:.12g}" for value in own if low <= value < high or (is_last and value == high)]
            parts.append(
                (
                    f"{low:.12g} to {'' if is_last else 'below '}{high:.12g}{' without ' if besides else ''}{', '.join(besides)}",
                    np.flatnonzero(rows),
                )
            )
    parts.append((MISSING, np.flatnonzero(~known)))
    return [(value, rows) for value, rows in parts if len(rows) >= MIN_ROWS]
