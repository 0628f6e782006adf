"""D11 to D13: labels outside the classes, one class alone, ids on both sides of a split."""

import shutil
from pathlib import Path

import pytest

from mmbert_core.data.splits import sample_rows
from mmbert_core.storage.files import read_json
from tests.faults.inputs import (
    Done,
    predictions_of,
    read_tsv,
    rows_of,
    train_run,
    trained,
    training_refuses,
    write_config,
    write_rows,
)
from tests.support import tiny
from tests.support.bad_tables import TRAINING_TABLES, Rows, cell, column_of
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


def with_labels(split: str, labels: dict[int, str]) -> Rows:
    """A table with other labels in some rows, counted from 1."""
    rows = rows_of(split)
    for index, label in labels.items():
        rows[index][-1] = label
    return rows


# ---- D11 ----

COUNT = "column 'label': expected 2 classes (num_classes) in the training rows, found 3: "
SPELLING = "column 'label': expected one spelling of a label, found "
KNOWN = "column 'label': expected one of the labels '0', '1', found "
LABELS = {
    "unknown": ("val", {7: "maybe"}, [" row 7 (line 8), " + KNOWN + "'maybe'"]),
    "unknown in many rows": (
        "test",
        {3: "yes", 8: "no", 11: "x", 20: ""},
        [" row 3 (line 4), " + KNOWN + "'yes' (4 such rows; also ", " row 8 (line 9), ", " row 11 (line 12))"],
    ),
    "other case of the training's": ("val", {2: "1 "}, [" row 2 (line 3), " + KNOWN + "'1 '"]),
    "missing": ("train", {4: ""}, [" row 4 (line 5), column 'label': expected a label, found an empty cell"]),
    "missing in many rows": (
        "train",
        {4: "", 9: "", 10: "", 30: ""},
        [
            " row 4 (line 5), column 'label': expected a label, found an empty cell (4 such rows; also ",
            " row 9 (line 10), ",
            " row 10 (line 11))",
        ],
    ),
    "missing in validation": ("val", {5: ""}, [" row 5 (line 6), " + KNOWN + "an empty cell"]),
    "missing in test": (
        "test",
        {1: "", 2: ""},
        [" row 1 (line 2), " + KNOWN + "an empty cell (2 such rows; also ", " row 2 (line 3))"],
    ),
    "a class too many": (
        "train",
        {12: "2"},
        [" row 12 (line 13), " + COUNT + "'0', '1', '2'; '2' is in this row for the first time"],
    ),
    "a class too many in many rows": (
        "train",
        {12: "2", 20: "2", 21: "2", 22: "2"},
        [" row 12 (line 13), ", "for the first time (4 such rows; also ", " row 20 (line 21), ", " row 21 (line 22))"],
    ),
    "a word among numbers": ("train", {6: "True"}, [" row 6 (line 7), " + COUNT + "'0', '1', 'True'"]),
    "1.0 next to 1": (
        "train",
        {40: "1.0", 41: "1.0"},
        [
            " row 40 (line 41), " + SPELLING + "'1' and '1.0' for the same number (2 such rows; also ",
            " row 41 (line 42))",
        ],
    ),
    "01 next to 1": ("train", {40: "01"}, [" row 40 (line 41), " + SPELLING + "'01' and '1'"]),
    "+1 next to 1": ("train", {40: "+1"}, [" row 40 (line 41), " + SPELLING]),
    "a space next to 1": ("train", {40: " 1"}, [" row 40 (line 41), " + SPELLING]),
    "01 in validation": ("val", {3: "01"}, [" row 3 (line 4), " + KNOWN + "'01'"]),
}


@row(
    "D11",
    "labels: unknown, missing, too many or too few classes, two spellings of one; in train, validation and test",
    "exit code 2 before a model is loaded: column, first three rows, known labels",
)
def test_D11_labels(tmp_path: Path) -> Figures:
    figures = Figures()
    encoder = shutil.copytree(trained() / "encoder", tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()  # loading it would be another error
    for case, (split, labels, expected) in LABELS.items():
        path = write_rows(tmp_path / f"{split}.csv", with_labels(split, labels))
        training_refuses(figures, case, tmp_path, [str(path), *expected], encoder=encoder, **{f"{split}_path": path})
    for num_classes in (3, 5):
        expected = [
            f"column 'label': expected {num_classes} classes (num_classes) in the training rows, found 2: '0', '1'"
        ]
        training_refuses(
            figures,
            f"{num_classes} classes asked for",
            tmp_path,
            expected,
            encoder=encoder,
            is_binary=False,
            num_classes=num_classes,
        )
    path = write_rows(tmp_path / "train.csv", column_of("label", "")(rows_of("train")))
    training_refuses(
        figures,
        "all missing",
        tmp_path,
        [str(path), "found an empty cell (64 such rows; also "],
        encoder=encoder,
        train_path=path,
    )
    expected = ["positive_label: expected one of the labels '0', '1', found '1.0'"]
    training_refuses(
        figures, "positive_label of another spelling", tmp_path, expected, encoder=encoder, positive_label="1.0"
    )
    return figures


# ---- D12 ----


@row("D12", "one class only in the training rows", "exit code 2, one line; also where a sample leaves one class out")
def test_D12_one_class_in_train(tmp_path: Path) -> Figures:
    figures = Figures()
    split, edit, expected = TRAINING_TABLES["one class only"]
    path = write_rows(tmp_path / "train.csv", edit(rows_of(split)))
    for changes in ({}, {"val_path": [], "val_fraction": 0.3}, {"is_binary": False, "num_classes": 3}):
        three = ["column 'label': all training rows have the label '1', expected 3 classes"]
        words = three if changes.get("num_classes") else expected
        training_refuses(figures, f"one class, {changes}", tmp_path, [str(path), *words], train_path=path, **changes)
    # one row of class 0, which a sample may not contain
    path = write_rows(tmp_path / "train.csv", cell(1, "label", "0")(edit(rows_of(split))))
    outcomes = set()
    for seed in range(4):
        changes = {"train_path": path, "max_train_rows": 8, "seed": seed}
        outcomes.add(0 in sample_rows(64, 8, seed))
        if 0 not in sample_rows(64, 8, seed):
            expected = [
                "max_train_rows: expected rows of every class, found none of class '0' among 8 sampled training rows"
            ]
            training_refuses(figures, f"sample of seed {seed}", tmp_path, expected, **changes)
    figures.count(False in outcomes, "every sample has the class: other seeds are needed")
    return figures


@row(
    "D12",
    "one class only in the validation and test rows",
    "AUROC null with its reason, never 0.0; accuracy a number; val_loss chooses the best step",
)
def test_D12_one_class_in_validation(tmp_path: Path) -> Figures:
    figures = Figures()
    for num_classes, metric, label in ((2, "auroc", "0"), (2, "average_precision", "1"), (3, "auroc", "2")):
        case = f"{num_classes} classes, {metric}, all {label}"
        folder = tmp_path / f"{metric}{num_classes}"
        folder.mkdir()
        paths = {
            f"{name}_path": write_rows(folder / f"{name}.csv", column_of("label", label)(rows_of(name, num_classes)))
            for name in ("val", "test")
        }
        config = write_config(
            folder,
            trained(num_classes),
            num_classes=num_classes,
            is_binary=num_classes == 2,
            model_path=folder / "run",
            max_epochs=2,
            lr=1e-2,
            early_stop_metric=f"val/{metric}",
            metric_choices=["accuracy", "auroc", "average_precision"],
            **paths,
        )
        done = train_run(figures, case, config)
        validations = [line for line in tiny.metrics_lines(folder / "run") if "val_loss" in line]
        for values in validations:
            undefined = [values["val/auroc"], values["val/average_precision"]]
            figures.count(
                undefined == [None, None] and isinstance(values["val/accuracy"], float),
                f"{case}: validation has {values}",
            )
        figures.count(
            f"val/{metric} is undefined on these validation rows" in done.err, f"{case}: no warning: {done.err}"
        )
        best = min(validations, key=lambda values: values["val_loss"])
        results = read_json(folder / "run/train_results.json")
        chosen = [results["best_metric"], results["best_step"], results["best_value"]]
        figures.count(
            chosen == ["val_loss", best["step"], best["val_loss"]], f"{case}: best is {chosen}, expected {best}"
        )
        rows = read_tsv(predictions_of(folder / "run"))
        metrics = read_json(predictions_of(folder / "run").with_name("test_metrics.json"))
        accuracy = sum(line["label"] == line["pred"] for line in rows) / len(rows)
        figures.count(
            abs(metrics["test/accuracy"] - accuracy) < 1e-7,
            f"{case}: accuracy {metrics['test/accuracy']}, counted {accuracy}",
        )
        for name in ("test/auroc", "test/average_precision"):
            reason = metrics["undefined"].get(name)
            figures.count(
                metrics[name] is None and reason == f"only one class in the labels: '{label}'",
                f"{case}: {name} {metrics[name]}, {reason!r}",
            )
    return figures


# ---- D13 ----


def tables_with_ids(folder: Path, **ids: dict[int, str]) -> dict[str, Path]:
    """The three tables with unique ids, except for the given ones (by row, counted from 1)."""
    paths = {}
    for name in ("train", "val", "test"):
        rows = rows_of(name)
        for index, line in enumerate(rows[1:], start=1):
            line[0] = ids.get(name, {}).get(index, f"{name}-{index}")
        paths[f"{name}_path"] = write_rows(folder / f"{name}.csv", rows)
    return paths


def warnings_of(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if " rows have an id of a " in line]


@row(
    "D13",
    "ids shared by train, validation and test rows; by both sides of a split of one file",
    "a warning with the number of rows and the first one; none without",
)
def test_D13_shared_ids(tmp_path: Path) -> Figures:
    figures = Figures()
    options = {"model_path": tmp_path / "run"}
    found = {}
    for case, ids in {
        "none": {},
        "empty ids": {"train": {1: "", 2: ""}, "val": {1: ""}, "test": {1: "", 3: ""}},
        "train and val": {"val": {4: "train-1", 9: "train-64", 10: "train-1"}},
        "train and test": {"test": {2: "train-7"}},
        "val and test": {"test": {3: "val-1", 5: "val-2"}},
        "all": {"val": {6: "train-3"}, "test": {8: "train-3", 9: "val-9"}},
    }.items():
        folder = tmp_path / case
        folder.mkdir()
        done = train_run(
            figures, case, write_config(folder, trained(), **options, **tables_with_ids(folder, **ids)), "--check"
        )
        found[case] = (warnings_of(done), folder)

    def warning(folder: Path, split: str, count: int, other: str, first: int) -> str:
        location = f"{folder / split}.csv row {first} (line {first + 1})"
        return f"warning: {split}: {count} rows have an id of a {other} row, first {location}"

    for case, expected in {
        "none": [],
        "empty ids": [],
        "train and val": [("val", 3, "training", 4)],
        "train and test": [("test", 1, "training", 2)],
        "val and test": [("test", 2, "validation", 3)],
        "all": [("val", 1, "training", 6), ("test", 1, "training", 8), ("test", 2, "validation", 8)],
    }.items():
        lines, folder = found[case]
        figures.count(lines == [warning(folder, *words) for words in expected], f"{case}: {lines}")
    paths = tables_with_ids(tmp_path, train={index: f"pair-{index // 2}" for index in range(1, 65)})
    done = train_run(
        figures,
        "one file",
        write_config(tmp_path, trained(), **{**options, **paths, "val_path": [], "val_fraction": 0.5}),
        "--check",
    )
    lines = warnings_of(done)
    figures.count(
        len(lines) == 1
        and lines[0].startswith("warning: val: ")
        and f"first {tmp_path / 'train.csv'} row " in lines[0],
        f"one file: {lines}",
    )
    return figures
