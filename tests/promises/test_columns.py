"""Promises of the column keys: ranks, resume, folder, export, explanation.   pytest tests/promises/test_columns.py"""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.data.prepare import prepare
from mmbert_core.export import exporter
from mmbert_core.predictor import Predictor
from mmbert_core.serve.page import form_fields
from tests.support import tiny

KEYS = {
    "column_encoding": "piecewise_linear",
    "wide_columns": True,
    "min_category_count": 24,
    "date_field_list": ["sent"],
}


def add_dates(path: Path) -> None:
    """A column of dates in several forms, with times and empty cells."""
    rows = path.read_text().splitlines()
    dates = ["2019-09-24 10:15", "2018/1/5", "", "24 Dec 2017", "2016-02-29T23:00:00Z"]
    lines = [f"{row},{'sent' if index == 0 else dates[index % 5]}" for index, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in tiny.metrics_lines(folder) if "train_loss" in line]


def probabilities_of(path: Path) -> list[float]:
    return [float(line.split("\t")[1]) for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same run on one process and on two, in run1 and run2."""
    folder = tmp_path_factory.mktemp("columns")
    tiny.settings(folder, num_rows=90)
    for name in ("train", "val", "test"):
        add_dates(folder / f"{name}.csv")
    for num_processes in (1, 2):
        settings = tiny.settings(folder, num_rows=90, model_path=str(folder / f"run{num_processes}"), **KEYS)
        (folder / "config.json").write_text(json.dumps(settings))
        tiny.mmbert(num_processes, "train", str(folder / "config.json"))
    return folder


def test_losses_do_not_depend_on_the_number_of_processes(runs):
    np.testing.assert_allclose(losses(runs / "run2"), losses(runs / "run1"), rtol=1e-5)
    assert len(losses(runs / "run1")) == 24


def test_predictions_are_the_same_bytes_on_any_number_of_processes(runs):
    for num_processes in (1, 2):
        output = runs / f"by{num_processes}.tsv"
        paths = [str(path) for path in (runs / "run1", runs / "test.csv", output)]
        tiny.mmbert(num_processes, "predict", *paths, "--num_threads", "1")
    assert (runs / "by1.tsv").read_bytes() == (runs / "by2.tsv").read_bytes()
    [tested] = (runs / "run1").glob("multimodal_bert-*/test_result_0.tsv")
    np.testing.assert_allclose(probabilities_of(runs / "by1.tsv"), probabilities_of(tested), atol=1e-6)


def test_a_killed_run_resumes_to_the_same_bits(runs, monkeypatch):
    saved = json.loads((runs / "run1" / "config.json").read_text())["config"]
    config = config_from_dict(saved | {"model_path": str(runs / "resumed"), "save_every": 1})
    tiny.train_in_two_starts(config, monkeypatch, step=15)
    assert losses(runs / "resumed") == losses(runs / "run1")
    for name in ("model.safetensors", "features.json"):
        assert (runs / "resumed" / name).read_bytes() == (runs / "run1" / name).read_bytes(), name


@pytest.mark.parametrize("format", exporter.MODEL_FILES)
def test_exports_give_the_same_probabilities(runs, format):
    for package in exporter.ONNX_PACKAGES:
        pytest.importorskip(package)
    loaded = Predictor.from_folder(runs / "run1").loaded
    assert exporter.export_model(loaded, runs / format, format=format) < 1e-5
    if format == "onnx":
        paths = [str(path) for path in (runs / format / "example.py", runs / "test.csv", runs / "example.tsv")]
        assert tiny.run_command(paths).returncode == 0
        [tested] = (runs / "run1").glob("multimodal_bert-*/test_result_0.tsv")
        np.testing.assert_allclose(probabilities_of(runs / "example.tsv"), probabilities_of(tested), atol=1e-5)


def test_explanation_and_importance_name_the_columns(runs):
    explained = Predictor.from_folder(runs / "run1").explain(
        {"text": "refund pay", "age": "31", "amount": "1.5", "kind": "a", "sent": datetime(2019, 3, 4)}
    )
    assert [span for span, _ in explained["tokens"]] == ["refund", " ", "pay"]
    assert 0 < explained["prediction"]["prob"] < 1
    [report] = (runs / "run1").glob("multimodal_bert-*/report.json")
    importance = json.loads(report.read_text())["importance"]
    assert {item["name"] for item in importance["items"]} == {
        *("text", "age", "amount", "kind"),
        *("sent (age in days)", "sent (month)", "sent (weekday)", "sent (hour)"),
    }


def test_the_form_and_the_model_card_ask_for_the_dates_themselves(runs):
    loaded = Predictor.from_folder(runs / "run1").loaded
    kinds = {field.name: field.kind for field in form_fields(loaded.config, loaded.features)}
    assert kinds == {
        "text": "text",
        "age": "number",
        "amount": "number",
        "kind": "category",
        "sent": "date",
        "row_id": "id",
    }
    card = (runs / "run1" / "README.md").read_text()
    assert "read as age in days, month, weekday, hour; newest in the training rows: 2019-09-24T10:15:00" in card
    assert "rare ones that share a weight" in card and "sent (month) | number" not in card


def test_a_date_that_is_none_is_one_line_and_exit_code_2(runs, capsys):
    bad = runs / "bad.csv"
    bad.write_text((runs / "test.csv").read_text().replace("2018/1/5", "03/04/2018"))
    assert cli.main(["predict", str(runs / "run1"), str(bad), str(runs / "bad.tsv")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "column 'sent': " in line and line.endswith("or train with date_order: day_first or month_first")


def test_keys_left_out_leave_their_fields_out_of_the_folder(runs, tmp_path):
    with_keys = json.loads((runs / "run1" / "features.json").read_text())
    assert len(with_keys["edges"]) == len(with_keys["scales"]) == 6
    plain = {**tiny.settings(runs), "model_path": str(tmp_path)}
    plain_features = prepare(Config(**plain)).features.to_json()
    assert set(with_keys) - set(plain_features) == {"edges", "scales", "pooled", "dates"} and any(with_keys["pooled"])
