"""Parts of a report that follow from predictions and labels alone, as JSON values.

N rows, K classes. A part that cannot be is `{"reason": why}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmbert_core.evaluation.class_counts import class_counts
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.metrics import within_range
from mmbert_core.evaluation.thresholds import ThresholdCurve, metrics_at_threshold, predicted_classes, threshold_curve

MAX_CURVES = 10  # with more classes, the most frequent ones
MAX_POINTS = 300  # of a curve
MAX_MISTAKES = 15  # pairs of label and predicted class
BINS = 10  # of the calibration
BARS = 40  # of the histogram
RECALLS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)  # whose thresholds the table shows

Section = dict[str, Any]


def threshold_section(preds: np.ndarray, labels: np.ndarray, decision: Decision) -> Section:
    """The chosen threshold with its figures on the validation rows, and a table of others on these rows; two classes only."""
    if preds.ndim == 2:
        return {"reason": "several classes: the largest probability decides"}
    chosen = decision.threshold
    section = {
        **chosen.to_json(),
        "chosen_on": f"{chosen.rows:,} validation rows" if chosen.rows else "no rows",
        "table": [],
    }
    if (labels == 1).any():
        cuts = threshold_curve(preds, labels)
        places = {int(np.argmax(cuts.recall >= recall)) for recall in RECALLS}
        values = sorted({*(float(cuts.thresholds[place]) for place in places), 0.5, chosen.value}, reverse=True)
        section["table"] = [_table_row(preds, labels, value) for value in values]
    return section


def _table_row(preds: np.ndarray, labels: np.ndarray, value: float) -> Section:
    made = metrics_at_threshold(preds, labels, value, "")
    false_alerts = 1000 * float(((preds.astype(np.float64) > value) & (labels != 1)).mean())
    return {
        "threshold": value,
        "precision": made.precision,
        "recall": made.recall,
        "f1": made.f1,
        "alerts_per_1000": made.alerts_per_1000,
        "false_alerts_per_1000": false_alerts,
    }


def calibration_section(preds: np.ndarray, labels: np.ndarray, decision: Decision) -> Section:
    """The temperature, and how often probabilities of about p came true, before and after it."""
    calibration = decision.calibration
    return {
        **calibration.to_json(),
        "bins": _bins(preds, labels),
        "calibrated_bins": _bins(calibration.apply(preds), labels),
    }


def _bins(preds: np.ndarray, labels: np.ndarray) -> list[Section]:
    """Of the probability of class 1, or, of several classes, of the predicted one."""
    confidence, hit = (preds, labels == 1) if preds.ndim == 1 else (preds.max(axis=1), preds.argmax(axis=1) == labels)
    places = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    bins = []
    for place in range(BINS):
        here = places == place
        means = (
            {"mean": float(confidence[here].mean()), "share": float(hit[here].mean())}
            if here.any()
            else {"mean": None, "share": None}
        )
        bins.append({"low": place / BINS, "high": (place + 1) / BINS, "rows": int(here.sum()), **means})
    return bins


def roc_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Section:
    curves = {}
    for name, cuts in _cuts_by_class(preds, labels, class_names):
        false = (cuts.predicted_positives - cuts.true_positives) / (
            cuts.predicted_positives[-1] - cuts.true_positives[-1]
        )
        x, y = thinned(false, cuts.recall)
        curves[name] = {"x": x, "y": y, "area": within_range("auroc", float(np.trapezoid(cuts.recall, false)))}
    return {"curves": curves} if curves else {"reason": "one class only in the labels"}


def precision_recall_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Section:
    curves = {}
    for name, cuts in _cuts_by_class(preds, labels, class_names):
        precision = np.append(cuts.precision[1], cuts.precision[1:])  # of no rows: as of the first
        x, y = thinned(cuts.recall, precision)
        area = within_range("average_precision", float(np.diff(cuts.recall) @ cuts.precision[1:]))
        curves[name] = {"x": x, "y": y, "area": area, "share": float(cuts.true_positives[-1] / cuts.num_rows)}
    return {"curves": curves} if curves else {"reason": "one class only in the labels"}


def _cuts_by_class(
    preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> list[tuple[str, ThresholdCurve]]:
    """Classes with rows and with others; of two classes class 1 alone, of many the most frequent."""
    counts = np.bincount(labels, minlength=len(class_names))
    indices = [1] if preds.ndim == 1 else np.argsort(-counts, kind="stable")[:MAX_CURVES].tolist()
    scores = preds[:, None] if preds.ndim == 1 else preds
    return [
        (
            class_names[index],
            threshold_curve(scores[:, 0 if preds.ndim == 1 else index], (labels == index).astype(np.int64)),
        )
        for index in indices
        if 0 < counts[index] < len(labels)
    ]


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points of a curve, evenly along its length, its ends among them."""
    if len(x) <= MAX_POINTS:
        return x.tolist(), y.tolist()
    along = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    places = np.unique(np.searchsorted(along, np.linspace(0, along[-1], MAX_POINTS)).clip(0, len(x) - 1))
    places[0], places[-1] = 0, len(x) - 1
    return x[places].tolist(), y[places].tolist()


def confusion_section(preds: np.ndarray, labels: np.ndarray, num_classes: int, threshold: float) -> Section:
    """`counts` [K, K]: rows are labels, columns predicted classes. Of more than FEW_CLASSES three counts of each, and the most frequent mistakes."""
    chosen = predicted_classes(preds, threshold=threshold)
    if num_classes > FEW_CLASSES:
        of_class = class_counts(labels, chosen, num_classes)
        wrong = labels != chosen
        pairs, rows = np.unique(labels[wrong] * num_classes + chosen[wrong], return_counts=True)
        largest = np.argsort(-rows, kind="stable")[:MAX_MISTAKES]
        mistakes = [
            [int(pairs[index]) // num_classes, int(pairs[index]) % num_classes, int(rows[index])] for index in largest
        ]
        return {
            "mistakes": mistakes,
            **{name: getattr(of_class, name).astype(np.int64).tolist() for name in ("right", "labelled", "predicted")},
        }
    return {
        "counts": np.bincount(labels * num_classes + chosen, minlength=num_classes**2)
        .reshape(num_classes, num_classes)
        .tolist()
    }


def scores_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Section:
    """Rows by probability of class 1 and class; of several classes by that of the predicted one, right or wrong."""
    edges = np.linspace(0, 1, BARS + 1)
    if preds.ndim == 1:
        groups = {name: preds[labels == index] for index, name in enumerate(class_names)}
    else:
        is_right = preds.argmax(axis=1) == labels
        groups = {"right": preds.max(axis=1)[is_right], "wrong": preds.max(axis=1)[~is_right]}
    return {
        "edges": edges.tolist(),
        "counts": {name: np.histogram(values, edges)[0].tolist() for name, values in groups.items()},
    }
