"""Sections of a report that are computed from predictions and labels only.

N rows, K classes; `preds` are probabilities: [N] of class 1 (binary), or [N, K]. `labels` are class indices [N]. A
section that cannot be computed is `Missing` with the reason.
"""

from collections.abc import Sequence

import numpy as np

from mmbert_core.evaluation.class_counts import class_counts
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.metrics import within_range
from mmbert_core.evaluation.thresholds import ThresholdCurve, metrics_at_threshold, predicted_classes, threshold_curve
from mmbert_core.report.report_schema import (
    Bin,
    Calibration,
    Confusion,
    Curve,
    Curves,
    Scores,
    Threshold,
    ThresholdRow,
)
from mmbert_core.report.thinning import evenly_along
from mmbert_core.report.typed_json import Missing

MAX_CURVES = 10  # with more classes: those of the most frequent ones
MAX_POINTS = 300  # of a curve
MAX_MISTAKES = 15  # pairs of label and predicted class
BINS = 10  # of the calibration
BARS = 40  # of the histogram of probabilities
RECALLS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)  # the table has the highest threshold that reaches each


def threshold_section(preds: np.ndarray, labels: np.ndarray, decision: Decision) -> Threshold | Missing:
    """Binary only. The chosen threshold with its figures on the validation rows; a table of others on these rows."""
    if preds.ndim == 2:
        return Missing("several classes: the largest probability decides")
    chosen, table = decision.threshold, []
    if (labels == 1).any():
        curve = threshold_curve(preds, labels)
        indices = {int(np.argmax(curve.recall >= recall)) for recall in RECALLS}
        values = sorted({*(float(curve.thresholds[index]) for index in indices), 0.5, chosen.value}, reverse=True)
        table = [_table_row(preds, labels, value) for value in values]
    chosen_on = f"{chosen.rows:,} validation rows" if chosen.rows else "no rows"
    return Threshold(**chosen.to_json(), chosen_on=chosen_on, table=table)


def _table_row(preds: np.ndarray, labels: np.ndarray, value: float) -> ThresholdRow:
    metrics = metrics_at_threshold(preds, labels, value, "")
    return ThresholdRow(
        threshold=value,
        precision=metrics.precision,
        recall=metrics.recall,
        f1=metrics.f1,
        alerts_per_1000=metrics.alerts_per_1000,
        false_alerts_per_1000=1000 * float(((preds.astype(np.float64) > value) & (labels != 1)).mean()),
    )


def calibration_section(preds: np.ndarray, labels: np.ndarray, decision: Decision) -> Calibration:
    """The temperature, and bins of predicted probability and share of rows of the class, before and after scaling."""
    calibration = decision.calibration
    bins, calibrated_bins = bins_of(preds, labels), bins_of(calibration.apply(preds), labels)
    return Calibration(**calibration.to_json(), bins=bins, calibrated_bins=calibrated_bins)


def bins_of(preds: np.ndarray, labels: np.ndarray) -> list[Bin]:
    """Bins by the probability of class 1, or, with several classes, by that of the predicted class."""
    confidence, hit = (preds, labels == 1) if preds.ndim == 1 else (preds.max(axis=1), preds.argmax(axis=1) == labels)
    bin_of_row = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    bins = []
    for index in range(BINS):
        in_bin = bin_of_row == index
        mean = float(confidence[in_bin].mean()) if in_bin.any() else None
        share = float(hit[in_bin].mean()) if in_bin.any() else None
        bins.append(Bin(low=index / BINS, high=(index + 1) / BINS, rows=int(in_bin.sum()), mean=mean, share=share))
    return bins


def roc_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Curves | Missing:
    curves = {}
    for name, curve in _curves_by_class(preds, labels, class_names):
        false_positives = curve.predicted_positives - curve.true_positives
        false = false_positives / false_positives[-1]
        area = within_range("auroc", float(np.trapezoid(curve.recall, false)))
        curves[name] = Curve(**_points(false, curve.recall), area=area)
    return Curves(curves=curves) if curves else Missing("one class only in the labels")


def precision_recall_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Curves | Missing:
    curves = {}
    for name, curve in _curves_by_class(preds, labels, class_names):
        precision = np.append(curve.precision[1], curve.precision[1:])  # at recall 0 undefined: as at the next point
        area = within_range("average_precision", float(np.diff(curve.recall) @ curve.precision[1:]))
        curves[name] = Curve(
            **_points(curve.recall, precision), area=area, share=float(curve.true_positives[-1] / curve.num_rows)
        )
    return Curves(curves=curves) if curves else Missing("one class only in the labels")


def _curves_by_class(
    preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> list[tuple[str, ThresholdCurve]]:
    """(name, curve) of class 1 (binary), or of the most frequent classes; without classes that no or all rows have."""
    counts = np.bincount(labels, minlength=len(class_names))
    indices = [1] if preds.ndim == 1 else np.argsort(-counts, kind="stable")[:MAX_CURVES].tolist()
    curves = []
    for index in indices:
        if 0 < counts[index] < len(labels):
            probabilities = preds if preds.ndim == 1 else preds[:, index]
            curves.append((class_names[index], threshold_curve(probabilities, (labels == index).astype(np.int64))))
    return curves


def _points(x: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    kept = evenly_along(x, y, MAX_POINTS)
    return {"x": x[kept].tolist(), "y": y[kept].tolist()}


def confusion_section(preds: np.ndarray, labels: np.ndarray, num_classes: int, threshold: float) -> Confusion:
    """`counts` [K, K]; with more than FEW_CLASSES, three counts of each class and the most frequent mistakes."""
    chosen = predicted_classes(preds, threshold=threshold)
    if num_classes <= FEW_CLASSES:
        counts = np.bincount(labels * num_classes + chosen, minlength=num_classes**2)
        return Confusion(counts=counts.reshape(num_classes, num_classes).tolist())
    of_class = class_counts(labels, chosen, num_classes)
    wrong = labels != chosen
    pairs, rows = np.unique(labels[wrong] * num_classes + chosen[wrong], return_counts=True)
    largest = np.argsort(-rows, kind="stable")[:MAX_MISTAKES]
    return Confusion(
        mistakes=[[*map(int, divmod(int(pairs[index]), num_classes)), int(rows[index])] for index in largest],
        right=of_class.right.astype(np.int64).tolist(),
        labelled=of_class.labelled.astype(np.int64).tolist(),
        predicted=of_class.predicted.astype(np.int64).tolist(),
    )


def scores_section(preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Scores:
    """Histograms of the probability of class 1 by label; with several classes, of the predicted one, right or wrong."""
    edges = np.linspace(0, 1, BARS + 1)
    if preds.ndim == 1:
        groups = {name: preds[labels == index] for index, name in enumerate(class_names)}
    else:
        is_right = preds.argmax(axis=1) == labels
        groups = {"right": preds.max(axis=1)[is_right], "wrong": preds.max(axis=1)[~is_right]}
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in groups.items()}
    return Scores(edges=edges.tolist(), counts=counts)
