"""Bootstrap intervals of metrics. A draw gives the rows weights, so that a thousand draws take seconds.

N rows, K classes, D draws.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mmbert_core.evaluation.class_counts import COUNT_METRICS, class_counts, value_of
from mmbert_core.evaluation.class_ranking import (
    FEW_CLASSES,
    Curve,
    auroc,
    average_precision,
    cost_per_draw,
    ranking_of,
    weighted_rankings,
)
from mmbert_core.evaluation.metrics import CLASS_PREFIX, EPS, within_range
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes

LEVEL = 0.95
DRAWS, MIN_DRAWS = 1000, 200
WORK = 4_000_000_000  # rows x draws x curves at most, some minutes; metrics that need more have no interval
RANKINGS: dict[str, Curve] = {"auroc": auroc, "average_precision": average_precision}
WITHOUT = ("ece",)  # biased upwards, in a draw even more: the true value would be below the interval
WORK_OF_CLASSES = 6e9  # approximate nanoseconds at most to rank classes, with more than FEW_CLASSES
DRAW_CELLS = 1_000_000  # rows x draws in memory at a time
MAX_UNDEFINED = 0.05  # share of draws in which a metric may be undefined because a class has no row

Metric = Callable[[np.ndarray], float]  # weights [N] -> value, nan where undefined


def bootstrap_intervals(
    preds: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    class_names: Sequence[str],
    threshold: float = BINARY_THRESHOLD,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of the metrics `names` of `compute_metrics`; None where there is no interval.

    `preds` [N] (binary: probability of class 1) or [N, K], `labels` [N]. Each draw gives every row a Poisson(1) weight:
    one pass over the rows, and for more than a hundred rows as good as drawing N rows with replacement (Hanley and
    MacGibbon 2006).

    There is no interval for the metrics of WITHOUT, for those that would take too long or are undefined in more than
    MAX_UNDEFINED of the draws, and where all draws are equal, which does not prove that the metric is certain.
    """
    values = metric_draws(preds, labels, names, class_names=class_names, threshold=threshold, draws=draws, seed=seed)
    return {name: interval_of(values[name], level) if name in values else None for name in names}


def metric_draws(
    preds: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    class_names: Sequence[str],
    threshold: float = BINARY_THRESHOLD,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Metric -> its values [D] in draws of row weights, nan where undefined; arguments as of `bootstrap_intervals`.

    Without the metrics that have no draws: those of WITHOUT and those that would take too long. Weights, metrics and D
    follow from labels, names and seed alone, so the draws of two models on the same rows are paired.
    """
    if len(labels) == 0:
        return {}
    values_of = _draws_of_many_classes if len(class_names) > FEW_CLASSES else _draws_of_few_classes
    return values_of(
        np.asarray(preds),
        np.asarray(labels, dtype=np.int64),
        [name for name in names if name not in WITHOUT],
        class_names,
        threshold,
        draws,
        seed,
    )


def interval_of(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile interval of the values [D] of draws, nan where undefined; None where there is no interval."""
    defined = values[~np.isnan(values)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(values) or defined.min() == defined.max():
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(values: np.ndarray, reference: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile interval of the difference `values` - `reference`, both [D], of two models on the same rows.

    In each draw both have the same row weights (`metric_draws` with the same labels, names and seed), so that what
    makes a draw easy or hard for both cancels out. None as for `interval_of`.
    """
    return interval_of(values - reference, level)


# ---- up to FEW_CLASSES: metrics one by one ----


def _draws_of_few_classes(
    preds: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    class_names: Sequence[str],
    threshold: float,
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Values [D] of the affordable metrics."""
    affordable, num_draws = affordable_metrics(
        names, len(labels), draws, num_classes=1 if preds.ndim == 1 else len(class_names)
    )
    metrics = {name: weighted_metric(name, preds, labels, class_names, threshold) for name in affordable}
    generator = np.random.default_rng(seed)
    values = np.full((num_draws, len(metrics)), np.nan)
    for draw in range(num_draws):
        weights = generator.poisson(1.0, len(labels)).astype(np.float64)
        if weights.any():
            values[draw] = [metric(weights) for metric in metrics.values()]
    return dict(zip(metrics, values.T, strict=True))


def affordable_metrics(names: Sequence[str], num_rows: int, draws: int, *, num_classes: int) -> tuple[list[str], int]:
    """The metrics for which WORK allows MIN_DRAWS, in their order, and the number of draws of all.

    If it does not allow all of them, metrics with few curves have priority, and those of single classes come last.
    """
    curves = {name: num_classes if name in RANKINGS else 1 for name in names}  # a macro mean has one per class
    budget = WORK // (num_rows * min(draws, MIN_DRAWS))
    affordable: list[str] = []
    for name in sorted(names, key=lambda name: (curves[name], name.startswith(CLASS_PREFIX))):
        if curves[name] <= budget:
            budget -= curves[name]
            affordable.append(name)
    total = sum(curves[name] for name in affordable)
    num_draws = int(np.clip(WORK // (num_rows * max(1, total)), min(draws, MIN_DRAWS), draws))
    return [name for name in names if name in affordable], num_draws


def weighted_metric(
    name: str, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str], threshold: float = BINARY_THRESHOLD
) -> Metric:
    """A metric as a function of row weights [N]; with all weights 1 it equals that of `compute_metrics`."""
    metric = _weighted_metric(name, preds, labels, class_names, threshold)
    return lambda weights: within_range(name, metric(weights))


def _weighted_metric(
    name: str, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str], threshold: float
) -> Metric:
    preds, labels = np.asarray(preds), np.asarray(labels, dtype=np.int64)
    is_binary, num_classes = preds.ndim == 1, len(class_names)
    if name in RANKINGS:
        if is_binary:
            return _ranking_metric(RANKINGS[name], preds, labels == 1)
        by_class = [_ranking_metric(RANKINGS[name], preds[:, index], labels == index) for index in range(num_classes)]
        return lambda weights: float(np.mean([metric(weights) for metric in by_class]))
    if name.startswith(CLASS_PREFIX):
        index = list(class_names).index(name.removeprefix(CLASS_PREFIX))
        if is_binary:
            scores = preds if index == 1 else -preds
        else:
            scores = preds[:, index]
        return _ranking_metric(average_precision, scores, labels == index)
    if name == "log_loss":
        losses = _losses(preds, labels)
        return lambda weights: float(weights @ losses / weights.sum())
    predicted = predicted_classes(preds, threshold=threshold)
    return lambda weights: value_of(name, class_counts(labels, predicted, num_classes, weights), is_binary=is_binary)


def _ranking_metric(curve: Curve, scores: np.ndarray, is_positive: np.ndarray) -> Metric:
    ranking = ranking_of(scores, is_positive)
    return lambda weights: ranking.value_of(curve, weights)


def _losses(preds: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log loss of each row, float64 [N]."""
    if preds.ndim == 1:
        of_label = np.where(labels == 1, preds, 1 - preds.astype(np.float64))
    else:
        of_label = preds[np.arange(len(labels)), labels]
    return -np.log(np.clip(of_label.astype(np.float64), EPS, 1 - EPS))


# ---- more than FEW_CLASSES: all metrics share the counts of a draw, and all classes are ranked at once ----


def _draws_of_many_classes(
    preds: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    class_names: Sequence[str],
    threshold: float,
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Values [D] of the affordable metrics, for the same draws as `_draws_of_few_classes`."""
    class_of = {f"{CLASS_PREFIX}{name}": index for index, name in enumerate(class_names)}
    of_classes, means = [name for name in names if name in class_of], [name for name in names if name in RANKINGS]
    num_positives = np.bincount(labels, minlength=len(class_names))
    classes, has_all, num_draws = affordable_classes(
        num_positives, [class_of[name] for name in of_classes], draws, with_means=bool(means)
    )
    column_of = {index: column for column, index in enumerate(classes)}
    predicted = predicted_classes(preds, threshold=threshold)
    losses = _losses(preds, labels) if "log_loss" in names else None
    values: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(seed)
    for start in range(0, num_draws, block := max(1, DRAW_CELLS // len(labels))):
        weights = generator.poisson(1.0, (min(block, num_draws - start), len(labels))).astype(np.float64)
        draw_rows = start + np.flatnonzero(weights.any(axis=1))  # in a draw without rows all metrics are undefined
        weights = weights[draw_rows - start]
        counts = [class_counts(labels, predicted, len(class_names), row) for row in weights]
        block_values = {
            name: [within_range(name, value_of(name, of_draw, is_binary=False)) for of_draw in counts]
            for name in names
            if name in COUNT_METRICS
        }
        if losses is not None:
            block_values["log_loss"] = weights @ losses / weights.sum(axis=1)
        areas, precisions = weighted_rankings(preds, labels, classes, weights)
        for name in of_classes:
            if class_of[name] in column_of:
                block_values[name] = precisions[:, column_of[class_of[name]]]
        if has_all:
            block_values |= {name: (areas if name == "auroc" else precisions).mean(axis=1) for name in means}
        for name, of_draws in block_values.items():
            values.setdefault(name, np.full(num_draws, np.nan))[draw_rows] = of_draws
    return values


def affordable_classes(
    num_positives: np.ndarray, wanted: Sequence[int], draws: int, *, with_means: bool
) -> tuple[list[int], bool, int]:
    """Classes to rank, whether these are all (for a macro mean), and the number of draws.

    `num_positives` [K] rows of each class, `wanted` classes whose own metric is asked for. A class that would have
    no row in more than MAX_UNDEFINED of the draws is left out, since it would have no interval. So are the macro means,
    if some class is expected to have none in that many draws. If MIN_DRAWS take longer than WORK_OF_CLASSES, the means
    are left out first, then the rarest classes.
    """
    num_rows, min_draws = int(num_positives.sum()), min(draws, MIN_DRAWS)
    chance_of_none = np.exp(-num_positives.astype(np.float64))  # that all rows of a class have a Poisson weight of 0
    costs = cost_per_draw(num_positives, num_rows)
    are_means_defined = 1 - np.prod(1 - chance_of_none) <= MAX_UNDEFINED
    has_all = with_means and bool(are_means_defined and costs.sum() * min_draws <= WORK_OF_CLASSES)
    if has_all:
        classes = list(range(len(num_positives)))
    else:
        defined = [index for index in wanted if chance_of_none[index] <= MAX_UNDEFINED]
        by_rows = sorted(defined, key=lambda index: -num_positives[index])
        classes = by_rows[: int(np.searchsorted(np.cumsum(costs[by_rows]) * min_draws, WORK_OF_CLASSES, side="right"))]
    total = float(costs[classes].sum()) or 1.0
    return sorted(classes), has_all, int(np.clip(WORK_OF_CLASSES / total, min_draws, draws))
