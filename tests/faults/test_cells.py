"""D4 and D8 to D10: ids, formulas, texts, numbers and categories of any kind in the cells."""

import ctypes
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmbert_core.predictor import Predictor
from mmbert_core.storage.files import read_json
from tests.faults.inputs import (
    command,
    count_prediction,
    prediction_refuses,
    predictions_of,
    read_tsv,
    rows_of,
    train_run,
    trained,
    training_refuses,
    write_config,
    write_rows,
)
from tests.support.bad_tables import Rows, cell, column_of
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault

HEADER = ["row_id", "text", "age", "amount", "kind", "label"]
ODD_IDS = [
    "",
    "a\tb",
    "\t",
    "two\nlines",
    "two\r\nlines",
    "\r",
    "\n",
    '"quoted"',
    'a"b',
    '"',
    "'",
    ",",
    "=1+1",
    "+1",
    "-",
    "@SUM(1)",
    "x" * 300,
    "00001",
    "007",
    "NA",
    "NaN",
    "null",
    "None",
    "1e5",
    "1.0",
    "9" * 40,
    "True",
    " spaces ",
    "ünïcödé",
    "日本",
    "e\u0301",
    "\u202eleft",
    "zero\u200bwidth",
    "😀",
    "\x1b[31m",
    "\\N",
    "#",
    "",
]


def table_of(**columns: list[str]) -> Rows:
    """Rows that are plain but for the given columns."""
    plain = {"text": "refund now", "age": "30", "amount": "1.5", "kind": "a", "label": "1"}
    length = len(next(iter(columns.values())))
    cells = {
        name: columns.get(name)
        or ([plain[name]] * length if name in plain else [f"r{place}" for place in range(length)])
        for name in HEADER
    }
    return [HEADER, *map(list, zip(*cells.values(), strict=True))]


# ---- D4: ids ----


@row(
    "D4",
    "ids: empty, with tabs, line breaks, quotes, 300 characters, any script, 007, NA, 1e5, =1+1",
    "come back byte for byte from predict, the test stage and a frame, read by csv and by pandas",
)
def test_D4_ids_come_back(tmp_path: Path) -> Figures:
    figures = Figures()
    rows = table_of(row_id=ODD_IDS)
    sources = {
        "CSV": write_rows(tmp_path / "ids.csv", rows),
        "JSONL": tmp_path / "ids.jsonl",
        "Parquet": tmp_path / "ids.parquet",
    }
    frame = pd.DataFrame(rows[1:], columns=HEADER)
    sources["JSONL"].write_text("".join(json.dumps(record) + "\n" for record in frame.to_dict("records")))
    frame.to_parquet(sources["Parquet"], index=False)

    def count_ids(case: str, path: Path) -> None:
        found = [line["row_id"] for line in read_tsv(path)]
        figures.count(found == ODD_IDS, f"{case}: csv reads {found}")
        found = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)["row_id"].tolist()
        figures.count(found == ODD_IDS, f"{case}: pandas reads {found}")

    for case, source in sources.items():
        count_prediction(figures, case, source, tmp_path / "out.tsv", num_rows=len(ODD_IDS))
        count_ids(case, tmp_path / "out.tsv")
    paths = {"train_path": write_rows(tmp_path / "train.csv", both_classes(rows)), "test_path": sources["CSV"]}
    train_run(figures, "test stage", write_config(tmp_path, trained(), model_path=tmp_path / "run", **paths))
    count_ids("test stage", predictions_of(tmp_path / "run"))
    predicted = Predictor.from_folder(trained() / "run").predict(frame)
    figures.count(predicted["row_id"].tolist() == ODD_IDS, "frame: other ids")
    return figures


def both_classes(rows: Rows) -> Rows:
    return [rows[0], *([*line[:-1], str(place % 2)] for place, line in enumerate(rows[1:]))]


@row(
    "D4",
    "ids that repeat in train, validation, test and new rows",
    "a warning with their number and the first row; every row kept and scored",
)
def test_D4_ids_that_repeat(tmp_path: Path) -> Figures:
    figures = Figures()
    paths = {}
    for name in ("train", "val", "test"):
        rows = rows_of(name)
        for place in (5, 9, 20):
            rows[place][0] = rows[2][0]
        rows[11][0] = rows[12][0] = ""  # two empty ids are no repeat
        paths[name] = write_rows(tmp_path / f"{name}.csv", rows)
    config = write_config(
        tmp_path, trained(), model_path=tmp_path / "run", **{f"{name}_path": path for name, path in paths.items()}
    )
    done = train_run(figures, "training", config)
    for name, num_rows in (("train", 64), ("val", 23), ("test", 37)):
        message = f"warning: {paths[name]}: 3 of {num_rows} ids repeat one of an earlier row, first in {paths[name]} row 5 (line 6); all rows are kept"
        figures.count(done.err.count(message) == 1, f"{name}: {done.err}")
    results = read_json(tmp_path / "run/train_results.json")
    figures.count((results["train_rows"], results["test_metrics"]["test/num_rows"]) == (64, 37), "rows were dropped")
    expected = [line[0] for line in rows_of("test")[1:]]
    for place in (5, 9, 20):
        expected[place - 1] = expected[1]
    expected[10] = expected[11] = ""
    count_prediction(figures, "predict", paths["test"], tmp_path / "out.tsv", num_rows=37, model=tmp_path / "run")
    for case, path in (("test stage", predictions_of(tmp_path / "run")), ("predict", tmp_path / "out.tsv")):
        figures.count([line["row_id"] for line in read_tsv(path)] == expected, f"{case}: other ids")
    figures.count(
        predictions_of(tmp_path / "run").read_bytes() == (tmp_path / "out.tsv").read_bytes(),
        "test stage and predict differ",
    )
    return figures


FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1+1)",
    "\t=1",
    "\r=1",
    "-",
    "+",
    "-inf",
    "-1,5",
    "+1 2",
    '="a"&"b"',
    "-1e",
    "+日本",
    "\n=1",
    "＝1+1",
    "＠a",
]
NO_FORMULAS = ["-3", "+1.5e3", "-.5", "+7.", "-1E-5", "'=1+1", " =1", "a=1", "007", "", '"=1"', "1-2", "a\t=1"]


@row(
    "D4",
    "ids, labels, class names and an id column's name that a spreadsheet would take for formulas",
    "plain: verbatim; sheet_safe: a ' before them, numbers and probabilities unchanged",
)
def test_D4_formulas(tmp_path: Path) -> Figures:
    figures = Figures()
    classes = ["=1+1", "+x", "-y", "@z", "-3"]
    tables = {}
    for name in ("train", "val"):
        rows = [
            ["=id", *HEADER[1:]],
            *([*line[:-1], classes[place % 5]] for place, line in enumerate(rows_of(name)[1:])),
        ]
        tables[f"{name}_path"] = write_rows(tmp_path / f"{name}.csv", rows)
    changes = {"id_name": "=id", "is_binary": False, "num_classes": 5, "test_path": [], "max_train_rows": 40}
    train_run(figures, "training", write_config(tmp_path, trained(), model_path=tmp_path / "run", **tables, **changes))
    cells = [*FORMULAS, *NO_FORMULAS]
    source = write_rows(tmp_path / "new.csv", [["=id", *HEADER[1:]], *table_of(row_id=cells, label=cells)[1:]])
    for output, words in (("plain.tsv", []), ("safe.tsv", ["--sheet_safe"])):
        done = command("predict", tmp_path / "run", source, tmp_path / output, *words)
        figures.count(done.code == 0, f"{output}: exit code {done.code}: {done.err[-600:]}")
    plain, safe = read_tsv(tmp_path / "plain.tsv"), read_tsv(tmp_path / "safe.tsv")
    probabilities = [f"prob_{name}" for name in sorted(classes)]
    figures.count(
        list(plain[0]) == ["=id", *probabilities, "label", "pred", "prob_calibrated"], f"plain header {list(plain[0])}"
    )
    figures.count(
        list(safe[0]) == ["'=id", *probabilities, "label", "pred", "prob_calibrated"], f"safe header {list(safe[0])}"
    )
    for text, is_formula, before, after in zip(
        cells, [True] * len(FORMULAS) + [False] * len(NO_FORMULAS), plain, safe, strict=True
    ):
        figures.count(before["=id"] == before["label"] == text, f"plain: {text!r} became {before}")
        expected = "'" + text if is_formula else text
        figures.count(after["'=id"] == after["label"] == expected, f"safe: {text!r} became {after}")
        figures.count(
            after["pred"] == (before["pred"] if before["pred"] == "-3" else "'" + before["pred"]),
            f"class name {after['pred']!r}",
        )
        figures.count(all(before[name] == after[name] for name in probabilities), f"probabilities of {text!r} changed")
    lines = (tmp_path / "safe.tsv").read_text().splitlines()
    figures.count(lines[0].startswith("'=id\t"), "the header is a formula")
    return figures


# ---- D8: texts ----

TEXTS = {
    "empty": "",
    "blank": "   ",
    "line breaks and tabs": " \t\r\n ",
    "NaN": "NaN",
    "emoji": "refund 😀👩‍👩‍👧‍👦🏳️‍🌈 now",
    "right to left": "\u202eأعيدوا مالي\u202c שלום",
    "zero width": "re\u200bfu\u200dnd\ufeff",
    "combining marks": "z" + "\u0301" * 500,
    "only unknown tokens": "日本 ☃ ᚠᚢ ∑",
    "special tokens": "[SEP] [PAD] [CLS] [MASK] [UNK]",
    "control characters": "\x01\x02\x1b[31m\x7f",
    "markup": "<script>alert(1)</script> {{7*7}} %s %n",
}
LONG = 1_000_000
LONG_TEXTS = {
    "10^6 characters without a space": "x" * LONG,
    "10^6 characters with spaces": "refund pay " * (LONG // 11),
    "10^6 spaces": " " * LONG,
    "10^6 emoji": "😀" * LONG,
    "10^6 combining marks": "\u0301" * LONG,
}


@row(
    "D8",
    "texts: empty, blank, NaN, emoji, right to left, zero width, unknown or special tokens",
    "each gives a prediction, finite, summing to 1 within 1e-6; neighbours unchanged; trained on as well",
)
def test_D8_odd_texts(tmp_path: Path) -> Figures:
    figures = Figures()
    model = trained(3) / "run"
    texts = [*TEXTS.values(), *LONG_TEXTS.values()]
    source = write_rows(tmp_path / "all.csv", table_of(text=texts))
    together = count_prediction(figures, "together", source, tmp_path / "all.tsv", num_rows=len(texts), model=model)
    for (case, text), there in zip((TEXTS | LONG_TEXTS).items(), together, strict=True):
        source = write_rows(tmp_path / "one.csv", table_of(text=[text]))
        [alone] = count_prediction(figures, case, source, tmp_path / "one.tsv", num_rows=1, model=model)
        differences = [abs(float(alone[name]) - float(there[name])) for name in alone if name.startswith("prob")]
        figures.count(max(differences) <= 1e-6, f"{case}: {max(differences)} away from the same row among others")
    frame = pd.DataFrame(table_of(text=["x"] * 4)[1:], columns=HEADER).assign(text=[None, float("nan"), pd.NA, ""])
    found = Predictor.from_folder(model).predict(frame)["prob_0"].tolist()
    figures.count(max(found) - min(found) <= 1e-6, f"missing texts of a frame differ: {found}")
    rows = rows_of("train")
    for place, text in enumerate(texts, start=1):
        rows[place][1] = text
    paths = {
        "train_path": write_rows(tmp_path / "train.csv", rows),
        "test_path": write_rows(tmp_path / "test.csv", table_of(text=texts)),
    }
    done = train_run(
        figures, "trained on them", write_config(tmp_path, trained(), model_path=tmp_path / "run", **paths)
    )
    said = " texts are longer than 1 x 32 tokens (max_chunks x max_length) and were cut" in done.err
    figures.count(said, f"trained on them: cut texts not counted: {done.err}")
    figures.count(len(read_tsv(predictions_of(tmp_path / "run"))) == len(texts), "trained on them: test rows lost")
    return figures


def reset_peak() -> float:
    """Resident MB now, without freed memory that could hide new; the kernel's note of the largest begins anew, where it can."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return next(
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
    except OSError:
        return largest_peak()


def largest_peak() -> float:
    """Most resident MB since `reset_peak` (elsewhere than on Linux: since the start)."""
    try:
        return next(
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@row(
    "D8",
    "texts of 10^6 characters, with and without spaces",
    "at most 1 s a row and 200 MB of extra memory, of one row and of a file of them",
    full={"num_rows": 1000},
)
def test_D8_long_texts(tmp_path: Path, num_rows: int = 300) -> Figures:
    figures = Figures()
    predictor = Predictor.from_folder(trained() / "run")
    short = write_rows(tmp_path / "short.csv", table_of(text=["refund pay " * 100] * 256))
    predictor.predict_file(
        [str(short)], tmp_path / "short.tsv"
    )  # what a first batch allocates is no matter of the text
    for case, text in LONG_TEXTS.items():
        measured = []
        for count in (1, num_rows) if len(text.encode()) <= LONG else (1,):  # of two bytes a character and more: one
            source = write_rows(tmp_path / "long.csv", table_of(text=[text] * count))
            before, started = reset_peak(), time.perf_counter()
            scored = predictor.predict_file([str(source)], tmp_path / "long.tsv")
            seconds, extra = (time.perf_counter() - started) / count, largest_peak() - before
            figures.rows_lost += count - scored
            figures.count(
                seconds <= 1 and extra <= 200, f"{count} rows of {case}: {seconds:.2f} s a row, {extra:.0f} MB"
            )
            measured.append(f"{max(extra, 0):.0f} MB for {count}")
            os.remove(source)
        figures.notes.append(f"{case}: {1000 * seconds:.0f} ms a row, extra memory {', '.join(measured)}")
    return figures


# ---- D9: numbers ----

NO_NUMBERS = [
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
    "inf, -inf, 1e308, text, decimal commas, digit groups in a numeric column of train, validation, test and new rows; no number at all",
    "exit code 2, one line with file, row, column and cell",
)
def test_D9_no_numbers(tmp_path: Path) -> Figures:
    figures = Figures()
    for content in NO_NUMBERS:
        for part in ("train", "val", "test"):
            path = write_rows(tmp_path / f"{part}.csv", cell(6, "age", content)(rows_of(part)))
            expected = [f"{path} row 6 (line 7), column 'age': expected a finite number", f"found {content!r}"]
            training_refuses(figures, f"{content!r} in {part}", tmp_path, expected, **{f"{part}_path": path})
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


@row("D9", "missing numbers", "the training median stands in: the same probability as with the median in the cell")
def test_D9_missing_numbers(tmp_path: Path) -> Figures:
    figures = Figures()
    features = read_json(trained() / "run/features.json")
    place = features["number_names"].index("amount")  # no training row lacked it, so it has no indicator
    figures.count(features["has_indicator"] == [True, False], "other indicators")
    amounts = [float(line[3]) for line in rows_of("train")[1:]]
    figures.count(
        features["medians"][place] == float(np.median(amounts)), "the median is not that of the training rows"
    )
    source = write_rows(tmp_path / "new.csv", table_of(amount=[repr(features["medians"][place]), *MISSING, "77"]))
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
    "1e-320, 3.4e38, whole numbers beyond 2^53; a constant column, a column of two numbers that float32 cannot tell apart",
    "scored and trained on; probabilities finite",
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
    "one neutral index for all unseen, counted in a warning; the empty one is learned",
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
    most = f"warning: input: {len(unseen)} of {len(unseen) + 4} cells of column 'kind' hold a value that no training row has, such as 'z', 'A', 'a '; training rows have 'a', 'b', 'c'"
    figures.count(done.err.count(most) == 1, f"predict does not count them: {done.err}")
    paths = {}
    for name, count in (("val", 3), ("test", 5)):
        edited = rows_of(name)
        for place in range(1, count + 1):
            edited[place][4] = unseen[place]
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


@row("D10", "a column of 10^5 categories", "trained on, with a warning that names column and number; new rows scored")
def test_D10_many_categories(tmp_path: Path, num_categories: int = 100_000) -> Figures:
    figures = Figures()
    rows = [
        HEADER,
        *([str(place), "", "", "1", f"category {place}", str(place % 2)] for place in range(num_categories)),
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
    message = f"warning: column 'kind': {num_categories} categories in {num_categories} training rows, each with weights of its own to learn: is it an id?"
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
