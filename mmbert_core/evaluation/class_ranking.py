"""AUROC and average precision of classes against the rest: one class of weighted rows, or thousands at once.

N rows, K classes, C of them asked for, R rows of these, D draws of weights. A class without
rows, or with all of them, has nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FEW_CLASSES = 30  # with more, all are ranked at once instead of one after the other, and pages and prints list some
# Nanoseconds for the weight of a row, on one CPU core: in the sum above one score (a matrix product), and in a sorted
# cumulative sum.
PAIR_COST, CURVE_COST = 0.15, 12.0
RARE_ROWS = int(CURVE_COST / PAIR_COST)  # of a class, up to which the matrix product is cheaper
BLOCK_CELLS = 4_000_000  # rows of classes x all rows in memory at a time

Curve = Callable[[np.ndarray, np.ndarray], float]


# ---- one class ----


@dataclass(frozen=True)
class Ranking:
    """Rows from the highest score down, of which those with equal scores count as one."""

    order: np.ndarray  # [N]
    ends: np.ndarray  # last row, in that order, of each distinct score
    is_positive: np.ndarray  # [N] float64, in that order

    def value_of(self, curve: Curve, weights: np.ndarray) -> float:
        """`curve` gets the weights of positives and of negatives down to each distinct score; nan without either."""
        true, false = self.sums(weights)
        return curve(true, false) if true[-1] > 0 and false[-1] > 0 else np.nan

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered = weights[self.order]
        true = np.cumsum(ordered * self.is_positive)[self.ends]
        return true, np.cumsum(ordered)[self.ends] - true


def ranking_of(scores: np.ndarray, is_positive: np.ndarray) -> Ranking:
    """Of scores [N] and flags [N]."""
    scores = scores.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return Ranking(order, ends, is_positive[order].astype(np.float64))


def auroc(true: np.ndarray, false: np.ndarray) -> float:
    heights = (true + np.append(0, true[:-1])) / 2
    return float(np.diff(false, prepend=0) @ heights / (true[-1] * false[-1]))


def average_precision(true: np.ndarray, false: np.ndarray) -> float:
    found = true + false
    precision = np.divide(true, found, out=np.zeros_like(true), where=found > 0)
    return float(np.diff(true, prepend=0) @ precision / true[-1])


# ---- all classes, every row counted once ----


@dataclass(frozen=True)
class ClassRankings:
    """Areas under the curves of each class, float64 [K]."""

    auroc: np.ndarray
    average_precision: np.ndarray


def class_rankings(preds: np.ndarray, labels: np.ndarray) -> ClassRankings:
    """Of finite probabilities `preds` [N, K] and `labels` int [N]: a sort for each class, and a search for its rows."""
    num_rows, num_classes = preds.shape
    areas, precisions = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    for index, rows in _rows_by_class(labels, num_classes):
        if len(rows) == num_rows:
            continue
        scores = preds[:, index]
        own = np.sort(scores[rows])
        above, above_or_equal = _counts_above(np.sort(scores), own)
        own_above, own_above_or_equal = _counts_above(own, own)
        negatives = num_rows - len(rows)
        # negatives above a row count as errors, those of its own score as half of one
        errors = int((above - own_above).sum() + (above_or_equal - own_above_or_equal).sum())
        areas[index] = (2 * len(rows) * negatives - errors) / (2 * len(rows) * negatives)
        precisions[index] = (own_above_or_equal / above_or_equal).mean()
    return ClassRankings(areas, precisions)


def _rows_by_class(labels: np.ndarray, num_classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each class that has rows, with their positions."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    for index in np.unique(labels).tolist():
        yield index, order[(ends[index - 1] if index else 0) : ends[index]]


def _counts_above(ascending: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the scores `ascending` lie above each of `scores`, and how many above or at it."""
    return len(ascending) - np.searchsorted(ascending, scores, "right"), len(ascending) - np.searchsorted(
        ascending, scores, "left"
    )


# ---- many classes, many draws of weights ----


def cost_per_draw(num_positives: np.ndarray, num_rows: int) -> np.ndarray:
    """Nanoseconds that `weighted_rankings` takes for one draw of each class of so many rows, about."""
    return num_rows * np.minimum(num_positives * PAIR_COST, CURVE_COST)


def weighted_rankings(
    preds: np.ndarray, labels: np.ndarray, classes: Sequence[int], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision [D, C] of `classes` for D draws of whole-number row weights [D, N].

    `preds` [N, K], `labels` int [N]. Weights add up exactly in float32, below 2^23 a class.
    """
    num_positives = np.bincount(labels, minlength=preds.shape[1])
    areas, precisions = np.full((2, len(weights), len(classes)), np.nan)
    rare = [column for column, index in enumerate(classes) if 0 < num_positives[index] <= RARE_ROWS]
    by_row = np.ascontiguousarray(weights.T, dtype=np.float32) if rare else None  # [N, D]
    for columns in _blocks(rare, num_positives[[classes[column] for column in rare]], len(labels)):
        block = _rare_rankings(preds, labels, [classes[column] for column in columns], by_row)
        areas[:, columns], precisions[:, columns] = block[0].T, block[1].T
    for column, index in enumerate(classes):
        if num_positives[index] > RARE_ROWS:
            ranking = ranking_of(preds[:, index], labels == index)
            for draw, of_draw in enumerate(weights):
                true, false = ranking.sums(of_draw)
                if true[-1] > 0 and false[-1] > 0:
                    areas[draw, column] = auroc(true, false)
                    precisions[draw, column] = average_precision(true, false)
    return areas, precisions


def _blocks(columns: Sequence[int], num_positives: np.ndarray, num_rows: int) -> Iterator[list[int]]:
    """Columns in their order, in blocks whose rows x all rows are BLOCK_CELLS, or one class."""
    block: list[int] = []
    cells = 0
    for column, rows in zip(columns, num_positives.tolist(), strict=True):
        if block and cells + rows * num_rows > BLOCK_CELLS:
            yield block
            block, cells = [], 0
        block.append(column)
        cells += rows * num_rows
    if block:
        yield block


def _rare_rankings(
    preds: np.ndarray, labels: np.ndarray, classes: Sequence[int], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision [C, D] of whole classes with rows, from the weights [N, D] above each of their rows."""
    rows = np.concatenate([np.flatnonzero(labels == index) for index in classes])  # [R], class by class
    own_labels = labels[rows]
    starts = np.flatnonzero(np.diff(own_labels, prepend=-1))
    scores = preds[:, own_labels].T  # [R, N]
    own = preds[rows, own_labels][:, None]
    above_or_equal, above = scores >= own, scores > own
    is_own_class = own_labels[:, None] == own_labels  # [R, R]
    own_weights = weights[rows]  # [R, D]

    def negatives(is_counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [R, D] of the rows of other classes, and of the class itself, that a mask [R, N] counts."""
        positive = (is_counted[:, rows] & is_own_class).astype(np.float32) @ own_weights
        return is_counted.astype(np.float32) @ weights - positive, positive

    false, true = negatives(above_or_equal)
    has_ties = above_or_equal.sum() - above.sum() > len(rows)  # more than that of each row with itself
    false_above = negatives(above)[0] if has_ties else false
    found = (true + false).astype(np.float64)
    precision = np.divide(true, found, out=np.zeros_like(found), where=found > 0)
    positives = np.add.reduceat(own_weights, starts, axis=0).astype(np.float64)  # [C, D]
    others = weights.sum(axis=0) - positives
    errors = np.add.reduceat(own_weights * (false.astype(np.float64) + false_above), starts, axis=0)
    hits = np.add.reduceat(own_weights * precision, starts, axis=0)
    is_defined = (positives > 0) & (others > 0)
    pairs = np.where(is_defined, 2 * positives * others, np.nan)
    return (pairs - errors) / pairs, hits / np.where(is_defined, positives, np.nan)
