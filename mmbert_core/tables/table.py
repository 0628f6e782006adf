"""Rows of files or of objects in memory, in chunks: the columns of a config, and the file and line of each row."""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from unicodedata import is_normalized, normalize

import numpy as np
import pandas as pd

from mmbert_core.config import Config
from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.tables.cells import text_of
from mmbert_core.tables.csv_reader import AUTO, SEPARATORS
from mmbert_core.tables.lines import row_location
from mmbert_core.tables.readers import check_unique_columns, header_of, rows_of

CHUNK_ROWS = 8192
MAX_MISSING_NAMED = 10  # missing columns in a message
MAX_CHUNK_CHARACTERS = 2**24  # of the cells that are kept; bounds the memory of a chunk
# column names that are compared with a missing one, and their length: difflib takes 6 s for 60,000 names
MAX_COMPARED_NAMES, MAX_COMPARED_CHARACTERS = 1000, 100
OTHER_SEPARATOR = ": cells seem to be separated by"
MEMORY_PATH, RECORDS_PATH = "data frame", "data"  # in messages instead of a path, for rows in memory


@dataclass(frozen=True)
class Roles:
    """The columns by their roles. A column's type follows from its role, never from its cells."""

    text: tuple[str, ...]
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    label: str | None
    id: str | None
    group: str | None
    dates: tuple[str, ...] = ()
    date_order: str = "unambiguous"  # see `dates.seconds_of`

    @classmethod
    def from_config(cls, config: Config) -> "Roles":
        return cls(
            text=config.text_name,
            numbers=config.tab_field_list,
            categories=config.cat_field_list,
            label=config.label_name,
            id=config.id_name,
            group=config.group_name,
            dates=config.date_field_list,
            date_order=config.date_order,
        )

    def features(self) -> list[str]:
        """Columns that the model reads: text, numbers, dates, categories. Each once."""
        return list(dict.fromkeys([*self.text, *self.numbers, *self.dates, *self.categories]))

    def inputs(self) -> list[str]:
        """Columns that prediction reads: features and id. Each once."""
        return list(dict.fromkeys([*self.features(), *([self.id] if self.id is not None else [])]))


@dataclass
class Chunk:
    """N consecutive rows."""

    cells: dict[str, list[str]]  # column -> N texts, "" where missing
    paths: list[str]  # all files of the table, as the user gave them
    file_index: np.ndarray  # [N] int64 into paths
    row: np.ndarray  # [N] int64, counted from 1 in the row's file
    line: np.ndarray  # [N] int64, 0 where the format has no lines

    def __len__(self) -> int:
        return len(self.row)

    def row_location(self, index: int) -> str:
        """A row for messages: `reviews.csv row 17 (line 23)`."""
        return row_location(self.paths[self.file_index[index]], int(self.row[index]), int(self.line[index]))


def expand_paths(paths: Sequence[str]) -> list[str]:
    """The files in the given order, with globs and folders of Parquet files expanded.

    The matches of a glob are sorted by name, the files of a folder by the numbers in their names.
    Raises `InputError` for a missing file, another folder, a pipe, a glob without a match, a file that is given twice
    and a name that is not UTF-8.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        check_path(path)
        if os.path.isdir(path):
            matches = _parquet_files(path)
        elif os.path.exists(path):  # before globs: a file name may contain [ or ?
            matches = [path]
        else:
            matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if not matches:
            problem = "no file matches this pattern" if glob.has_magic(path) else "there is no such file"
            raise InputError(f"{path}: {problem}")
        files += matches
    seen: dict[str, str] = {}
    for path in files:
        check_path(path)
        if not os.path.isfile(path):  # a pipe can be read only once
            found = "found a pipe or a device; `mmbert predict` reads standard input as -"
            raise InputError(f"{path}: expected a file, {found}")
        real = os.path.realpath(path)
        if real in seen:
            raise InputError(f"{path}: the same file is given twice (also as {seen[real]})")
        seen[real] = path
    return files


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` for a name that is not UTF-8: JSON files and reports could not contain it."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        escaped = os.fsencode(path).decode("utf-8", "backslashreplace")
        expected = "expected a name in UTF-8, found other bytes in it (here as \\x..)"
        raise InputError(f"{escaped}: {expected}: rename it") from None


def _parquet_files(folder: str) -> list[str]:
    """Parquet files of a folder that Spark, Dask or pandas wrote, without hidden files and markers such as _SUCCESS."""
    names = sorted((name for name in os.listdir(folder) if not name.startswith(("_", "."))), key=_numeric_sort_key)
    others = [name for name in names if not name.endswith(".parquet")]
    if len(others) == len(names):
        partition = next((name for name in names if "=" in name), None)
        if partition is not None:
            found = f"found folders such as {format_for_message(partition)}, whose names hold a column"
            raise InputError(f"{folder}: expected Parquet files, {found}: write files with all columns")
        raise InputError(f"{folder}: expected a file, found a folder (all its files: {os.path.join(folder, '*.csv')})")
    if others:
        found = f"found {format_for_message(others[0])} in it"
        raise InputError(f"{folder}: expected a folder of Parquet files alone, {found}")
    return [os.path.join(folder, name) for name in names]


def _numeric_sort_key(name: str) -> list[tuple[int, str]]:
    """Puts part.2 before part.10: Dask writes numbers without leading zeros."""
    pieces = re.split("([0-9]+)", name)  # text and digits alternate
    return [(int(piece), "") if index % 2 else (-1, piece) for index, piece in enumerate(pieces)]


def resolve_columns(
    paths: Sequence[str], columns: Sequence[str], optional: Sequence[str] = (), *, tsv_quoting: str = AUTO
) -> list[str]:
    """The `columns`, then those of `optional` that the files have. Only headers are read.

    Raises `InputError` for a missing column (with the nearest name) and for an optional one that only some files have.
    """
    kept: list[str] = []
    files = expand_paths(paths)
    if problems := missing_in_files(files, columns, tsv_quoting=tsv_quoting):
        raise InputError(join_problems(problems))
    for path in files:
        found = _columns_of(path, header_of(path, tsv_quoting), columns, optional)
        if path != files[0] and found != kept:
            [name, *_] = set(found) ^ set(kept)
            with_it, without = (path, files[0]) if name in found else (files[0], path)
            problem = f"column {name!r} not found, but {with_it} has it"
            raise InputError(f"{without}: {problem}: expected the same columns in all files")
        kept = found
    return kept


def read_chunks(
    paths: Sequence[str],
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    max_characters: Mapping[str, int] | None = None,
    keep_end: bool = False,
    chunk_rows: int = CHUNK_ROWS,
    tsv_quoting: str = AUTO,
) -> Iterator[Chunk]:
    """Rows of all files in order, in chunks.

    A chunk ends after every `chunk_rows` rows of all files together, and earlier when its cells reach
    MAX_CHUNK_CHARACTERS. Cells of a column in `max_characters` are truncated to that many characters (with `keep_end`
    to the last ones), so that very long texts do not fill the memory. The headers of all files are checked before the
    first row is read.
    Raises the `InputError`s of `expand_paths`, `resolve_columns` and `readers.rows_of`.
    """
    files = expand_paths(paths)
    kept = resolve_columns(files, columns, optional, tsv_quoting=tsv_quoting)
    absent = [name for name in optional if name not in kept]
    limits = [
        (kept.index(name), slice(-count, None) if keep_end else slice(count))
        for name, count in (max_characters or {}).items()
    ]
    rows: list[Sequence[str]] = []
    lines: list[int] = []
    starts: list[tuple[int, int, int]] = []  # of each file in the chunk: its first index in `rows`, file, row
    num_rows = num_characters = 0  # of all files so far; of the chunk
    for file_index, path in enumerate(files):
        starts.append((len(rows), file_index, 1))
        for row, (line, cells) in enumerate(rows_of(path, kept, absent=absent, tsv_quoting=tsv_quoting), start=1):
            cells = _truncate_cells(cells, limits) if limits else cells
            rows.append(cells)
            lines.append(line)
            num_rows += 1
            num_characters += sum(map(len, cells))
            if num_rows % chunk_rows == 0 or num_characters >= MAX_CHUNK_CHARACTERS:
                yield _chunk_of(rows, kept, files, lines, starts)
                rows, lines, starts, num_characters = [], [], [(0, file_index, row + 1)], 0
    if rows:
        yield _chunk_of(rows, kept, files, lines, starts)


def frame_to_chunk(frame: pd.DataFrame, columns: Sequence[str], optional: Sequence[str] = ()) -> Chunk:
    """A frame as one chunk; cells become text by `cells.text_of`.

    pandas turns a column of integers with a missing value into floats: an id 7 becomes "7.0". Reading files with
    `dtype=str` avoids it. Raises `InputError` for a missing or repeated column and a cell that is not a single value.
    """
    names = [str(name) for name in frame.columns]
    check_unique_columns(MEMORY_PATH, names)
    kept = _columns_of(MEMORY_PATH, names, columns, optional)
    values = {name: _values_of(frame.iloc[:, names.index(name)]) for name in kept}
    return _chunk_in_memory(MEMORY_PATH, values, len(frame))


def _values_of(column: pd.Series) -> list[object]:
    """The values of a frame's column. float32 and float16 stay: as float64, their 0.1 would be 0.10000000149011612."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        dtype = dtype.categories.dtype
    if isinstance(dtype, pd.SparseDtype):
        dtype = dtype.subtype
    kind = getattr(dtype, "numpy_dtype", dtype)  # also of pandas' nullable and pyarrow's types
    if isinstance(kind, np.dtype) and kind.kind == "f" and kind.itemsize < 8:
        return list(column.to_numpy(dtype=kind, na_value=np.nan))
    return column.astype(object).tolist()


def records_to_chunk(
    records: Sequence[Mapping[str, object]], columns: Sequence[str], optional: Sequence[str] = ()
) -> Chunk:
    """Rows given as dicts, as one chunk. An optional column that one row has must be in all rows.

    Raises `InputError` for a row without a column and a cell that is not a single value.
    """
    rows = [{str(name): value for name, value in record.items()} for record in records]
    kept = _columns_of(RECORDS_PATH, list(rows[0]), columns, ()) if rows else list(columns)
    kept += [name for name in optional if name not in kept and any(name in row for row in rows)]
    for number, row in enumerate(rows, start=1):
        _columns_of(row_location(RECORDS_PATH, number), list(row), kept, ())
    return _chunk_in_memory(RECORDS_PATH, {name: [row[name] for row in rows] for name in kept}, len(rows))


def _chunk_in_memory(path: str, values: Mapping[str, Sequence[object]], num_rows: int) -> Chunk:
    return Chunk(
        cells={
            name: [_memory_cell(value, path, name, row) for row, value in enumerate(column, start=1)]
            for name, column in values.items()
        },
        paths=[path],
        file_index=np.zeros(num_rows, dtype=np.int64),
        row=np.arange(1, num_rows + 1, dtype=np.int64),
        line=np.zeros(num_rows, dtype=np.int64),
    )


def _columns_of(path: str, header: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    """`columns`, then those of `optional` that the header has, each once. Raises `InputError` for a missing column."""
    if problem := _missing_columns(header, columns):
        raise InputError(f"{path}: {problem}")
    known = set(header)
    return list(dict.fromkeys([*columns, *(name for name in optional if name in known)]))


def missing_in_files(paths: Sequence[str], columns: Sequence[str], *, tsv_quoting: str = AUTO) -> dict[str, list[str]]:
    """One line about all columns that a file's header lacks -> the files with this line."""
    problems: dict[str, list[str]] = {}
    for path in paths:
        if problem := _missing_columns(header_of(path, tsv_quoting), columns):
            problems.setdefault(problem, []).append(path)
    return problems


def join_problems(problems: Mapping[str, Sequence[str]]) -> str:
    """What `missing_in_files` found, as one line."""
    return "; ".join(f"{', '.join(paths)}: {problem}" for problem, paths in problems.items())


def _missing_columns(header: Sequence[str], columns: Sequence[str]) -> str | None:
    """A line about the `columns` that the header lacks, each with a possible reason; None where it has all."""
    known = set(header)
    missing = [column for column in columns if column not in known]
    if not missing:
        return None
    names = list_for_message(header, 40)
    hints = [_missing_hint(column, header) for column in missing[:MAX_MISSING_NAMED]]
    if hints[0].startswith(OTHER_SEPARATOR):
        hints[1:] = [""] * (len(hints) - 1)  # one reason for all missing columns
    lines = [f"column {column!r} not found{hint}" for column, hint in zip(missing, hints, strict=False)]
    more = f"; {len(missing) - MAX_MISSING_NAMED} more columns not found" if len(missing) > MAX_MISSING_NAMED else ""
    return f"{'; '.join(lines)}{more}; columns are {names}"


def _missing_hint(column: str, header: Sequence[str]) -> str:
    """A possible reason for a missing column: composed or decomposed letters, another separator, or a similar name."""
    same = next((name for name in header if normalize("NFC", name) == normalize("NFC", column)), None)
    if same is not None:
        here, there = ("composed", "decomposed") if is_normalized("NFC", column) else ("decomposed", "composed")
        written = f"it is written here in {here} letters and in the header in {there} ones"
        return f": {written} ({ascii(column)} and {ascii(same)}); write both in composed letters (Unicode NFC)"
    for separator, (kind, advice) in SEPARATORS.items():
        split = [cell.strip(' "') for cell in ",".join(header).split(separator)]
        is_in_names = any(separator in name for name in header)
        if column in split and is_in_names and (separator != "," or len(header) == 1):
            return f"{OTHER_SEPARATOR} {kind}; {advice}"
    by_lower = {name.lower(): name for name in header[:MAX_COMPARED_NAMES] if len(name) <= MAX_COMPARED_CHARACTERS}
    if len(column) > MAX_COMPARED_CHARACTERS:
        return ""
    near = get_close_matches(column.lower(), by_lower, n=1, cutoff=0.5)
    return f"; nearest is {by_lower[near[0]]!r}" if near else ""


def _truncate_cells(cells: Sequence[str], limits: Sequence[tuple[int, slice]]) -> Sequence[str]:
    """The cells, truncated as in `limits` (index, kept characters); the same object where no cell is longer."""
    for index, kept in limits:
        truncated = cells[index][kept]
        if len(truncated) < len(cells[index]):
            cells = [*cells[:index], truncated, *cells[index + 1 :]]
    return cells


def _chunk_of(
    rows: list[Sequence[str]],
    columns: list[str],
    files: list[str],
    lines: list[int],
    starts: list[tuple[int, int, int]],
) -> Chunk:
    """`lines` of each row; `starts` of each file in the chunk: its first index in `rows`, file, row in the file."""
    line = np.array(lines, dtype=np.int64)
    first, file, first_row = np.array(starts, dtype=np.int64).T
    counts = np.diff(first, append=len(rows))
    file_index = np.repeat(file, counts)
    row = np.arange(len(rows)) + np.repeat(first_row - first, counts)
    cells = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    return Chunk(cells=cells, paths=files, file_index=file_index, row=row, line=line)


def _memory_cell(value: object, path: str, column: str, row: int) -> str:
    try:
        text = text_of(value)
        text.encode("utf-8")  # fails for half a surrogate pair
        return text
    except ValueError as error:
        error_prefix = f"{row_location(path, row)}, column {column!r}"
        raise InputError(f"{error_prefix}: expected a single value, found {error}") from None
