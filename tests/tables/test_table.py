"""Cells as text, every row once and with its location in every format; an error of one line for a broken file."""

import gzip
import json
import os

import numpy as np
import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet

from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.cells import text_of
from mmbert_core.tables.readers import header_of
from mmbert_core.tables.table import Roles, expand_paths, frame_to_chunk, read_chunks, records_to_chunk, resolve_columns

ODD_CELLS = [
    "007",
    "NA",
    "=1+1",
    "a\tb",
    "line\nbreak",
    "line\r\nbreak",
    'quote " inside',
    "1e5",
    "ü 漢 🙂",
    " space ",
    "",
    "x" * 300,
]


def cells_of(paths, columns, **options):
    chunks = list(read_chunks([str(path) for path in paths], columns, **options))
    return [tuple(record) for chunk in chunks for record in zip(*(chunk.cells[column] for column in columns))]


def error_of(path, columns=("a", "b"), **options):
    with pytest.raises(InputError) as caught:
        list(read_chunks([str(path)], list(columns), **options))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message.replace(str(path), "FILE")


def test_odd_cells_survive_byte_for_byte_in_csv_and_tsv(write_table):
    rows = [(cell, str(index)) for index, cell in enumerate(ODD_CELLS)]
    for name in ("t.csv", "t.tsv"):
        assert cells_of([write_table(name, ["a", "b"], rows)], ["a", "b"]) == rows


def test_all_formats_give_the_same_cells(tmp_path, write_table):
    rows = [(cell, str(index)) for index, cell in enumerate(ODD_CELLS)]
    plain = write_table("t.csv", ["a", "b"], rows)
    text = open(plain, "rb").read()
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + text)
    lines = "".join(json.dumps({"a": a, "b": int(b)}) + "\n" for a, b in rows)
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "t.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(
        pyarrow.table({"a": [a for a, _ in rows], "b": [int(b) for _, b in rows]}), tmp_path / "t.parquet"
    )
    for name in ("z.csv.gz", "bom.csv", "t.jsonl", "t.ndjson.gz", "t.parquet"):
        assert cells_of([tmp_path / name], ["a", "b"]) == rows, name


def test_windows_line_ends_are_no_part_of_cells_but_stay_in_quotes(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'a,b\r\n1,"x\r\ny"\r\n2,z\r\n')
    assert cells_of([tmp_path / "t.csv"], ["a", "b"]) == [("1", "x\r\ny"), ("2", "z")]


def test_columns_come_in_the_asked_order_and_others_are_dropped(write_table):
    path = write_table("t.csv", ["c", "b", "a"], [(3, 2, 1)])
    [chunk] = read_chunks([path], ["a", "b"])
    assert list(chunk.cells) == ["a", "b"]
    assert chunk.cells == {"a": ["1"], "b": ["2"]}


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 100])
def test_chunks_continue_over_files_and_keep_row_locations(write_table, chunk_rows):
    first = write_table("one.csv", ["a"], [("x\ny",), ("b",), ("c",)])
    empty = write_table("none.csv", ["a"], [])
    second = write_table("two.tsv", ["a"], [("d",), ("e\n\n",), ("f",), ("g",)])
    chunks = list(read_chunks([first, empty, second], ["a"], chunk_rows=chunk_rows))
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)
    locations = [chunk.row_location(index) for chunk in chunks for index in range(len(chunk))]
    # a quoted line break counts as a line, not as a row
    assert locations == [
        f"{first} row 1 (line 2)",
        f"{first} row 2 (line 4)",
        f"{first} row 3 (line 5)",
        f"{second} row 1 (line 2)",
        f"{second} row 2 (line 3)",
        f"{second} row 3 (line 6)",
        f"{second} row 4 (line 7)",
    ]
    assert [cell for chunk in chunks for cell in chunk.cells["a"]] == ["x\ny", "b", "c", "d", "e\n\n", "f", "g"]


def test_parquet_rows_have_no_lines(tmp_path):
    parquet.write_table(pyarrow.table({"a": list(range(5000))}), tmp_path / "t.parquet", row_group_size=700)
    chunks = list(read_chunks([str(tmp_path / "t.parquet")], ["a"], chunk_rows=4999))
    assert [len(chunk) for chunk in chunks] == [4999, 1]
    assert chunks[1].row_location(0) == f"{tmp_path / 't.parquet'} row 5000"
    assert chunks[1].cells["a"] == ["4999"]


def test_a_header_alone_gives_no_chunk(write_table):
    path = write_table("t.csv", ["a", "b"], [])
    assert list(read_chunks([path], ["a"])) == [] and header_of(path) == ["a", "b"]


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    (tmp_path / "t.csv").write_text('a\n1\n""\n\n\n')
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n')
    assert cells_of([tmp_path / "t.csv"], ["a"]) == [("1",), ("",)]
    assert cells_of([tmp_path / "t.jsonl"], ["a"]) == [("1",)]


def test_long_lines_and_long_cells(write_table):
    path = write_table("t.csv", [f"c{index}" for index in range(200_000)], [["7"] * 200_000])
    assert cells_of([path], ["c199999"]) == [("7",)]
    path = write_table("u.csv", ["a"], [["x" * 1_000_000]])
    assert len(cells_of([path], ["a"])[0][0]) == 1_000_000


BROKEN = [
    (b"", "FILE: the file is empty"),
    (b"\xef\xbb\xbf", "FILE: the file is empty"),
    (b"\n1,2\n", "FILE header (line 1): expected a row, found a blank line"),
    (b"a,b,a\n1,2,3\n", "FILE: column 'a' occurs 2 times"),
    (b"a,b\n1,2\n1,2,3\n", "FILE row 2 (line 3): expected 2 cells as in the header, found 3"),
    (b'a,b\n"x\ny",2\n1\n', "FILE row 2 (line 4): expected 2 cells as in the header, found 1"),
    (b"a,b\n1,2\n\n3,4\n", "FILE row 2 (line 3): expected a row, found a blank line"),
    (b'a,b\n1,2\n3,"x\n5,6\n', "FILE row 2 (line 3): the quoted cell that begins here is never closed"),
    (b'a,b\n1,"x"y\n', "FILE row 1 (line 2): broken quoting"),
    (b'a,b\n1,"x\n2,"y"\n', "FILE row 1 (line 2): broken quoting"),
    (b"a,b\n1,2\n3,\xe9t\xe9\n", "FILE row 2 (line 3): expected UTF-8, found byte 0xe9 at byte 10 of the file"),
    (b'a,b\n1,2\n3,"\n\xff"\n', "FILE row 2 (line 4): expected UTF-8, found byte 0xff at byte 12 of the file"),
    (b"\xef\xbb\xbfa,b\n1,\xff\n", "FILE row 1 (line 2): expected UTF-8, found byte 0xff at byte 9 of the file"),
    ("a,b\n1,2\n".encode("utf-16"), "FILE header (line 1): expected UTF-8, found byte 0xff at byte 0 of the file"),
    (b"a,b\n1,\x00\n", "FILE row 1 (line 2): expected text, found a NUL byte at byte 6 of the file"),
    (b"a,b\n1,x\ry\n", "FILE row 1 (line 2): broken quoting"),
]


@pytest.mark.parametrize("content, expected", BROKEN)
def test_the_error_for_a_broken_csv_is_one_line_with_the_row(tmp_path, content, expected):
    (tmp_path / "t.csv").write_bytes(content)
    assert error_of(tmp_path / "t.csv").startswith(expected)


BROKEN_LINES = [
    (b"", "FILE: the file is empty"),
    (b'{"a": 1, "b": 2}\n{"a": 1\n', "FILE row 2 (line 2): expected a JSON object, found '{\"a\": 1'"),
    (b'{"a": 1, "b": 2}\n[1, 2]\n', "FILE row 2 (line 2): expected a JSON object, found '[1, 2]'"),
    (b'{"a": 1, "b": 2}\n\n{"a": 1, "b": 2}\n', "FILE row 2 (line 2): expected a JSON object, found a blank line"),
    (b'{"a": 1, "b": 2}\n{"a": 1}\n', "FILE row 2 (line 2): key 'b' is not there"),
    (
        b'{"a": 1, "b": [2]}\n',
        "FILE row 1 (line 1), column 'b': expected text, a number, true, false or null, found a list",
    ),
    (b'{"a": 1, "a": 2, "b": 3}\n', "FILE header (line 1)"),
    (b'{"a": "\\ud800", "b": 3}\n', "FILE row 1 (line 1): expected a JSON object"),
    (b'{"a": "\xff", "b": 3}\n', "FILE row 1 (line 1): expected UTF-8, found byte 0xff at byte 7 of the file"),
    (b"[" * 100_000 + b"\n", "FILE row 1 (line 1): expected a JSON object"),
]


@pytest.mark.parametrize("content, expected", BROKEN_LINES)
def test_broken_json_lines(tmp_path, content, expected):
    (tmp_path / "t.jsonl").write_bytes(content)
    assert error_of(tmp_path / "t.jsonl").startswith(expected.replace("header (line 1)", "row 1 (line 1)"))


def test_json_values_become_their_shortest_text(tmp_path):
    values = '3, -0, 123456789012345678901234567890, 1.50, 1e3, true, false, null, NaN, "x"'
    (tmp_path / "t.jsonl").write_text("".join(f'{{"a": {value}}}\n' for value in values.split(", ")))
    expected = ["3", "-0", "123456789012345678901234567890", "1.5", "1000.0", "true", "false", "", "", "x"]
    assert [cell for (cell,) in cells_of([tmp_path / "t.jsonl"], ["a"])] == expected


def test_parquet_types(tmp_path):
    columns = {
        "big": pyarrow.array([2**53 + 1, None]),
        "single": pyarrow.array([0.1, None], pyarrow.float32()),
        "double": pyarrow.array([0.1, float("nan")]),
        "truth": pyarrow.array([True, None]),
        "kind": pyarrow.array(["x", None]).dictionary_encode(),
        "a.b": pyarrow.array(["dot", "in name"]),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    rows = cells_of([tmp_path / "t.parquet"], list(columns))
    assert rows == [("9007199254740993", "0.1", "0.1", "true", "x", "dot"), ("", "", "", "", "", "in name")]


def test_broken_parquet(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"a,b\n1,2\n")
    assert "cannot be read as Parquet" in error_of(tmp_path / "t.parquet")
    parquet.write_table(pyarrow.table({"a": [[1]], "b": [1]}), tmp_path / "u.parquet")
    assert error_of(tmp_path / "u.parquet").startswith("FILE row 1, column 'a': expected a single value, found a list")


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (index, index * index) for index in range(10_000)))
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) // 2])
    message = error_of(tmp_path / "t.csv.gz")
    assert "the file cannot be read to its end" in message and " row " in message
    (tmp_path / "u.csv.gz").write_bytes(b"a,b\n1,2\n")
    assert "cannot be read" in error_of(tmp_path / "u.csv.gz")


def test_missing_column_names_file_column_nearest_and_all(write_table):
    path = write_table("t.csv", ["Text", "prise"], [("x", 1)])
    assert error_of(path, ["text"]) == "FILE: column 'text' not found; nearest is 'Text'; columns are 'Text', 'prise'"
    assert "nearest is 'prise'" in error_of(path, ["price"])
    assert "nearest" not in error_of(path, ["zzz"])


def test_a_missing_column_says_what_was_probably_meant(write_table):
    found = error_of(write_table("t.csv", ["pre\u0301cis", "b"], []), ["précis"])
    composed = "in composed letters and in the header in decomposed ones ('pr\\xe9cis' and 'pre\\u0301cis')"
    assert f"{composed}; write both in composed letters" in found
    assert "in decomposed letters and in the header in composed ones" in error_of(
        write_table("u.csv", ["précis"], []), ["pre\u0301cis"]
    )
    for name, separator, kind in (
        ("s.csv", ";", "semicolons"),
        ("t.csv", "\t", "tabs"),
        ("v.csv", "|", "vertical bars"),
        ("c.tsv", ",", "commas"),
    ):
        path = write_table(name, ["c"], [])
        open(path, "w").write(separator.join(["id", '"text"', "label"]) + "\n")
        assert f"column 'text' not found: cells seem to be separated by {kind}; " in error_of(path, ["text"])
        assert error_of(path, ["text", "label"]).count("separated by") == 1
        # all names quoted: no header with another separator
        open(path, "w").write(separator.join(['"id"', '"text"', '"label"']) + "\n")
        assert f"FILE header (line 1): cells seem to be separated by {kind}; " in error_of(path, ["text"])
    assert "not found; nearest is 'a,b'" in error_of(write_table("w.csv", ["text", "a,b"], []), ["b"])


def test_a_later_file_is_checked_before_the_first_row_is_read(tmp_path, write_table):
    (tmp_path / "bad.csv").write_text("a,b\n1,2,3\n")
    other = write_table("other.csv", ["a"], [])
    with pytest.raises(InputError, match="other.csv: column 'b' not found"):
        next(read_chunks([str(tmp_path / "bad.csv"), other], ["a", "b"]))


def test_optional_columns_are_in_all_files_or_in_none(write_table):
    with_it = write_table("one.csv", ["a", "label"], [(1, 2)])
    without = write_table("two.csv", ["a"], [(1,)])
    assert resolve_columns([with_it], ["a"], ["label"]) == ["a", "label"]
    assert resolve_columns([without], ["a"], ["label"]) == ["a"]
    for paths in ([with_it, without], [without, with_it]):
        with pytest.raises(InputError, match=r"two.csv: column 'label' not found, but .*one.csv has it"):
            resolve_columns(paths, ["a"], ["label"])


def test_globs_are_sorted_and_a_file_counts_once(tmp_path, write_table):
    names = [write_table(f"part-{index}.csv", ["a"], [(index,)]) for index in (2, 0, 1)]
    assert expand_paths([str(tmp_path / "part-*.csv")]) == sorted(names)
    assert cells_of([tmp_path / "part-*.csv"], ["a"]) == [("0",), ("1",), ("2",)]
    odd = write_table("part[0].csv", ["a"], [(9,)])  # a real name comes before a pattern
    assert expand_paths([odd]) == [odd]
    with pytest.raises(InputError, match="the same file is given twice"):
        expand_paths([names[0], str(tmp_path / "part-*.csv")])
    with pytest.raises(InputError, match="there is no such file"):
        expand_paths([str(tmp_path / "none.csv")])
    with pytest.raises(InputError, match="no file matches"):
        expand_paths([str(tmp_path / "none*.csv")])
    with pytest.raises(InputError, match="expected a file, found a folder"):
        expand_paths([str(tmp_path)])


def test_the_error_for_a_json_array_says_how_to_write_lines(tmp_path):
    for name, content in (
        ("t.json", '{"a": 1}'),
        ("t.jsonl", '[{"a": 1}]'),
        ("t.jsonl", '[\n{"a": 1}\n]'),
        ("t.jsonl", '{\n"a": 1\n}'),
    ):
        (tmp_path / name).write_text(content)
        assert "; write one object a line" in error_of(tmp_path / name)


@pytest.mark.parametrize("name", ["t.txt", "t.xlsx", "t", "t.parquet.gz", "t.gz"])
def test_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_text("a,b\n1,2\n")
    assert "expected a name that ends in .csv, .tsv, .jsonl, .ndjson, .parquet" in error_of(tmp_path / name)


def test_a_frame_in_memory_gives_the_same_chunk():
    frame = pd.DataFrame(
        {"n": [1.5, None], "s": ["x", None], "i": [2**53 + 1, 2], "t": [True, False], "extra": [0, 0]}, index=[5, 5]
    )
    chunk = frame_to_chunk(frame, ["i", "s", "n"], ["t", "label"])
    assert chunk.cells == {"i": ["9007199254740993", "2"], "s": ["x", ""], "n": ["1.5", ""], "t": ["true", "false"]}
    assert chunk.row_location(1) == "data frame row 2"
    narrow = pd.Series([0.1, 2, None], dtype="float32")  # as its CSV and its Parquet file have it
    kinds = {
        "a": narrow,
        "b": narrow.astype("float16"),
        "c": narrow.astype("Float32"),
        "d": narrow.astype("category"),
        "e": narrow.astype(pd.SparseDtype("float32")),
    }
    for cells in frame_to_chunk(pd.DataFrame(kinds), list(kinds)).cells.values():
        assert cells == ["0.1", "2.0", ""]
    with pytest.raises(InputError, match="data frame: column 'x' not found"):
        frame_to_chunk(frame, ["x"])
    with pytest.raises(InputError, match="data frame: column 'n' occurs 2 times"):
        frame_to_chunk(pd.concat([frame, frame[["n"]]], axis=1), ["n"])
    with pytest.raises(InputError, match="data frame row 2, column 'a': expected a single value, found a list"):
        frame_to_chunk(pd.DataFrame({"a": ["x", [1]]}), ["a"])


def test_text_of_typed_cells():
    values = [
        np.float32(0.1),
        np.float64(0.1),
        np.int8(3),
        np.bool_(True),
        pd.NA,
        pd.NaT,
        pd.Timestamp("2026-01-31"),
        b"x",
        float("inf"),
    ]
    assert [text_of(value) for value in values] == [
        "0.1",
        "0.1",
        "3",
        "true",
        "",
        "",
        "2026-01-31 00:00:00",
        "x",
        "inf",
    ]


def test_roles_list_each_input_once():
    roles = Roles(text=("t", "k"), numbers=("n",), categories=("k",), label="y", id="t", group="g")
    assert roles.inputs() == ["t", "k", "n"]


def test_rows_as_dicts_give_the_same_chunk():
    records = [{"n": 1.5, "s": "x", "i": 2**53 + 1, "t": True, "extra": 0}, {"t": False, "i": 2, "s": None, "n": None}]
    chunk = records_to_chunk(records, ["i", "s", "n"], ["t", "label"])
    assert chunk.cells == {"i": ["9007199254740993", "2"], "s": ["x", ""], "n": ["1.5", ""], "t": ["true", "false"]}
    assert chunk.row_location(1) == "data row 2" and len(records_to_chunk([], ["i"])) == 0
    with pytest.raises(InputError, match="data: column 'x' not found"):
        records_to_chunk(records, ["x"])
    with pytest.raises(InputError, match="data row 2: column 'extra' not found"):
        records_to_chunk(records, ["extra"])
    with pytest.raises(InputError, match="data row 1, column 's': expected a single value"):
        records_to_chunk([{"s": ["x", "y"]}], ["s"])
    for number, rows in (
        (1, [{"s": "x"}, {"s": "y", "id": "1"}]),
        (2, [{"s": "x", "id": "1"}, {"s": "y"}]),
    ):  # whose id would be lost
        with pytest.raises(InputError, match=f"data row {number}: column 'id' not found"):
            records_to_chunk(rows, ["s"], ["id"])
    with pytest.raises(InputError, match="data row 1, column 's': expected .* found a NUL character"):
        records_to_chunk([{"s": "a\0b"}], ["s"])


def test_parquet_cells_that_python_cannot_hold(tmp_path):
    columns = {
        "far": pyarrow.array([2**60], pyarrow.timestamp("ms")),
        "day": pyarrow.array([2**30], pyarrow.date32()),
        "long": pyarrow.array([2**60], pyarrow.duration("s")),
        "zone": pyarrow.array([0], pyarrow.timestamp("ms", tz="No/Where")),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for column in columns:
        assert error_of(tmp_path / "t.parquet", [column]).startswith(
            f"FILE row 1 or after, column '{column}': cannot be read as "
        )


def test_a_nul_character_in_json(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": "x\\u0000y", "b": 1}\n')
    found = error_of(tmp_path / "t.jsonl")
    assert found.startswith("FILE row 1 (line 1), column 'a': expected text") and "NUL" in found


def test_a_gzip_file_with_another_suffix(tmp_path):
    (tmp_path / "t.csv").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert "the file is packed by gzip: its name should end in .gz" in error_of(tmp_path / "t.csv")


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    assert "expected a file, found a pipe or a device" in error_of(tmp_path / "t.csv")
