"""How well a column alone predicts the label: inputs that do so almost perfectly are known only with it.

S rows of the sample that have a label.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmbert_core.data.column_statistics import ColumnStatistics
from mmbert_core.data.dates import seconds_of
from mmbert_core.data.encoding import MISSING_DATES, number_of
from mmbert_core.data.leaks import most_separated_class
from mmbert_core.runtime.errors import format_for_message
from mmbert_core.tables.cells import index_by_form, normal_form

MIN_AUROC = 0.95  # of a column alone, from which it is left out; a run warns from `leaks.MIN_AUROC`
MAX_DERIVED_ENTROPY = 0.02  # of a column once the label is known, as a share of its own: it is computed from the label
MIN_ENTROPY, MAX_DERIVED_VALUES = 0.05, 100  # bits and distinct values of a column that is examined for this
MIN_CLASS_ROWS = 10  # of a class that is examined for this
MAX_CLASSES = 20  # the most frequent ones are compared with each column


@dataclass(frozen=True)
class SampledLabel:
    """The label of the rows of the sample that have one, in random order."""

    rows: np.ndarray  # [S] int64 into the sample
    classes: np.ndarray  # [S] int64, the most frequent class first
    names: tuple[str, ...]


def sampled_label(label: ColumnStatistics) -> SampledLabel:
    """The classes of the sample, which are the label's normal forms."""
    index_of = index_by_form({value: index for index, value in enumerate(dict.fromkeys(label.present_sample))})
    known = np.array([row for row, cell in enumerate(label.sample) if cell], dtype=np.int64)
    rows = np.random.default_rng(0).permutation(known)
    codes = np.array([index_of[normal_form(label.sample[row])] for row in rows], dtype=np.int64)
    counts = np.bincount(codes, minlength=1)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank = np.zeros(len(counts), dtype=np.int64)
    rank[order] = np.arange(len(order))
    name_of = {index_of[normal_form(cell)]: cell for cell in reversed(label.present_sample)}
    return SampledLabel(rows, rank[codes], tuple(name_of[int(index)] for index in order))


def numbers_of(column: ColumnStatistics) -> np.ndarray:
    """The sample of a numeric column, float64, NaN where missing."""
    return np.array([number_of(cell) for cell in column.sample], dtype=np.float64)


def dates_of(column: ColumnStatistics, order: str) -> np.ndarray:
    """The sample of a date column in seconds, float64, NaN where missing."""
    seconds = {
        cell: math.nan if cell.strip().lower() in MISSING_DATES else seconds_of(cell, order)
        for cell in set(column.sample)
    }
    return np.array([seconds[cell] for cell in column.sample], dtype=np.float64)


def categories_of(column: ColumnStatistics) -> np.ndarray:
    """The sample of a categorical column, objects."""
    return np.array(column.sample, dtype=object)


def emptiness_of(column: ColumnStatistics) -> np.ndarray:
    """Whether each cell of the sample is empty, objects."""
    return np.array([not cell for cell in column.sample], dtype=object)


def leak_of(cells: np.ndarray, label: SampledLabel) -> str | None:
    """How the cells of the sample give the label away, as a phrase; None where they do not."""
    if len(label.names) < 2:
        return None
    cells = cells[label.rows]
    codes, values = pd.factorize(cells, use_na_sentinel=False)
    num_classes = min(len(label.names), MAX_CLASSES)
    index, area = most_separated_class(cells, codes, len(values), label.classes, num_classes)
    if area >= MIN_AUROC:
        name = format_for_message(label.names[index])
        return f"alone separates the class {name} from the rest with an AUROC of {area:.3f}"
    if is_derived(codes, label.classes):
        return "follows from the label: all rows of a class have the same value"
    return None


def is_derived(codes: np.ndarray, classes: np.ndarray) -> bool:
    """Whether a column [S] follows from the label: its entropy is nearly 0 once the label is known."""
    counts = np.bincount(classes)
    rows = counts[classes] >= MIN_CLASS_ROWS
    if rows.sum() < 0.5 * len(classes) or codes.max(initial=0) >= MAX_DERIVED_VALUES:
        return False
    table = np.zeros((len(counts), int(codes.max(initial=0)) + 1))
    np.add.at(table, (classes[rows], codes[rows]), 1)
    alone, joint, label = (_entropy(counts) for counts in (table.sum(axis=0), table.ravel(), table.sum(axis=1)))
    return alone >= MIN_ENTROPY and joint - label <= MAX_DERIVED_ENTROPY * alone


def _entropy(counts: np.ndarray) -> float:
    """In bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
