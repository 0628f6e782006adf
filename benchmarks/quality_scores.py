"""Metrics of probabilities under weights of rows, many draws at once, and the paired bootstrap.

N rows, K classes, D draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_PROBABILITY = 1e-7  # of the true class in the log loss, so that one sure mistake does not decide
METRICS = {"auroc": "AUROC", "log_loss": "log loss", "f1_macro": "macro F1"}
LOWER_IS_BETTER = ("log_loss",)


@dataclass(frozen=True)
class Predictions:
    """Test rows of one run."""

    probabilities: np.ndarray  # [N, K]
    predicted: np.ndarray  # [N] classes, by the candidate's own threshold or the largest probability
    labels: np.ndarray  # [N]
    units: np.ndarray  # [N] what is drawn: the row's group, the same in all resamples


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(metric_draws("log_loss", probabilities, None, labels, np.ones((1, len(labels))))[0])


def scores(predictions: Predictions) -> dict[str, float]:
    weights = np.ones((1, len(predictions.labels)))
    return {name: float(_draws(name, predictions, weights)[0]) for name in METRICS}


def _draws(name: str, of: Predictions, weights: np.ndarray) -> np.ndarray:
    return metric_draws(name, of.probabilities, of.predicted, of.labels, weights)


def metric_draws(
    name: str, probabilities: np.ndarray, predicted: np.ndarray | None, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """[D] of weights [D, N]. Macro means are over the classes in a draw; AUROC of two classes is that of class 1."""
    num_classes = probabilities.shape[1]
    if name == "log_loss":
        losses = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY, 1))
        return weights @ losses / weights.sum(axis=1)
    if name == "f1_macro":
        assert predicted is not None
        return np.nanmean([_f1(predicted == k, labels == k, weights) for k in range(num_classes)], axis=0)
    classes = [1] if num_classes == 2 else range(num_classes)
    with np.errstate(invalid="ignore"):
        return np.nanmean([_auroc(probabilities[:, k], labels == k, weights) for k in classes], axis=0)


def _f1(predicted: np.ndarray, true: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """2 TP / (predicted + true); undefined for a class that a draw has neither in labels nor in predictions."""
    hits, total = weights @ (predicted & true), weights @ predicted.astype(float) + weights @ true.astype(float)
    return np.divide(2 * hits, total, out=np.full(len(weights), np.nan), where=total > 0)


def _auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted share of (positive, negative) pairs in the right order, ties half; NaN without one of both."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # of rows with the same score
    weights, positive = weights[:, order], positive[order]
    of_positive = np.add.reduceat(weights * positive, starts, axis=1)
    of_negative = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(of_negative, axis=1) - of_negative
    pairs = (of_positive * (below + of_negative / 2)).sum(axis=1)
    total = of_positive.sum(axis=1) * of_negative.sum(axis=1)
    return np.divide(pairs, total, out=np.full(len(weights), np.nan), where=total > 0)


# ---- the paired bootstrap ----


def differences(
    name: str, ours: Sequence[Predictions], other: Sequence[Predictions], *, num_draws: int, seed: int = 0
) -> tuple[float, np.ndarray]:
    """The mean over runs of ours minus the other's, and the same for each draw [D] of units with replacement.

    A draw weighs a unit equally in all runs and for both candidates.
    """
    for one, two in zip(ours, other, strict=True):
        if not (np.array_equal(one.labels, two.labels) and np.array_equal(one.units, two.units)):
            raise ValueError("expected the same test rows for both candidates")
    names = np.unique(np.concatenate([run.units for run in ours]))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_draws).astype(float)
    point, draws = [], []
    for one, two in zip(ours, other):
        weights = counts[:, np.searchsorted(names, one.units)]
        draws.append(_draws(name, one, weights) - _draws(name, two, weights))
        unweighted = np.ones((1, len(one.labels)))
        point.append(float((_draws(name, one, unweighted) - _draws(name, two, unweighted))[0]))
    return float(np.mean(point)), np.nanmean(draws, axis=0)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 %, the percentiles of the draws."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)
