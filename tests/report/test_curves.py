"""Sections of the report against scikit-learn and against counting."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from mmbert_core.evaluation.calibration import Calibration
from mmbert_core.evaluation.decision import MIN_CLASS_ROWS, Decision, fit_threshold_and_calibration
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.report import curves


def evaluated(num_rows: int = 500, num_classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    preds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return (preds[:, 1] if num_classes == 2 else preds).astype(np.float32), labels


@pytest.mark.parametrize("num_rows", [500, 20_000])
def test_curves_have_their_areas_and_their_ends(num_rows: int) -> None:
    preds, labels = evaluated(num_rows)
    [roc] = curves.roc_section(preds, labels, ["no", "yes"]).curves.values()
    [recall] = curves.precision_recall_section(preds, labels, ["no", "yes"]).curves.values()
    assert roc.area == pytest.approx(oracle.roc_auc_score(labels, preds)) and recall.area == pytest.approx(
        oracle.average_precision_score(labels, preds)
    )
    for curve in (roc, recall):
        assert 2 < len(curve.x) == len(curve.y) <= curves.MAX_POINTS and curve.x == sorted(curve.x)
        assert (curve.x[0], curve.x[-1]) == (0, 1)
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(roc.area, abs=0.005)  # what is drawn is the curve
    assert recall.share == pytest.approx(labels.mean())


def test_each_of_several_classes_has_a_curve() -> None:
    preds, labels = evaluated(300, 3)
    labels[labels == 2] = 0
    curves_of_class = curves.roc_section(preds, labels, ["a", "b", "c"]).curves
    assert set(curves_of_class) == {"a", "b"} and curves_of_class["b"].area == pytest.approx(
        oracle.roc_auc_score(labels == 1, preds[:, 1])
    )
    assert "one class" in curves.roc_section(preds, np.zeros_like(labels), ["a", "b", "c"]).reason


def test_the_threshold_table_is_counted() -> None:
    preds, labels = evaluated()
    decision = Decision(Threshold(0.37, "best_f1", rows=90))
    section = curves.threshold_section(preds, labels, decision)
    assert section.chosen_on == "90 validation rows" and section.value == 0.37
    values = [row.threshold for row in section.table]
    assert values == sorted(values, reverse=True) and {0.37, 0.5} <= set(values)
    for row in section.table:
        above = preds.astype(float) > row.threshold
        assert row.precision == pytest.approx(oracle.precision_score(labels, above, zero_division=0))
        assert row.recall == pytest.approx(oracle.recall_score(labels, above))
        assert row.alerts_per_1000 == pytest.approx(2 * above.sum())
        assert row.false_alerts_per_1000 == pytest.approx(2 * (above & (labels == 0)).sum())
    for recall in curves.RECALLS:
        assert any(row.recall >= recall for row in section.table)
    assert "several classes" in curves.threshold_section(*evaluated(50, 3), decision).reason


@pytest.mark.parametrize("num_classes", [2, 3])
def test_bins_and_bars_count_every_row_once(num_classes: int) -> None:
    preds, labels = evaluated(400, num_classes)
    section = curves.calibration_section(preds, labels, Decision(calibration=Calibration(2.0, 400)))
    for bins in (section.bins, section.calibrated_bins):
        assert sum(each.rows for each in bins) == 400 and all(
            each.low <= each.mean <= each.high for each in bins if each.rows
        )
        total = sum(each.rows * each.share for each in bins if each.rows)
        assert total == pytest.approx(labels.sum() if num_classes == 2 else (preds.argmax(1) == labels).sum())
    assert section.bins != section.calibrated_bins
    counts = curves.scores_section(preds, labels, list("abc")[:num_classes]).counts
    assert sum(map(sum, counts.values())) == 400 and set(counts) == (
        {"a", "b"} if num_classes == 2 else {"right", "wrong"}
    )


def test_confusion_is_scikit_learns() -> None:
    preds, labels = evaluated(300, 4)
    assert (
        curves.confusion_section(preds, labels, 4, 0.5).counts
        == oracle.confusion_matrix(labels, preds.argmax(1)).tolist()
    )
    preds, labels = evaluated()
    assert (
        curves.confusion_section(preds, labels, 2, 0.8).counts == oracle.confusion_matrix(labels, preds > 0.8).tolist()
    )


def test_a_decision_needs_rows() -> None:
    preds, labels = evaluated(400)
    decision = fit_threshold_and_calibration(preds, labels, rule="best_f1", num_classes=2, baselines=None)
    assert decision.threshold.reason is None and decision.threshold.value != 0.5 and decision.calibration.reason is None
    few = np.concatenate([np.flatnonzero(labels == 1)[: MIN_CLASS_ROWS - 1], np.flatnonzero(labels == 0)])
    decision = fit_threshold_and_calibration(preds[few], labels[few], rule="best_f1", num_classes=2, baselines=None)
    assert decision.threshold.value == 0.5 and f"{MIN_CLASS_ROWS - 1} validation rows" in decision.threshold.reason
    decision = fit_threshold_and_calibration(None, None, rule="best_f1", num_classes=2, baselines=None)
    assert (decision.threshold.value, decision.threshold.reason, decision.calibration.reason) == (
        0.5,
        "no validation rows",
        "no validation rows",
    )
    decision = fit_threshold_and_calibration(*evaluated(400, 3), rule="best_f1", num_classes=3, baselines=None)
    assert "several classes" in decision.threshold.reason and decision.calibration.reason is None
