"""The test stage of a run: threshold, calibration, report; `evaluate` and `predict` give the same figures."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.report.model_card import describe
from mmbert_core.report.page import render
from mmbert_core.report.report_schema import report_of
from mmbert_core.report.wrong_rows import distance_to
from mmbert_core.runtime.errors import InputError
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# sections of a report that need labels
OF_LABELS = """
    metrics baselines threshold calibration roc precision_recall confusion scores slices importance errors
""".split()


def train_with_test(folder: Path, num_classes: int = 2, **changes) -> Path:
    values = tiny.settings(folder, num_classes=num_classes, num_rows=240, max_epochs=2)
    for seed, name in enumerate(("val", "test"), start=5):
        tiny.write_table(folder / f"{name}.csv", 220, seed=seed, num_classes=num_classes)
    tiny.train(Config(**(values | {"tab_field_list": ("age", "amount"), "head_lr": 1e-2} | changes)))
    return folder / "run"


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    return train_with_test(tmp_path_factory.mktemp("binary"))


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    return train_with_test(tmp_path_factory.mktemp("several"), 3)


def folder_of(run: Path) -> Path:
    [folder] = run.glob("multimodal_bert-*")
    return folder


def words_of(report: dict) -> list:
    """(word, weight) of all explained errors; removes them from the report."""
    return [pair for row in report["errors"]["rows"] for pair in row.pop("tokens")]


def check_same_words(first: list, second: list) -> None:
    """Weights are gradients, whose rounding differs between processes."""
    assert [word for word, _ in first] == [word for word, _ in second]
    assert [weight for _, weight in first] == pytest.approx([weight for _, weight in second], abs=1e-5)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_threshold_is_chosen_on_validation_and_used(binary, tmp_path):
    threshold = json.loads((binary / "thresholds.json").read_text())["threshold"]
    assert threshold["rule"] == "best_f1" and threshold["rows"] == 220 and threshold["value"] != 0.5
    rows = rows_of(folder_of(binary) / "test_result_0.tsv")
    assert all(row["pred"] == str(int(float(row["prob"]) > threshold["value"])) for row in rows)
    figures = json.loads((folder_of(binary) / "test_metrics.json").read_text())
    labels, preds = ([int(row[name]) for row in rows] for name in ("label", "pred"))
    assert figures["test/f1_score"] == pytest.approx(oracle.f1_score(labels, preds))
    assert figures["threshold"] == threshold["value"]
    val = binary.parent / "val.csv"
    assert cli.main(["predict", str(binary), str(val), str(tmp_path / "val.tsv")]) == 0
    rows = rows_of(tmp_path / "val.tsv")
    labels, preds, probs = ([float(row[name]) for row in rows] for name in ("label", "pred", "prob"))
    assert threshold["f1"] == pytest.approx(oracle.f1_score(labels, preds))
    assert threshold["f1"] >= max(oracle.f1_score(labels, np.array(probs) > value) for value in probs) - 1e-9


def test_a_threshold_on_the_command_line_wins(binary, several, tmp_path):
    def predict(run: Path, threshold: str) -> int:
        words = [str(run), str(run.parent / "test.csv"), str(tmp_path / "t.tsv"), "--threshold", threshold]
        return cli.main(["predict", *words])

    assert predict(binary, "0.9") == 0
    assert all(row["pred"] == str(int(float(row["prob"]) > 0.9)) for row in rows_of(tmp_path / "t.tsv"))
    assert predict(several, "0.9") == 2 and predict(binary, "1.5") == 2


def test_calibrated_probabilities(binary, several):
    for run in (binary, several):
        temperature = json.loads((run / "thresholds.json").read_text())["calibration"]["temperature"]
        rows = pd.read_csv(folder_of(run) / "test_result_0.tsv", sep="\t")
        if run == binary:
            odds = np.log(rows["prob"] / (1 - rows["prob"])) / temperature
            assert np.allclose(rows["prob_calibrated"], 1 / (1 + np.exp(-odds)), atol=1e-6)
        else:
            logits = np.log(rows[["prob_0", "prob_1", "prob_2"]].to_numpy()) / temperature
            calibrated = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            assert np.allclose(rows["prob_calibrated"], calibrated[np.arange(len(rows)), rows["pred"]], atol=1e-6)
        assert (rows["prob_calibrated"].between(0, 1)).all() and temperature != 1.0


def test_evaluate_gives_the_figures_of_the_test_stage(binary, several, tmp_path, capsys):
    for run in (binary, several):
        words = [str(run), str(run.parent / "test.csv"), "--output", str(tmp_path / run.parent.name)]
        assert cli.main(["evaluate", *words, "--num_threads", "1"]) == 0
        assert "interval" in capsys.readouterr().out
        [folder] = (tmp_path / run.parent.name).glob("multimodal_bert-*")
        assert (folder / "test_result_0.tsv").read_bytes() == (folder_of(run) / "test_result_0.tsv").read_bytes()
        first, second = (json.loads((path / "test_metrics.json").read_text()) for path in (folder_of(run), folder))
        assert first.pop("test_loss") > 0 and first == second
        first, second = (json.loads((path / "report.json").read_text()) for path in (folder_of(run), folder))
        check_same_words(*(words_of(report) for report in (first, second)))
        assert [name for name in OF_LABELS if first[name] != second[name]] == []
        assert [name for name in OF_LABELS if first[name].get("reason")] == ([] if run == binary else ["threshold"])
        assert not (folder / "cache").exists()


def test_two_processes_report_the_same_as_one(tmp_path):
    """The end of a run, and `evaluate`, on two ranks: the figures are those of one process with the same model."""
    val = str(tiny.write_table(tmp_path / "more.csv", 220, seed=7))
    values = tiny.settings(tmp_path, num_rows=48, max_epochs=1, val_path=(val,))
    (tmp_path / "config.json").write_text(json.dumps(values))
    run, table = tmp_path / "run", str(tmp_path / "test.csv")
    done = tiny.torchrun(2, ["-m", "mmbert_core", "train", str(tmp_path / "config.json")])
    assert done.returncode == 0, done.stderr[-4000:]
    evaluate = ["evaluate", str(run), table, "--num_threads", "1", "--output"]
    assert cli.main([*evaluate, str(tmp_path / "one")]) == 0
    two = tiny.torchrun(2, ["-m", "mmbert_core", *evaluate, str(tmp_path / "two")])
    assert two.returncode == 0, two.stderr[-4000:]
    assert json.loads((run / "train_results.json").read_text())["world_size"] == 2
    folders = [folder_of(path) for path in (run, tmp_path / "one", tmp_path / "two")]  # each has one folder
    assert len({(folder / "test_result_0.tsv").read_bytes() for folder in folders}) == 1
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert "items" in reports[0]["importance"] and reports[0]["calibration"]["bins"]
    assert len(reports[0]["errors"]["rows"]) > 3
    words = [words_of(report) for report in reports]
    for name in OF_LABELS:
        assert reports[0][name] == reports[1][name] == reports[2][name], name
    check_same_words(words[0], words[1])
    assert words[1] == words[2]
    verdicts = [[line for line in process.stdout.splitlines() if "baselines: " in line] for process in (done, two)]
    assert verdicts[0] == verdicts[1] == [reports[1]["baselines"]["verdict"]]  # printed by one rank alone
    assert sorted(path.name for path in folders[2].iterdir()) == sorted(path.name for path in folders[1].iterdir())


def test_evaluate_needs_labels(binary, tmp_path, capfd):
    pd.read_csv(binary.parent / "test.csv", dtype=str).drop(columns="label").to_csv(tmp_path / "none.csv", index=False)
    assert cli.main(["evaluate", str(binary), str(tmp_path / "none.csv")]) == 2
    assert "column 'label' not found" in capfd.readouterr().err and len(list(binary.glob("multimodal_bert-*"))) == 1


def test_slices_of_a_column_that_the_model_does_not_read(binary, tmp_path):
    frame = pd.read_csv(binary.parent / "test.csv", dtype=str, keep_default_na=False)
    frame.assign(country=["be", "nl"] * 110, weight=np.arange(220)).to_csv(tmp_path / "more.csv", index=False)
    figures, folder = Predictor.from_folder(binary).evaluate_file(
        [str(tmp_path / "more.csv")], tmp_path, slice_columns=["country", "weight", "country"]
    )
    report = json.loads((folder / "report.json").read_text())
    found = {(row["column"], row["value"]): row["rows"] for row in report["slices"]["rows"]}
    assert found[("country", "be")] == found[("country", "nl")] == 110
    assert sum(found.values()) == 440 and len(found) == 6


def test_a_report_of_later_rows_describes_the_training_rows(binary, tmp_path):
    """The training rows and the best step, from summary.json, and the later rows."""
    pd.read_csv(binary.parent / "test.csv", dtype=str).head(90).to_csv(tmp_path / "later.csv", index=False)
    _, folder = Predictor.from_folder(binary).evaluate_file([str(tmp_path / "later.csv")], tmp_path)
    run, later = (json.loads((path / "report.json").read_text()) for path in (folder_of(binary), folder))
    assert later["data"]["train"] == run["data"]["train"] and later["data"]["test"]["rows"] == 90
    assert str(tmp_path / "later.csv") in later["data"]["files"]
    best, best_later = ((report["training"]["best_step"], report["training"]["metric"]) for report in (run, later))
    assert best_later == best != (None, None)


def test_errors_are_ordered_by_their_distance_from_the_threshold(binary, tmp_path):
    """Distances are relative: 0 is as far below a low threshold as 1 is above it."""
    found = distance_to(0.1, np.float32([0.09, 0.0, 0.45, 1.0])).tolist()
    assert found == pytest.approx([0.1, 1.0, 0.35 / 0.9, 1.0], abs=1e-6)
    for threshold, probabilities in ((1.0, [0.5, 1.0]), (0.0, [0.0, 0.5])):
        assert np.isfinite(distance_to(threshold, np.float32(probabilities))).all()
    predictor = Predictor.from_folder(binary, threshold=0.2)
    _, folder = predictor.evaluate_file([str(binary.parent / "test.csv")], tmp_path)
    errors = json.loads((folder / "report.json").read_text())["errors"]["rows"]
    sure = [(row["prob"] - 0.2) / 0.8 if row["pred"] == "1" else (row["prob"] - 0.8) / 0.2 for row in errors]
    assert sure == sorted(sure, reverse=True) and len(sure) > 5


@pytest.mark.parametrize("rows", ["a text", pd.Series({"text": "a"}), [["a"]], 7, None], ids=repr)
def test_values_that_are_not_rows_are_refused(binary, rows):
    with pytest.raises(InputError, match="^rows: expected a dict, a list of dicts or a data frame, found "):
        Predictor.from_folder(binary).predict(rows)


@pytest.mark.parametrize("threshold", [-0.1, 50, float("nan")])
def test_a_threshold_is_a_probability(binary, threshold):
    with pytest.raises(InputError, match="threshold: expected a probability of 0 to 1"):
        Predictor.from_folder(binary, threshold=threshold)


def test_baselines_are_kept_with_the_model(binary, several):
    for run, classes in ((binary, 2), (several, 3)):
        loaded = load_model_folder(run).decision.baselines
        assert set(loaded.models) == {"columns only", "text only"}
        assert loaded.models["columns only"].bias.shape == (classes,)
        figures = json.loads((folder_of(run) / "test_metrics.json").read_text())
        assert set(figures["baselines"]) == {"most frequent class", "columns only", "text only"}
        assert figures["baselines"]["most frequent class"]["test/auroc"] == pytest.approx(0.5)
        assert figures["baselines"]["columns only"]["test/auroc"] > 0.6  # the label depends on age


def test_importance_finds_the_column_that_matters(binary):
    importance = json.loads((folder_of(binary) / "report.json").read_text())["importance"]
    assert {item["name"] for item in importance["items"]} == {"text", "age", "amount", "kind"}
    drops = [item["drop"] for item in importance["items"]]
    assert drops == sorted(drops, reverse=True) and importance["items"][0]["name"] in ("age", "text")


def test_errors_are_the_surest_wrong_rows(binary):
    errors = json.loads((folder_of(binary) / "report.json").read_text())["errors"]["rows"]
    rows = {row["row_id"]: row for row in rows_of(folder_of(binary) / "test_result_0.tsv")}
    texts = {row["row_id"]: row["text"] for row in csv.DictReader(open(binary.parent / "test.csv", newline=""))}
    sure = [error["prob"] for error in errors]
    assert sure == sorted(sure, reverse=True) and len(errors) == 20
    for error in errors:
        row = rows[error["id"]]
        assert (error["label"], error["pred"]) == (row["label"], row["pred"]) and row["label"] != row["pred"]
        read = "".join(piece for piece, _ in error["tokens"])
        assert texts[error["id"]].startswith(read) and all(-1 <= weight <= 1 for _, weight in error["tokens"])
    weighed = [any(weight for _, weight in error["tokens"]) for error in errors]
    assert weighed == [error["method"] is not None and bool(error["tokens"]) for error in errors]
    assert sum(weighed) in (2, 3)  # a text may be empty


def test_report_is_written_anew_from_its_json(binary, tmp_path, capfd):
    folder = folder_of(binary)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
    assert page == render(report_of(json.loads((folder / "report.json").read_text())))
    assert cli.main(["report", str(tmp_path)]) == 2
    (tmp_path / "report.json").write_text("[1]")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capfd.readouterr().err.count("error: ") == 2


def test_card_and_inspect(binary, several, capsys):
    for run in (binary, several):
        *card, mark = (run / "README.md").read_text().splitlines()
        assert describe(run) == card and mark.startswith("<!-- model card of mmbert_core")
        assert cli.main(["inspect", str(run)]) == 0
        assert capsys.readouterr().out.splitlines() == card
        figures = json.loads((folder_of(run) / "test_metrics.json").read_text())
        assert any(f"| auroc | {figures['test/auroc']:.4f} |" in line for line in card)
        assert "* train: 240 rows" in "\n".join(card)
    assert cli.main(["inspect", str(binary.parent)]) == 2


def test_standard_input_and_output(binary, tmp_path):
    cli.main(["predict", str(binary), str(binary.parent / "test.csv"), str(tmp_path / "file.tsv")])
    table = (binary.parent / "test.csv").read_text()
    words = ["-m", "mmbert_core", "predict", str(binary), "-", "-"]
    done = tiny.run_command(words, input=table)
    assert done.returncode == 0 and done.stdout == (tmp_path / "file.tsv").read_text()
    assert "220 rows scored" in done.stderr
    done = tiny.run_command([*words, "--input_format", "jsonl"], input=table)
    assert done.returncode == 2 and done.stdout == ""
    assert "standard input row 1 (line 1): expected a JSON object" in done.stderr


@pytest.mark.parametrize(
    "command", [["inspect", "{run}"], ["predict", "{run}", "{test}", "-"]], ids=["inspect", "predict"]
)
def test_a_closed_output_pipe_is_not_an_error(binary, command):
    """As `mmbert inspect MODEL_PATH | head -1`: the pipe's other end is closed before the first line."""
    words = [word.format(run=binary, test=binary.parent / "test.csv") for word in command]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmbert_core", *words],
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert "rror" not in process.stderr.read() and process.wait(timeout=120) == 0


def test_a_folder_without_thresholds_uses_one_half(binary, tmp_path):
    old = shutil.copytree(binary, tmp_path / "old")
    for name in ("thresholds.json", "baselines.json", "baselines.safetensors", "summary.json", "MANIFEST.json"):
        (old / name).unlink()
    cli.main(["predict", str(old), str(binary.parent / "test.csv"), str(tmp_path / "o.tsv")])
    assert all(
        row["pred"] == str(int(float(row["prob"]) > 0.5)) and row["prob"] == row["prob_calibrated"]
        for row in rows_of(tmp_path / "o.tsv")
    )
    assert cli.main(["inspect", str(old)]) == 0


def test_closed_standard_streams(binary, tmp_path):
    cli.main(["predict", str(binary), str(binary.parent / "test.csv"), str(tmp_path / "file.tsv")])
    command = f"{sys.executable} -m mmbert_core predict {binary} {binary.parent / 'test.csv'} {tmp_path / 'closed.tsv'}"
    for redirections in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            f"{command} {redirections}", shell=True, cwd=tiny.ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert (tmp_path / "closed.tsv").read_bytes() == (tmp_path / "file.tsv").read_bytes()
        (tmp_path / "closed.tsv").unlink()
    done = subprocess.run(
        f"{sys.executable} -m mmbert_core predict {binary} - - <&-",
        shell=True,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "standard input: the file is empty" in done.stderr
    assert "Traceback" not in done.stderr
