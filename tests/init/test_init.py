"""`mmbert init` writes a config that is read as it was proposed, checks it, and replaces no file."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mmbert_core import cli
from mmbert_core.config_file import read_config_file, yaml_scalar
from mmbert_core.config_reader import read_config
from mmbert_core.data.label_column import Task
from mmbert_core.init.config_text import metrics_for
from mmbert_core.init.encoder_lengths import measure_lengths
from mmbert_core.init.run import write_first_config
from tests.support import tiny

LONG_NAME = "a column of numbers with a name that is longer than the usual line"
ODD_TEXTS = [
    'a: "b" #c',
    "née",
    "no",
    "- dash",
    "line\nbreak",
    "1.0",
    "2024-01-01",
    "\\",
    "'",
    "[x]",
    "😀",
    " x ",
    "\x85",
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with an encoder and a table, whose rare class is 'yes'."""
    monkeypatch.chdir(tmp_path)
    tiny.write_encoder(tmp_path / "models/tiny")
    rng = np.random.default_rng(0)
    with open("train.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        numbers = [LONG_NAME, *ODD_TEXTS]
        writer.writerow(["row_id", "thread", "message", *numbers, "kind", "sent", "outcome", "verdict"])
        for row in range(120):
            words = " ".join(rng.choice(tiny.WORDS, 15))
            amounts = np.round(rng.normal(size=len(numbers)), 3)
            sent = f"2024-01-{rng.integers(1, 29):02d}"
            verdict = "yes" if row % 6 == 0 else "no"
            writer.writerow([row, f"t{row // 2}", words, *amounts, rng.choice(["a", "b"]), sent, "x", verdict])
    return tmp_path


def test_the_file_is_read_as_proposed_and_checked(folder, capsys):
    assert cli.main(["init", "train.csv", "--label", "verdict", "--encoder", "models/tiny"]) == 0
    config = read_config("run.yaml")
    assert (config.train_path, config.text_name, config.label_name) == (("train.csv",), ("message",), "verdict")
    assert config.tab_field_list == (LONG_NAME, *ODD_TEXTS) and config.cat_field_list == ("kind",)
    assert (config.date_field_list, config.id_name, config.group_name) == (("sent",), "row_id", "thread")
    assert config.is_binary and config.positive_label == "yes" and config.recipe == "recommended"
    assert config.metric_choices[0] == "average_precision" and "accuracy" not in config.metric_choices
    assert config.max_length == 64 and config.encoder == "models/tiny"  # the encoder has 64 positions
    assert config.model_path == "runs/verdict"
    printed = capsys.readouterr()
    assert printed.out == "" and "the check found nothing wrong" in printed.err
    assert "left out: outcome: constant: 'x' in every row" in printed.err
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert "#   outcome: constant: 'x' in every row" in text and "the rarer of the two, 16.7 %" in text
    assert all(line.count(" # ") for line in text.splitlines() if line.startswith("  - "))  # each has its reason


def test_an_existing_file_is_kept_unless_forced(folder, capsys):
    Path("runs/verdict/checkpoints").mkdir(parents=True)
    Path("runs/verdict_2/cache").mkdir(parents=True)  # of an earlier check
    Path("run.yaml").write_text("mine")
    command = ["init", "train.csv", "--label", "verdict", "--encoder", "models/tiny"]
    assert cli.main(command) == 2 and Path("run.yaml").read_text() == "mine"
    assert capsys.readouterr().err == "error: --output: run.yaml exists: give another name, or --force to replace it\n"
    assert cli.main([*command, "--force"]) == 0
    assert read_config("run.yaml").model_path == "runs/verdict_2"  # the folder of another run is not continued


def test_without_an_encoder_the_file_says_what_to_set(folder, capsys):
    assert cli.main(["init", "train.csv", "--label", "verdict"]) == 0
    assert "run.yaml is not checked: no encoder was named" in (printed := capsys.readouterr().err)
    assert printed.rstrip().endswith("found here: models/tiny")
    assert "# encoder: models/tiny" in Path("run.yaml").read_text() and "encoder" not in read_config_file("run.yaml")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train.csv"], "columns of few values, which could be it: 'kind' (2 values), 'verdict' (2 values)"),
        (["train.csv", "--label", "verdicts"], "column 'verdicts' not found; nearest is 'verdict'"),
        (["train.csv", "--label", LONG_NAME], "regression is not supported yet"),
        (["train.csv", "--label", "outcome"], "expected two classes or more, every row has 'x'"),
        (["train.csv", "--label", "verdict", "--encoder", "models/none"], "no such folder, not in the local cache"),
        (["train.csv", "--label", "verdict", "--output", "run.json"], "ends in .yaml or .yml"),
        (["train.csv", "--label", "verdict", "--output", "none/run.yaml"], "none: there is no such folder"),
        (["none.csv", "--label", "verdict"], "there is no such file"),
        (["header.csv", "--label", "verdict"], "expected rows, found a header alone"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, capsys, arguments, problem):
    Path("header.csv").write_text("message,verdict\n")
    assert cli.main(["init", *arguments]) == 2
    printed = capsys.readouterr().err
    assert problem in printed and printed.count("\n") == 1
    assert not Path("run.yaml").exists() and not Path("run.json").exists()


def test_rows_without_a_label_are_counted_and_refused(folder, capsys):
    with open("train.csv", "a", encoding="utf-8") as stream:
        stream.write("120,t99,pay," + "1," * (1 + len(ODD_TEXTS)) + "a,2024-01-01,x,\n")
    assert cli.main(["init", "train.csv", "--label", "verdict", "--encoder", "models/tiny"]) == 2
    assert "column 'verdict': expected a label, found an empty cell" in capsys.readouterr().err
    assert "# rows without a label: 1; remove them" in Path("run.yaml").read_text()


def test_several_classes_and_columns_alone(folder):
    tiny.write_table(Path("several.csv"), 300, num_classes=4)
    rows = [line.split(",") for line in Path("several.csv").read_text().splitlines()]
    Path("columns.csv").write_text("\n".join(",".join([*cells[:1], *cells[2:]]) for cells in rows))
    assert cli.main(["init", "columns.csv"]) == 0  # one column is called label, and there is no text to encode
    config = read_config("run.yaml")
    assert not config.is_binary and config.num_classes == 4 and config.text_name == () and config.id_name == "row_id"


@pytest.mark.parametrize("text", [*ODD_TEXTS, "data/a b.csv", "../a", "/x/y", "Null", "y", "plain", '"', "a#b", ""])
def test_every_text_is_read_back(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"label_name: {yaml_scalar(text)}  # why\nx:\n  - {yaml_scalar(text)}\n", "utf-8")
    assert read_config_file(str(tmp_path / "a.yaml")) == {"label_name": text, "x": [text]}


def test_a_wide_table_gives_a_file_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmbert_core.init.config_text.MAX_BYTES", 3_000)
    names = [f"column {index}" for index in range(50)]
    rows = [",".join([*(f"{(index * row) % 7}.5" for index in range(1, 51)), str(row % 2)]) for row in range(60)]
    Path("wide.csv").write_text("\n".join([",".join([*names, "y"]), *rows]))
    config = write_first_config("wide.csv", "run.yaml")
    assert len(config.to_yaml()) < 3_000 and read_config("run.yaml").label_name == "y"


def test_metrics_suit_the_imbalance():
    assert metrics_for(Task({"a": 60, "b": 40}))[1] is None
    assert metrics_for(Task({"a": 95, "b": 5}))[1] == "always predicting 'a' has an accuracy of 95.0 %"
    assert metrics_for(Task({"a": 40, "b": 35, "c": 25}))[1] is None
    assert "accuracy" not in metrics_for(Task({"a": 80, "b": 15, "c": 5}))[0]


def test_lengths(folder):
    lengths = measure_lengths("models/tiny", ["refund please"] * 90 + ["refund " * 100] * 10)
    assert (lengths.median, lengths.high, lengths.limit, lengths.max_length) == (4, 102, 64, 64)
    assert lengths.longer == pytest.approx(0.1)
