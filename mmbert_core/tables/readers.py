"""The cells of one file as text, row by row: CSV, TSV, JSONL, Parquet.

A row is one record, counted from 1; a line is a line of the file (a quoted cell may contain line breaks). No row is
skipped: what cannot be read raises `InputError` with the row and the line.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.tables.csv_reader import AUTO, csv_header, csv_rows
from mmbert_core.tables.lines import BadLine, bounded_text_of, is_gzip_name, row_location, text_lines
from mmbert_core.tables.parquet_reader import open_parquet, parquet_header, parquet_rows

# suffix -> delimiter, None: one JSON object a line. All may end in .gz too.
TEXT_FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
FORMATS = [*TEXT_FORMATS, ".parquet"]
WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods")
JSON_LINES = "write one object a line, without an array around them, as .jsonl (pandas: orient='records', lines=True)"

Row = tuple[int, Sequence[str]]  # line on which the record begins (0: a format without lines), cells


def header_of(path: str, tsv_quoting: str = AUTO) -> list[str]:
    """Column names; for JSONL the keys of the first object, which all others must have.

    Raises `InputError` for an unknown suffix, an unreadable or empty file, and a column name that occurs twice.
    """
    kind = format_of(path)
    if kind == ".parquet":
        names = parquet_header(path)
    elif (delimiter := TEXT_FORMATS[kind]) is None:
        names = next((list(record) for _, record in _json_records(path)), None)
    else:
        names = csv_header(path, delimiter, tsv_quoting)
    if names is None:
        expected = "JSON object" if TEXT_FORMATS[kind] is None else "header"
        raise InputError(f"{path}: the file is empty, expected a {expected} in line 1")
    check_unique_columns(path, names)
    return names


def check_unique_columns(path: str, names: Sequence[str]) -> None:
    """Raise `InputError` for a column name that occurs twice: it would be ambiguous."""
    name, count = max(Counter(names).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise InputError(f"{path}: column {name!r} occurs {count} times in the header, expected once")


def rows_of(path: str, columns: Sequence[str], *, absent: Sequence[str] = (), tsv_quoting: str = AUTO) -> Iterator[Row]:
    """Rows of `columns`, in that order. The file's header must have them, and none of the columns in `absent`.

    Raises `InputError` with path, row and line for a row of another length than the header, broken quoting, a NUL
    byte, bytes that are not UTF-8, a line that is not a JSON object or has a key of `absent`, a blank line between
    rows, and broken compression.
    """
    kind = format_of(path)
    if kind == ".parquet":
        yield from ((0, cells) for cells in parquet_rows(path, columns))
    elif (delimiter := TEXT_FORMATS[kind]) is not None:
        yield from csv_rows(path, delimiter, columns, tsv_quoting)
    else:
        for row, (line, record) in enumerate(_json_records(path), start=1):
            for column in absent:
                if column in record:
                    problem = f"key {column!r} is there, but row 1 has none; a missing value is written null"
                    raise InputError(f"{row_location(path, row, line)}: {problem}")
            yield line, [_json_cell(record, column, row_location(path, row, line)) for column in columns]


def lengths_of(paths: Sequence[str]) -> list[int] | None:
    """Lines of each text file (header and line breaks in cells included), or rows of each Parquet file.

    None where a file is compressed: its lines could not be counted without decompressing it.
    """
    lengths = []
    for path in paths:
        if is_gzip_name(path):
            return None
        if format_of(path) == ".parquet":
            lengths.append(open_parquet(path).metadata.num_rows)
            continue
        with open(path, "rb") as stream:
            lengths.append(sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 22), b"")))
    return lengths


def format_of(path: str) -> str:
    """The suffix, without .gz, that decides how a file is read. Raises `InputError` for an unknown one."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    is_compressed = suffixes[-1:] == [".gz"]
    if is_compressed:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in TEXT_FORMATS or (kind == ".parquet" and not is_compressed):
        return kind
    advice = f"; {JSON_LINES}" if kind == ".json" else ""
    if kind in WORKBOOKS:
        advice = "; save the sheet of a workbook as CSV UTF-8"
    raise InputError(f"{path}: expected a name that ends in {', '.join(FORMATS)} (text formats also with .gz){advice}")


# ---- JSON lines ----


def _json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line. Blank lines are allowed only at the end of a file."""
    lines = text_lines(path)
    row, line, blank_line = 1, 0, 0
    while True:
        line += 1
        try:
            text = next(lines)
        except StopIteration:
            return
        except BadLine as error:
            raise InputError(f"{row_location(path, row, line)}: {error}") from None
        if not text.strip():
            blank_line = blank_line or line
            continue
        if blank_line:
            raise InputError(f"{row_location(path, row, blank_line)}: expected a JSON object, found a blank line")
        try:
            # integers stay text, so that none is rounded or has too many digits
            record = json.loads(text, parse_int=str, object_pairs_hook=object_of)
            if "\\u" in text:
                json.dumps(record, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair
        except (ValueError, RecursionError) as error:
            advice = f" ({error})" + (f"; {JSON_LINES}" if text.strip() in ("[", "{") else "")
            raise InputError(f"{_expected_object(path, row, line, text)}{advice}") from None
        if not isinstance(record, dict):
            advice = f"; {JSON_LINES}" if isinstance(record, list) else ""
            raise InputError(f"{_expected_object(path, row, line, text)}{advice}")
        yield line, record
        row += 1


def _expected_object(path: str, row: int, line: int, text: str) -> str:
    return f"{row_location(path, row, line)}: expected a JSON object, found {format_for_message(text.strip())}"


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook` of `json.loads`). Raises `ValueError` for a key that occurs twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands in it twice")
    return record


def _json_cell(record: dict[str, Any], column: str, error_prefix: str) -> str:
    if column not in record:
        raise InputError(f"{error_prefix}: key {column!r} is not there; a missing value is written null")
    try:
        return bounded_text_of(record[column])
    except ValueError as error:
        expected = "expected text, a number, true, false or null"
        raise InputError(f"{error_prefix}, column {column!r}: {expected}, found {error}") from None
