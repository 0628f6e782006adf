"""Metrics over all rows, each a number or "undefined" with its reason."""

# N rows, K classes

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType

import numpy as np
import torch

from mmbert_core.evaluation.class_counts import COUNT_METRICS, ClassCounts, class_counts, value_of
from mmbert_core.evaluation.class_ranking import FEW_CLASSES, ClassRankings, class_rankings
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes
from mmbert_core.runtime.errors import InputError

CLASS_PREFIX = "average_precision_class_"
NUM_BINS = 15  # of the expected calibration error: equal width, [a, b), the last one closed
ONE_SIDED = ("precision", "recall")  # calling every row class 1 finds them all: alone they compare no models
LOWER_IS_BETTER = ("val_loss", "log_loss", "ece")
EPS = float(np.finfo(np.float32).eps)  # log_loss keeps probabilities in [EPS, 1 - EPS], whatever their dtype


def lower_is_better(name: str) -> bool:
    """Of a metric, as "val/ece" or "ece". A class may be named after one: only the whole name counts."""
    return name.removeprefix("val/") in LOWER_IS_BETTER


@dataclass(frozen=True)
class MetricValues:
    """``values``: "<stage>/<metric>" -> number, None where undefined; ``undefined``: the same keys -> reason."""

    values: dict[str, float | None]
    undefined: dict[str, str]


class _Undefined(Exception):
    """Raised by a metric that the rows at hand do not define; the message is the reason."""


@dataclass(frozen=True)
class _Scored:
    """The rows of one call: ``preds`` [N] (binary: of class 1) or [N, K], float64 up to FEW_CLASSES; ``labels``, ``chosen`` int64 [N]."""

    preds: torch.Tensor
    labels: torch.Tensor
    chosen: torch.Tensor
    binary: bool
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def counts(self) -> ClassCounts:
        return class_counts(self.labels.numpy(), self.chosen.numpy(), self.num_classes)

    @cached_property
    def rankings(self) -> ClassRankings:
        return class_rankings(self.preds.numpy(), self.labels.numpy())


def functional() -> ModuleType:
    """torchmetrics' functions, imported at their first use: that takes seconds, and a prediction needs none of them."""
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
    """Metrics of ``preds`` [N] (binary: probability of class 1) or [N, K] against ``labels`` int [N].

    ``task`` is "binary" or "multiclass"; ``class_names`` default to "0", "1", ... The class a row is counted as is
    class 1 above (not at) the threshold, or the first largest probability. With several classes f1_score, precision and
    recall are macro means over the classes seen in labels or predictions, auroc and average_precision macro means of
    one class against the rest. ece: NUM_BINS bins; binary: of the probability of class 1, else of the largest one.
    All agree with scikit-learn's; zero denominators are 0 as there. What the rows cannot define is None, with a reason.

    Raises InputError for an unknown metric, ValueError for arrays that do not fit together.
    """
    names = tuple(class_names) if class_names is not None else tuple(str(index) for index in range(num_classes))
    check_metric_choices(metric_choices, names)
    preds, labels = np.asarray(preds), np.asarray(labels)
    _check_arrays(preds, labels, task, num_classes, names)
    reason = None
    if len(labels) == 0:
        reason = "no rows"
    elif num_bad := int((~np.isfinite(preds)).reshape(len(labels), -1).any(axis=1).sum()):
        reason = f"{num_bad} of {len(labels)} predictions are not finite"
    metrics = _metrics_of_rows(names)
    scored = _scored(preds, labels, binary=task == "binary", class_names=names, threshold=threshold)
    values: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for name in metric_choices:
        key = f"{stage}/{name}"
        try:
            if reason is not None:
                raise _Undefined(reason)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchmetrics warns of what is handled here
                values[key] = within_range(name, float(metrics[name](scored)))
        except _Undefined as error:
            values[key], undefined[key] = None, str(error)
    return MetricValues(values, undefined)


def within_range(name: str, value: float) -> float:
    """A metric's value in its range of 0 to 1 (mcc -1 to 1, log_loss from 0): sums of rounded terms reach 1.0000001. NaN stays."""
    low, high = {"mcc": (-1.0, 1.0), "log_loss": (0.0, np.inf)}.get(name, (0.0, 1.0))
    return min(max(value, low), high)


def check_metric_choices(
    metric_choices: Sequence[str], class_names: Sequence[str], *, key: str = "metric_choices"
) -> None:
    """InputError naming the choices (and the nearest one) if a metric is not known."""
    known = metric_names(class_names)
    unknown = set(metric_choices) - set(known)
    for name in metric_choices:
        if name in unknown:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            # Classes can be many: the line shows a dozen of their metrics at most.
            choices = ", ".join(known[: len(METRICS) + 12]) + (", ..." if len(class_names) > 12 else "")
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


def _scored(
    preds: np.ndarray, labels: np.ndarray, *, binary: bool, class_names: tuple[str, ...], threshold: float
) -> _Scored:
    # The class of a row is chosen in the dtype of the predictions; float64 afterwards changes no comparison.
    chosen = predicted_classes(preds, threshold=threshold)
    is_many = len(class_names) > FEW_CLASSES  # a float64 copy would be large
    return _Scored(
        preds=torch.from_numpy(np.require(preds, requirements=["C", "W"]) if is_many else preds.astype(np.float64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        chosen=torch.from_numpy(chosen),
        binary=binary,
        class_names=class_names,
    )


# ---- metrics of the chosen class ----


def _of_counts(metric: str, average: str) -> Callable[[_Scored], torch.Tensor]:
    """f1_score, precision or recall; ``average`` "task": of class 1 when binary, else macro."""

    def compute(rows: _Scored) -> torch.Tensor:
        if average == "task" and rows.binary:
            return getattr(functional(), f"binary_{metric}")(rows.chosen, rows.labels)
        kind = "macro" if average == "task" else average
        return getattr(functional(), f"multiclass_{metric}")(rows.chosen, rows.labels, rows.num_classes, average=kind)

    return compute


def _accuracy(rows: _Scored) -> torch.Tensor:
    return functional().multiclass_accuracy(rows.chosen, rows.labels, rows.num_classes, average="micro")


def _mcc(rows: _Scored) -> float:
    """From the counts in float64: torchmetrics' own float32 loses six digits on large unbalanced data, and gives a
    zero denominator values of its own."""
    confusion = functional().multiclass_confusion_matrix(rows.chosen, rows.labels, rows.num_classes)
    counts = confusion.numpy().astype(np.float64)
    true, chosen, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    denominator = (total**2 - (chosen**2).sum()) * (total**2 - (true**2).sum())
    if denominator <= 0:
        return 0.0
    return (np.trace(counts) * total - (true * chosen).sum()) / np.sqrt(denominator)


# ---- metrics of the ranking ----


def _need_classes(rows: _Scored) -> None:
    counts = torch.bincount(rows.labels, minlength=rows.num_classes)
    if int((counts > 0).sum()) == 1:
        raise _Undefined(f"only one class in the labels: {rows.class_names[int(counts.argmax())]!r}")
    if (counts == 0).any():
        raise _Undefined(f"class {rows.class_names[int((counts == 0).nonzero()[0])]!r} has no row")


def _auroc(rows: _Scored) -> torch.Tensor:
    _need_classes(rows)
    if rows.binary:
        return functional().binary_auroc(rows.preds, rows.labels)
    return functional().multiclass_auroc(rows.preds, rows.labels, rows.num_classes, average="macro")


def _average_precision(rows: _Scored) -> torch.Tensor:
    _need_classes(rows)
    if rows.binary:
        return functional().binary_average_precision(rows.preds, rows.labels)
    return functional().multiclass_average_precision(rows.preds, rows.labels, rows.num_classes, average="macro")


def _class_average_precision(rows: _Scored, index: int) -> torch.Tensor:
    is_class = (rows.labels == index).long()
    if int(is_class.sum()) in (0, len(is_class)):
        word = "no row" if int(is_class.sum()) == 0 else "all rows"
        raise _Undefined(f"class {rows.class_names[index]!r} has {word}")
    if not rows.binary:
        scores = rows.preds[:, index]
    elif index == 1:
        scores = rows.preds
    else:
        # Dense ranks of -p rather than 1 - p, which rounds small probabilities into ties.
        _, ranks = torch.unique(-rows.preds, return_inverse=True)
        scores = ranks.double() / (int(ranks.max()) + 1)
    return functional().binary_average_precision(scores, is_class)


# ---- metrics of the probability ----


def _log_loss(rows: _Scored) -> torch.Tensor:
    if rows.binary:
        of_label = torch.where(rows.labels == 1, rows.preds, 1.0 - rows.preds)
    else:
        of_label = rows.preds.gather(1, rows.labels[:, None])[:, 0]
    return -of_label.double().clamp(EPS, 1.0 - EPS).log().mean()


def _ece(rows: _Scored) -> torch.Tensor:
    """In float64 and with 1.0 in the last bin; torchmetrics sums in float32 and gives 1.0 a bin of its own."""
    if rows.binary:
        confidence, hit = rows.preds, rows.labels.double()
    else:
        confidence, hit = rows.preds.amax(dim=1).double(), (rows.chosen == rows.labels).double()
    bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    gaps = torch.bincount(bins, weights=hit - confidence, minlength=NUM_BINS)
    return gaps.abs().sum() / len(confidence)


_METRICS: dict[str, Callable[[_Scored], torch.Tensor | float]] = {
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
    "ece": _ece,
}
METRICS = tuple(_METRICS)  # average_precision_class_<name> comes beside these, one per class


def metric_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """All that can be asked for, those of the classes last."""
    return (*METRICS, *(CLASS_PREFIX + name for name in class_names))


def _metrics_of_rows(class_names: Sequence[str]) -> dict[str, Callable[[_Scored], torch.Tensor | float]]:
    """Every metric by its name. Of more than FEW_CLASSES, torchmetrics would take K^2 of memory, or a second for a few hundred curves."""
    of_class = _class_average_precision
    metrics = dict(_METRICS)
    if len(class_names) > FEW_CLASSES:
        of_class = _class_average_precision_of_many
        metrics |= {name: partial(_of_class_counts, name) for name in COUNT_METRICS}
        metrics |= {name: partial(_macro_of_rankings, name) for name in ("auroc", "average_precision")}
    return metrics | {f"{CLASS_PREFIX}{name}": partial(of_class, index=index) for index, name in enumerate(class_names)}


# ---- of more than FEW_CLASSES ----


def _of_class_counts(name: str, rows: _Scored) -> float:
    return value_of(name, rows.counts, is_binary=False)


def _macro_of_rankings(name: str, rows: _Scored) -> float:
    _need_classes(rows)
    return float(getattr(rows.rankings, name).mean())


def _class_average_precision_of_many(rows: _Scored, index: int) -> float:
    value = float(rows.rankings.average_precision[index])
    if np.isnan(value):
        raise _Undefined(
            f"class {rows.class_names[index]!r} has {'all rows' if rows.counts.labelled[index] else 'no row'}"
        )
    return value
