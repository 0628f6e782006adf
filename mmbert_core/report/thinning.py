"""Which points of a long curve to keep."""

import numpy as np


def evenly_spaced(num_points: int, max_points: int) -> np.ndarray:
    """Ascending indices of at most `max_points` of `num_points` points, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, num_points - 1, min(num_points, max_points)).round().astype(np.int64))


def evenly_along(x: np.ndarray, y: np.ndarray, max_points: int) -> np.ndarray:
    """Ascending indices of at most `max_points` points, evenly spaced along the length |dx| + |dy| of a curve.

    Includes both ends. For ROC and precision-recall curves, which have most of their points in a small range.
    """
    if len(x) <= max_points:
        return np.arange(len(x))
    length = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], max_points)).clip(0, len(x) - 1))
    kept[0], kept[-1] = 0, len(x) - 1
    return kept
