"""The verdict: what it says of a model above its baselines, below them, and where nothing can be compared."""

import pytest

from mmbert_core.config import Config
from mmbert_core.console import print_figures
from mmbert_core.report.results import NOT_BETTER, TRY, verdict

REASONS = {"text only": "the model has no text"}


def said(
    value: float | None,
    rivals: dict[str, float | None],
    *,
    low: float | None = None,
    metric: str = "auroc",
    **changes: object,
) -> str:
    """The verdict on a model whose `metric` is `value`, with an interval from `low` on, and its `baselines`."""
    key = f"test/{metric}"
    figures = {
        key: value,
        "undefined": {} if value is not None else {key: "only one class in the labels: '0'"},
        "no_baselines": REASONS,
        "intervals": {} if low is None else {key: [low, 1.0]},
        "baselines": {name: {key: rival} for name, rival in rivals.items()},
    }
    settings = Config(text_name=("text",), label_name="label", model_path="run", early_stop_metric=f"val/{metric}")
    return verdict(figures | changes, "test", settings)


@pytest.mark.parametrize(
    ("value", "low", "beginning"),
    [
        (0.9, 0.75, "The model is above all baselines: "),
        (0.9, None, "The model is above all baselines, but no interval says by how much it may be chance: "),
        (
            0.9,
            0.7,
            "The model is above all baselines, but by less than its interval is wide: ",
        ),  # up to the baseline itself
        (0.7, 0.6, "The model does not beat its baselines: "),  # equal
        (0.4, 0.3, "The model does not beat its baselines: "),
        (0.4, None, "The model does not beat its baselines: "),
    ],
)
def test_the_model_is_compared_with_the_best_baseline(value, low, beginning):
    line = said(value, {"most frequent class": 0.0, "columns only": 0.7, "text only": None}, low=low)
    assert line.startswith(f"{beginning}auroc {value:.4f} against 0.7000 (columns only).") and "\n" not in line
    assert (
        line.startswith(NOT_BETTER) == ("does not beat" in beginning)
        and "Try" not in line
        and "the model has no text" not in line
    )


def test_a_perfect_tie_is_a_tie_without_advice():
    for value, rival in ((1.0, 1.0), (0.99999, 1.0), (1.0, 0.99996)):
        line = said(value, {"columns only": 0.5, "text only": rival}, low=1.0)
        tie = "auroc 1.0000 for both (text only), and more is not possible"
        assert line == f"The model ties with the best of its baselines: {tie}."


def test_advice_on_training_is_for_who_trains(capsys):
    settings = Config(text_name=("text",), label_name="label", model_path="run")
    figures = {
        "test/auroc": 0.6,
        "undefined": {},
        "no_baselines": {},
        "intervals": {},
        "baselines": {"text only": {"test/auroc": 0.7}},
    }
    for advice, expected in ((True, [TRY]), (False, [])):
        print_figures(figures, settings, advice=advice)
        assert capsys.readouterr().out.splitlines()[-1 - len(expected) :] == [
            "The model does not beat its baselines: auroc 0.6000 against 0.7000 (text only).",
            *expected,
        ]


def test_what_cannot_be_compared_has_its_reason():
    assert said(None, {"columns only": 0.7}) == "No comparison with baselines: only one class in the labels: '0'."
    assert said(0.9, {}) == said(0.9, {"columns only": None}) == "No comparison with baselines: there are none."


def test_a_baseline_that_is_missing_is_named():
    for value, low in ((0.9, 0.8), (0.75, 0.5), (0.3, 0.2), (None, None)):
        line = said(value, {"columns only": 0.7}, low=low, no_baselines={"text only": "more than 50 classes"})
        assert line.endswith(" No baseline 'text only': more than 50 classes.")


def test_another_metric_stands_in_for_one_that_is_undefined_or_better_when_lower():
    rows = {"test/auroc": None, "test/f1_macro": 0.6, "test/accuracy": 0.9}
    rivals = {"columns only": {"test/auroc": None, "test/f1_macro": 0.5, "test/accuracy": 0.95}}
    assert "f1_macro 0.6000 against 0.5000" in said(None, {}, metric="auroc", baselines=rivals, **rows)
    for metric in (
        "log_loss",
        "ece",
        "recall",
        "precision",
        "f1_score",
    ):  # everything is class 1: recall 1, and an F1 above the most frequent class's
        line = said(
            0.2,
            {},
            metric=metric,
            baselines={"columns only": {"test/auroc": 0.5, f"test/{metric}": 0.9}},
            intervals={"test/auroc": [0.7, 0.9]},
            **{"test/auroc": 0.8},
        )
        assert line.startswith("The model is above all baselines: auroc 0.8000 against 0.5000")
