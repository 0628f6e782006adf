"""example.py of an exported folder, alone: the package's predictions, and one line for what is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmbert_core.export import example as export_example
from mmbert_core.export import exporter
from mmbert_core.inference.output_file import output_delimiter, table_line
from tests.support.exports import COLUMNS, cpu_predictor, write_csv

for package in exporter.ONNX_PACKAGES:
    pytest.importorskip(package)

HOSTILE = [
    ["007", 'she said "refund" now', "30", "1.5", "a"],
    ["NA", "two\nlines", "1e1", " 2.5 ", "b"],
    ['a"b', "two\r\nlines\r, and a\ttab", "NA", "", "c"],
    ["two\nlines", "", "", "null", ""],
    ["a\tb", " ", "nan", "#N/A", "never seen"],
    ["=1+1", "refund " * 200, "-1e30", "+.5", " a"],
    ["", "x" * 3000, "3.4e38", "1e-320", "A"],
    [" spaces ", "[SEP] [PAD] [CLS] [MASK] [UNK]", "٣", "-0", "NA"],
    ["日本", "é ́ 日本 😀 \u200b \u202e", "007", "1E5", "a\n"],
    ["\r", "Refund PAY,outside;shop", "<na>", "None", '"a"'],
    ["00001", "refund", "50", "2", "a"],
    ["00001", "NA", "50", "2", "a"],
    ["1.0", "True", "True", "FALSE", "True"],
]
BLOCKED = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "pandas", "mmbert_core"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """example.py in an empty place of its own, where importing torch, transformers, pandas or this package fails."""
    command = [sys.executable, "-c", BLOCKED, str(folder / "example.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_example_alone_predicts_what_the_package_predicts(case, tmp_path):
    folder, loaded = case
    with open(folder / "test.csv", newline="", encoding="utf-8") as stream:
        rows = [[row[column] for column in COLUMNS] for row in csv.DictReader(stream)]
    source = write_csv(tmp_path / "new.csv", HOSTILE + rows)
    done = run_example(folder / "exported", str(source), str(tmp_path / "found.tsv"))
    assert done.returncode == 0, done.stderr

    cpu_predictor(loaded).predict_file([str(source)], tmp_path / "expected.tsv")
    found, expected = read_tsv(tmp_path / "found.tsv"), read_tsv(tmp_path / "expected.tsv")
    assert len(found) == len(HOSTILE) + len(rows) and list(found[0]) == list(expected[0])
    for name in found[0]:
        ours, theirs = ([row[name] for row in each] for each in (expected, found))
        if name.startswith("prob"):
            np.testing.assert_allclose(np.array(theirs, float), np.array(ours, float), atol=1e-4, rtol=0)
            assert np.std(np.array(ours, float)) > 0.01, "a model that cannot tell rows apart proves nothing"
        else:
            assert theirs == ours


def test_the_example_keeps_its_input_and_says_what_is_wrong_with_it(case):
    folder, _ = case
    before = (folder / "test.csv").read_bytes()
    done = run_example(folder / "exported", str(folder / "test.csv"), str(folder / "test.csv"))
    assert done.returncode == 1 and "is the input file" in done.stderr and (folder / "test.csv").read_bytes() == before
    header = before.split(b"\n")[0]
    (folder / "broken.csv").write_bytes(header + b'\n"a"b' + b"," * header.count(b",") + b"\n")
    (folder / "out.tsv").write_text("of an earlier day")
    done = run_example(folder / "exported", str(folder / "broken.csv"), str(folder / "out.tsv"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert (folder / "out.tsv").read_text() == "of an earlier day" and not list(folder.glob("*.part"))


def test_a_wrong_row_is_one_line(plain, tmp_path):
    folder, loaded = plain
    exporter.export_model(loaded, tmp_path / "exported", format="onnx")
    good = ["r", "refund", "1", "2", "a"]
    for name, rows, columns, problem in (
        ("number", [good, ["r", "refund", "1_0", "2", "a"]], COLUMNS, "expected a finite number, found '1_0'"),
        ("column", [good[:4]], COLUMNS[:4], "expected the column 'kind' once, found it 0 times"),
        ("cells", [good, good[:4]], COLUMNS, "before line 4: expected rows of 5 cells, found 4"),
        ("blank", [good, [], good], COLUMNS, "found a blank line"),
    ):
        source = write_csv(tmp_path / f"{name}.csv", rows, columns)
        done = run_example(tmp_path / "exported", str(source), str(tmp_path / "out.tsv"))
        assert done.returncode == 1 and problem in done.stderr and len(done.stderr.splitlines()) == 1
    source.write_bytes(
        b"\xef\xbb\xbf" + source.read_bytes().replace(b"\r\n\r\n", b"\r\n") + b"\r\n\r\n"
    )  # a mark at the start, blank lines at the end
    assert run_example(tmp_path / "exported", str(source), str(tmp_path / "out.tsv")).returncode == 0
    assert len(read_tsv(tmp_path / "out.tsv")) == 2


def test_the_example_writes_the_lines_of_the_package():
    cells = ["007", "a\tb", "a,b", 'say "x"', "two\nlines", "\r", " ", "", np.float32(0.1)]
    for name in ("out.csv", "OUT.CSV", "out.tsv", "out.txt", "out"):
        delimiter = export_example.output_delimiter(name)
        assert delimiter == output_delimiter(name)
        assert export_example.table_line(cells, delimiter) == table_line(cells, delimiter=delimiter)
    for name in ("out.parquet", "out.jsonl", "out.xlsx", "out.csv.gz"):
        for check in (export_example.output_delimiter, output_delimiter):
            with pytest.raises(ValueError, match="expected an output that ends in .tsv or .csv"):
                check(name)
