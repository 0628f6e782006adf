"""AUROC and average precision of one class against the rest, for one class or for thousands of classes at once.

N rows, K classes, C of them asked for, R rows of these, D draws of weights. A class without rows, or with all of
them, has nan.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

FEW_CLASSES = 30  # with more, all are ranked in one computation, and pages and messages list only some
# Nanoseconds on one CPU core for the weight of one row: in a matrix product with a mask of the rows above a score, and
# in a cumulative sum over sorted rows.
PAIR_COST, CURVE_COST = 0.15, 12.0
RARE_ROWS = int(CURVE_COST / PAIR_COST)  # of a class, up to which the matrix product is faster
BLOCK_CELLS = 4_000_000  # rows of the classes x all rows in memory at a time

Curve = Callable[[np.ndarray, np.ndarray], float]  # weights of positives and negatives above each score -> its area


# ---- one class ----


@dataclass(frozen=True)
class Ranking:
    """Rows sorted by descending score; rows with equal scores are one point of a curve."""

    order: np.ndarray  # [N]
    ends: np.ndarray  # last row, in that order, of each distinct score
    is_positive: np.ndarray  # [N] float64, in that order

    def value_of(self, curve: Curve, weights: np.ndarray) -> float:
        """The area of `curve` for row weights [N]; nan where the positives or the negatives have no weight."""
        true, false = self.sums(weights)
        return curve(true, false) if true[-1] > 0 and false[-1] > 0 else np.nan

    def sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Summed weights of the positives and of the negatives at or above each distinct score."""
        ordered = weights[self.order]
        true = np.cumsum(ordered * self.is_positive)[self.ends]
        return true, np.cumsum(ordered)[self.ends] - true


def ranking_of(scores: np.ndarray, is_positive: np.ndarray) -> Ranking:
    """The ranking of `scores` [N]; `is_positive` [N] bool."""
    scores = scores.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return Ranking(order, ends, is_positive[order].astype(np.float64))


def auroc(true: np.ndarray, false: np.ndarray) -> float:
    """Area under the ROC curve by the trapezoidal rule, from the sums of `Ranking.sums`."""
    heights = (true + np.append(0, true[:-1])) / 2
    return float(np.diff(false, prepend=0) @ heights / (true[-1] * false[-1]))


def average_precision(true: np.ndarray, false: np.ndarray) -> float:
    """Sum of precision x gain in recall, without interpolation, from the sums of `Ranking.sums`."""
    predicted = true + false
    precision = np.divide(true, predicted, out=np.zeros_like(true), where=predicted > 0)
    return float(np.diff(true, prepend=0) @ precision / true[-1])


# ---- all classes, rows of equal weight ----


@dataclass(frozen=True)
class ClassRankings:
    """Areas under the curves of each class, float64 [K]."""

    auroc: np.ndarray
    average_precision: np.ndarray


def class_rankings(preds: np.ndarray, labels: np.ndarray) -> ClassRankings:
    """Of finite probabilities `preds` [N, K], `labels` int [N]: one sort per class and a binary search of its rows."""
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
        # A negative above a positive is one error, one with the same score half an error. Both are counted twice here.
        errors = int((above - own_above).sum() + (above_or_equal - own_above_or_equal).sum())
        areas[index] = (2 * len(rows) * negatives - errors) / (2 * len(rows) * negatives)
        precisions[index] = (own_above_or_equal / above_or_equal).mean()
    return ClassRankings(areas, precisions)


def _rows_by_class(labels: np.ndarray, num_classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """(class, positions of its rows) of each class that has rows."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    for index in np.unique(labels).tolist():
        yield index, order[(ends[index - 1] if index else 0) : ends[index]]


def _counts_above(ascending: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the sorted scores `ascending` are above each of `scores`, and how many above or equal to it."""
    above = len(ascending) - np.searchsorted(ascending, scores, "right")
    return above, len(ascending) - np.searchsorted(ascending, scores, "left")


# ---- many classes, many draws of weights ----


def cost_per_draw(num_positives: np.ndarray, num_rows: int) -> np.ndarray:
    """Approximate nanoseconds of `weighted_rankings` for one draw, of each class with `num_positives` rows."""
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
    """Consecutive `columns` whose classes have at most BLOCK_CELLS / `num_rows` rows together, or a single one."""
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
    """AUROC and average precision [C, D] of classes with few rows, for row `weights` [N, D]: matrix products."""
    rows = np.concatenate([np.flatnonzero(labels == index) for index in classes])  # [R], class by class
    own_labels = labels[rows]
    starts = np.flatnonzero(np.diff(own_labels, prepend=-1))
    scores = preds[:, own_labels].T  # [R, N]
    own = preds[rows, own_labels][:, None]
    above_or_equal, above = scores >= own, scores > own
    is_own_class = own_labels[:, None] == own_labels  # [R, R]
    own_weights = weights[rows]  # [R, D]

    def sums(is_counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [R, D] of the rows of other classes, and of the same class, that a mask [R, N] selects."""
        positive = (is_counted[:, rows] & is_own_class).astype(np.float32) @ own_weights
        return is_counted.astype(np.float32) @ weights - positive, positive

    false, true = sums(above_or_equal)
    has_ties = above_or_equal.sum() - above.sum() > len(rows)  # each row has one with itself
    false_above = sums(above)[0] if has_ties else false
    predicted = (true + false).astype(np.float64)
    precision = np.divide(true, predicted, out=np.zeros_like(predicted), where=predicted > 0)
    positives = np.add.reduceat(own_weights, starts, axis=0).astype(np.float64)  # [C, D]
    others = weights.sum(axis=0) - positives
    errors = np.add.reduceat(own_weights * (false.astype(np.float64) + false_above), starts, axis=0)
    hits = np.add.reduceat(own_weights * precision, starts, axis=0)
    is_defined = (positives > 0) & (others > 0)
    pairs = np.where(is_defined, 2 * positives * others, np.nan)
    return (pairs - errors) / pairs, hits / np.where(is_defined, positives, np.nan)
