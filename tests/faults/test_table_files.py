"""D5 to D7: tables with other columns, broken files, other encodings."""

import gzip
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.inputs import (
    HEADER,
    count_prediction,
    prediction_refuses,
    predictions_of,
    rows_of,
    train_run,
    trained,
    training_refuses,
    write_config,
    write_rows,
)
from tests.support.bad_tables import (
    PREDICT_TABLES,
    TRAINING_FILES,
    TRAINING_TABLES,
    Rows,
    as_csv,
    spoil,
    without,
)
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault

MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
WIDE = 200_000  # cells of the widest line


# ---- D5: columns ----


@row(
    "D5",
    "a column missing from train, validation, test or new rows",
    "exit code 2, one line with column and file",
    full={"columns": HEADER},
)
def test_D5_missing_columns(tmp_path: Path, columns: tuple[str, ...] = ("row_id", "age", "label")) -> Figures:
    figures = Figures()
    for table in ("train", "val", "test", "new"):
        for column in columns:
            if column == "label" and table in ("test", "new"):  # these need no labels
                continue
            path = write_rows(tmp_path / f"{table}.csv", without(column)(rows_of("test" if table == "new" else table)))
            expected = [f"{path}: column {column!r} not found; ", "columns are '"]
            if table == "new":
                prediction_refuses(figures, f"new rows without {column}", path, expected)
            else:
                training_refuses(figures, f"{table} without {column}", tmp_path, expected, **{f"{table}_path": path})
    return figures


@row(
    "D5",
    "header: other case, a name twice, none at all, none but it; 0 bytes",
    "exit code 2, one line with column and file",
)
def test_D5_headers(tmp_path: Path) -> Figures:
    figures = Figures()
    for case in ("column in other case", "column twice", "no header", "header only", "header only in validation"):
        table, edit, expected = TRAINING_TABLES[case]
        path = write_rows(tmp_path / f"bad_{table}.csv", edit(rows_of(table)))
        training_refuses(figures, case, tmp_path, [str(path), *expected], **{f"{table}_path": path})
    for case in ("column in other case", "column twice", "empty"):
        edit, expected = PREDICT_TABLES[case]
        path = write_rows(tmp_path / "new.csv", edit(rows_of("test")))
        prediction_refuses(figures, case, path, [str(path), *expected])
    path = write_rows(tmp_path / "new.csv", rows_of("test")[1:])
    prediction_refuses(figures, "no header", path, [f"{path}: column 'text' not found"])
    for content in (b"", MARK):
        for table in ("train", "val", "test"):
            (tmp_path / "nothing.csv").write_bytes(content)
            expected = [f"{tmp_path / 'nothing.csv'}: the file is empty, expected a header in line 1"]
            training_refuses(
                figures,
                f"{table} of {len(content)} bytes",
                tmp_path,
                expected,
                **{f"{table}_path": tmp_path / "nothing.csv"},
            )
    return figures


@row(
    "D5",
    "columns in another order, more columns, a byte order mark, new rows with only a header",
    "the same model, the same predictions; a header-only file and exit code 0",
)
def test_D5_harmless_columns(tmp_path: Path) -> Figures:
    figures = Figures()
    run = trained() / "run"
    right = predictions_of(run).read_bytes()

    def other(rows: Rows) -> Rows:
        return [[*line[::-1], "one more" if index == 0 else "x"] for index, line in enumerate(rows)]

    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_bytes(MARK + as_csv(other(rows_of(name))))
    for case, edit, mark in (
        ("reordered", lambda rows: [line[::-1] for line in rows], b""),
        ("reordered, one column more", other, b""),
        ("byte order mark", list, MARK),
        ("all three", other, MARK),
    ):
        (tmp_path / "new.csv").write_bytes(mark + as_csv(edit(rows_of("test"))))
        count_prediction(figures, case, tmp_path / "new.csv", tmp_path / "out.tsv", num_rows=37)
        figures.count((tmp_path / "out.tsv").read_bytes() == right, f"{case}: other predictions")
    paths = {f"{name}_path": tmp_path / f"{name}.csv" for name in ("train", "val", "test")}
    train_run(figures, "trained on all three", write_config(tmp_path, trained(), model_path=tmp_path / "run", **paths))
    for name in ("model.safetensors", "features.json", "labels.json"):
        figures.count(
            (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), f"trained on all three: another {name}"
        )
    figures.count(
        predictions_of(tmp_path / "run").read_bytes() == right, "trained on all three: other test predictions"
    )
    for with_label, expected in (
        (False, b"row_id\tprob\tpred\tprob_calibrated\n"),
        (True, b"row_id\tprob\tlabel\tpred\tprob_calibrated\n"),
    ):
        path = write_rows(tmp_path / "header.csv", [list(HEADER[: 5 + with_label])])
        count_prediction(figures, "header only", path, tmp_path / "out.tsv", num_rows=0)
        figures.count((tmp_path / "out.tsv").read_bytes() == expected, "header only: another header")
    return figures


# ---- D6: broken files ----

ROW_4 = b"\n00003,"  # its beginning, in line 5
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "row too short": (
        lambda content: spoil(content, ROW_4, b"\n00003\n00003,"),
        " row 4 (line 5): expected 6 cells as in the header, found 1",
    ),
    "row too long": (
        lambda content: spoil(content, ROW_4, b"\n,00003,"),
        " row 4 (line 5): expected 6 cells as in the header, found 7",
    ),
    "last row incomplete": (
        lambda content: content[: content.rindex(b",")],
        ": expected 6 cells as in the header, found 5",
    ),
    "NUL byte in a quoted cell": (
        lambda content: spoil(content, ROW_4, b'\n"\n\0",'),
        " row 4 (line 6): expected text, found a NUL byte at byte ",
    ),
    "NUL byte in the header": (
        lambda content: b"ro\0" + content,
        " header (line 1): expected text, found a NUL byte at byte 2 of the file",
    ),
    "all NUL": (lambda content: bytes(5000), " header (line 1): expected text, found a NUL byte at byte 0 of the file"),
    "quote in the last row never closed": (
        lambda content: content[:-2] + b'"0\n',
        ": the quoted cell that begins here is never closed",
    ),
    "header's quote never closed": (
        lambda content: b'"' + content,
        " header (line 1): the quoted cell that begins here is never closed",
    ),
    "line of 200,000 cells": (
        lambda content: spoil(content, ROW_4, b"\n" + b"x," * (WIDE - 1) + ROW_4),
        f" row 4 (line 5): expected 6 cells as in the header, found {WIDE}",
    ),
    "header of 200,000 columns": (
        lambda content: b",".join(b"c%d" % index for index in range(WIDE)) + b"\n" + b"x," * (WIDE - 1) + b"x\n",
        "column 'text' not found; column 'age' not found; ",
    ),
    "carriage returns alone": (
        lambda content: content.replace(b"\n", b"\r"),
        " header (line 1): broken quoting (a carriage return outside quotes; lines end with \\n or \\r\\n)",
    ),
}


@row(
    "D6",
    "ragged rows, quotes never closed, NUL bytes, blank lines, lines of 200,000 cells, truncated .gz",
    "exit code 2, one line with row and line; no row skipped",
)
def test_D6_broken_files(tmp_path: Path) -> Figures:
    figures = Figures()
    cases = {case: (edit, [expected]) for case, (edit, expected) in BROKEN.items()}
    cases |= {
        case: TRAINING_FILES[case][1:]
        for case in ("quote never closed", "quote within a cell", "NUL byte", "blank line")
    }
    good = as_csv(rows_of("train"))
    for case, (edit, expected) in cases.items():
        path = tmp_path / "broken.csv"
        path.write_bytes(edit(good))
        training_refuses(figures, case, tmp_path, [str(path), *expected], train_path=path)
        prediction_refuses(figures, case, path, [str(path), *expected])
    path = tmp_path / "truncated.csv.gz"
    path.write_bytes(gzip.compress(good * 50)[:-30])
    training_refuses(
        figures, "truncated .gz", tmp_path, [f"{path} row ", "the file cannot be read to its end"], train_path=path
    )
    prediction_refuses(figures, "truncated .gz", path, [f"{path} row ", "the file cannot be read to its end"])
    return figures


@row(
    "D6",
    "CRLF, blank lines at the end, a table of 200,000 columns, a cell of more than 128 KiB, line breaks in cells",
    "every row predicted once, as without them",
)
def test_D6_unusual_files(tmp_path: Path, cell_bytes: int = 1_000_000) -> Figures:
    figures = Figures()
    rows = rows_of("test")
    right = predictions_of(trained() / "run").read_bytes()
    unusual = {
        "CRLF": as_csv(rows).replace(b"\n", b"\r\n"),
        "no line break at the end": as_csv(rows)[:-1],
        "blank lines at the end": as_csv(rows) + b"\r\n\n\n",
        "200,000 columns": as_csv(
            [
                [*rows[0], *(f"c{index}" for index in range(WIDE - 6))],
                *([*line, *["7"] * (WIDE - 6)] for line in rows[1:]),
            ]
        ),
        "another column's cell of more than 128 KiB": as_csv(
            [[*line, "note" if index == 0 else "x" * cell_bytes] for index, line in enumerate(rows)]
        ),
        "another column's cells of several lines": as_csv(
            [[*line, "note" if index == 0 else 'a\r\n\n"b"\n'] for index, line in enumerate(rows)]
        ),
    }
    for case, content in unusual.items():
        (tmp_path / "new.csv").write_bytes(content)
        count_prediction(figures, case, tmp_path / "new.csv", tmp_path / "out.tsv", num_rows=37)
        figures.count((tmp_path / "out.tsv").read_bytes() == right, f"{case}: other predictions")
    return figures


# ---- D7: encodings ----

INVALID = {
    "Latin-1 letter": b"\xe9",
    "curly quote of Windows-1252": b"\x93",
    "byte 0xff": b"\xff",
    "incomplete character": b"\xe2\x82",
    "overlong slash": b"\xc0\xaf",
    "half a surrogate pair": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf5\x80\x80\x80",
}


@row(
    "D7",
    "bytes that are not UTF-8: in the header, a row, a cell of several lines; CSV, TSV, JSONL, .gz",
    "exit code 2, one line with file, row, line and byte",
)
def test_D7_invalid_utf8(tmp_path: Path) -> Figures:
    figures = Figures()
    good = as_csv(rows_of("train"))
    positions = (
        ("header", b"r", b"", " header (line 1)"),
        ("row", ROW_4, b"", " row 4 (line 5)"),
        ("second line of a cell", ROW_4, b'"\n', " row 4 (line 6)"),
    )
    for case, odd in INVALID.items():
        for position, before, quote, location in positions:
            content = spoil(good, before, before + quote + odd)
            path = tmp_path / "odd.csv"
            path.write_bytes(content)
            offset = content.index(before + quote) + len(before + quote)
            expected = [f"{path}{location}: expected UTF-8, found byte 0x{odd[0]:02x} at byte {offset} of the file"]
            training_refuses(figures, f"{case} in {position}", tmp_path, expected, train_path=path)
            prediction_refuses(figures, f"{case} in {position}", path, expected)
    content = spoil(good, ROW_4, ROW_4 + b"\xff")
    lines = [json.dumps(dict(zip(HEADER, line, strict=True))) for line in rows_of("train")[1:]]
    for name, spoiled, location in (
        ("odd.tsv", content.replace(b",", b"\t"), " row 4 (line 5)"),
        ("odd.csv.gz", gzip.compress(content), " row 4 (line 5)"),
        ("odd.jsonl", "\n".join(lines).encode().replace(b"00003", b"0\xff003"), " row 4 (line 4)"),
    ):
        (tmp_path / name).write_bytes(spoiled)
        training_refuses(
            figures,
            name,
            tmp_path,
            [f"{tmp_path / name}{location}: expected UTF-8, found byte 0xff at byte "],
            train_path=tmp_path / name,
        )
    return figures


@row(
    "D7",
    "whole files in UTF-16 (with and without mark), UTF-32, Latin-1, Windows-1252",
    "exit code 2; the file that the advised command writes gets the same predictions as the UTF-8 one",
)
def test_D7_other_encodings(tmp_path: Path) -> Figures:
    figures = Figures()
    rows = rows_of("test")
    rows[3][1] = "caf\xe9 clich\xe9 refund"  # in every encoding tried
    count_prediction(figures, "UTF-8", write_rows(tmp_path / "right.csv", rows), tmp_path / "right.tsv", num_rows=37)
    text = as_csv(rows).decode()
    encodings = {
        "utf-16": "UTF-16",
        "utf-16-le": "UTF-16LE",
        "utf-16-be": "UTF-16BE",
        "utf-32": "UTF-32",
        "latin-1": "Windows-1252",
        "cp1252": "Windows-1252",
    }
    for encoding, advised in encodings.items():
        path = tmp_path / f"{encoding}.csv"
        path.write_bytes(text.encode(encoding))
        advice = f"convert it: iconv -f {advised} -t UTF-8 OLD > NEW"
        training_refuses(
            figures, encoding, tmp_path, [str(path), "(line ", " of the file; if the file is ", advice], train_path=path
        )
        prediction_refuses(figures, encoding, path, [str(path), advice])
        words = shlex.split(advice.removeprefix("convert it: "))
        if shutil.which(words[0]) is None:
            figures.notes.append("iconv is not installed: its advice was not followed")
            continue
        (tmp_path / "new.csv").write_bytes(
            subprocess.run([*words[:-3], str(path)], check=True, capture_output=True).stdout
        )
        count_prediction(figures, f"{encoding} converted", tmp_path / "new.csv", tmp_path / "out.tsv", num_rows=37)
        figures.count(
            (tmp_path / "out.tsv").read_bytes() == (tmp_path / "right.tsv").read_bytes(),
            f"{encoding} converted: other predictions",
        )
    return figures
