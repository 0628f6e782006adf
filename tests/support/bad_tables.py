"""Tables that cannot be trained on or predicted: the error of each, and words that the error line must have."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

Rows = list[list[str]]  # of a table, the header first


def read_rows(path: Path) -> Rows:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def as_csv(rows: Rows) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode("utf-8")


# ---- edits of a good table ----


def cell(row: int, column: str, content: str) -> Callable[[Rows], Rows]:
    """An edit of one cell; rows count from 1."""

    def edit(rows: Rows) -> Rows:
        rows[row][rows[0].index(column)] = content
        return rows

    return edit


def column_of(column: str, contents: str | Callable[[str], str]) -> Callable[[Rows], Rows]:
    """An edit of all cells of a column."""

    def edit(rows: Rows) -> Rows:
        index = rows[0].index(column)
        for row in rows[1:]:
            row[index] = contents if isinstance(contents, str) else contents(row[index])
        return rows

    return edit


def without(column: str) -> Callable[[Rows], Rows]:
    return lambda rows: [[content for index, content in enumerate(row) if rows[0][index] != column] for row in rows]


def header(old: str, new: str) -> Callable[[Rows], Rows]:
    return lambda rows: [[new if name == old else name for name in rows[0]], *rows[1:]]


def spoil(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


# ---- the cases ----

TRAINING_TABLES = {
    "column missing": ("train", without("age"), ["column 'age' not found", "columns are 'row_id', 'text'"]),
    "column in other case": ("train", header("age", "Age"), ["column 'age' not found", "nearest is 'Age'"]),
    "no header": ("train", lambda rows: rows[1:], ["column 'text' not found"]),
    "column twice": ("train", header("amount", "age"), ["column 'age' occurs 2 times in the header"]),
    "label column missing": ("train", without("label"), ["column 'label' not found"]),
    "label column missing in validation": ("val", without("label"), ["column 'label' not found"]),
    "id column missing in test": ("test", without("row_id"), ["column 'row_id' not found"]),
    "label cell empty": (
        "train",
        cell(4, "label", ""),
        [" row 4 (line 5), column 'label': expected a label, found an empty cell"],
    ),
    "label out of range": (
        "train",
        cell(7, "label", "2"),
        ["column 'label': expected 2 classes (num_classes) in the training rows, found 3: '0', '1', '2'"],
    ),
    "label unknown in validation": (
        "val",
        cell(3, "label", "maybe"),
        [" row 3 (line 4), column 'label': expected one of the labels '0', '1', found 'maybe'"],
    ),
    "label missing in test": (
        "test",
        cell(9, "label", ""),
        [" row 9 (line 10), column 'label': expected one of the labels '0', '1', found an empty cell"],
    ),
    "labels unknown in test": (
        "test",
        column_of("label", "yes"),
        [" row 1 (line 2)", "found 'yes'", "37 such rows; also", " row 3 (line 4)"],
    ),
    "label in two spellings": ("train", cell(5, "label", "1.0"), ["column 'label': expected one spelling of a label"]),
    "one class only": (
        "train",
        column_of("label", "1"),
        ["column 'label': all training rows have the label '1', expected 2 classes"],
    ),
    "text among numbers": (
        "train",
        cell(6, "age", "abc"),
        [" row 6 (line 7), column 'age': expected a finite number", "found 'abc'"],
    ),
    "decimal comma": ("val", cell(2, "amount", "1,5"), [" row 2 (line 3), column 'amount'", "found '1,5'"]),
    "infinity": ("train", cell(1, "age", "inf"), [" row 1 (line 2), column 'age'", "found 'inf'"]),
    "minus infinity": ("test", cell(37, "age", "-inf"), [" row 37 (line 38), column 'age'", "found '-inf'"]),
    "number too large for float32": ("train", cell(1, "age", "1e39"), ["column 'age'", "found '1e39'"]),
    "no value in a numeric column": (
        "train",
        column_of("age", ""),
        ["column 'age': expected numbers, found no value in any of 64 rows"],
    ),
    "row too short": (
        "train",
        lambda rows: [*rows[:5], rows[5][:-1], *rows[6:]],
        [" row 5 (line 6): expected 6 cells as in the header, found 5"],
    ),
    "row too long": (
        "test",
        lambda rows: [*rows[:5], [*rows[5], "x"], *rows[6:]],
        [" row 5 (line 6): expected 6 cells as in the header, found 7"],
    ),
    "header only": ("train", lambda rows: rows[:1], ["expected rows, found a header only"]),
    "header only in validation": ("val", lambda rows: rows[:1], ["expected rows, found a header only"]),
}

TRAINING_FILES = {
    "empty": ("csv", lambda content: b"", ["the file is empty, expected a header in line 1"]),
    "quote never closed": (
        "csv",
        lambda content: spoil(content, b"\n00003,", b'\n00003,"'),
        [" row 4 (line 5): the quoted cell", "is never closed"],
    ),
    "quote within a cell": (
        "csv",
        lambda content: spoil(content, b"\n00003,", b'\n00003,"a"b'),
        [" row 4 (line 5): broken quoting"],
    ),
    "NUL byte": (
        "csv",
        lambda content: spoil(content, b"\n00003,", b"\n00003\0,"),
        [" row 4 (line 5): expected text, found a NUL byte at byte "],
    ),
    "invalid UTF-8": (
        "csv",
        lambda content: spoil(content, b"\n00003,", b"\n0\xff03,"),
        [" row 4 (line 5): expected UTF-8, found byte 0xff at byte "],
    ),
    "Latin-1": (
        "csv",
        lambda content: spoil(content, b"\n00003,", "\n00003,cliché ".encode("latin-1")),
        [" row 4 (line 5): expected UTF-8, found byte 0xe9"],
    ),
    "UTF-16": (
        "csv",
        lambda content: content.decode().encode("utf-16"),
        [" header (line 1): expected UTF-8, found byte 0xff at byte 0"],
    ),
    "blank line": (
        "csv",
        lambda content: spoil(content, b"\n00003,", b"\n\n00003,"),
        [" (line 5): expected a row, found a blank line"],
    ),
    "not gzip": ("csv.gz", lambda content: content, ["cannot be read"]),
    "not Parquet": ("parquet", lambda content: content, ["cannot be read as Parquet"]),
    "not JSON": ("jsonl", lambda content: b'{"text": "a"}\n{"text": \n', ["column 'age' not found"]),
    "unknown kind": ("xlsx", lambda content: content, ["expected a name that ends in .csv, .tsv, .jsonl"]),
}

PREDICT_TABLES = {
    "column missing": (without("amount"), ["column 'amount' not found"]),
    "column in other case": (header("text", "TEXT"), ["column 'text' not found", "nearest is 'TEXT'"]),
    "id column missing": (without("row_id"), ["column 'row_id' not found"]),
    "column twice": (header("amount", "kind"), ["column 'kind' occurs 2 times in the header"]),
    "text among numbers": (cell(21, "age", "abc"), [" row 21 (line 22), column 'age'", "found 'abc'"]),
    "infinity": (cell(20, "amount", "inf"), [" row 20 (line 21), column 'amount'", "found 'inf'"]),
    "row too short": (
        lambda rows: [*rows[:30], rows[30][:-1], *rows[31:]],
        [" row 30 (line 31): expected 6 cells as in the header, found 5"],
    ),
    "empty": (lambda rows: [], ["the file is empty"]),
}
