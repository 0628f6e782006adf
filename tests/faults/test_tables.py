"""D5 to D7, D14 and D15: tables with other columns, broken files, other encodings, parts of other models, data that changed under a run."""

import gzip
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mmbert_core.storage.files import read_json, write_json
from tests.faults.inputs import (
    command,
    contents,
    count_prediction,
    count_refusal,
    prediction_refuses,
    predictions_of,
    rows_of,
    train_run,
    trained,
    training_refuses,
    write_config,
    write_rows,
)
from tests.support import tiny
from tests.support.bad_tables import (
    PREDICT_TABLES,
    TRAINING_FILES,
    TRAINING_TABLES,
    Rows,
    as_csv,
    header,
    spoil,
    without,
)
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault

MARK = b"\xef\xbb\xbf"  # of UTF-8
COLUMNS = ("row_id", "text", "age", "amount", "kind", "label")
WIDE = 200_000  # cells of the widest line


# ---- D5: columns ----


@row(
    "D5",
    "a column missing from train, validation, test or new rows",
    "exit code 2, one line with column and file",
    full={"columns": COLUMNS},
)
def test_D5_missing_columns(tmp_path: Path, columns: tuple[str, ...] = ("row_id", "age", "label")) -> Figures:
    figures = Figures()
    for part in ("train", "val", "test", "new"):
        for column in columns:
            if column == "label" and part in ("test", "new"):  # which need none
                continue
            path = write_rows(tmp_path / f"{part}.csv", without(column)(rows_of("test" if part == "new" else part)))
            expected = [f"{path}: column {column!r} not found; ", "columns are '"]
            if part == "new":
                prediction_refuses(figures, f"new rows without {column}", path, expected)
            else:
                training_refuses(figures, f"{part} without {column}", tmp_path, expected, **{f"{part}_path": path})
    return figures


@row(
    "D5",
    "header: other case, a name twice, none at all, none but it; 0 bytes",
    "exit code 2, one line with column and file",
)
def test_D5_headers(tmp_path: Path) -> Figures:
    figures = Figures()
    for case in ("column in other case", "column twice", "no header", "header only", "header only in validation"):
        part, edit, expected = TRAINING_TABLES[case]
        path = write_rows(tmp_path / f"bad_{part}.csv", edit(rows_of(part)))
        training_refuses(figures, case, tmp_path, [str(path), *expected], **{f"{part}_path": path})
    for case in ("column in other case", "column twice", "empty"):
        edit, expected = PREDICT_TABLES[case]
        path = write_rows(tmp_path / "new.csv", edit(rows_of("test")))
        prediction_refuses(figures, case, path, [str(path), *expected])
    path = write_rows(tmp_path / "new.csv", rows_of("test")[1:])
    prediction_refuses(figures, "no header", path, [f"{path}: column 'text' not found"])
    for content in (b"", MARK):
        for part in ("train", "val", "test"):
            (tmp_path / "nothing.csv").write_bytes(content)
            expected = [f"{tmp_path / 'nothing.csv'}: the file is empty, expected a header in line 1"]
            training_refuses(
                figures,
                f"{part} of {len(content)} bytes",
                tmp_path,
                expected,
                **{f"{part}_path": tmp_path / "nothing.csv"},
            )
    return figures


@row(
    "D5",
    "columns in another order, more columns, a byte order mark, only a header to score",
    "the same model, the same predictions; a header-only file and exit code 0",
)
def test_D5_columns_that_do_no_harm(tmp_path: Path) -> Figures:
    figures = Figures()
    run = trained() / "run"
    right = predictions_of(run).read_bytes()

    def other(rows: Rows) -> Rows:
        return [[*line[::-1], "one more" if place == 0 else "x"] for place, line in enumerate(rows)]

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
        path = write_rows(tmp_path / "header.csv", [list(COLUMNS[: 5 + with_label])])
        count_prediction(figures, "header only", path, tmp_path / "out.tsv", num_rows=0)
        figures.count((tmp_path / "out.tsv").read_bytes() == expected, "header only: another header")
    return figures


# ---- D6: broken files ----

AT = b"\n00003,"  # where row 4 begins, in line 5
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "row too short": (
        lambda content: spoil(content, AT, b"\n00003\n00003,"),
        " row 4 (line 5): expected 6 cells as in the header, found 1",
    ),
    "row too long": (
        lambda content: spoil(content, AT, b"\n,00003,"),
        " row 4 (line 5): expected 6 cells as in the header, found 7",
    ),
    "last row cut off": (
        lambda content: content[: content.rindex(b",")],
        ": expected 6 cells as in the header, found 5",
    ),
    "NUL byte in a quoted cell": (
        lambda content: spoil(content, AT, b'\n"\n\0",'),
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
        lambda content: spoil(content, AT, b"\n" + b"x," * (WIDE - 1) + AT),
        f" row 4 (line 5): expected 6 cells as in the header, found {WIDE}",
    ),
    "header of 200,000 columns": (
        lambda content: b",".join(b"c%d" % place for place in range(WIDE)) + b"\n" + b"x," * (WIDE - 1) + b"x\n",
        "column 'text' not found; column 'age' not found; ",
    ),
    "carriage returns alone": (
        lambda content: content.replace(b"\n", b"\r"),
        " header (line 1): broken quoting (a carriage return outside quotes; lines end with \\n or \\r\\n)",
    ),
}


@row(
    "D6",
    "ragged rows, quotes never closed, NUL bytes, blank lines, lines of 200,000 cells, cut .gz",
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
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(good * 50)[:-30])
    training_refuses(
        figures, "cut .gz", tmp_path, [f"{path} row ", "the file cannot be read to its end"], train_path=path
    )
    prediction_refuses(figures, "cut .gz", path, [f"{path} row ", "the file cannot be read to its end"])
    return figures


@row(
    "D6",
    "CRLF, blank lines at the end, a table of 200,000 columns, a cell of more than 128 KiB, line breaks in cells",
    "every row scored once, as without them",
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
                [*rows[0], *(f"c{place}" for place in range(WIDE - 6))],
                *([*line, *["7"] * (WIDE - 6)] for line in rows[1:]),
            ]
        ),
        "another column's cell of more than 128 KiB": as_csv(
            [[*line, "note" if place == 0 else "x" * cell_bytes] for place, line in enumerate(rows)]
        ),
        "another column's cells of several lines": as_csv(
            [[*line, "note" if place == 0 else 'a\r\n\n"b"\n'] for place, line in enumerate(rows)]
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
    "character cut off": b"\xe2\x82",
    "overlong slash": b"\xc0\xaf",
    "half a surrogate pair": b"\xed\xa0\x80",
    "beyond Unicode": b"\xf5\x80\x80\x80",
}


@row(
    "D7",
    "bytes that are no UTF-8: in the header, a row, a cell of several lines; CSV, TSV, JSONL, .gz",
    "exit code 2, one line with file, row, line and byte",
)
def test_D7_invalid_utf8(tmp_path: Path) -> Figures:
    figures = Figures()
    good = as_csv(rows_of("train"))
    places = (
        ("header", b"r", b"", " header (line 1)"),
        ("row", AT, b"", " row 4 (line 5)"),
        ("second line of a cell", AT, b'"\n', " row 4 (line 6)"),
    )
    for case, odd in INVALID.items():
        for place, before, quote, at in places:
            content = spoil(good, before, before + quote + odd)
            path = tmp_path / "odd.csv"
            path.write_bytes(content)
            expected = [
                f"{path}{at}: expected UTF-8, found byte 0x{odd[0]:02x} at byte {content.index(before + quote) + len(before + quote)} of the file"
            ]
            training_refuses(figures, f"{case} in {place}", tmp_path, expected, train_path=path)
            prediction_refuses(figures, f"{case} in {place}", path, expected)
    content = spoil(good, AT, AT + b"\xff")
    lines = [json.dumps(dict(zip(COLUMNS, line, strict=True))) for line in rows_of("train")[1:]]
    for name, spoiled, at in (
        ("odd.tsv", content.replace(b",", b"\t"), " row 4 (line 5)"),
        ("odd.csv.gz", gzip.compress(content), " row 4 (line 5)"),
        ("odd.jsonl", "\n".join(lines).encode().replace(b"00003", b"0\xff003"), " row 4 (line 4)"),
    ):
        (tmp_path / name).write_bytes(spoiled)
        training_refuses(
            figures,
            name,
            tmp_path,
            [f"{tmp_path / name}{at}: expected UTF-8, found byte 0xff at byte "],
            train_path=tmp_path / name,
        )
    return figures


@row(
    "D7",
    "whole files in UTF-16 (with and without mark), UTF-32, Latin-1, Windows-1252",
    "exit code 2; the command that the line advises makes a file that is scored as the UTF-8 one",
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
            figures.notes.append("iconv is not here: its advice was not followed")
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


# ---- D14: a model and what does not belong to it ----


@row(
    "D14",
    "new rows with other columns than the training rows; model folders without, or with another model's, preprocessing",
    "exit code 2, one line",
)
def test_D14_other_schemas(tmp_path: Path) -> Figures:
    figures = Figures()
    for column in COLUMNS[:-1]:
        path = write_rows(tmp_path / "new.csv", header(column, f"{column}s")(rows_of("test")))
        prediction_refuses(
            figures, f"{column} renamed", path, [f"{path}: column {column!r} not found; nearest is '{column}s'"]
        )
    path = write_rows(tmp_path / "new.csv", [["id", "review", "stars"], ["1", "fine", "5"]])
    prediction_refuses(
        figures, "another table", path, [f"{path}: column ", "not found", "columns are 'id', 'review', 'stars'"]
    )
    path = write_rows(
        tmp_path / "new.csv",
        [COLUMNS[:-1], *[[line[0], line[1], line[4] or "a", *line[3:5]] for line in rows_of("test")[1:]]],
    )
    prediction_refuses(
        figures,
        "categories where the numbers were",
        path,
        [f"{path} row 1 (line 2), column 'age': expected a finite number", "found '"],
    )

    table = write_rows(tmp_path / "good.csv", rows_of("test"))
    for name in (
        "config.json",
        "features.json",
        "labels.json",
        "model.safetensors",
        "encoder",
        "encoder/config.json",
        "encoder/tokenizer.json",
    ):
        folder = shutil.copytree(trained() / "run", tmp_path / f"without {name.replace('/', ' ')}")
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        prediction_refuses(figures, f"no {name}", table, [str(folder)], model=folder)

    features = read_json(trained() / "run/features.json")
    for case, name, changes in (
        ("statistics of other columns", "features.json", {"number_names": ["age", "weight"]}),
        ("numbers in another order", "features.json", {"number_names": ["amount", "age"]}),
        (
            "statistics of fewer columns",
            "features.json",
            {"means": features["means"][:1], "stds": features["stds"][:1]},
        ),
        ("one category less", "features.json", {"categories": [features["categories"][0][:-1]]}),
        ("one category more", "features.json", {"categories": [[*features["categories"][0], "z"]]}),
        ("labels of another model", "labels.json", {"names": ["0", "1", "2"]}),
    ):
        folder = tiny.without_manifest(shutil.copytree(trained() / "run", tmp_path / case))
        write_json(folder / name, {**read_json(folder / name), **changes})
        prediction_refuses(figures, case, table, [str(folder)], model=folder)
    for name in ("config.json", "model.safetensors"):
        folder = tiny.without_manifest(shutil.copytree(trained() / "run", tmp_path / f"another {name}"))
        shutil.copy(trained(3) / "run" / name, folder / name)
        prediction_refuses(figures, f"{name} of another model", table, [str(folder)], model=folder)
    return figures


# ---- D15: data that changed between start and restart ----

CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one digit": lambda content: content[:-2] + (b"1\n" if content.endswith(b"0\n") else b"0\n"),
    "one row more": lambda content: content + content[content.rindex(b"\n", 0, -1) + 1 :],
    "one row less": lambda content: content[: content.rindex(b"\n", 0, -1) + 1],
    "another order": lambda content: b"\n".join([content.splitlines()[0], *content.splitlines()[:0:-1], b""]),
    "a line break of Windows": lambda content: content[:-1] + b"\r\n",
}


@row(
    "D15",
    "train, validation or test file changed between a run's start and its restart",
    "refused with the file's name, checkpoints untouched; restored: the run ends as one that never stopped",
)
def test_D15_changed_data(tmp_path: Path) -> Figures:
    figures = Figures()
    shutil.copytree(trained() / "encoder", tmp_path / "encoder")
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_bytes(as_csv(rows_of(name)))
    config = write_config(tmp_path, tmp_path, max_epochs=2)
    train_run(figures, "first start", config)
    whole = (tmp_path / "run/model.safetensors").read_bytes()
    for name in (
        "model.safetensors",
        "train_results.json",
        "checkpoints/step-00000016",
    ):  # as if it had died after step 8
        shutil.rmtree(tmp_path / "run" / name) if "step" in name else (tmp_path / "run" / name).unlink()
    before = contents(tmp_path / "run")
    for name in ("train", "val", "test"):
        path = tmp_path / f"{name}.csv"
        good = path.read_bytes()
        for case, change in CHANGES.items():
            path.write_bytes(change(good))
            assert path.read_bytes() != good
            for check in ("--check",), ():
                done = command("train", config, *check)
                count_refusal(
                    figures,
                    f"{name}.csv: {case}",
                    done,
                    f"{path} has changed since the checkpoint at step 8",
                    "sha256 ",
                )
            figures.count(contents(tmp_path / "run") == before, f"{name}.csv: {case}: the run was changed")
        path.write_bytes(good)  # the same content at another time
    train_run(figures, "files restored", config)
    figures.count((tmp_path / "run/model.safetensors").read_bytes() == whole, "files restored: another model")
    return figures
