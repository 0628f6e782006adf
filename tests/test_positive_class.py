"""A model of 'fraud' and 'legit': every command, file and page names class 1 and the share of its rows."""

import csv
import html
import json
import random
import threading
import urllib.request
from pathlib import Path

import pytest

from mmbert_core import cli
from mmbert_core.predictor import Predictor
from mmbert_core.serve.server import Server
from tests.support import tiny

LINE = "class 1 (prob, F1, threshold): '{}', {} % of the training rows"


def write_rows(path: Path, num_rows: int, num_fraud: int, seed: int) -> str:
    """Exactly `num_fraud` rows are fraud, and contain the word bank."""
    rng = random.Random(seed)
    verdicts = ["fraud"] * num_fraud + ["legit"] * (num_rows - num_fraud)
    rng.shuffle(verdicts)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "verdict"])
        for verdict in verdicts:
            text = " ".join(rng.choices(["refund", "shop", "item", "order"], k=5))
            writer.writerow([text + " bank" * (verdict == "fraud"), verdict])
    return str(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    tiny.write_encoder(folder / "encoder", layers=1)
    for seed, (name, num_rows, num_fraud) in enumerate([("train", 600, 54), ("val", 120, 24), ("test", 60, 6)]):
        write_rows(folder / f"{name}.csv", num_rows, num_fraud, seed)
    return folder


def arguments(rows: Path, model: Path, *more: str) -> list[str]:
    paths = [word for name in ("train", "val", "test") for word in (f"--{name}_path", str(rows / f"{name}.csv"))]
    options = """
        --text_name text --label_name verdict --max_length 16 --max_epochs 2 --lr 3e-3 --num_threads 1
        --hidden_common_dim 16 --threshold_rule alerts_per_1000=100
    """.split()
    return ["train", *paths, "--encoder", str(rows / "encoder"), "--model_path", str(model), *options, *more]


@pytest.fixture(scope="module")
def models(rows) -> dict[str, Path]:
    """By the label that is class 1."""
    folders = {"legit": rows / "legit", "fraud": rows / "fraud"}
    assert cli.main(arguments(rows, folders["legit"])) == 0
    assert cli.main(arguments(rows, folders["fraud"], "--positive_label", "fraud")) == 0
    return folders


def test_the_check_warns_and_names_the_line_to_add(rows, tmp_path, capsys):
    assert cli.main(arguments(rows, tmp_path / "run", "--check")) == 0
    printed = capsys.readouterr().err
    assert (
        "warning: class 1 is 'legit' (91.0 % of the training rows)" in printed
        and "add: positive_label: fraud\n" in printed
    )
    assert LINE.format("legit", "91.0") in printed
    assert cli.main(arguments(rows, tmp_path / "run", "--check", "--positive_label", "fraud")) == 0
    printed = capsys.readouterr().err
    assert "class 1 is" not in printed and LINE.format("fraud", "9.0") in printed


@pytest.mark.parametrize(("label", "share"), [("legit", "91.0"), ("fraud", "9.0")])
def test_card_inspect_predict_and_evaluate_name_class_1(models, rows, tmp_path, capsys, label, share):
    card = f"Class 1 is `{label}`, {share} % of the training rows: `prob` is its probability"
    assert card in (models[label] / "README.md").read_text()
    assert cli.main(["inspect", str(models[label])]) == 0 and card in capsys.readouterr().out
    model, table = str(models[label]), str(rows / "test.csv")
    assert cli.main(["predict", model, table, str(tmp_path / "out.tsv"), "--num_threads", "1"]) == 0
    assert LINE.format(label, share) in capsys.readouterr().err
    assert cli.main(["evaluate", model, table, "--output", str(tmp_path / "e"), "--num_threads", "1"]) == 0
    assert LINE.format(label, share) in capsys.readouterr().err
    [report] = (tmp_path / "e").glob("*/report.json")
    assert json.loads(report.read_text())["class_names"][1] == label


def test_the_warning_is_in_the_report_of_the_run(models):
    for label, is_there in (("legit", True), ("fraud", False)):
        [report] = models[label].glob("*/report.json")
        warnings = json.loads(report.read_text())["warnings"]
        assert any("add: positive_label: fraud" in line for line in warnings) is is_there


def test_predictor_and_server_name_class_1(models):
    predictor = Predictor.from_folder(models["fraud"])
    assert predictor.positive_label == "fraud" and predictor.positive_share == pytest.approx(0.09)
    with Server(predictor, str(models["fraud"]), host="127.0.0.1", port=0) as server:
        threading.Thread(target=lambda: [server.handle_request() for _ in range(2)], daemon=True).start()
        health = json.load(urllib.request.urlopen(f"{server.url}health", timeout=20))
        page = urllib.request.urlopen(server.url, timeout=20).read().decode()
    assert health["positive_label"] == "fraud" and health["labels"] == ["legit", "fraud"]
    assert health["positive_share"] == pytest.approx(0.09)
    assert LINE.format("fraud", "9.0") in html.unescape(page)


def test_an_older_folder_without_a_summary_gives_the_name_alone(models, rows, tmp_path, capsys):
    summary = models["fraud"] / "summary.json"
    content = summary.read_text()
    try:
        for text in (None, "{}", content.replace('"classes"', '"groups"')):
            summary.unlink(missing_ok=True)
            if text is not None:
                summary.write_text(text)
            predictor = Predictor.from_folder(models["fraud"])
            assert predictor.positive_label == "fraud" and predictor.positive_share is None
            assert predictor.positive_class_line == "class 1 (prob, F1, threshold): 'fraud'"
    finally:
        summary.write_text(content)


def test_alerts_are_of_the_positive_label(models, rows, tmp_path):
    """100 alerts of 1,000: with positive_label they are rows predicted as fraud, without it as 'legit'."""
    words = ["predict", str(models["fraud"]), str(rows / "test.csv"), str(tmp_path / "out.tsv"), "--num_threads", "1"]
    assert cli.main(words) == 0
    with open(tmp_path / "out.tsv", newline="") as stream:
        found = [row["pred"] for row in csv.DictReader(stream, delimiter="\t")]
    assert 0 < found.count("fraud") <= 20
