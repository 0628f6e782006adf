"""Thresholds by rule, against trying every cut."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from mmbert_core.evaluation.thresholds import (
    EVERY_ROW,
    Threshold,
    choose_threshold,
    parse_rule,
    predicted_classes,
    threshold_curve,
)
from mmbert_core.runtime.errors import InputError


def random_rows(seed: int, num_rows: int = 200, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_rows) < 0.3).astype(int)
    preds = 1 / (1 + np.exp(-(rng.normal(size=num_rows) + 1.5 * labels)))
    return (np.round(preds, 1) if ties else preds).astype(np.float32), labels


def brute_force(preds: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float, int]]:
    """F1, precision, recall and rows found of every threshold that could matter."""
    rows = []
    for value in [-1.0, *np.unique(preds).tolist()]:
        chosen = (preds > value).astype(int)
        rows.append(
            (
                *(
                    measure(labels, chosen, zero_division=0)
                    for measure in (oracle.f1_score, oracle.precision_score, oracle.recall_score)
                ),
                chosen.sum(),
            )
        )
    return rows


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_each_rule_finds_the_best_cut(seed: int, ties: bool) -> None:
    preds, labels = random_rows(seed, ties=ties)
    tried = brute_force(preds, labels)
    chosen = choose_threshold(preds, labels, "best_f1")
    assert chosen.f1 == pytest.approx(max(f1 for f1, *_ in tried))
    chosen = choose_threshold(preds, labels, "recall_at_precision=0.6")
    assert chosen.precision >= 0.6 and chosen.recall == pytest.approx(
        max(recall for _, precision, recall, _ in tried if precision >= 0.6)
    )
    chosen = choose_threshold(preds, labels, "precision_at_recall=0.7")
    assert chosen.recall >= 0.7 and chosen.precision == pytest.approx(
        max(precision for _, precision, recall, _ in tried if recall >= 0.7)
    )
    chosen = choose_threshold(preds, labels, "alerts_per_1000=50")
    assert chosen.alerts_per_1000 == pytest.approx(5 * max(found for *_, found in tried if found <= 10))


def test_figures_are_those_of_the_rows_above() -> None:
    preds, labels = random_rows(7)
    chosen = choose_threshold(preds, labels, "best_f1")
    above = (preds > chosen.value).astype(int)
    assert (chosen.precision, chosen.recall, chosen.f1) == pytest.approx(
        tuple(measure(labels, above) for measure in (oracle.precision_score, oracle.recall_score, oracle.f1_score))
    )
    assert Threshold.from_json(chosen.to_json()) == chosen
    assert choose_threshold(preds, labels, "half").value == 0.5


def test_thresholds_run_from_none_to_all() -> None:
    preds, labels = np.array([0.2, 0.9, 0.9, 0.4], np.float32), np.array([0, 1, 0, 1])
    curve = threshold_curve(preds, labels)
    assert curve.predicted_positives.tolist() == [0, 2, 3, 4] and curve.true_positives.tolist() == [0, 1, 2, 2]
    assert [int((preds > value).sum()) for value in curve.thresholds] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [("recall_at_precision=0.99", "no threshold reaches 0.99"), ("best_f1", "no validation row of class 1")],
)
def test_what_cannot_be_reached_is_said(rule: str, reason: str) -> None:
    preds, labels = np.array([0.9, 0.8, 0.1], np.float32), np.array([0, 1, 0] if "=" in rule else [0, 0, 0])
    chosen = choose_threshold(preds, labels, rule)
    assert chosen.value == 0.5 and reason in chosen.reason


@pytest.mark.parametrize(
    "text",
    [
        "f1",
        "best_f1=1",
        "recall_at_precision",
        "recall_at_precision=x",
        "recall_at_precision=1.5",
        "alerts_per_1000=0",
        "half=0.3",
    ],
)
def test_a_rule_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="threshold_rule: expected"):
        parse_rule(text)


# ---- ties, zeros, ones, neighbours ----

FLOAT32 = [
    0.0,
    1e-45,
    1.1754944e-38,
    1e-30,
    0.25,
    0.5,
    np.nextafter(np.float32(0.5), np.float32(1)),
    0.75,
    np.nextafter(np.float32(1), np.float32(0)),
    1.0,
]
FLOAT64 = [0.0, 5e-324, 0.5, np.nextafter(0.5, 1), np.nextafter(np.nextafter(0.5, 1), 1), np.nextafter(1.0, 0), 1.0]
NUMBERS = {
    "best_f1": [None],
    "recall_at_precision": [0.07, 0.5, 2 / 3, 1.0],
    "precision_at_recall": [0.1, 0.7, 1.0],
    "alerts_per_1000": [20.0, 70.0, 290.0, 500.0, 1000.0],
}


@st.composite
def hard_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of few distinct values, with a row of class 1 among them."""
    dtype, values = draw(st.sampled_from([(np.float32, FLOAT32), (np.float64, FLOAT64)]))
    some = st.one_of(st.sampled_from(values), st.floats(0, 1, width=32 if dtype is np.float32 else 64))
    pool = draw(st.lists(some, min_size=1, max_size=6))
    rows = draw(st.lists(st.tuples(st.sampled_from(pool), st.booleans()), min_size=1, max_size=25))
    labels = np.array([label for _, label in rows], dtype=np.int64)
    labels[draw(st.integers(0, len(rows) - 1))] = 1
    return np.array([value for value, _ in rows], dtype=dtype), labels


def exact_figures(above: np.ndarray, labels: np.ndarray) -> dict[str, Fraction]:
    """The figures of the rows above, as fractions."""
    found, true, positives = int(above.sum()), int((above & (labels == 1)).sum()), int(labels.sum())
    figures = {
        "precision": Fraction(true, found) if found else Fraction(0),
        "recall": Fraction(true, positives),
        "f1": Fraction(2 * true, found + positives),
    }
    return figures | {"alerts_per_1000": Fraction(1000 * found, len(labels))}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(hard_rows(), st.sampled_from([(rule, number) for rule, numbers in NUMBERS.items() for number in numbers]))
def test_the_promise_of_a_rule_holds_whatever_the_probabilities(
    rows: tuple[np.ndarray, np.ndarray], rule: tuple[str, float | None]
) -> None:
    """Figures are those of the rows above the value, the promise is kept where a cut keeps it, and no cut is better."""
    (preds, labels), (name, number) = rows, rule
    chosen = choose_threshold(preds, labels, name if number is None else f"{name}={number!r}")
    chosen = Threshold.from_json(json.loads(json.dumps(chosen.to_json())))  # as a model folder keeps it
    above = [np.zeros(len(preds), bool), *(preds >= value for value in np.unique(preds))]
    figures = [exact_figures(mask, labels) for mask in above]
    key, best, kept = {
        "best_f1": ("f1", max, lambda each: each["alerts_per_1000"] > 0),
        "recall_at_precision": (
            "recall",
            max,
            lambda each: each["alerts_per_1000"] > 0 and float(each["precision"]) >= number,
        ),
        "precision_at_recall": ("precision", max, lambda each: float(each["recall"]) >= number),
        "alerts_per_1000": ("alerts_per_1000", max, lambda each: 0 < float(each["alerts_per_1000"]) <= number),
    }[name]
    candidates = [each for each in figures if kept(each)]
    assert (chosen.reason is None) == bool(candidates)
    if candidates:
        found = exact_figures(predicted_classes(preds, threshold=chosen.value) == 1, labels)
        assert {name: getattr(chosen, name) for name in found} == {name: float(value) for name, value in found.items()}
        assert kept(found) and found[key] == best(each[key] for each in candidates)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(hard_rows())
def test_each_cut_separates_what_it_counts(rows: tuple[np.ndarray, np.ndarray]) -> None:
    preds, labels = rows
    curve = threshold_curve(preds, labels)
    assert [int((preds > np.float64(value)).sum()) for value in curve.thresholds] == curve.predicted_positives.tolist()
    assert [int(labels[preds > np.float64(value)].sum()) for value in curve.thresholds] == curve.true_positives.tolist()


def test_all_rows_are_those_of_probability_zero_too() -> None:
    preds, labels = np.array([0.0, 0.0, 0.3, 0.9], np.float32), np.array([1, 0, 1, 1])
    chosen = choose_threshold(preds, labels, "precision_at_recall=1.0")
    assert (chosen.value, chosen.recall, chosen.precision, chosen.reason) == (EVERY_ROW, 1.0, 0.75, None)
    assert predicted_classes(preds, threshold=chosen.value).tolist() == [1, 1, 1, 1]
    assert 0 < choose_threshold(preds + np.float32(1e-40), labels, "precision_at_recall=1.0").value < 1e-40


@pytest.mark.parametrize("value", [-0.5, -2.0, 1.5, float("nan"), True, "0.5", None])
def test_a_stored_threshold_is_a_probability_or_that_of_every_row(value: object) -> None:
    assert Threshold.from_json({"value": EVERY_ROW, "rule": "best_f1"}).value == EVERY_ROW
    with pytest.raises(ValueError, match="expected a threshold from 0 to 1"):
        Threshold.from_json({"value": value, "rule": "best_f1"})
