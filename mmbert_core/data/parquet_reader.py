"""Rows of a Parquet file, in batches of bounded bytes. Floor 1; imports errors, lines."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmbert_core.data.lines import MAX_CELL_CHARACTERS, kind_of, short_text_of
from mmbert_core.errors import InputError

MAX_BATCH_ROWS = 4096
MAX_BATCH_BYTES = 2**24  # of all columns of a batch, as the file's metadata has them
READ_BYTES = 2**20  # of a column at a time; without it a column of a row group is in memory as a whole


def open_parquet(path: str, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises `InputError`: pyarrow is not there, or the file is not Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'mmbert_core[parquet]'") from None
    try:
        return parquet.ParquetFile(path, **options)
    except (OSError, ValueError) as error:  # pyarrow's exceptions are subclasses of these
        raise InputError(f"{path}: cannot be read as Parquet ({_one_line(error)}){_other_kind(path)}") from None


def parquet_rows(path: str, columns: Sequence[str]) -> Iterator[list[str]]:
    """Rows of `columns`, which the file has. Raises `InputError` with path, row and column for what cannot be read."""
    file = open_parquet(path, read_dictionary=_text_columns(open_parquet(path), columns), buffer_size=READ_BYTES)
    row = 0
    for group in range(file.metadata.num_row_groups):
        batch_rows = _batch_rows(file.metadata.row_group(group), columns, f"{path} row {row + 1} or after")
        batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=list(columns))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (OSError, ValueError) as error:
                raise InputError(f"{path} row {row + 1} or after: cannot be read as Parquet ({_one_line(error)})") from None
            cells = [_cells(batch, column, first_row=row + 1, path=path) for column in columns]
            row += batch.num_rows
            yield from map(list, zip(*cells, strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _other_kind(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            kind = kind_of(stream.read(512))
    except OSError:
        return ""
    return "" if not kind or "is Parquet" in kind else f"; {kind}"


def _text_columns(file: Any, columns: Sequence[str]) -> list[str]:
    """Columns of texts. They are read as dictionaries: a text that a thousand rows share is in memory once."""
    import pyarrow

    kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    schema = file.schema_arrow
    return [name for name in columns if any(is_kind(schema.field(name).type) for is_kind in kinds)]


def _batch_rows(group: Any, columns: Sequence[str], error_prefix: str) -> int:
    """How many rows of a row group are read at a time, by their average bytes. Raises `InputError` where cells are too long."""
    bytes_of_row = 0.0
    for index in range(group.num_columns):
        chunk = group.column(index)
        column = next((name for name in columns if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")), None)
        if column is not None and group.num_rows:
            average = chunk.total_uncompressed_size / group.num_rows
            if average > MAX_CELL_CHARACTERS:
                raise InputError(f"{error_prefix}, column {column!r}: expected cells of at most {MAX_CELL_CHARACTERS:,} characters, found longer ones")
            bytes_of_row += average
    return int(max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES / max(1.0, bytes_of_row))))


def _cells(batch: Any, column: str, *, first_row: int, path: str) -> list[str]:
    values = batch.column(batch.schema.get_field_index(column))
    try:
        found = _python_values(values)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} row {first_row} or after, column {column!r}: expected UTF-8 text ({error.reason})") from None
    except (ValueError, OverflowError, NotImplementedError) as error:  # a date after the year 9999, a time zone that nobody knows; pyarrow's own are these
        raise InputError(f"{path} row {first_row} or after, column {column!r}: cannot be read as {values.type} ({_one_line(error)})") from None
    cells: list[str] = []
    for value in found:
        try:
            cells.append(short_text_of(value))
        except ValueError as error:
            raise InputError(f"{path} row {first_row + len(cells)}, column {column!r}: expected a single value, found {error}") from None
    return cells


def _python_values(values: Any) -> Sequence[Any]:
    """The values of an arrow array; of a dictionary's, equal values are one object."""
    if hasattr(values, "dictionary"):
        import pyarrow

        used, index_of_row = np.unique(values.indices.fill_null(-1).to_numpy(zero_copy_only=False), return_inverse=True)
        known = _python_values(values.dictionary.take(pyarrow.array(used[used >= 0])))
        distinct = [*([None] if (used < 0).any() else []), *known]
        return [distinct[index] for index in index_of_row.tolist()]
    # as float32, not as the float64 that Python would have: 0.1 stays 0.1
    is_narrow = str(values.type) in ("float", "halffloat")
    return values.to_numpy(zero_copy_only=False) if is_narrow else values.to_pylist()
