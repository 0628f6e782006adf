"""Metrics over all rows, each a value or None with the reason why it is undefined.

N rows, K classes.
"""

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import ModuleType

import numpy as np
import torch

from mmbert_core.evaluation.class_counts import COUNT_METRICS, ClassCounts, class_counts, value_of
from mmbert_core.evaluation.class_ranking import FEW_CLASSES, ClassRankings, class_rankings
from mmbert_core.evaluation.temperature import best_temperature, log_odds, rows_to_fit, scaled
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes
from mmbert_core.runtime.errors import InputError

CLASS_PREFIX = "average_precision_class_"
NUM_BINS = 15  # of the expected calibration error: equal width, [a, b), the last one closed
ONE_SIDED = ("precision", "recall")  # recall is 1 if every row is predicted as class 1: alone, they cannot rank models
LOG_LOSSES = ("log_loss", "log_loss_calibrated")
LOWER_IS_BETTER = ("val_loss", "log_loss", "log_loss_calibrated", "ece")
EPS = float(np.finfo(np.float32).eps)  # log_loss keeps probabilities in [EPS, 1 - EPS], whatever their dtype


def lower_is_better(name: str) -> bool:
    """Whether "ece" or "val/ece" is better when lower. Only the whole name counts: a class may be called ece."""
    return name.removeprefix("val/") in LOWER_IS_BETTER


@dataclass(frozen=True)
class MetricValues:
    """Metrics of one stage, and why some have no value."""

    values: dict[str, float | None]  # "<stage>/<metric>" -> value, None where undefined
    undefined: dict[str, str]  # "<stage>/<metric>" -> reason, of the undefined ones


class _Undefined(Exception):
    """Raised by a metric that is undefined for these rows; the message is the reason."""


@dataclass(frozen=True)
class _EvaluatedRows:
    """The rows of one call of `compute_metrics`."""

    preds: torch.Tensor  # [N] probability of class 1 (binary), or [N, K]; float64 up to FEW_CLASSES
    labels: torch.Tensor  # [N] int64
    predicted: torch.Tensor  # [N] int64
    is_binary: bool
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def counts(self) -> ClassCounts:
        return class_counts(self.labels.numpy(), self.predicted.numpy(), self.num_classes)

    @cached_property
    def rankings(self) -> ClassRankings:
        return class_rankings(self.preds.numpy(), self.labels.numpy())


def functional() -> ModuleType:
    """torchmetrics' functions, imported at first use: the import takes seconds, and prediction needs none of them."""
    from torchmetrics.functional import classification

    return classification


def compute_metrics(
    preds: np.ndarray,
    labels: np.ndarray,
    metric_choices: Sequence[str],
    task: str,
    num_classes: int,
    stage: str,
    *,
    class_names: Sequence[str] | None = None,
    threshold: float = BINARY_THRESHOLD,
) -> MetricValues:
    """Metrics of `preds` [N] (binary: probability of class 1) or [N, K] against `labels` int [N].

    `task` is "binary" or "multiclass"; `class_names` default to "0", "1", ... The predicted class is class 1 above
    (not at) the threshold, or the first largest probability. With several classes f1_score, precision and recall are
    macro means over the classes that occur in labels or predictions; auroc and average_precision are macro means of
    one class against the rest. ece is the expected calibration error (Naeini et al. 2015) with NUM_BINS bins, of the
    probability of class 1 if binary, else of the largest one. All others equal scikit-learn's, with 0 for
    a zero denominator. A metric that is undefined for the rows is None, with a reason.

    Raises `InputError` for an unknown metric, `ValueError` for an unknown task, inconsistent shapes, and labels that
    are not classes.
    """
    names = tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes))
    check_metric_choices(metric_choices, names)
    preds, labels = np.asarray(preds), np.asarray(labels)
    _check_arrays(preds, labels, task, num_classes, names)
    reason = None
    if len(labels) == 0:
        reason = "no rows"
    elif num_non_finite := int((~np.isfinite(preds)).reshape(len(labels), -1).any(axis=1).sum()):
        reason = f"{num_non_finite} of {len(labels)} predictions are not finite"
    metrics = _metrics_of_rows(names)
    rows = _evaluated_rows(preds, labels, is_binary=task == "binary", class_names=names, threshold=threshold)
    values: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for name in metric_choices:
        key = f"{stage}/{name}"
        try:
            if reason is not None:
                raise _Undefined(reason)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchmetrics warns of cases that are handled here
                values[key] = within_range(name, float(metrics[name](rows)))
        except _Undefined as error:
            values[key], undefined[key] = None, str(error)
    return MetricValues(values, undefined)


def within_range(name: str, value: float) -> float:
    """The value clipped to the metric's range, 0 to 1 (mcc -1 to 1, log losses from 0); NaN stays.

    Sums of rounded terms can reach 1.0000001.
    """
    low, high = {"mcc": (-1.0, 1.0), **dict.fromkeys(LOG_LOSSES, (0.0, np.inf))}.get(name, (0.0, 1.0))
    return min(max(value, low), high)


def check_metric_choices(
    metric_choices: Sequence[str], class_names: Sequence[str], *, key: str = "metric_choices"
) -> None:
    """Raise `InputError`, with the choices and the nearest one, for an unknown metric."""
    known = (*METRICS, *VALIDATION_ONLY, *metric_names(class_names)[len(METRICS) :])
    unknown = set(metric_choices) - set(known)
    for name in metric_choices:
        if name in unknown:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            # with many classes the message lists the metrics of the first 12
            choices = ", ".join(known[: len(METRICS) + len(VALIDATION_ONLY) + 12]) + (
                ", ..." if len(class_names) > 12 else ""
            )
            raise InputError(f"{key}: expected names among {choices}; found {name!r}{hint}")


def _check_arrays(preds: np.ndarray, labels: np.ndarray, task: str, num_classes: int, names: Sequence[str]) -> None:
    if task not in ("binary", "multiclass"):
        raise ValueError(f"task: expected binary or multiclass, found {task!r}")
    if len(names) != num_classes or (task == "binary" and num_classes != 2):
        raise ValueError(f"expected {num_classes} class names (2 when binary), found {len(names)}")
    shape = (len(labels),) if task == "binary" else (len(labels), num_classes)
    if labels.ndim != 1 or (len(labels) and preds.shape != shape):
        raise ValueError(f"expected preds of shape {shape} for {len(labels)} labels, found {preds.shape}")
    if len(labels) and not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(f"expected labels from 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}")


def _evaluated_rows(
    preds: np.ndarray, labels: np.ndarray, *, is_binary: bool, class_names: tuple[str, ...], threshold: float
) -> _EvaluatedRows:
    predicted = predicted_classes(preds, threshold=threshold)
    is_many = len(class_names) > FEW_CLASSES  # a float64 copy would be large
    return _EvaluatedRows(
        preds=torch.from_numpy(np.require(preds, requirements=["C", "W"]) if is_many else preds.astype(np.float64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        predicted=torch.from_numpy(predicted),
        is_binary=is_binary,
        class_names=class_names,
    )


# ---- metrics of the predicted class ----


def _of_counts(metric: str, average: str) -> Callable[[_EvaluatedRows], torch.Tensor]:
    """f1_score, precision or recall. With `average` "task": of class 1 if binary, else the macro mean."""

    def compute(rows: _EvaluatedRows) -> torch.Tensor:
        if average == "task" and rows.is_binary:
            return getattr(functional(), f"binary_{metric}")(rows.predicted, rows.labels)
        compute_metric = getattr(functional(), f"multiclass_{metric}")
        kind = "macro" if average == "task" else average
        return compute_metric(rows.predicted, rows.labels, rows.num_classes, average=kind)

    return compute


def _accuracy(rows: _EvaluatedRows) -> torch.Tensor:
    return functional().multiclass_accuracy(rows.predicted, rows.labels, rows.num_classes, average="micro")


def _mcc(rows: _EvaluatedRows) -> float:
    """Matthews correlation for K classes (Gorodkin 2004), 0 for a zero denominator.

    In float64: torchmetrics' float32 loses six digits on large unbalanced data, and its value for a zero denominator
    differs.
    """
    confusion = functional().multiclass_confusion_matrix(rows.predicted, rows.labels, rows.num_classes)
    counts = confusion.numpy().astype(np.float64)
    labelled, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    denominator = (total**2 - (predicted**2).sum()) * (total**2 - (labelled**2).sum())
    if denominator <= 0:
        return 0.0
    return (np.trace(counts) * total - (labelled * predicted).sum()) / np.sqrt(denominator)


# ---- metrics of the ranking ----


def _require_all_classes(rows: _EvaluatedRows) -> None:
    """Raise `_Undefined` if a class has no row."""
    counts = torch.bincount(rows.labels, minlength=rows.num_classes)
    if int((counts > 0).sum()) == 1:
        raise _Undefined(f"only one class in the labels: {rows.class_names[int(counts.argmax())]!r}")
    if (counts == 0).any():
        raise _Undefined(f"class {rows.class_names[int((counts == 0).nonzero()[0])]!r} has no row")


def _auroc(rows: _EvaluatedRows) -> torch.Tensor:
    _require_all_classes(rows)
    if rows.is_binary:
        return functional().binary_auroc(rows.preds, rows.labels)
    return functional().multiclass_auroc(rows.preds, rows.labels, rows.num_classes, average="macro")


def _average_precision(rows: _EvaluatedRows) -> torch.Tensor:
    _require_all_classes(rows)
    if rows.is_binary:
        return functional().binary_average_precision(rows.preds, rows.labels)
    return functional().multiclass_average_precision(rows.preds, rows.labels, rows.num_classes, average="macro")


def _class_average_precision(rows: _EvaluatedRows, index: int) -> torch.Tensor:
    is_class = (rows.labels == index).long()
    if int(is_class.sum()) in (0, len(is_class)):
        word = "no row" if int(is_class.sum()) == 0 else "all rows"
        raise _Undefined(f"class {rows.class_names[index]!r} has {word}")
    if not rows.is_binary:
        scores = rows.preds[:, index]
    elif index == 1:
        scores = rows.preds
    else:
        # dense ranks of -p, not 1 - p: that would round small probabilities to ties
        _, ranks = torch.unique(-rows.preds, return_inverse=True)
        scores = ranks.double() / (int(ranks.max()) + 1)
    return functional().binary_average_precision(scores, is_class)


# ---- metrics of the probability ----


def _log_loss(rows: _EvaluatedRows) -> torch.Tensor:
    if rows.is_binary:
        of_label = torch.where(rows.labels == 1, rows.preds, 1.0 - rows.preds)
    else:
        of_label = rows.preds.gather(1, rows.labels[:, None])[:, 0]
    return -of_label.double().clamp(EPS, 1.0 - EPS).log().mean()


def _log_loss_calibrated(rows: _EvaluatedRows) -> torch.Tensor:
    """The log loss at the temperature that is best for these rows: how well the model tells the classes apart.

    A model that is only too sure, as after many epochs, loses nothing here, as its temperature is fitted after training
    (Berta et al. 2025, arXiv 2501.19195). Not what a reader of the probabilities gets: that is log_loss.
    """
    indices = rows_to_fit(len(rows.labels), rows.num_classes)
    preds, labels = rows.preds.numpy()[indices], rows.labels.numpy()[indices]
    temperature = best_temperature(preds, labels, rows.num_classes)
    calibrated = torch.from_numpy(scaled(log_odds(preds), 1 / temperature))
    return _log_loss(replace(rows, preds=calibrated, labels=torch.from_numpy(labels)))


def _ece(rows: _EvaluatedRows) -> torch.Tensor:
    """Expected calibration error: mean gap of confidence and accuracy in NUM_BINS equal bins, weighted by their rows.

    In float64 and with 1.0 in the last bin; torchmetrics sums in float32 and puts 1.0 into a bin of its own.
    """
    if rows.is_binary:
        confidence, hit = rows.preds, rows.labels.double()
    else:
        confidence, hit = rows.preds.amax(dim=1).double(), (rows.predicted == rows.labels).double()
    bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    gaps = torch.bincount(bins, weights=hit - confidence, minlength=NUM_BINS)
    return gaps.abs().sum() / len(confidence)


_METRICS: dict[str, Callable[[_EvaluatedRows], torch.Tensor | float]] = {
    "accuracy": _accuracy,
    "f1_score": _of_counts("f1_score", "task"),
    "f1_macro": _of_counts("f1_score", "macro"),
    "f1_micro": _of_counts("f1_score", "micro"),
    "f1_weighted": _of_counts("f1_score", "weighted"),
    "precision": _of_counts("precision", "task"),
    "recall": _of_counts("recall", "task"),
    "auroc": _auroc,
    "average_precision": _average_precision,
    "mcc": _mcc,
    "log_loss": _log_loss,
    "log_loss_calibrated": _log_loss_calibrated,
    "ece": _ece,
}
# For the best step, whose temperature is fitted to the same rows afterwards; of test rows it would be too good.
VALIDATION_ONLY = ("log_loss_calibrated",)
METRICS = tuple(
    name for name in _METRICS if name not in VALIDATION_ONLY
)  # and average_precision_class_<name>, one per class


def metric_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """All metrics of test rows, those of single classes last."""
    return (*METRICS, *(CLASS_PREFIX + name for name in class_names))


def _metrics_of_rows(class_names: Sequence[str]) -> dict[str, Callable[[_EvaluatedRows], torch.Tensor | float]]:
    """Every metric by its name.

    With more than FEW_CLASSES, torchmetrics is not used: it needs memory for K^2 counts, and a second for a few hundred
    curves.
    """
    of_class = _class_average_precision
    metrics = dict(_METRICS)
    if len(class_names) > FEW_CLASSES:
        of_class = _class_average_precision_of_many
        metrics |= {name: partial(_of_class_counts, name) for name in COUNT_METRICS}
        metrics |= {name: partial(_macro_of_rankings, name) for name in ("auroc", "average_precision")}
    return metrics | {f"{CLASS_PREFIX}{name}": partial(of_class, index=index) for index, name in enumerate(class_names)}


# ---- more than FEW_CLASSES ----


def _of_class_counts(name: str, rows: _EvaluatedRows) -> float:
    return value_of(name, rows.counts, is_binary=False)


def _macro_of_rankings(name: str, rows: _EvaluatedRows) -> float:
    _require_all_classes(rows)
    return float(getattr(rows.rankings, name).mean())


def _class_average_precision_of_many(rows: _EvaluatedRows, index: int) -> float:
    value = float(rows.rankings.average_precision[index])
    if np.isnan(value):
        word = "all rows" if rows.counts.labelled[index] else "no row"
        raise _Undefined(f"class {rows.class_names[index]!r} has {word}")
    return value
