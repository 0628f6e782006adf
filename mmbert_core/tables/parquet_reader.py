"""Rows of a Parquet file, in batches of bounded bytes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError, shorten
from mmbert_core.tables.cells import text_of
from mmbert_core.tables.lines import MAX_CELL_CHARACTERS, bounded_text_of, kind_of, row_location

MAX_BATCH_ROWS = 4096
MAX_BATCH_BYTES = 2**24  # decompressed, of all columns of a batch
MAX_DICTIONARY_BYTES = 2**16  # mean bytes of a text, up to which its column is read as a dictionary
MAX_ERROR_CHARACTERS = 120  # of pyarrow's message in ours
READ_BYTES = 2**20  # of a column at a time; without a limit pyarrow reads a whole column of a row group
# base classes of all of pyarrow's errors; ValueError also for text that is not UTF-8
READ_ERRORS = (OSError, ValueError, OverflowError, LookupError, NotImplementedError, TypeError)


def open_parquet(path: str, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises `InputError` without pyarrow, and for a file that is not Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'mmbert_core[parquet]'") from None
    try:
        return parquet.ParquetFile(path, **options)
    except READ_ERRORS as error:
        raise InputError(f"{path}: {_cannot_read(error)}{_other_kind(path)}") from None


def parquet_header(path: str) -> list[str]:
    """Names of the columns. Raises `InputError` as `open_parquet`."""
    file = open_parquet(path)
    try:
        return list(file.schema_arrow.names)
    except READ_ERRORS as error:
        raise InputError(f"{path}: {_cannot_read(error)}") from None


def parquet_rows(path: str, columns: Sequence[str]) -> Iterator[list[str]]:
    """Rows of `columns`, which the file must have.

    Raises `InputError` with path, row and column for what cannot be read, and for a cell that is too long.
    Memory: a batch, and what pyarrow takes to decode a page (1,024 values or more, at most 2 GiB by the format).
    """
    file = open_parquet(path)
    try:
        sizes = [
            _bytes_per_row(file.metadata.row_group(group), columns) for group in range(file.metadata.num_row_groups)
        ]
    except READ_ERRORS as error:
        raise InputError(f"{path}: {_cannot_read(error)}") from None
    # pyarrow takes these options only when it opens a file; the metadata is not read again
    options = {"read_dictionary": _dictionary_columns(file, columns, sizes), "buffer_size": READ_BYTES}
    file = open_parquet(path, metadata=file.metadata, **options)
    row = 0
    for group, size_of in enumerate(sizes):
        column = next((name for name, size in size_of.items() if size > MAX_CELL_CHARACTERS), None)
        if column is not None:
            expected = f"expected cells of at most {MAX_CELL_CHARACTERS:,} characters, found longer ones"
            raise InputError(f"{row_location(path, row + 1)} or after, column {column!r}: {expected}")
        batch_rows = int(max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES / max(1.0, sum(size_of.values())))))
        batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=list(columns))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except READ_ERRORS as error:
                raise InputError(f"{row_location(path, row + 1)} or after: {_cannot_read(error)}") from None
            cells = [_cells(batch, column, first_row=row + 1, path=path) for column in columns]
            row += batch.num_rows
            yield from map(list, zip(*cells, strict=True))
    if row != file.metadata.num_rows:
        raise InputError(f"{path}: expected {file.metadata.num_rows} rows, as the file's metadata says, found {row}")


def _cannot_read(error: Exception, kind: object = "Parquet") -> str:
    return f"cannot be read as {kind} ({shorten(str(error), MAX_ERROR_CHARACTERS)})"


def _other_kind(path: str) -> str:
    """What the file is instead of Parquet, for the end of a message; "" where that is not known."""
    try:
        with open(path, "rb") as stream:
            kind = kind_of(stream.read(512))
    except OSError:
        return ""
    return "" if not kind or "is Parquet" in kind else f"; {kind}"


def _bytes_per_row(group: Any, columns: Sequence[str]) -> dict[str, float]:
    """Column -> mean decompressed bytes of a row of the row group, from its metadata.

    Repeated values that a dictionary stores once count once.
    """
    sizes = dict.fromkeys(columns, 0.0)
    for index in range(group.num_columns):
        chunk = group.column(index)
        path = chunk.path_in_schema  # of a nested column `name.field`
        column = next((name for name in columns if path == name or path.startswith(f"{name}.")), None)
        if column is not None:
            sizes[column] += chunk.total_uncompressed_size / max(1, group.num_rows)
    return sizes


def _dictionary_columns(file: Any, columns: Sequence[str], sizes: Sequence[Mapping[str, float]]) -> list[str]:
    """Text columns to read as dictionaries, so that a text of many rows is in memory once.

    Columns of long texts are excluded: if their texts differ, a dictionary takes several times the memory.
    """
    import pyarrow

    text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    texts = [name for name in columns if file.schema_arrow.field(name).type in text_types]
    return [name for name in texts if all(size_of[name] <= MAX_DICTIONARY_BYTES for size_of in sizes)]


def _cells(batch: Any, column: str, *, first_row: int, path: str) -> list[str]:
    """The cells of a column as text; the batch begins with row `first_row` of the file. Raises `InputError`."""
    values = batch.column(batch.schema.get_field_index(column))
    try:
        found = _python_values(values)
    except READ_ERRORS as error:  # such as a damaged page, a date after the year 9999, an unknown time zone
        is_encoding = isinstance(error, UnicodeDecodeError)
        problem = f"expected UTF-8 text ({error.reason})" if is_encoding else _cannot_read(error, values.type)
        raise InputError(f"{row_location(path, first_row)} or after, column {column!r}: {problem}") from None
    with suppress(ValueError):  # fast path: a batch without invalid cells
        cells = list(map(text_of, found))
        if max(map(len, cells), default=0) <= MAX_CELL_CHARACTERS:
            return cells
    cells = []
    for value in found:
        try:
            cells.append(bounded_text_of(value))
        except ValueError as error:
            error_prefix = f"{row_location(path, first_row + len(cells))}, column {column!r}"
            raise InputError(f"{error_prefix}: expected a single value, found {error}") from None
    return cells


def _python_values(values: Any) -> Sequence[Any]:
    """The values of an arrow array; equal values of a dictionary array are the same object."""
    if hasattr(values, "dictionary"):
        import pyarrow

        indices = values.indices.cast(pyarrow.int64())  # Polars writes unsigned ones, which have no -1
        used, index_of_row = np.unique(indices.fill_null(-1).to_numpy(zero_copy_only=False), return_inverse=True)
        known = _python_values(values.dictionary.take(pyarrow.array(used[used >= 0])))
        distinct = [*([None] if (used < 0).any() else []), *known]
        return [distinct[index] for index in index_of_row.tolist()]
    # float32 stays float32: its 0.1 as a Python float would be 0.10000000149011612
    is_narrow = str(values.type) in ("float", "halffloat")
    return values.to_numpy(zero_copy_only=False) if is_narrow else values.to_pylist()
