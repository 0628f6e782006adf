"""How sure a metric is: bootstrap intervals from weights of rows, so that a thousand draws take seconds. Floor 1; imports metrics and predictions."""

# N rows, K classes, D draws

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmbert_core.evaluation.metrics import CLASS_PREFIX, EPS, within_range
from mmbert_core.evaluation.predictions import BINARY_THRESHOLD, predicted_classes

LEVEL = 0.95
DRAWS, FEWEST_DRAWS = 1000, 200
WORK = 4_000_000_000  # rows x draws x curves, about: some minutes. Metrics that would take more have no interval
WITHOUT = ("ece",)  # biased upwards, and once more in each draw: the true value would lie below its interval
MOST_UNDEFINED = 0.05  # share of draws without a value (a class has no row in them) from which there is no interval

Metric = Callable[[np.ndarray], float]  # weights [N] -> value, nan where undefined


def bootstrap_intervals(
    preds: np.ndarray, labels: np.ndarray, names: Sequence[str], *, class_names: Sequence[str], threshold: float = BINARY_THRESHOLD,
    draws: int = DRAWS, seed: int = 0, level: float = LEVEL,
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of the metrics `names` of `compute_metrics`; None where too many draws leave one undefined.

    None too for those of `WITHOUT`, and where all draws are equal, which a few rows that are all right are no proof of.
    `preds` [N] (binary: probability of class 1) or [N, K], `labels` [N]. A draw gives each row a Poisson(1) weight (Hanley
    and MacGibbon 2006: for more than a hundred rows as good as drawing N rows with replacement, and one pass).
    """
    if len(labels) == 0:
        return dict.fromkeys(names)
    affordable, num_draws = affordable_metrics([name for name in names if name not in WITHOUT], len(labels), draws, num_classes=1 if np.ndim(preds) == 1 else len(class_names))
    metrics = {name: weighted_metric(name, preds, labels, class_names, threshold) for name in affordable}
    generator = np.random.default_rng(seed)
    values = np.full((num_draws, len(metrics)), np.nan)
    for draw in range(num_draws):
        weights = generator.poisson(1.0, len(labels)).astype(np.float64)
        if weights.any():
            values[draw] = [metric(weights) for metric in metrics.values()]
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    for name, column in zip(metrics, values.T, strict=True):
        defined = column[~np.isnan(column)]
        if len(defined) >= (1 - MOST_UNDEFINED) * num_draws and defined.min() < defined.max():
            low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
            intervals[name] = (float(low), float(high))
    return intervals


def affordable_metrics(names: Sequence[str], num_rows: int, draws: int, *, num_classes: int) -> tuple[list[str], int]:
    """The metrics that FEWEST_DRAWS can be had of, in their order, the cheap ones first to be chosen; and the draws of all."""
    curves = {name: num_classes if name in ("auroc", "average_precision") else 1 for name in names}  # a macro mean has one for each class
    budget = WORK // (num_rows * min(draws, FEWEST_DRAWS))
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: (curves[name], name.startswith(CLASS_PREFIX))):
        if curves[name] <= budget:
            budget -= curves[name]
            chosen.append(name)
    total = sum(curves[name] for name in chosen)
    return [name for name in names if name in chosen], int(np.clip(WORK // (num_rows * max(1, total)), min(draws, FEWEST_DRAWS), draws))


def weighted_metric(
    name: str, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str], threshold: float = BINARY_THRESHOLD
) -> Metric:
    """A metric of `metrics` as a function of the rows' weights, in its range; with all weights 1 it is that metric."""
    metric = _weighted_metric(name, preds, labels, class_names, threshold)
    return lambda weights: within_range(name, metric(weights))


def _weighted_metric(name: str, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str], threshold: float) -> Metric:
    preds, labels = np.asarray(preds), np.asarray(labels, dtype=np.int64)
    chosen = predicted_classes(preds, threshold=threshold)
    preds = preds.astype(np.float64)
    is_binary, num_classes = preds.ndim == 1, len(class_names)
    by_class = np.stack([1 - preds, preds], axis=1) if is_binary else preds
    if name in ("auroc", "average_precision"):
        curve = _auroc if name == "auroc" else _average_precision
        if is_binary:
            return _ranking(curve, preds, labels == 1)
        parts = [_ranking(curve, by_class[:, index], labels == index) for index in range(num_classes)]
        return lambda weights: float(np.mean([part(weights) for part in parts]))
    if name.startswith(CLASS_PREFIX):
        index = list(class_names).index(name.removeprefix(CLASS_PREFIX))
        return _ranking(_average_precision, -preds if is_binary and index == 0 else by_class[:, index], labels == index)
    if name == "log_loss":
        losses = -np.log(np.clip(by_class[np.arange(len(labels)), labels], EPS, 1 - EPS))
        return lambda weights: float(weights @ losses / weights.sum())
    pairs, of_counts = labels * num_classes + chosen, _OF_COUNTS[name]
    average = {"f1_macro": "macro", "f1_micro": "micro", "f1_weighted": "weighted"}.get(name, "binary" if is_binary else "macro")
    return lambda weights: of_counts(np.bincount(pairs, weights, num_classes**2).reshape(num_classes, num_classes), average)


# ---- of the ranking ----


def _ranking(curve: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, is_positive: np.ndarray) -> Metric:
    """`curve` gets the weights of positives and of negatives above each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last row of each tie
    positive = is_positive[order].astype(np.float64)

    def metric(weights: np.ndarray) -> float:
        ordered = weights[order]
        true = np.cumsum(ordered * positive)[ends]
        false = np.cumsum(ordered)[ends] - true
        return curve(true, false) if true[-1] > 0 and false[-1] > 0 else np.nan

    return metric


def _auroc(true: np.ndarray, false: np.ndarray) -> float:
    heights = (true + np.append(0, true[:-1])) / 2
    return float(np.diff(false, prepend=0) @ heights / (true[-1] * false[-1]))


def _average_precision(true: np.ndarray, false: np.ndarray) -> float:
    found = true + false
    precision = np.divide(true, found, out=np.zeros_like(true), where=found > 0)
    return float(np.diff(true, prepend=0) @ precision / true[-1])


# ---- of the chosen class, from a confusion matrix [K, K] of weights: rows are labels ----


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def _averaged(values: np.ndarray, counts: np.ndarray, average: str) -> float:
    """Class 1's, or the mean over classes seen in labels or predictions, or weighted by their labels."""
    if average == "binary":
        return float(values[1])
    if average == "weighted":
        return float(values @ counts.sum(axis=1) / counts.sum())
    return float(values[counts.sum(axis=0) + counts.sum(axis=1) > 0].mean())


def _precision(counts: np.ndarray, average: str) -> float:
    return _averaged(_share(np.diag(counts), counts.sum(axis=0)), counts, average)


def _recall(counts: np.ndarray, average: str) -> float:
    return _averaged(_share(np.diag(counts), counts.sum(axis=1)), counts, average)


def _accuracy(counts: np.ndarray, average: str) -> float:
    return float(np.trace(counts) / counts.sum())


def _f1(counts: np.ndarray, average: str) -> float:
    if average == "micro":
        return _accuracy(counts, average)
    return _averaged(_share(2 * np.diag(counts), counts.sum(axis=0) + counts.sum(axis=1)), counts, average)


def _mcc(counts: np.ndarray, average: str) -> float:
    true, found, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    denominator = (total**2 - (found**2).sum()) * (total**2 - (true**2).sum())
    return float((np.trace(counts) * total - (true * found).sum()) / np.sqrt(denominator)) if denominator > 0 else 0.0


_OF_COUNTS: dict[str, Callable[[np.ndarray, str], float]] = {
    "accuracy": _accuracy, "f1_score": _f1, "f1_macro": _f1, "f1_micro": _f1, "f1_weighted": _f1, "precision": _precision, "recall": _recall, "mcc": _mcc,
}  # fmt: skip
