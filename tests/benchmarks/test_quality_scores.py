"""Weighted metrics and the paired bootstrap, compared with rows that are really repeated."""

import numpy as np
import pytest

from benchmarks.quality_scores import METRICS, Predictions, differences, interval, metric_draws, scores


def predictions(seed: int, *, num_classes: int, num_rows: int = 40, skill: float = 1.0) -> Predictions:
    """With tied probabilities, groups of two rows and every class present. Labels and groups depend on no seed."""
    labels = np.arange(num_rows) % num_classes
    logits = np.random.default_rng(seed).normal(size=(num_rows, num_classes)).round(1)
    logits[np.arange(num_rows), labels] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    units = np.array([f"g{row // 2}" for row in range(num_rows)])
    return Predictions(probabilities, probabilities.argmax(axis=1), labels, units)


def by_loops(name: str, of: Predictions, rows: np.ndarray) -> float:
    """Of a list of rows, some repeated, by loops over rows and pairs."""
    probabilities, predicted, labels = of.probabilities[rows], of.predicted[rows], of.labels[rows]
    num_classes = probabilities.shape[1]
    if name == "log_loss":
        return float(np.mean([-np.log(probabilities[row, labels[row]]) for row in range(len(rows))]))
    values = []
    for k in [1] if name == "auroc" and num_classes == 2 else range(num_classes):
        if name == "auroc":
            pairs = [
                (one > two) + (one == two) / 2
                for one in probabilities[labels == k, k]
                for two in probabilities[labels != k, k]
            ]
            values += [np.mean(pairs)] if pairs else []
        elif (total := (predicted == k).sum() + (labels == k).sum()) > 0:
            values.append(2 * ((predicted == k) & (labels == k)).sum() / total)
    return float(np.mean(values))


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("name", METRICS)
def test_weights_are_repeated_rows(name: str, num_classes: int) -> None:
    of = predictions(1, num_classes=num_classes)
    assert scores(of)[name] == pytest.approx(by_loops(name, of, np.arange(40)), abs=1e-12)
    weights = np.random.default_rng(2).integers(0, 4, size=(5, 40)).astype(float)
    drawn = metric_draws(name, of.probabilities, of.predicted, of.labels, weights)
    repeated = [by_loops(name, of, np.repeat(np.arange(40), each.astype(int))) for each in weights]
    assert drawn == pytest.approx(repeated, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_the_bootstrap_draws_groups_for_both_candidates_and_all_runs(name: str) -> None:
    ours = [predictions(seed, num_classes=3, skill=1.5) for seed in (1, 2)]
    other = [predictions(seed, num_classes=3) for seed in (3, 4)]
    point, drawn = differences(name, ours, other, num_draws=6, seed=7)
    pairs = list(zip(ours, other, strict=True))
    every = np.arange(40)
    assert point == pytest.approx(np.mean([by_loops(name, a, every) - by_loops(name, b, every) for a, b in pairs]))
    groups = np.unique(ours[0].units)
    counts = np.random.default_rng(7).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=6)
    for draw, of_draw in zip(drawn, counts):
        rows = np.concatenate([np.repeat(np.flatnonzero(ours[0].units == g), n) for g, n in zip(groups, of_draw)])
        expected = np.mean([by_loops(name, one, rows) - by_loops(name, two, rows) for one, two in pairs])
        assert draw == pytest.approx(expected, abs=1e-12)


def test_an_interval_contains_what_is_the_same_and_excludes_what_is_better() -> None:
    one, better = predictions(1, num_classes=2, num_rows=400), predictions(2, num_classes=2, num_rows=400, skill=3)
    assert differences("auroc", [one], [one], num_draws=50)[1].any() == False  # noqa: E712
    point, drawn = differences("auroc", [better], [one], num_draws=400)
    low, high = interval(drawn)
    assert 0 < low < point < high


def test_other_rows_are_refused() -> None:
    one = predictions(1, num_classes=2)
    other = Predictions(one.probabilities, one.predicted, one.labels[::-1].copy(), one.units)
    with pytest.raises(ValueError, match="the same test rows"):
        differences("auroc", [one], [other], num_draws=2)
