"""Accuracy, F1, precision, recall and MCC from three counts of each class, without a confusion matrix.

N rows, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassCounts:
    """Number of rows, or their summed weights, float64 [K]: diagonal and margins of the confusion matrix."""

    right: np.ndarray  # labelled and predicted as the class
    labelled: np.ndarray
    predicted: np.ndarray


def class_counts(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> ClassCounts:
    """Counts of `labels` and `predicted` classes, both int [N]; `weights` [N] of the rows, by default 1."""
    weights = np.ones(len(labels)) if weights is None else weights
    is_right = labels == predicted
    right = np.bincount(labels[is_right], weights[is_right], num_classes)
    return ClassCounts(right, np.bincount(labels, weights, num_classes), np.bincount(predicted, weights, num_classes))


def value_of(metric: str, counts: ClassCounts, *, is_binary: bool) -> float:
    """The value of one of COUNT_METRICS; 0 where the denominator is 0, as in scikit-learn.

    f1_score, precision and recall are those of class 1 if `is_binary`, else macro means.
    """
    averages = {"f1_macro": "macro", "f1_micro": "micro", "f1_weighted": "weighted"}
    return COUNT_METRICS[metric](counts, averages.get(metric, "binary" if is_binary else "macro"))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """[K], 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def _averaged(values: np.ndarray, counts: ClassCounts, average: str) -> float:
    """Of `values` [K]: class 1's, the mean over classes in labels or predictions, or the mean weighted by labels."""
    if average == "binary":
        return float(values[1])
    if average == "weighted":
        return float(values @ counts.labelled / counts.labelled.sum())
    return float(values[counts.predicted + counts.labelled > 0].mean())


def _precision(counts: ClassCounts, average: str) -> float:
    return _averaged(_ratio(counts.right, counts.predicted), counts, average)


def _recall(counts: ClassCounts, average: str) -> float:
    return _averaged(_ratio(counts.right, counts.labelled), counts, average)


def _accuracy(counts: ClassCounts, average: str) -> float:
    return float(counts.right.sum() / counts.labelled.sum())


def _f1(counts: ClassCounts, average: str) -> float:
    if average == "micro":
        return _accuracy(counts, average)
    return _averaged(_ratio(2 * counts.right, counts.predicted + counts.labelled), counts, average)


def _mcc(counts: ClassCounts, average: str) -> float:
    """Matthews correlation for K classes (Gorodkin 2004)."""
    labelled, predicted, total = counts.labelled, counts.predicted, counts.labelled.sum()
    denominator = (total**2 - (predicted**2).sum()) * (total**2 - (labelled**2).sum())
    if denominator <= 0:
        return 0.0
    return float((counts.right.sum() * total - (labelled * predicted).sum()) / np.sqrt(denominator))


COUNT_METRICS: dict[str, Callable[[ClassCounts, str], float]] = {
    "accuracy": _accuracy,
    "f1_score": _f1,
    "f1_macro": _f1,
    "f1_micro": _f1,
    "f1_weighted": _f1,
    "precision": _precision,
    "recall": _recall,
    "mcc": _mcc,
}
