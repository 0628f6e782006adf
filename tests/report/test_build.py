"""Runs with little to show, and sections that fail: each has its reason, and no run is lost."""

import csv
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmbert_core import cli, console, hooks
from mmbert_core.config import Config
from mmbert_core.inference.model_files import WEIGHTS
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.report import build, results, wrong_rows
from mmbert_core.report.page import OPTIONAL, SECTIONS
from mmbert_core.training import decision_fit, finish
from tests.support import tiny
from tests.support.page_tree import tree_of

pytestmark = pytest.mark.usefixtures("one_thread")

OF_LABELS = (
    "metrics",
    "baselines",
    "threshold",
    "calibration",
    "roc",
    "precision_recall",
    "confusion",
    "scores",
    "slices",
    "importance",
    "errors",
)
OF_A_MODEL = {
    "model.safetensors",
    "config.json",
    "features.json",
    "labels.json",
    "thresholds.json",
    "summary.json",
    "README.md",
    "train_results.json",
}
OF_A_TEST = {"test_result_0.tsv", "test_metrics.json", "report.json", "report.html"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, caplog):
    """They take longer than these runs, and have tests of their own."""
    monkeypatch.setattr(results, "write_plots", lambda *_, **__: [])
    monkeypatch.setattr(logging.getLogger("mmbert_core"), "propagate", True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """An encoder and tables, also test rows without labels and some of one class only."""
    folder = tmp_path_factory.mktemp("files")
    tiny.settings(folder, num_rows=24)
    with open(folder / "test.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    for name, kept in (
        ("unlabelled", [row[:-1] for row in (header, *rows)]),
        ("one", [header, *(row for row in rows if row[-1] == "1")]),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as stream:
            csv.writer(stream).writerows(kept)
    return folder


def config_of(files: Path, folder: Path, **changes: Any) -> Config:
    return Config(**tiny.settings(files, **({"model_path": str(folder / "run"), "max_epochs": 1} | changes)))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def report_of(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the run's only test, and its report.json."""
    [folder] = run.glob("multimodal_bert-*")
    return folder, json.loads((folder / "report.json").read_text())


def page_of(folder: Path) -> dict[str, str]:
    """The text of each section of report.html, by the report's key."""
    report = {
        section.attributes["id"]: section.text
        for section in tree_of((folder / "report.html").read_text()).all("section")
    }
    anchors = {key: title.lower().replace(" ", "-") for title, key, *_ in SECTIONS}
    return {key: report[anchor] for key, anchor in anchors.items() if key not in OPTIONAL}


# ---- little to show ----


FEW = {"slices": "no value and no quarter of a column has 30 rows"}  # of 24
LITTLE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # changes, and the reason of each section that is empty
    "no validation rows": ({"val_path": (), "val_fraction": 0.0}, FEW),
    "text only": (
        {"tab_field_list": (), "cat_field_list": ()},
        {"slices": "the model has no columns, and none were named"},
    ),
    "columns only": ({"text_name": ()}, FEW),
    "unlabelled": ({"test_path": "unlabelled.csv"}, dict.fromkeys(OF_LABELS, "no labelled rows")),
    "one class": (
        {"test_path": "one.csv", "early_stop_metric": "val/auroc"},
        {
            **FEW,
            "roc": "one class only in the labels",
            "precision_recall": "one class only in the labels",
            "importance": "auroc is undefined on ",
        },
    ),
}


@pytest.mark.parametrize("name", LITTLE)
def test_a_run_with_little_to_show_has_every_section(files, tmp_path, name):
    changes, reasons = LITTLE[name]
    if "test_path" in changes:
        changes = changes | {"test_path": (str(files / changes["test_path"]),)}
    results = tiny.train(config_of(files, tmp_path, **changes))
    run = tmp_path / "run"
    folder, report = report_of(run)
    assert names_in(run) >= OF_A_MODEL and names_in(folder) == OF_A_TEST
    empty = {
        key: section["reason"] for key in (*OF_LABELS, "training", "data") if set(section := report[key]) == {"reason"}
    }
    assert set(empty) - {"errors"} == set(reasons) - {"errors"} and all(
        empty[key].startswith(why) for key, why in reasons.items()
    )
    page = page_of(folder)
    assert all(empty[key] in text if key in empty else len(text) > 10 for key, text in page.items())
    rows = len(report["errors"].get("rows", ()))
    wrong = (
        0
        if name == "unlabelled"
        else sum(sum(line) for line in report["confusion"]["counts"]) - sum(np.diag(report["confusion"]["counts"]))
    )
    assert rows == min(wrong, wrong_rows.MAX_ERRORS)

    baselines = {row["name"] for row in report["baselines"].get("rows", ())}
    importance = {item["name"] for item in report["importance"].get("items", ())}
    if name == "no validation rows":
        assert (
            report["threshold"]["reason"] == report["calibration"]["reason"] == "no validation rows"
            and report["training"]["validations"] == []
        )
        assert page["threshold"].count("no validation rows") and set(report["data"]) == {"files", "train", "test"}
    if name == "text only":
        assert baselines == {"most frequent class", "text only"} and importance == {"text"}
    if name == "columns only":
        assert baselines == {"most frequent class", "columns only"} and importance == {"age", "amount", "kind"}
        assert all(error["tokens"] == [] and error["columns"] for error in report["errors"]["rows"]) and rows
    if name == "unlabelled":
        assert (
            results.test_metrics == {"test/num_rows": 37} and "No labelled test rows" in (run / "README.md").read_text()
        )
        assert report["data"]["test"]["classes"] is None and not report["has_labels"]
    if name == "one class":
        assert report["metrics"]["model"]["auroc"] == {
            "value": None,
            "interval": None,
            "reason": "only one class in the labels: '1'",
        }
        assert "only one class in the labels" in page["metrics"] and "f1_macro" in report["baselines"]["verdict"]
        assert report["data"]["test"]["classes"]["0"] == 0 < report["data"]["test"]["classes"]["1"]


# ---- probabilities that are not finite ----


@pytest.mark.parametrize(("num_classes", "value"), [(2, np.nan), (2, np.inf), (3, np.nan)])
def test_predictions_that_are_not_finite_are_reported_and_the_run_completes(
    tmp_path, monkeypatch, capsys, caplog, num_classes, value
):
    plain = hooks.test_step

    def test_step(model, batch, batch_idx, outputs, **options):
        plain(model, batch, batch_idx, outputs, **options)
        if batch_idx == 0:
            preds = outputs[-1].preds.copy()
            preds[0] = value
            outputs[-1] = replace(outputs[-1], preds=preds)

    monkeypatch.setattr(hooks, "test_step", test_step)
    config = config_of(tmp_path, tmp_path, num_classes=num_classes)
    results = tiny.train(config)
    figures, why = results.test_metrics, "1 of 37 predictions are not finite"
    metrics = [key for key in figures if key.startswith("test/") and key != "test/num_rows"]
    assert (
        len(metrics) >= 14
        and all(figures[key] is None and figures["undefined"][key] == why for key in metrics)
        and figures["intervals"] == {}
    )
    folder, report = report_of(tmp_path / "run")
    assert names_in(folder) == OF_A_TEST and load_model_folder(tmp_path / "run")
    assert {key: report[key] for key in OF_LABELS} == dict.fromkeys(
        OF_LABELS, {"reason": "predictions that are not finite"}
    )
    assert all("predictions that are not finite" in page_of(folder)[key] for key in OF_LABELS)
    with open(folder / "test_result_0.tsv", newline="") as stream:
        cells = [row["prob" if num_classes == 2 else "prob_0"] for row in csv.DictReader(stream, delimiter="\t")]
    assert len(cells) == 37 and np.isfinite(np.array(cells, float)).sum() == 36
    console.print_figures(figures, config)
    assert capsys.readouterr().out.splitlines()[-1] == f"No comparison with baselines: {why}."
    assert any(
        message.startswith("probabilities that are not finite: 1 of 37 rows, first ") for message in caplog.messages
    )


# ---- evaluate: what it leaves ----


@pytest.fixture(scope="module")
def model(files, tmp_path_factory) -> Path:
    """A model folder with the report of its test; its learning rate is too low to learn anything."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(results, "write_plots", lambda *_, **__: [])
        tiny.train(config_of(files, folder, lr=1e-9))
    return folder / "run"


@pytest.fixture
def output_folder(tmp_path, monkeypatch) -> Path:
    """An empty folder for outputs; temporary files of the process would be found in its parent."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def everything(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def test_evaluate_leaves_one_folder_and_says_that_a_model_is_no_better_than_its_baselines(
    model, files, output_folder, tmp_path, capsys
):
    before = everything(model, files)
    assert (
        cli.main(
            ["evaluate", str(model), str(files / "test.csv"), "--output", str(output_folder), "--num_threads", "1"]
        )
        == 0
    )
    [folder] = output_folder.iterdir()
    assert (
        names_in(folder) == OF_A_TEST
        and everything(model, files) == before
        and names_in(tmp_path / "temporary") == set()
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line.startswith("The model does not beat its baselines: auroc ") and "Try a higher lr" not in line
    )  # who evaluates does not train
    report = json.loads((folder / "report.json").read_text())
    assert report["baselines"]["verdict"] == line and line in page_of(folder)["baselines"]


BAD = {
    "a label that training never had": ("label", "7"),
    "no label": ("label", ""),
    "text in a numeric column": ("amount", "many"),
}


@pytest.mark.parametrize(
    "case",
    [*BAD, "a column that is missing", "a file that is missing", "a slice of no column", "an output that is a file"],
)
def test_evaluate_on_bad_input_is_one_line_and_leaves_nothing(model, files, output_folder, tmp_path, capsys, case):
    path, words = tmp_path / "bad.csv", []
    with open(files / "test.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if case in BAD:
        rows[30][BAD[case][0]] = BAD[case][1]
    elif case == "a column that is missing":
        rows = [{key: cell for key, cell in row.items() if key != "age"} for row in rows]
    elif case == "a slice of no column":
        words = ["--slices", "colour"]
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if case == "a file that is missing":
        path.unlink()
    output = output_folder / "new" / "folder"
    if case == "an output that is a file":
        output = output_folder.parent / "taken"
        output.write_text("")
    before = everything(model, tmp_path)
    assert cli.main(["evaluate", str(model), str(path), "--output", str(output), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and [line.startswith("error: ") for line in said.err.splitlines()] == [True]
    assert everything(model, tmp_path) == before


def test_evaluate_of_a_model_that_overflows_names_the_row_and_leaves_nothing(
    model, files, output_folder, tmp_path, capsys
):
    """Finite weights, but logits beyond float32."""
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / WEIGHTS)
    weights["final_merge_network.linear_layer_final.weight"].fill_(3e38)
    save_file(weights, broken / WEIGHTS)
    tiny.without_manifest(broken)
    before = everything(broken, tmp_path)
    with pytest.raises(RuntimeError):
        cli.main(["evaluate", str(broken), str(files / "test.csv"), "--output", str(output_folder)])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "test.csv row 1 (line 2)" in line and "its probability is not finite" in line
    assert everything(broken, tmp_path) == before


# ---- sections that fail ----


def fail(*_: Any, **__: Any) -> None:
    raise MemoryError("no more")


def train_despite_failure(files: Path, tmp_path: Path, caplog) -> tuple[dict[str, Any], str]:
    """The results of a run that has its model and its test figures; and its only warning about a failure."""
    results = tiny.train(config_of(files, tmp_path))
    run = tmp_path / "run"
    assert names_in(run) >= OF_A_MODEL and load_model_folder(run)
    [folder] = run.glob("multimodal_bert-*")
    assert names_in(folder) >= {"test_result_0.tsv", "test_metrics.json"}
    figures = json.loads((folder / "test_metrics.json").read_text())
    assert figures == json.loads(json.dumps(results.test_metrics)) and figures["test/accuracy"] is not None
    [warning] = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "MemoryError" in record.getMessage()
    ]
    return results, warning


def test_baselines_that_fail_cost_no_run(files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decision_fit.baselines, "fit_best", fail)
    results, warning = train_despite_failure(files, tmp_path, caplog)
    folder, report = report_of(tmp_path / "run")
    assert warning == "no baselines: MemoryError: no more" and results.test_metrics["baselines"] == {}
    assert (
        report["baselines"] == {"reason": "the model folder has none"}
        and "the model folder has none" in page_of(folder)["baselines"]
    )
    assert (
        cli.main(["evaluate", str(tmp_path / "run"), str(files / "test.csv"), "--output", str(tmp_path / "again")]) == 0
    )


@pytest.mark.parametrize(
    ("module", "function", "section"),
    [
        ("curves", "roc_section", "roc"),
        ("build", "permutation_importance", "importance"),
        ("wrong_rows", "explain_rows", "errors"),
    ],
)
def test_a_section_that_fails_is_a_section_with_its_reason(
    files, tmp_path, monkeypatch, caplog, module, function, section
):
    monkeypatch.setattr(f"mmbert_core.report.{module}.{function}", fail)
    _, warning = train_despite_failure(files, tmp_path, caplog)
    folder, report = report_of(tmp_path / "run")
    assert warning == "a section of the report is missing: MemoryError: no more"
    assert [key for key in OF_LABELS if set(report[key]) == {"reason"} and key not in FEW] == [section]
    assert page_of(folder)[section].endswith("MemoryError: no more")


@pytest.mark.parametrize(
    ("module", "function"), [(build, "render"), (build, "build_report"), (finish, "training_section")]
)
def test_a_report_that_fails_costs_no_run(files, tmp_path, monkeypatch, caplog, module, function):
    caplog.set_level(logging.INFO, logger="mmbert_core")
    monkeypatch.setattr(module, function, fail)
    results, warning = train_despite_failure(files, tmp_path, caplog)
    folder = results.test_folder
    assert warning == "no report.html: MemoryError: no more" and not (folder / "report.html").exists()
    assert not any(message.startswith("report: ") for message in caplog.messages)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"] == json.loads(
        (folder / "test_metrics.json").read_text()
    )


def test_a_damaged_log_of_the_run_costs_no_evaluation(model, files, output_folder, tmp_path, capsys):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "train_loss": 0.5}\n')  # no lr
    assert cli.main(["evaluate", str(damaged), str(files / "test.csv"), "--output", str(output_folder)]) == 0
    [folder] = output_folder.iterdir()
    assert names_in(folder) >= {"test_result_0.tsv", "test_metrics.json"}
