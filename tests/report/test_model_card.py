"""The model card: its sections, and names and values that cannot leave their line, their code span or their cell."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.evaluation.calibration import Calibration
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.thresholds import EVERY_ROW, Threshold
from mmbert_core.report.model_card import render_card

HOSTILE = (
    "a`b``c",
    "a|b||c",
    "line\n# a heading\r\n\n```\nmmbert",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "tab\tand\u2028separator\x85end",
    "<b>&amp;\"'</b>",
)


def loaded(name: str = "x", **changes: Any) -> SimpleNamespace:
    """The contents of a model folder of which every name and reason is `name`."""
    values = {
        "config": Config(
            text_name=(f"{name}t",),
            label_name=f"{name}l",
            id_name=f"{name}i",
            tab_field_list=(f"{name}n",),
            cat_field_list=(f"{name}c",),
            encoder=f"{name}e",
            model_path="m",
        ),
        "features": Features((f"{name}n",), (1.5,), (0.0,), (1.0,), (False,), (f"{name}c",), (("a", "b"),)),
        "labels": Labels((f"{name}0", f"{name}1")),
        "decision": Decision(Threshold(0.25, "best_f1", rows=1234), Calibration(1.5, 900, 0.04, 0.02, method=name)),
        "blend": None,
    }
    return SimpleNamespace(**values | changes)


def summary(name: str = "x") -> dict[str, Any]:
    metrics = {"test/accuracy": 0.9, "test/auroc": 0.95, "test/num_rows": 1000}
    return {
        "data": {
            "train": {"rows": 2000, "classes": {f"{name}0": 1500, f"{name}1": 500}, "classes_left_out": 1100},
            "files": {},
        },
        "best": {"step": 1200, "metric": f"val/{name}", "value": 0.5},
        "test": metrics | {"intervals": {"test/auroc": [0.9, 0.99]}, "baselines": {name: {"test/accuracy": 0.8}}},
    }


def card(name: str, **changes: Any) -> str:
    return render_card(name, loaded(name, **changes), summary(name))


def test_the_card_says_what_the_model_needs_and_how_good_it_is():
    text = card("x")
    for line in (
        "# x",
        "A classifier of `x0`, `x1` (column `xl`), fine-tuned from `xe` with mmbert_core.",
        "| `xt` | text | up to 1 x 256 tokens |",
        "| `xn` | number | missing: 1.5 |",
        "| `xc` | category | 2 known values |",
        "| `xi` | id | carried through |",
        "* train: 2,000 rows (`x0` 1,500, `x1` 500 and 1,100 more classes)",
        "* best step 1,200: val/x 0.5000 on the validation rows",
        "1,000 test rows; 95 % bootstrap intervals.",
        "| metric | model | interval | x |",
        "|---|---|---|---|",
        "| auroc | 0.9500 | 0.9000 - 0.9900 | undefined |",
        "| accuracy | 0.9000 |  | 0.8000 |",
        "Class 1 is `x1`, 25.0 % of the training rows: `prob` is its probability, "
        "and F1, precision, recall and the threshold are about it.",
        "A row counts as `x1` when its probability is above 0.25, by the rule `best_f1` on 1,234 validation rows.",
        "`prob_calibrated` divides logits by 1.5000 (x); expected calibration error on the validation rows "
        "0.0400 before, 0.0200 after.",
        "mmbert predict x new.csv predictions.tsv",
    ):
        assert line in text.split("\n"), line
    assert "\n\n\n" not in text and text.endswith("does worst.\n")


def test_what_a_folder_does_not_record_is_said():
    text = render_card("x", loaded(decision=Decision()), {"data": {}, "best": {}, "test": None})
    for line in (
        "Not recorded in this folder.",
        "No labelled test rows were scored.",
        "A row counts as `x1` when its probability is above 0.5 (the model folder has none).",
        "Probabilities are not calibrated: the model folder has none.",
    ):
        assert line in text.split("\n"), line
    every = card("x", decision=replace(loaded().decision, threshold=Threshold(EVERY_ROW, "best_f1", rows=5)))
    assert "Every row counts as `x1`, also those with a probability of exactly 0, by the rule" in every


def test_several_classes_and_columns_alone():
    config = replace(loaded().config, text_name=(), is_binary=False, num_classes=30)
    text = card("x", config=config, labels=Labels(tuple(f"k{index}" for index in range(30))))
    assert "`k18`, `k19`, ... from columns alone, made with mmbert_core." in text and "`k20`" not in text
    assert "\nThe class of the largest probability is predicted.\n" in text and "Class 1 is" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_on_its_line_in_its_code_span_and_in_its_cell(name):
    plain, hostile = card("x").split("\n"), card(name).split("\n")
    assert len(hostile) == len(plain)
    for expected, found in zip(plain, hostile, strict=True):
        assert found.count("`") == expected.count("`"), found
        assert len(re.findall(r"(?<!\\)\|", found)) == len(re.findall(r"(?<!\\)\|", expected)), found


@pytest.mark.parametrize("name", HOSTILE)
def test_reasons_of_a_folder_are_escaped_too(name):
    decision = Decision(Threshold(0.5, name, reason=name), Calibration(reason=name))
    text = render_card("x", loaded(decision=decision), summary())
    assert len(text.split("\n")) == len(card("x").split("\n"))
    line = next(line for line in text.split("\n") if line.startswith("Probabilities are not calibrated: "))
    assert "`" not in line and not re.search(r"(?<!\\)\|", line)
