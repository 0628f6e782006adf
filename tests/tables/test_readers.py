"""Files are read correctly or refused in one line: TSV quotes, JSON keys, spreadsheet leftovers, other file formats."""

import gzip
import json
import logging
import os
import random
import shutil
import zipfile
from contextlib import suppress

import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet

from mmbert_core.runtime.errors import InputError
from mmbert_core.tables import csv_reader, lines, parquet_reader
from mmbert_core.tables.readers import header_of
from mmbert_core.tables.table import expand_paths, read_chunks, resolve_columns


def cells_of(path, columns, **options):
    chunks = list(read_chunks([str(path)], columns, **options))
    return [tuple(record) for chunk in chunks for record in zip(*(chunk.cells[column] for column in columns))]


def error_of(path, columns, **options):
    with pytest.raises(InputError) as caught:
        cells_of(path, columns, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


# ---- quotes in TSV ----

ADVICE = "tsv_quoting none (--tsv_quoting none)"
UNQUOTED = {  # lines of 3 columns; the row and text of the error
    "swallows rows": (
        ["1\ta\tfine", '2\ta\t"refund now', "3\tb\tlate", '4\tb\tpay outside"', "5\tb\tmoney"],
        "row 2 (line 3): a quote opens a cell that ends 2 lines later, and lines in it have 3 cells",
    ),
    "swallows one row": (['1\ta\t"x', '2\tb\ty"'], "row 1 (line 2): a quote opens a cell that ends 1 lines later"),
    "swallows from the middle": (
        ['1\t"a\tx', '2\tb"\ty', "3\tc\tz"],
        "row 1 (line 2): a quote opens a cell that ends 1 lines later",
    ),
    "words after the quote": (["1\ta\tx", '2\ta\t"refund" now'], "row 2 (line 3): broken quoting"),
    "never closed": (
        ["1\ta\tx", '2\ta\t"refund now', "3\ta\ty"],
        "row 2 (line 3): the quoted cell that begins here is never closed",
    ),
}


@pytest.mark.parametrize("case", UNQUOTED)
def test_an_unquoted_tsv_is_never_read_with_fewer_rows(tmp_path, case):
    rows, words = UNQUOTED[case]
    path = tmp_path / "t.tsv"
    path.write_text("\n".join(["i\tk\tt", *rows]) + "\n")
    for name in ("t.tsv", "t.tsv.gz"):
        (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
        found = error_of(tmp_path / name, ["i", "k", "t"])
        assert found.startswith(f"FILE {words}") and ADVICE in found
        assert cells_of(tmp_path / name, ["i", "k", "t"], tsv_quoting="none") == [
            tuple(row.split("\t")) for row in rows
        ]


def test_an_unquoted_tsv_of_one_column(tmp_path):
    (tmp_path / "t.tsv").write_text('t\n"refund now\nlate\npay outside"\nmoney\n')
    assert ADVICE in error_of(tmp_path / "t.tsv", ["t"])
    assert len(cells_of(tmp_path / "t.tsv", ["t"], tsv_quoting="none")) == 4
    (tmp_path / "t.tsv").write_text('t\n"refund now\n\nlate"\nmoney\n')  # a blank line is no row
    assert cells_of(tmp_path / "t.tsv", ["t"]) == [("refund now\n\nlate",), ("money",)]


def test_unambiguous_line_breaks_in_quoted_cells_of_a_tsv_are_read(tmp_path, write_table):
    rows = [("1", "two\nlines", "x"), ("2", 'say "hi"', "a\tb"), ("3", "x", "last\n\ncolumn"), ("4", "", "")]
    path = write_table("t.tsv", ["i", "k", "t"], rows)
    assert cells_of(path, ["i", "k", "t"]) == cells_of(path, ["i", "k", "t"], tsv_quoting="standard") == rows
    like_rows = [("1", "x", "a\n2\ty\tb")]  # a cell that holds a row: only the user can know
    path = write_table("u.tsv", ["i", "k", "t"], like_rows)
    assert (
        ADVICE in error_of(path, ["i", "k", "t"])
        and cells_of(path, ["i", "k", "t"], tsv_quoting="standard") == like_rows
    )
    path = write_table("v.csv", ["i", "k", "t"], [("1", "x", "a\n2,y,b")])
    assert cells_of(path, ["i", "k", "t"]) == [("1", "x", "a\n2,y,b")]  # in CSV, quoting is the rule


# ---- JSON lines ----


def test_an_optional_key_that_only_later_objects_have_is_refused(tmp_path):
    objects = [{"a": 1}, {"a": 2, "label": "x"}, {"a": 3, "label": "y"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    assert resolve_columns([str(tmp_path / "t.jsonl")], ["a"], ["label"]) == ["a"]
    found = error_of(tmp_path / "t.jsonl", ["a"], optional=["label"])
    assert found == "FILE row 2 (line 2): key 'label' is there, but row 1 has none; a missing value is written null"
    assert cells_of(tmp_path / "t.jsonl", ["a"]) == [("1",), ("2",), ("3",)]
    (tmp_path / "u.jsonl").write_text('{"a": 1, "label": "x"}\n{"a": 2}\n')
    assert (
        error_of(tmp_path / "u.jsonl", ["a", "label"])
        == "FILE row 2 (line 2): key 'label' is not there; a missing value is written null"
    )


# ---- what spreadsheets leave behind ----


@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t")])
def test_empty_columns_and_rows_of_separators_at_the_end_are_ignored_and_said(tmp_path, caplog, suffix, separator):
    path = tmp_path / f"t{suffix}"
    lines_of_file = ["a,b,,", "1,2,,", ",3,,", ",,,", "", ",,,", ""]
    path.write_text("\n".join(lines_of_file).replace(",", separator))
    with caplog.at_level(logging.INFO):
        assert header_of(str(path)) == ["a", "b"] and cells_of(path, ["b", "a"]) == [("2", "1"), ("3", "")]
    assert [message.replace(str(path), "FILE") for message in caplog.messages] == [
        "FILE: 2 columns without a name at the end are ignored",
        "FILE: 2 rows of separators alone at the end are ignored",
    ]
    path.write_text("\n".join(["a,b", ",", ",,,"]).replace(",", separator))  # of any number
    assert cells_of(path, ["a"]) == []


def test_spreadsheet_leftovers_between_rows_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n,\n,\n3,4\n")
    assert (
        error_of(path, ["a"])
        == "FILE row 2 (line 3): expected a row, found separators alone (remove it, or give the row an id)"
    )
    path.write_text("\na,b\n1,2\n")
    assert error_of(path, ["a"]) == "FILE header (line 1): expected a row, found a blank line (remove it)"
    path.write_text("a,b,,\n1,2,,\n3,4,x,\n")
    assert (
        error_of(path, ["a"])
        == "FILE row 2 (line 3): expected no cell under the empty names at the end of the header, found 'x'"
    )
    path.write_text('a\n1\n""\n2\n')  # an empty cell of a single column is a row
    assert cells_of(path, ["a"]) == [("1",), ("",), ("2",)]
    for name, line, advice in (("t.csv", "sep=;", "commas"), ("t.csv", "sep=,", "commas"), ("t.tsv", "SEP=\t", "tabs")):
        (tmp_path / name).write_text(f"{line}\na;b\n1;2\n")
        assert f"expected column names, found '{line[:4]}" in error_of(
            tmp_path / name, ["a"]
        ) and f"separate cells by {advice}" in error_of(tmp_path / name, ["a"])


# ---- other kinds of files ----


def workbook(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")


def open_document(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")


def archive_of_csv(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t.csv", "a,b\n1,2\n")


KINDS = {
    "Excel workbook": workbook,
    "OpenDocument": open_document,
    "ZIP archive": archive_of_csv,
    "Excel": lambda path: path.write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(500)),
    "packed by gzip": lambda path: path.write_bytes(gzip.compress(b"a,b\n1,2\n")),
    "Parquet": lambda path: pd.DataFrame({"a": ["x"] * 100, "b": range(100)}).to_parquet(path),
    "PDF": lambda path: path.write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"),
    "HTML page": lambda path: path.write_text("<!DOCTYPE html>\n<html><table>\n"),
    "XML": lambda path: path.write_text('\ufeff<?xml version="1.0"?>\n'),
    "SQLite": lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(100)),
    "pickle": lambda path: pd.DataFrame({"a": [1]}).to_pickle(path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_for_another_file_format_names_it(tmp_path, kind):
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        KINDS[kind](tmp_path / name)
        found = error_of(tmp_path / name, ["a"])
        assert "expected text; the file is" in found and kind in found and "Latin" not in found
    KINDS[kind](tmp_path / "t.parquet")
    assert kind == "Parquet" or kind in error_of(tmp_path / "t.parquet", ["a"])


def test_a_workbook_is_one_whenever_it_was_saved(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.csv", "w") as archive:  # line breaks among the first bytes: day 10 of month 8
        archive.writestr(zipfile.ZipInfo("[Content_Types].xml", date_time=(2026, 8, 10, 1, 16, 20)), "<Types/>")
    assert b"\n" in (tmp_path / "t.csv").read_bytes()[:30]
    assert "Excel workbook" in error_of(tmp_path / "t.csv", ["a"])


def test_text_that_begins_as_other_files_is_text(tmp_path):
    for header in ("PAR1", "ORC", "BZh", "PK", "Obj", "GIF89a"):
        (tmp_path / "t.csv").write_text(f"{header},b\n1,2\n")
        assert cells_of(tmp_path / "t.csv", [header, "b"]) == [("1", "2")]


# ---- folders and names ----


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    folder = tmp_path / "new.parquet"
    folder.mkdir()
    frame = pd.DataFrame({"a": range(10), "b": list("abcdefghij")})
    for number in (1, 0, 2):
        frame[number * 4 : number * 4 + 4].to_parquet(folder / f"part-0000{number}.snappy.parquet", index=False)
    for mark in ("_SUCCESS", "._SUCCESS.crc", ".part-00000.snappy.parquet.crc", "_metadata"):
        (folder / mark).write_bytes(b"")
    assert cells_of(folder, ["a", "b"]) == [(str(a), b) for a, b in zip(frame["a"], frame["b"])]
    for number in range(12):  # as Dask numbers them
        frame[:0].assign(a=[]).to_parquet(folder / f"part.{number}.parquet", index=False)
    assert [name.split(".")[-2] for name in expand_paths([str(folder)])[-12:]] == [str(number) for number in range(12)]
    (folder / "notes.csv").write_text("a,b\n")
    assert error_of(folder, ["a"]) == "FILE: expected a folder of Parquet files alone, found 'notes.csv' in it"
    shutil.rmtree(folder)
    (folder / "year=2026").mkdir(parents=True)
    assert "found folders such as 'year=2026', whose names hold a column" in error_of(folder, ["a"])


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.csv")
    with open(name, "w") as stream:
        stream.write("a,b\n1,2\n")
    for path in (name, str(tmp_path / "*.csv")):
        with pytest.raises(InputError) as caught:
            expand_paths([path])
        assert (
            str(caught.value)
            == f"{tmp_path}/caf\\xe9.csv: expected a name in UTF-8, found other bytes in it (here as \\x..): rename it"
        )


# ---- bounds ----


def test_cells_and_lines_that_are_too_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    for module in (lines, csv_reader, parquet_reader):
        monkeypatch.setattr(module, "MAX_CELL_CHARACTERS", 100)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n" + ",".join(["x" * 80] * 20) + "\n")
    assert error_of(tmp_path / "t.csv", ["a"]).startswith(
        "FILE row 2 (line 3): expected lines of at most 1,000 bytes, found a longer one"
    )
    (tmp_path / "u.csv.gz").write_bytes(gzip.compress(b"x" * 5000))
    assert error_of(tmp_path / "u.csv.gz", ["a"]).startswith(
        "FILE header (line 1): expected lines of at most 1,000 bytes"
    )
    for name, text in (
        ("c.csv", f"a,b\n1,2\n{'x' * 101},2\n"),
        ("q.csv", 'a,b\n1,2\n"' + "x\n" * 60),
        ("c.tsv", f"a\tb\n1\t2\n{'x' * 101}\t2\n"),
    ):
        (tmp_path / name).write_text(text)
        assert error_of(tmp_path / name, ["a"]).startswith(
            "FILE row 2 (line 3): expected cells of at most 100 characters, found a longer one"
        )
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n' + json.dumps({"a": "x" * 101}) + "\n")
    assert error_of(tmp_path / "t.jsonl", ["a"]).endswith(
        "row 2 (line 2), column 'a': expected text, a number, true, false or null, found 101 characters, more than 100"
    )
    parquet.write_table(pyarrow.table({"a": ["x"] * 50 + ["y" * 101]}), tmp_path / "t.parquet")
    assert (
        error_of(tmp_path / "t.parquet", ["a"])
        == "FILE row 51, column 'a': expected a single value, found 101 characters, more than 100"
    )
    parquet.write_table(
        pyarrow.table({"a": [chr(65 + row) * 1000 for row in range(3)]}), tmp_path / "u.parquet", use_dictionary=False
    )
    assert error_of(tmp_path / "u.parquet", ["a"]).startswith(
        "FILE row 1 or after, column 'a': expected cells of at most 100 characters"
    )


def test_chunks_end_at_a_number_of_characters_and_at_multiples_of_their_rows(write_table, monkeypatch):
    from mmbert_core.tables import table

    path = write_table("t.csv", ["a", "b"], [("x" * 10, row) for row in range(25)])
    monkeypatch.setattr(table, "MAX_CHUNK_CHARACTERS", 45)
    chunks = list(read_chunks([path], ["a"], chunk_rows=12))
    assert [len(chunk) for chunk in chunks] == [5, 5, 2, 5, 5, 2, 1]
    assert [chunk.row_location(0).split()[-4:] for chunk in chunks] == [
        ["row", str(row), "(line", f"{row + 1})"] for row in (1, 6, 11, 13, 18, 23, 25)
    ]
    assert [len(chunk) for chunk in read_chunks([path], ["a"], max_characters={"a": 3}, chunk_rows=12)] == [12, 12, 1]


def test_parquet_texts_are_the_same_in_any_encoding(tmp_path):
    values = ["x", None, "", "y" * 50, "x", "ü", None] * 300
    columns = {
        "text": values,
        "kind": pd.Categorical(values),
        "binary": [None if value is None else value.encode() for value in values],
        "number": pd.Categorical([3, 1, None, 2, 3, 1, 1] * 300),
        "large": pyarrow.array(values, pyarrow.large_string()),
        "unsigned": pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0, None, 1, 0, 0, 1, None] * 300, pyarrow.uint32()), ["x", "y"]
        ),  # Polars
    }
    for name, options in (
        ("d", {}),
        ("p", {"use_dictionary": False}),
        ("g", {"row_group_size": 100}),
        ("s", {"data_page_size": 64, "dictionary_pagesize_limit": 16}),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet", **options)
        rows = cells_of(tmp_path / f"{name}.parquet", list(columns))
        others = list(zip(["3", "1", "", "2", "3", "1", "1"] * 300, ["x", "", "y", "x", "x", "y", ""] * 300))
        assert rows == [
            (value or "", value or "", value or "", number, value or "", word)
            for value, (number, word) in zip(values, others)
        ], name


def test_a_damaged_parquet_file_is_read_or_refused(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(
        pyarrow.table({"text": [f"word {row % 7}" for row in range(60)], "number": list(range(60))}),
        path,
        compression="none",
    )
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        with suppress(InputError):
            assert len(cells_of(path, header_of(str(path)))) == parquet.ParquetFile(path).metadata.num_rows
