"""Thresholds by rule, against trying every cut."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from mmbert_core.errors import InputError
from mmbert_core.evaluation.thresholds import Threshold, choose_threshold, cuts_of, parse_rule


def scored(seed: int, num_rows: int = 200, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_rows) < 0.3).astype(int)
    preds = 1 / (1 + np.exp(-(rng.normal(size=num_rows) + 1.5 * labels)))
    return (np.round(preds, 1) if ties else preds).astype(np.float32), labels


def brute_force(preds: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float, int]]:
    """F1, precision, recall and rows found of every threshold that could matter."""
    rows = []
    for value in [-1.0, *np.unique(preds).tolist()]:
        chosen = (preds > value).astype(int)
        rows.append((*(measure(labels, chosen, zero_division=0) for measure in (oracle.f1_score, oracle.precision_score, oracle.recall_score)), chosen.sum()))
    return rows


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_each_rule_finds_the_best_cut(seed: int, ties: bool) -> None:
    preds, labels = scored(seed, ties=ties)
    tried = brute_force(preds, labels)
    chosen = choose_threshold(preds, labels, "best_f1")
    assert chosen.f1 == pytest.approx(max(f1 for f1, *_ in tried))
    chosen = choose_threshold(preds, labels, "recall_at_precision=0.6")
    assert chosen.precision >= 0.6 and chosen.recall == pytest.approx(max(recall for _, precision, recall, _ in tried if precision >= 0.6))
    chosen = choose_threshold(preds, labels, "precision_at_recall=0.7")
    assert chosen.recall >= 0.7 and chosen.precision == pytest.approx(max(precision for _, precision, recall, _ in tried if recall >= 0.7))
    chosen = choose_threshold(preds, labels, "alerts_per_1000=50")
    assert chosen.alerts_per_1000 == pytest.approx(5 * max(found for *_, found in tried if found <= 10))


def test_figures_are_those_of_the_rows_above() -> None:
    preds, labels = scored(7)
    chosen = choose_threshold(preds, labels, "best_f1")
    above = (preds > chosen.value).astype(int)
    assert (chosen.precision, chosen.recall, chosen.f1) == pytest.approx(tuple(measure(labels, above) for measure in (oracle.precision_score, oracle.recall_score, oracle.f1_score)))
    assert Threshold.from_json(chosen.to_json()) == chosen
    assert choose_threshold(preds, labels, "half").value == 0.5


def test_cuts_run_from_none_to_all() -> None:
    preds, labels = np.array([0.2, 0.9, 0.9, 0.4], np.float32), np.array([0, 1, 0, 1])
    cuts = cuts_of(preds, labels)
    assert cuts.found.tolist() == [0, 2, 3, 4] and cuts.true.tolist() == [0, 1, 2, 2]
    assert [int((preds > value).sum()) for value in cuts.values] == [0, 2, 3, 4]


@pytest.mark.parametrize(("rule", "reason"), [("recall_at_precision=0.99", "no threshold reaches 0.99"), ("best_f1", "no validation row of class 1")])
def test_what_cannot_be_reached_is_said(rule: str, reason: str) -> None:
    preds, labels = np.array([0.9, 0.8, 0.1], np.float32), np.array([0, 1, 0] if "=" in rule else [0, 0, 0])
    chosen = choose_threshold(preds, labels, rule)
    assert chosen.value == 0.5 and reason in chosen.reason


@pytest.mark.parametrize("text", ["f1", "best_f1=1", "recall_at_precision", "recall_at_precision=x", "recall_at_precision=1.5", "alerts_per_1000=0", "half=0.3"])
def test_a_rule_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="threshold_rule: expected"):
        parse_rule(text)
