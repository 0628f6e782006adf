"""Tables, prediction files and the command that writes them."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.training.results import Results
from tests.support import tiny

COLUMNS = ["row_id", "text", "age", "amount", "kind", "label"]
ODD_IDS = [
    "007",
    "NA",
    "=1+1",
    "1e5",
    "a\tb",
    "two\nlines",
    "two\r\nlines",
    "\r",
    '"quoted"',
    'a"b',
    '"',
    "'",
    " spaces ",
    "",
    "-",
    "+1",
    "null",
    "ünïcödé",
    "日本",
    "x" * 300,
    "00001",
    "00001",
    "True",
    "1.0",
    "\\N",
    "#",
    ",",
]


def train_in(tables: Path, tmp_path: Path, **changes: Any) -> tuple[Path, Results, Data]:
    """One epoch on the tables of `tables` into `tmp_path`; the folder, the results and the prepared data."""
    folder = tmp_path / changes.pop("name", "run")
    paths = {"model_path": str(folder), "cache_path": str(tmp_path / "cache")}
    config = Config(**tiny.settings(tables, max_epochs=1, **paths, **changes))
    return folder, tiny.train(config), prepare(config)


def predict(model: Path, source: Path | str, output: Path) -> list[dict[str, str]]:
    """Run the command; the output's rows."""
    assert cli.main(["predict", str(model), str(source), str(output), "--num_threads", "1"]) == 0
    return read_tsv(output)


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def write_csv(path: Path, rows: list[list[Any]], columns: list[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_file_of(folder: Path) -> Path:
    [found] = folder.glob("multimodal_bert-*/test_result_0.tsv")
    return found


test_file_of.__test__ = False
