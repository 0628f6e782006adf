"""Bootstrap intervals: the weighted metrics are the metrics, and the intervals cover at their rate."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from mmbert_core.evaluation.intervals import WITHOUT, bootstrap_intervals, weighted_metric
from mmbert_core.evaluation.metrics import METRICS as ALL
from mmbert_core.evaluation.metrics import compute_metrics

METRICS = [name for name in ALL if name not in WITHOUT]


def scored(num_rows: int, num_classes: int, seed: int, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)) + 1.0 * np.eye(num_classes)[labels]
    preds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    preds = preds[:, 1] if num_classes == 2 else preds
    return (np.round(preds, 1) if ties and num_classes == 2 else preds).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_with_all_weights_one_it_is_the_metric(num_classes: int, ties: bool) -> None:
    preds, labels = scored(500, num_classes, 0, ties=ties)
    names = [str(index) for index in range(num_classes)]
    wanted = [*METRICS, *(f"average_precision_class_{name}" for name in names)]
    expected = compute_metrics(preds, labels, wanted, "binary" if num_classes == 2 else "multiclass", num_classes, "test").values
    for name in wanted:
        assert weighted_metric(name, preds, labels, names)(np.ones(500)) == pytest.approx(expected[f"test/{name}"], abs=1e-6), name


def test_weights_are_repeated_rows() -> None:
    preds, labels = scored(300, 2, 1, ties=True)
    weights = np.random.default_rng(0).poisson(1, 300)
    rows = np.repeat(np.arange(300), weights)
    expected = compute_metrics(preds[rows], labels[rows], METRICS, "binary", 2, "test").values
    for name in METRICS:
        assert weighted_metric(name, preds, labels, ["0", "1"])(weights.astype(float)) == pytest.approx(expected[f"test/{name}"], abs=1e-6), name


def test_against_an_oracle_with_weights() -> None:
    preds, labels = scored(300, 2, 2)
    weights = np.random.default_rng(0).poisson(1, 300).astype(float)
    assert weighted_metric("auroc", preds, labels, ["0", "1"])(weights) == pytest.approx(oracle.roc_auc_score(labels, preds, sample_weight=weights))
    assert weighted_metric("average_precision", preds, labels, ["0", "1"])(weights) == pytest.approx(oracle.average_precision_score(labels, preds, sample_weight=weights))


def test_intervals_cover_at_their_rate() -> None:
    """300 samples of 400 rows from a population whose AUROC is that of two normals one apart: Phi(1 / sqrt 2) = .760."""
    rng, truth, covered = np.random.default_rng(0), 0.7602, 0
    for sample in range(300):
        labels = rng.integers(0, 2, 400)
        scores = rng.normal(size=400) + labels
        preds = (1 / (1 + np.exp(-scores))).astype(np.float32)
        low, high = bootstrap_intervals(preds, labels, ["auroc"], class_names=["0", "1"], seed=sample)["auroc"]
        covered += low <= truth <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_a_biased_metric_has_no_interval_and_neither_have_few_rows_that_are_all_right() -> None:
    preds, labels = scored(300, 2, 4)
    assert bootstrap_intervals(preds, labels, ["ece", "auroc"], class_names=["0", "1"])["ece"] is None
    made = bootstrap_intervals(labels.astype(np.float32), labels, ["accuracy", "auroc", "log_loss"], class_names=["0", "1"])
    assert made["accuracy"] is None and made["auroc"] is None


def test_too_few_rows_of_a_class_give_no_interval() -> None:
    preds, labels = scored(200, 2, 3)
    labels[:] = 0
    labels[0] = 1  # missing in 37 % of the draws
    made = bootstrap_intervals(preds, labels, ["auroc", "accuracy"], class_names=["0", "1"])
    assert made["auroc"] is None and made["accuracy"] is not None
    assert bootstrap_intervals(preds[:0], labels[:0], ["auroc"], class_names=["0", "1"]) == {"auroc": None}
