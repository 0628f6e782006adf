"""D4: ids of any kind in the cells, repeated ids, and spreadsheet formulas."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mmbert_core.predictor import Predictor
from mmbert_core.storage.files import read_json
from tests.faults.inputs import (
    HEADER,
    command,
    count_prediction,
    predictions_of,
    read_tsv,
    rows_of,
    table_of,
    train_run,
    trained,
    write_config,
    write_rows,
)
from tests.support.bad_tables import Rows
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


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


# ---- D4: ids ----


@row(
    "D4",
    "ids: empty, with tabs, line breaks, quotes, 300 characters, any script, 007, NA, 1e5, =1+1",
    "the same bytes in the output of predict, the test stage and a frame, read by csv and by pandas",
)
def test_D4_ids_are_kept(tmp_path: Path) -> Figures:
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
    return [rows[0], *([*line[:-1], str(index % 2)] for index, line in enumerate(rows[1:]))]


@row(
    "D4",
    "ids that repeat in train, validation, test and new rows",
    "a warning with their number and the first row; every row kept and predicted",
)
def test_D4_ids_that_repeat(tmp_path: Path) -> Figures:
    figures = Figures()
    paths = {}
    for name in ("train", "val", "test"):
        rows = rows_of(name)
        for index in (5, 9, 20):
            rows[index][0] = rows[2][0]
        rows[11][0] = rows[12][0] = ""  # two empty ids do not count as repeated
        paths[name] = write_rows(tmp_path / f"{name}.csv", rows)
    config = write_config(
        tmp_path, trained(), model_path=tmp_path / "run", **{f"{name}_path": path for name, path in paths.items()}
    )
    done = train_run(figures, "training", config)
    for name, num_rows in (("train", 64), ("val", 23), ("test", 37)):
        message = (
            f"warning: {paths[name]}: 3 of {num_rows} ids repeat one of an earlier row, "
            f"first in {paths[name]} row 5 (line 6); all rows are kept"
        )
        figures.count(done.err.count(message) == 1, f"{name}: {done.err}")
    results = read_json(tmp_path / "run/train_results.json")
    figures.count((results["train_rows"], results["test_metrics"]["test/num_rows"]) == (64, 37), "rows were dropped")
    expected = [line[0] for line in rows_of("test")[1:]]
    for index in (5, 9, 20):
        expected[index - 1] = expected[1]
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
PLAIN_CELLS = ["-3", "+1.5e3", "-.5", "+7.", "-1E-5", "'=1+1", " =1", "a=1", "007", "", '"=1"', "1-2", "a\t=1"]


@row(
    "D4",
    "ids, labels, class names and an id column's name that a spreadsheet would evaluate as formulas",
    "plain: verbatim; sheet_safe: a ' before them, numbers and probabilities unchanged",
)
def test_D4_formulas(tmp_path: Path) -> Figures:
    figures = Figures()
    classes = ["=1+1", "+x", "-y", "@z", "-3"]
    tables = {}
    for name in ("train", "val"):
        rows = [
            ["=id", *HEADER[1:]],
            *([*line[:-1], classes[index % 5]] for index, line in enumerate(rows_of(name)[1:])),
        ]
        tables[f"{name}_path"] = write_rows(tmp_path / f"{name}.csv", rows)
    changes = {"id_name": "=id", "is_binary": False, "num_classes": 5, "test_path": [], "max_train_rows": 40}
    train_run(figures, "training", write_config(tmp_path, trained(), model_path=tmp_path / "run", **tables, **changes))
    cells = [*FORMULAS, *PLAIN_CELLS]
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
        cells, [True] * len(FORMULAS) + [False] * len(PLAIN_CELLS), plain, safe, strict=True
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
