"""Rows of a Parquet file, in batches of bounded bytes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError, shorten
from mmbert_core.tables.cells import text_of
from mmbert_core.tables.lines import MAX_CELL_CHARACTERS, kind_of, row_location, short_text_of

MAX_BATCH_ROWS = 4096
MAX_BATCH_BYTES = 2**24  # of all columns of a batch, as the file's metadata has them
MAX_DICTIONARY_BYTES = 2**16  # of a text, on average over the rows
MAX_ERROR_CHARACTERS = 120  # of pyarrow's message in ours
READ_BYTES = 2**20  # of a column at a time; without it a column of a row group is in memory as a whole
# of pyarrow, all subclasses of these, and of text in a damaged file that is not UTF-8
READ_ERRORS = (OSError, ValueError, OverflowError, LookupError, NotImplementedError, TypeError)


def open_parquet(path: str, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises `InputError`: pyarrow is not there, or the file is not Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'mmbert_core[parquet]'") from None
    try:
        return parquet.ParquetFile(path, **options)
    except READ_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as Parquet ({shorten(str(error), MAX_ERROR_CHARACTERS)}){_other_kind(path)}"
        ) from None


def parquet_header(path: str) -> list[str]:
    """Names of the columns. Raises `InputError` as `open_parquet`."""
    file = open_parquet(path)
    try:
        return list(file.schema_arrow.names)
    except READ_ERRORS as error:
        raise InputError(f"{path}: cannot be read as Parquet ({shorten(str(error), MAX_ERROR_CHARACTERS)})") from None


def parquet_rows(path: str, columns: Sequence[str]) -> Iterator[list[str]]:
    """Rows of `columns`, which the file has. Raises `InputError` with path, row and column for what cannot be read.

    Memory: a batch, and what pyarrow itself takes to decode a page (1,024 values or more, at most 2 GiB by the format).
    """
    file = open_parquet(path)
    try:
        sizes = [
            _bytes_per_row(file.metadata.row_group(group), columns) for group in range(file.metadata.num_row_groups)
        ]
    except READ_ERRORS as error:
        raise InputError(f"{path}: cannot be read as Parquet ({shorten(str(error), MAX_ERROR_CHARACTERS)})") from None
    file = open_parquet(path, read_dictionary=_dictionary_columns(file, columns, sizes), buffer_size=READ_BYTES)
    row = 0
    for group, size_of in enumerate(sizes):
        if (column := next((name for name, size in size_of.items() if size > MAX_CELL_CHARACTERS), None)) is not None:
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
                raise InputError(
                    f"{row_location(path, row + 1)} or after: cannot be read as Parquet ({shorten(str(error), MAX_ERROR_CHARACTERS)})"
                ) from None
            cells = [_cells(batch, column, first_row=row + 1, path=path) for column in columns]
            row += batch.num_rows
            yield from map(list, zip(*cells, strict=True))
    if row != file.metadata.num_rows:
        raise InputError(f"{path}: expected {file.metadata.num_rows} rows, as the file's metadata says, found {row}")


def _other_kind(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            kind = kind_of(stream.read(512))
    except OSError:
        return ""
    return "" if not kind or "is Parquet" in kind else f"; {kind}"


def _bytes_per_row(group: Any, columns: Sequence[str]) -> dict[str, float]:
    """Column -> bytes of a row on average, unpacked, as a row group's metadata has them; repeated values may count once."""
    sizes = dict.fromkeys(columns, 0.0)
    for index in range(group.num_columns):
        chunk = group.column(index)
        column = next(
            (name for name in columns if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")),
            None,
        )
        if column is not None:
            sizes[column] += chunk.total_uncompressed_size / max(1, group.num_rows)
    return sizes


def _dictionary_columns(file: Any, columns: Sequence[str], sizes: Sequence[Mapping[str, float]]) -> list[str]:
    """Columns of texts to read as dictionaries, so that a text which a thousand rows share is in memory once.

    Not those of long texts that differ: as a dictionary they would be in memory several times.
    """
    import pyarrow

    kinds = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_binary,
        pyarrow.types.is_large_binary,
    )
    texts = [name for name in columns if any(is_kind(file.schema_arrow.field(name).type) for is_kind in kinds)]
    return [name for name in texts if all(size_of[name] <= MAX_DICTIONARY_BYTES for size_of in sizes)]


def _cells(batch: Any, column: str, *, first_row: int, path: str) -> list[str]:
    values = batch.column(batch.schema.get_field_index(column))
    try:
        found = _python_values(values)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{row_location(path, first_row)} or after, column {column!r}: expected UTF-8 text ({error.reason})"
        ) from None
    except (
        READ_ERRORS
    ) as error:  # a damaged page, a date after the year 9999, a time zone that nobody knows; pyarrow's own are these
        raise InputError(
            f"{row_location(path, first_row)} or after, column {column!r}: cannot be read as {values.type} ({shorten(str(error), MAX_ERROR_CHARACTERS)})"
        ) from None
    with suppress(ValueError):  # nearly all batches: nothing to refuse
        cells = list(map(text_of, found))
        if max(map(len, cells), default=0) <= MAX_CELL_CHARACTERS:
            return cells
    cells = []
    for value in found:
        try:
            cells.append(short_text_of(value))
        except ValueError as error:
            raise InputError(
                f"{row_location(path, first_row + len(cells))}, column {column!r}: expected a single value, found {error}"
            ) from None
    return cells


def _python_values(values: Any) -> Sequence[Any]:
    """The values of an arrow array; of a dictionary's, equal values are one object."""
    if hasattr(values, "dictionary"):
        import pyarrow

        indices = values.indices.cast(
            pyarrow.int64()
        )  # they may be unsigned, as Polars writes categories, which have no -1
        used, index_of_row = np.unique(indices.fill_null(-1).to_numpy(zero_copy_only=False), return_inverse=True)
        known = _python_values(values.dictionary.take(pyarrow.array(used[used >= 0])))
        distinct = [*([None] if (used < 0).any() else []), *known]
        return [distinct[index] for index in index_of_row.tolist()]
    # as float32, not as the float64 that Python would have: 0.1 stays 0.1
    is_narrow = str(values.type) in ("float", "halffloat")
    return values.to_numpy(zero_copy_only=False) if is_narrow else values.to_pylist()
