"""The cells of one file as text, row by row: CSV, TSV, JSONL, Parquet. Floor 1; imports errors, cells.

A row is one record of data, counted from 1; a line is a line of the file (a quoted cell may hold line breaks).
Nothing is guessed and nothing is skipped: what cannot be read is an `InputError` that says where.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from mmbert_core.data.cells import text_of
from mmbert_core.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = "gzip"
LATIN = "Windows-1252"  # Latin-1 with curly quotes: what a file that is neither UTF-8 nor wider is most often
TEXT_FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}  # suffix -> delimiter; all may end in .gz too
FORMATS = [*TEXT_FORMATS, ".parquet"]
LARGEST_FIELD = 2**31 - 1  # the csv module's own limit of 128 KiB is less than a long dialogue
PARQUET_BATCH_ROWS = 4096

Row = tuple[int, Sequence[str]]  # line where the record begins (0: the format has no lines), cells


class _BadLine(Exception):
    """A line that is no text. Its number and row are added by the reader that asked for it."""


def header_of(path: str) -> list[str]:
    """Names of the columns; for JSONL the keys of the first object.

    Raises `InputError`: unknown suffix, unreadable file, nothing in it, a name twice.
    """
    kind = _format_of(path)
    if kind == ".parquet":
        names = list(_parquet_file(path).schema_arrow.names)
    else:
        first = next(_records_of(path, kind), None)
        if first is None:
            raise InputError(f"{path}: the file is empty, expected a {'JSON object' if TEXT_FORMATS[kind] is None else 'header'} in line 1")
        names = list(first[1])
    check_once(path, names)
    return names


def check_once(path: str, names: Sequence[str]) -> None:
    """Raise `InputError` when a column name stands twice: either column could be meant."""
    name, count = max(Counter(names).items(), key=itemgetter(1), default=("", 0))
    if count > 1:
        raise InputError(f"{path}: column {name!r} stands {count} times in the header, expected once")


def rows_of(path: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of `columns`, in that order; the caller has checked with `header_of` that the file has them.

    Raises `InputError` with path, row and line for a ragged row, broken quoting, a NUL byte, bytes that are not UTF-8,
    a line that is no JSON object, a blank line between rows, broken compression.
    """
    kind = _format_of(path)
    if kind == ".parquet":
        yield from _parquet_rows(path, columns)
    elif TEXT_FORMATS[kind] is None:
        for row, (line, record) in enumerate(_json_records(path), start=1):
            yield line, [_json_cell(record, column, f"{path} row {row} (line {line})") for column in columns]
    else:
        records = _csv_records(path, TEXT_FORMATS[kind])
        _, header = next(records)
        places = [header.index(column) for column in columns]
        # itemgetter of one place gives the cell itself, not a row of one cell
        pick = itemgetter(*places) if len(places) > 1 else lambda cells: [cells[place] for place in places]
        for row, (line, cells) in enumerate(records, start=1):
            if len(cells) != len(header):
                raise InputError(f"{path} row {row} (line {line}): expected {len(header)} cells as in the header, found {len(cells)}")
            yield line, pick(cells)


def rows_about(paths: Sequence[str]) -> int | None:
    """How many rows the files have, about: lines but the header, so that line breaks in cells count too. None where it takes reading them."""
    total = 0
    for path in paths:
        kind = _format_of(path)
        if path.lower().endswith(".gz"):
            return None
        if kind == ".parquet":
            total += _parquet_file(path).metadata.num_rows
            continue
        with open(path, "rb") as stream:
            total += sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 22), b"")) - (TEXT_FORMATS[kind] is not None)
    return total


# ---- text files ----


def _format_of(path: str) -> str:
    """The suffix that decides how a file is read, without .gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind and (kind[0] in TEXT_FORMATS or (kind[0] == ".parquet" and not zipped)):
        return kind[0]
    raise InputError(f"{path}: expected a name that ends in {', '.join(FORMATS)} (text formats also with .gz)")


def _open_bytes(path: str) -> BinaryIO:
    try:
        return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _text_lines(path: str) -> Iterator[str]:
    """Lines with their line breaks, decoded one by one so that an undecodable byte has a place."""
    offset = 0  # bytes of the (unpacked) file before this line
    other_encoding = LATIN  # of bytes that are no UTF-8, unless the file begins as UTF-16, UTF-32 or gzip
    with _open_bytes(path) as stream:
        try:
            for raw in stream:
                if offset == 0:
                    other_encoding = _other_encoding(raw) or other_encoding
                skipped = len(BYTE_ORDER_MARK) if offset == 0 and raw.startswith(BYTE_ORDER_MARK) else 0
                try:
                    text = raw[skipped:].decode("utf-8")
                except UnicodeDecodeError as error:
                    at = error.start + skipped
                    raise _BadLine(f"expected UTF-8, found byte 0x{raw[at]:02x} at byte {offset + at} of the file; {_advice(other_encoding)}") from None
                if "\0" in text:
                    advice = f"; {_advice(other_encoding)}" if other_encoding != LATIN else ""
                    raise _BadLine(f"expected text, found a NUL byte at byte {offset + skipped + raw[skipped:].index(0)} of the file{advice}")
                if text:
                    yield text
                offset += len(raw)
        except (EOFError, zlib.error, OSError) as error:
            raise _BadLine(f"the file cannot be read to its end ({error})") from None


def _other_encoding(start: bytes) -> str:
    """The encoding of a file of two or four bytes a character, by its mark or by the NUL bytes beside its first letter; or gzip, which is none; "" for others."""
    if start.startswith(b"\x1f\x8b"):
        return GZIP
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    return {(False, True): "UTF-16LE", (True, False): "UTF-16BE"}.get(tuple(byte == 0 for byte in start[:2]), "")


def _advice(encoding: str) -> str:
    if encoding == GZIP:
        return "the file is packed by gzip: its name should end in .gz"
    name = f"Latin-1 or {encoding}" if encoding == LATIN else encoding
    return f"if the file is {name}, convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"


def _place(path: str, row: int, line: int) -> str:
    return f"{path} header (line {line})" if row == 0 else f"{path} row {row} (line {line})"


def _csv_records(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The header, then the rows, each with the line where it begins. Blank lines are allowed at the end of a file only."""
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    row, blank_line = 0, 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{_place(path, row, line)}: {_csv_problem(str(error))}") from None
        except _BadLine as error:
            raise InputError(f"{_place(path, row, reader.line_num + 1)}: {error}") from None
        if not cells:
            blank_line = blank_line or line
            continue
        if blank_line:
            raise InputError(f'{_place(path, row, blank_line)}: expected a row, found a blank line (an empty cell alone is written "")')
        yield line, cells
        row += 1


def _csv_problem(message: str) -> str:
    """What the csv module means."""
    if "end of data" in message:
        return "the quoted cell that begins here is never closed"
    if "new-line character" in message:
        message = r"a carriage return outside quotes; lines end with \n or \r\n"
    return f"broken quoting ({message})"


def _json_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line, with its line. Blank lines are allowed at the end of a file only."""
    lines = _text_lines(path)
    row, line, blank_line = 1, 0, 0
    while True:
        line += 1
        try:
            text = next(lines)
        except StopIteration:
            return
        except _BadLine as error:
            raise InputError(f"{_place(path, row, line)}: {error}") from None
        if not text.strip():
            blank_line = blank_line or line
            continue
        if blank_line:
            raise InputError(f"{_place(path, row, blank_line)}: expected a JSON object, found a blank line")
        try:
            # whole numbers stay the text they are: no limit of digits, nothing rounded
            record = json.loads(text, parse_int=str, object_pairs_hook=object_of)
            if "\\u" in text:
                json.dumps(record, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_place(path, row, line)}: expected a JSON object, found {text.strip()[:40]!r} ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{_place(path, row, line)}: expected a JSON object, found {text.strip()[:40]!r}")
        yield line, record
        row += 1


def _records_of(path: str, kind: str) -> Iterator[tuple[int, Any]]:
    delimiter = TEXT_FORMATS[kind]
    return _json_records(path) if delimiter is None else _csv_records(path, delimiter)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook` of `json.loads`). Raises `ValueError` for a key that stands in it twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands in it twice")
    return record


def _json_cell(record: dict[str, Any], column: str, place: str) -> str:
    if column not in record:
        raise InputError(f"{place}: key {column!r} is not there; a missing value is written null")
    try:
        return text_of(record[column])
    except ValueError as error:
        raise InputError(f"{place}, column {column!r}: expected text, a number, true, false or null, found {error}") from None


# ---- Parquet ----


def _parquet_file(path: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'mmbert_core[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's exceptions are subclasses of these
        raise InputError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:120]})") from None


def _parquet_rows(path: str, columns: Sequence[str]) -> Iterator[Row]:
    batches = _parquet_file(path).iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=list(columns))
    row = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:120]
            raise InputError(f"{path} row {row + 1} or after: cannot be read as Parquet ({problem})") from None
        cells = [_parquet_cells(batch, column, first_row=row + 1, path=path) for column in columns]
        row += batch.num_rows
        yield from ((0, list(record)) for record in zip(*cells, strict=True))


def _parquet_cells(batch: Any, column: str, *, first_row: int, path: str) -> list[str]:
    values = batch.column(batch.schema.get_field_index(column))
    # as float32, not as the float64 beside it: 0.1 stays 0.1
    narrow = str(values.type) in ("float", "halffloat")
    try:
        found = values.to_numpy(zero_copy_only=False) if narrow else values.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} row {first_row} or after, column {column!r}: expected UTF-8 text ({error.reason})") from None
    except (ValueError, OverflowError, NotImplementedError) as error:  # a date after the year 9999, a time zone that nobody knows; pyarrow's own are these
        problem = " ".join(str(error).split())[:120]
        raise InputError(f"{path} row {first_row} or after, column {column!r}: cannot be read as {values.type} ({problem})") from None
    cells = []
    for value in found:
        try:
            cells.append(text_of(value))
        except ValueError as error:
            place = f"{path} row {first_row + len(cells)}, column {column!r}"
            raise InputError(f"{place}: expected a single value, found {error}") from None
    return cells
