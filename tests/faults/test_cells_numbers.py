"""D9 and D10: numbers and categories of any kind in the cells."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbert_core.storage.files import read_json
from tests.faults.inputs import (
    HEADER,
    command,
    count_prediction,
    prediction_refuses,
    rows_of,
    table_of,
    train_run,
    trained,
    training_refuses,
    write_config,
    write_rows,
)
from tests.support.bad_tables import cell, column_of
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


# ---- D9: numbers ----

NOT_NUMBERS = [
    "inf",
    "-inf",
    "Infinity",
    "1e308",
    "-1e39",
    "abc",
    "1,5",
    "1 000",
    "1_000",
    "0x10",
    "12%",
    "$5",
    "yes",
    "=1+1",
    "-",
    "1e",
    "2024-01-31",
]
NUMBERS = {
    "1e-320": 1e-320,
    "-0": -0.0,
    "9007199254740993": 2.0**53,
    "-9223372036854775809": -(2.0**63),
    "1" * 38: 1.1111111e37,
    "3.4e38": 3.4e38,
    "-3.4e38": -3.4e38,
    "+1.5e3": 1500.0,
    " 7 ": 7.0,
    ".5": 0.5,
    "1.": 1.0,
    "007": 7.0,
    "1e-45": 1e-45,
}
MISSING = ["", "NaN", "nan", "NA", "N/A", "null", "None", " na "]


@row(
    "D9",
    "inf, -inf, 1e308, text, decimal commas, digit groups in a numeric column of train, validation, test and new rows; "
    "a numeric column without values",
    "exit code 2, one line with file, row, column and cell",
)
def test_D9_cells_that_are_not_numbers(tmp_path: Path) -> Figures:
    figures = Figures()
    for content in NOT_NUMBERS:
        for split in ("train", "val", "test"):
            path = write_rows(tmp_path / f"{split}.csv", cell(6, "age", content)(rows_of(split)))
            expected = [f"{path} row 6 (line 7), column 'age': expected a finite number", f"found {content!r}"]
            training_refuses(figures, f"{content!r} in {split}", tmp_path, expected, **{f"{split}_path": path})
        path = write_rows(tmp_path / "new.csv", cell(21, "amount", content)(rows_of("test")))
        expected = [f"{path} row 21 (line 22), column 'amount': expected a finite number", f"found {content!r}"]
        prediction_refuses(figures, f"{content!r} in new rows", path, expected)
    for content in ("", "NaN"):
        path = write_rows(tmp_path / "train.csv", column_of("age", content)(rows_of("train")))
        training_refuses(
            figures,
            f"all {content!r}",
            tmp_path,
            [f"{path}, column 'age': expected numbers, found no value in any of 64 rows"],
            train_path=path,
        )
    return figures


@row("D9", "missing numbers", "replaced by the training median: the same probability as with the median in the cell")
def test_D9_missing_numbers(tmp_path: Path) -> Figures:
    figures = Figures()
    features = read_json(trained() / "run/features.json")
    index = features["number_names"].index("amount")  # present in all training rows, so without an indicator
    figures.count(features["has_indicator"] == [True, False], "other indicators")
    amounts = [float(line[3]) for line in rows_of("train")[1:]]
    figures.count(
        features["medians"][index] == float(np.median(amounts)), "the median is not that of the training rows"
    )
    source = write_rows(tmp_path / "new.csv", table_of(amount=[repr(features["medians"][index]), *MISSING, "77"]))
    rows = count_prediction(figures, "missing amounts", source, tmp_path / "out.tsv", num_rows=len(MISSING) + 2)
    for content, line in zip(MISSING, rows[1:-1], strict=True):
        figures.count(
            line["prob"] == rows[0]["prob"], f"{content!r}: {line['prob']}, with the median {rows[0]['prob']}"
        )
    figures.count(rows[-1]["prob"] != rows[0]["prob"], "another amount makes no difference")
    source = write_rows(tmp_path / "new.csv", table_of(age=MISSING))
    rows = count_prediction(figures, "missing ages", source, tmp_path / "out.tsv", num_rows=len(MISSING))
    figures.count(len({line["prob"] for line in rows}) == 1, "spellings of a missing age differ")
    return figures


@row(
    "D9",
    "1e-320, 3.4e38, whole numbers beyond 2^53; a constant column, a column of two numbers that are equal in float32",
    "predicted and trained on; probabilities finite",
)
def test_D9_extreme_numbers(tmp_path: Path) -> Figures:
    figures = Figures()
    source = write_rows(tmp_path / "new.csv", table_of(age=list(NUMBERS), amount=list(NUMBERS)))
    extreme = count_prediction(figures, "new rows", source, tmp_path / "out.tsv", num_rows=len(NUMBERS))
    columns = {name: [repr(value) for value in NUMBERS.values()] for name in ("age", "amount")}
    plain = count_prediction(
        figures,
        "the same in digits",
        write_rows(tmp_path / "new.csv", table_of(**columns)),
        tmp_path / "out.tsv",
        num_rows=len(NUMBERS),
    )
    for content, first, second in zip(NUMBERS, extreme, plain, strict=True):
        figures.count(
            abs(float(first["prob"]) - float(second["prob"])) <= 1e-6, f"{content!r} was read as another number"
        )
    trainings = {
        "constant column": column_of("amount", "5"),
        "constant beyond 2^53": column_of("amount", str(2**53 + 1)),
        "all but one missing": lambda rows: cell(3, "amount", "5")(column_of("amount", "")(rows)),
        "1e-320 and 1e-310": lambda rows: cell(3, "amount", "1e-310")(column_of("amount", "1e-320")(rows)),
        "2^60 and 2^60 + 1": lambda rows: cell(3, "amount", str(2**60 + 1))(column_of("amount", str(2**60))(rows)),
        "3.4e38 and -3.4e38": lambda rows: cell(3, "amount", "-3.4e38")(column_of("amount", "3.4e38")(rows)),
    }
    for case, edit in trainings.items():
        folder = tmp_path / case.replace("^", "")
        folder.mkdir()
        table = write_rows(folder / "train.csv", edit(rows_of("train")))
        train_run(
            figures,
            case,
            write_config(
                folder, trained(), train_path=table, test_path=[], model_path=folder / "run", max_train_rows=24
            ),
        )
        source = write_rows(folder / "new.csv", table_of(amount=[*NUMBERS, "", "5"]))
        count_prediction(figures, case, source, folder / "out.tsv", num_rows=len(NUMBERS) + 2, model=folder / "run")
    return figures


# ---- D10: categories ----


@row(
    "D10",
    "categories that training never saw, and empty ones, in validation, test and new rows",
    "one neutral index for all unseen ones, counted in a warning; the empty one is learned",
)
def test_D10_unseen_categories(tmp_path: Path) -> Figures:
    figures = Figures()
    unseen = ["z", "A", "a ", "NA", "日本", "x" * 10_000, "a\nb"]
    source = write_rows(tmp_path / "new.csv", table_of(kind=[*unseen, "a", "b", "c", ""]))
    rows = count_prediction(figures, "new rows", source, tmp_path / "out.tsv", num_rows=len(unseen) + 4)
    probabilities = [line["prob"] for line in rows]
    figures.count(len(set(probabilities[: len(unseen)])) == 1, f"unseen categories differ: {probabilities}")
    figures.count(len(set(probabilities)) == 5, f"seen and empty ones do not: {probabilities}")
    message = "warning: {}: {} cells of column 'kind' hold a value that no training row has"
    done = command("predict", trained() / "run", source, tmp_path / "out.tsv")
    expected = (
        f"warning: input: {len(unseen)} of {len(unseen) + 4} cells of column 'kind' hold a value that no training row "
        "has, such as 'z', 'A', 'a '; training rows have 'a', 'b', 'c'"
    )
    figures.count(done.err.count(expected) == 1, f"predict does not count them: {done.err}")
    paths = {}
    for name, count in (("val", 3), ("test", 5)):
        edited = rows_of(name)
        for index in range(1, count + 1):
            edited[index][4] = unseen[index]
        paths[f"{name}_path"] = write_rows(tmp_path / f"{name}.csv", edited)
    done = train_run(
        figures, "training", write_config(tmp_path, trained(), model_path=tmp_path / "run", max_train_rows=24, **paths)
    )
    for name, count in (("val", 3), ("test", 5)):
        figures.count(
            done.err.count(message.format(name, count)) == 1, f"training does not count those of {name}: {done.err}"
        )
    categories = read_json(tmp_path / "run/features.json")["categories"]
    figures.count(categories == [["a", "b", "c"]], f"fitted on other rows than the training rows: {categories}")
    return figures


@row(
    "D10", "a column of 10^5 categories", "trained on, with a warning that names column and number; new rows predicted"
)
def test_D10_many_categories(tmp_path: Path, num_categories: int = 100_000) -> Figures:
    figures = Figures()
    rows = [
        HEADER,
        *([str(index), "", "", "1", f"category {index}", str(index % 2)] for index in range(num_categories)),
    ]
    changes: dict[str, Any] = {
        "text_name": [],
        "tab_field_list": ["amount"],
        "train_path": write_rows(tmp_path / "train.csv", rows),
        "val_path": [],
        "val_fraction": 0,
        "test_path": [],
        "batch_size": 8192,
        "model_path": tmp_path / "run",
        "id_name": "row_id",
    }
    started = time.perf_counter()
    done = train_run(figures, "training", write_config(tmp_path, trained(), **changes))
    seconds = time.perf_counter() - started
    message = (
        f"warning: column 'kind': {num_categories} categories in {num_categories} training rows, "
        "each with weights of its own to learn: is it an id?"
    )
    figures.count(done.err.count(message) == 1, f"no warning: {done.err}")
    source = write_rows(
        tmp_path / "new.csv", table_of(kind=["category 0", f"category {num_categories - 1}", "category -1", ""])
    )
    rows = count_prediction(figures, "new rows", source, tmp_path / "out.tsv", num_rows=4, model=tmp_path / "run")
    figures.count(
        len({line["prob"] for line in rows}) == 3,
        f"expected two categories apart and the rest, never trained, neutral: {rows}",
    )
    size = (tmp_path / "run/model.safetensors").stat().st_size / 2**20
    figures.notes.append(
        f"{num_categories} categories: {seconds:.0f} s for an epoch of {num_categories} rows, model of {size:.0f} MB"
    )
    return figures
