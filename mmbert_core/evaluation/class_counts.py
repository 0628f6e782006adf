"""Accuracy, F1, precision, recall and MCC from three counts of each class, never from a confusion matrix."""

# N rows, K classes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassCounts:
    """Rows, or weights of rows, of each class, float64 [K]: what these metrics need of a confusion matrix [K, K]."""

    right: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray


def class_counts(
    labels: np.ndarray, chosen: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> ClassCounts:
    """Counts of `labels` and predicted classes `chosen`, both int [N]; a row counts as its weight [N], by default 1."""
    weights = np.ones(len(labels)) if weights is None else weights
    is_right = labels == chosen
    right = np.bincount(labels[is_right], weights[is_right], num_classes)
    return ClassCounts(right, np.bincount(labels, weights, num_classes), np.bincount(chosen, weights, num_classes))


def value_of(metric: str, counts: ClassCounts, *, is_binary: bool) -> float:
    """One of COUNT_METRICS; a zero denominator is 0, as in scikit-learn.

    Binary f1_score, precision and recall are those of class 1, of several classes macro means.
    """
    averages = {"f1_macro": "macro", "f1_micro": "micro", "f1_weighted": "weighted"}
    return COUNT_METRICS[metric](counts, averages.get(metric, "binary" if is_binary else "macro"))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def _averaged(values: np.ndarray, counts: ClassCounts, average: str) -> float:
    """Class 1's, or the mean over classes seen in labels or predictions, or weighted by their labels."""
    if average == "binary":
        return float(values[1])
    if average == "weighted":
        return float(values @ counts.labelled / counts.labelled.sum())
    return float(values[counts.predicted + counts.labelled > 0].mean())


def _precision(counts: ClassCounts, average: str) -> float:
    return _averaged(_share(counts.right, counts.predicted), counts, average)


def _recall(counts: ClassCounts, average: str) -> float:
    return _averaged(_share(counts.right, counts.labelled), counts, average)


def _accuracy(counts: ClassCounts, average: str) -> float:
    return float(counts.right.sum() / counts.labelled.sum())


def _f1(counts: ClassCounts, average: str) -> float:
    if average == "micro":
        return _accuracy(counts, average)
    return _averaged(_share(2 * counts.right, counts.predicted + counts.labelled), counts, average)


def _mcc(counts: ClassCounts, average: str) -> float:
    true, found, total = counts.labelled, counts.predicted, counts.labelled.sum()
    denominator = (total**2 - (found**2).sum()) * (total**2 - (true**2).sum())
    return float((counts.right.sum() * total - (true * found).sum()) / np.sqrt(denominator)) if denominator > 0 else 0.0


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
