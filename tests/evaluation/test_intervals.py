"""Bootstrap intervals: the weighted metrics are the metrics, and the intervals cover at their rate."""

import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as oracle

from mmbert_core.evaluation import intervals
from mmbert_core.evaluation.intervals import (
    WITHOUT,
    affordable_classes,
    bootstrap_intervals,
    metric_draws,
    paired_interval,
    weighted_metric,
)
from mmbert_core.evaluation.metrics import METRICS as ALL
from mmbert_core.evaluation.metrics import compute_metrics

METRICS = [name for name in ALL if name not in WITHOUT]


def random_rows(num_rows: int, num_classes: int, seed: int, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)) + 1.0 * np.eye(num_classes)[labels]
    preds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    preds = preds[:, 1] if num_classes == 2 else preds
    return (np.round(preds, 1) if ties and num_classes == 2 else preds).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_with_all_weights_one_it_is_the_metric(num_classes: int, ties: bool) -> None:
    preds, labels = random_rows(500, num_classes, 0, ties=ties)
    names = [str(index) for index in range(num_classes)]
    wanted = [*METRICS, *(f"average_precision_class_{name}" for name in names)]
    expected = compute_metrics(
        preds, labels, wanted, "binary" if num_classes == 2 else "multiclass", num_classes, "test"
    ).values
    for name in wanted:
        assert weighted_metric(name, preds, labels, names)(np.ones(500)) == pytest.approx(
            expected[f"test/{name}"], abs=1e-6
        ), name


def test_weights_are_repeated_rows() -> None:
    preds, labels = random_rows(300, 2, 1, ties=True)
    weights = np.random.default_rng(0).poisson(1, 300)
    rows = np.repeat(np.arange(300), weights)
    expected = compute_metrics(preds[rows], labels[rows], METRICS, "binary", 2, "test").values
    for name in METRICS:
        assert weighted_metric(name, preds, labels, ["0", "1"])(weights.astype(float)) == pytest.approx(
            expected[f"test/{name}"], abs=1e-6
        ), name


def test_against_an_oracle_with_weights() -> None:
    preds, labels = random_rows(300, 2, 2)
    weights = np.random.default_rng(0).poisson(1, 300).astype(float)
    assert weighted_metric("auroc", preds, labels, ["0", "1"])(weights) == pytest.approx(
        oracle.roc_auc_score(labels, preds, sample_weight=weights)
    )
    assert weighted_metric("average_precision", preds, labels, ["0", "1"])(weights) == pytest.approx(
        oracle.average_precision_score(labels, preds, sample_weight=weights)
    )


def test_intervals_cover_at_their_rate() -> None:
    """300 samples of 400 rows; normal scores of means one apart: AUROC is Phi(1 / sqrt 2) = .760."""
    rng, truth, covered = np.random.default_rng(0), 0.7602, 0
    for sample in range(300):
        labels = rng.integers(0, 2, 400)
        scores = rng.normal(size=400) + labels
        preds = (1 / (1 + np.exp(-scores))).astype(np.float32)
        low, high = bootstrap_intervals(preds, labels, ["auroc"], class_names=["0", "1"], seed=sample)["auroc"]
        covered += low <= truth <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_a_biased_metric_has_no_interval_and_neither_have_few_rows_that_are_all_right() -> None:
    preds, labels = random_rows(300, 2, 4)
    assert bootstrap_intervals(preds, labels, ["ece", "auroc"], class_names=["0", "1"])["ece"] is None
    found = bootstrap_intervals(
        labels.astype(np.float32), labels, ["accuracy", "auroc", "log_loss"], class_names=["0", "1"]
    )
    assert found["accuracy"] is None and found["auroc"] is None


def test_too_few_rows_of_a_class_give_no_interval() -> None:
    preds, labels = random_rows(200, 2, 3)
    labels[:] = 0
    labels[0] = 1  # missing in 37 % of the draws
    found = bootstrap_intervals(preds, labels, ["auroc", "accuracy"], class_names=["0", "1"])
    assert found["auroc"] is None and found["accuracy"] is not None
    assert bootstrap_intervals(preds[:0], labels[:0], ["auroc"], class_names=["0", "1"]) == {"auroc": None}


# ---- two models on the same rows ----


def test_a_paired_interval_is_a_plain_bootstrap_of_the_difference_on_the_same_draws() -> None:
    labels = np.random.default_rng(5).integers(0, 2, 300)
    models = [np.clip(labels * 0.3 + np.random.default_rng(seed).random(300) * 0.7, 0.01, 0.99) for seed in (6, 7)]
    names, kinds = ["0", "1"], ["auroc", "log_loss", "accuracy"]
    draws = [metric_draws(preds, labels, kinds, class_names=names, draws=200, seed=3) for preds in models]
    generator, differences = np.random.default_rng(3), {name: [] for name in kinds}
    for _ in range(200):
        rows = np.repeat(np.arange(300), generator.poisson(1.0, 300))
        values = []
        for preds in (model[rows] for model in models):
            losses = -np.log(np.where(labels[rows] == 1, preds, 1 - preds))
            values.append(
                (oracle.roc_auc_score(labels[rows], preds), losses.mean(), ((preds > 0.5) == labels[rows]).mean())
            )
        for index, name in enumerate(kinds):
            differences[name].append(values[1][index] - values[0][index])
    for name in kinds:
        found = paired_interval(draws[1][name], draws[0][name])
        assert found == pytest.approx(np.quantile(differences[name], [0.025, 0.975]), abs=1e-9), name
    assert paired_interval(draws[0]["auroc"], draws[0]["auroc"]) is None  # a model against itself


def test_paired_intervals_cover_at_their_rate_and_are_narrower_than_those_of_one_model() -> None:
    """200 samples of 300 rows; one model is right in 80 % of them, the other in 70 %, on mostly the same rows."""
    rng, covered, widths = np.random.default_rng(0), 0, np.zeros(2)
    for sample in range(200):
        labels, uniform = rng.integers(0, 2, 300), rng.random(300)
        other = np.where(rng.random(300) < 0.95, uniform, rng.random(300))
        better, worse = (
            (np.where(u < rate, labels, 1 - labels) * 0.8 + 0.1) for u, rate in ((uniform, 0.8), (other, 0.7))
        )
        options = {"class_names": ["0", "1"], "draws": 200, "seed": sample}
        draws = [metric_draws(preds, labels, ["accuracy"], **options)["accuracy"] for preds in (better, worse)]
        low, high = paired_interval(*draws)
        covered += low <= 0.1 <= high
        widths += [high - low, np.ptp(np.quantile(draws[1], [0.025, 0.975]))]
    assert 0.90 <= covered / 200 <= 0.985 and widths[0] < 0.8 * widths[1]


# ---- many classes ----


def rows_of_many(
    num_rows: int, num_classes: int, *, most_frequent: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Each class a few rows, the first one `most_frequent` more; scores in hundredths, so that many are equal."""
    rng = np.random.default_rng(num_rows)
    labels = np.concatenate([np.arange(num_rows) % num_classes, np.zeros(most_frequent, np.int64)])
    preds = rng.random((len(labels), num_classes)) + 0.4 * np.eye(num_classes)[labels]
    return (
        np.round(preds / preds.sum(axis=1, keepdims=True), 4).astype(np.float32),
        labels,
        [f"c{index}" for index in range(num_classes)],
    )


@pytest.mark.parametrize("shift", [0, 150])
def test_many_classes_have_the_intervals_of_one_metric_after_the_other(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 10 rows of a class; with 150 more the first class is ranked by a sorted sum instead of a matrix product
    preds, labels, names = rows_of_many(320, 32, most_frequent=shift)
    wanted = [*METRICS, *(f"average_precision_class_{name}" for name in names)]
    found = bootstrap_intervals(preds, labels, wanted, class_names=names, draws=200, seed=3)
    monkeypatch.setattr(intervals, "FEW_CLASSES", 32)
    expected = bootstrap_intervals(preds, labels, wanted, class_names=names, draws=200, seed=3)
    assert None not in found.values() and list(found) == wanted
    assert all(found[name] == pytest.approx(expected[name], abs=1e-12) for name in wanted)


def test_classes_that_few_draws_have_are_not_ranked_and_rare_ones_go_first_when_work_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = np.array([1, 2, 3, 100, 50, 400])
    assert affordable_classes(counts, range(6), 1000, with_means=True) == ([2, 3, 4, 5], False, 1000)
    assert affordable_classes(np.full(40, 20), [], 1000, with_means=True) == (list(range(40)), True, 1000)
    assert affordable_classes(np.full(40, 20), [7], 1000, with_means=False) == ([7], False, 1000)
    monkeypatch.setattr(intervals, "WORK_OF_CLASSES", 2.0e6)
    assert affordable_classes(counts, range(6), 1000, with_means=True) == ([5], False, 299)
    monkeypatch.setattr(intervals, "WORK_OF_CLASSES", 1.0)
    assert affordable_classes(counts, range(6), 1000, with_means=True) == ([], False, 200)


def test_one_row_of_each_of_many_classes_gives_intervals_of_what_is_defined() -> None:
    preds, labels, names = rows_of_many(100, 100)
    found = bootstrap_intervals(preds, labels, [*METRICS, "average_precision_class_c7"], class_names=names)
    assert {name for name, pair in found.items() if pair is None} == {
        "auroc",
        "average_precision",
        "average_precision_class_c7",
    }
    assert (
        bootstrap_intervals(preds[:2], labels[:2], ["accuracy", "log_loss", "f1_macro"], class_names=names)["accuracy"]
        is None
    )  # a draw of no rows


def test_memory_of_ten_thousand_classes_is_that_of_their_predictions() -> None:
    names = [str(index) for index in range(10_000)]  # a matrix of them squared is 800 MB
    labels = np.repeat(np.arange(8), 4)
    preds = np.random.default_rng(0).random((32, 10_000), dtype=np.float32)
    wanted = [*METRICS, *(f"average_precision_class_{name}" for name in names)]
    tracemalloc.start()
    try:
        values = compute_metrics(preds, labels, wanted, "multiclass", 10_000, "test", class_names=names).values
        bootstrap_intervals(
            preds, labels, [name for name in wanted if values[f"test/{name}"] is not None], class_names=names, draws=20
        )
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
