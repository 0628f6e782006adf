"""Text cells as arrays before anything is fitted: token ids, numbers, codes of categories and labels.

N rows, F numeric columns, D date columns, K categorical columns. Codes number the distinct texts of a column in order
of appearance; code 0 is "" (missing). `Features` and `Labels`, fitted on the training rows, map codes to the model's
indices.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from mmap import MADV_DONTNEED, mmap

import numpy as np
from transformers import PreTrainedTokenizerFast

from mmbert_core.data.dates import AmbiguousDate, seconds_of
from mmbert_core.data.features import MAX_FLOAT32
from mmbert_core.data.tokens import Tokens, characters_read, join_texts, tokenise
from mmbert_core.runtime.errors import InputError, RunError, format_for_message
from mmbert_core.tables.cells import BOOLEANS
from mmbert_core.tables.csv_reader import AUTO
from mmbert_core.tables.lines import row_location
from mmbert_core.tables.table import Chunk, Roles

MISSING_NUMBERS = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "<na>"})  # in lower case
MISSING_DATES = MISSING_NUMBERS | {"nat"}
MAX_WINDOW_CHARACTERS = 2**27  # of the cells that a window holds as texts: ids, labels, categories
# Offsets of variable-length items, which begin with 0: joining chunks adds the last value of the previous ones.
OFFSET_ARRAYS = frozenset({"chunk_offsets", "row_chunks", "id_offsets"})

Arrays = dict[str, np.ndarray]


class CodeBook:
    """Text -> code for one column; grows with each chunk."""

    def __init__(self) -> None:
        self.code_of: dict[str, int] = {"": 0}

    def encode(self, cells: Sequence[str]) -> np.ndarray:
        """Codes [N] int32; new texts get new codes."""
        code_of = self.code_of
        return np.fromiter((code_of.setdefault(cell, len(code_of)) for cell in cells), dtype=np.int32, count=len(cells))

    def values(self) -> list[str]:
        """Text of each code."""
        return list(self.code_of)


@dataclass
class StringColumn:
    """Texts byte for byte: text n is `data[offsets[n]:offsets[n + 1]]` in UTF-8."""

    data: np.ndarray  # uint8, all texts concatenated
    offsets: np.ndarray  # [N + 1] int64

    @classmethod
    def of(cls, texts: Sequence[str]) -> "StringColumn":
        encoded = [text.encode("utf-8") for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def take(self, positions: np.ndarray) -> list[str]:
        """The texts at `positions`."""
        starts, ends = self.offsets[positions], self.offsets[positions + 1]
        return [self.data[start:end].tobytes().decode("utf-8") for start, end in zip(starts, ends, strict=True)]


@dataclass
class EncodedRows:
    """All rows of a table as arrays, in memory or memory-mapped. N rows in input order."""

    num_rows: int
    max_chunks: int
    tokens: Tokens | None  # None: no text columns
    numbers: np.ndarray  # [N, F + D] float64, NaN = missing; dates in seconds
    category_codes: np.ndarray  # [N, K] int32
    vocabularies: list[list[str]]  # K, text of each code
    label_codes: np.ndarray | None  # [N] int32; None: the table has no label column
    label_values: list[str]  # text of each label code
    group_codes: np.ndarray | None  # [N] int64, equal for equal groups; every missing group has its own code
    ids: StringColumn | None
    id_codes: np.ndarray | None  # [N] int64, equal for equal ids
    paths: list[str]
    file_index: np.ndarray  # [N] int32 into paths
    file_rows: np.ndarray  # [N] int64, counted from 1 in the row's file
    lines: np.ndarray  # [N] int64, 0 for a format without lines
    fingerprints: dict[str, dict[str, int | str]] = field(default_factory=dict)  # path -> bytes, sha256; {} in memory
    tsv_quoting: str = AUTO  # with which the files were read
    token_file: mmap | None = None  # of `tokens.ids`; None in memory
    mappings: dict[str, mmap] = field(default_factory=dict)  # path -> the mapped file of an array; {} in memory

    def check_files(self) -> None:
        """Raise `RunError` when a mapped file was truncated: reading past its end would kill the process (SIGBUS)."""
        for path, mapping in self.mappings.items():
            if (num_bytes := mapping.size()) < len(mapping):
                problem = "this file of the cache was truncated while it was in use"
                found = f"expected {len(mapping)} bytes, found {num_bytes}"
                raise RunError(f"{path}: {problem}: {found}; start again: the cache is built again")

    def last_position(self) -> tuple[int, int]:
        """File (index into `paths`) and line of the last row, or its row in a format without lines; (0, 0): no rows."""
        if self.num_rows == 0:
            return 0, 0
        return int(self.file_index[-1]), int(self.lines[-1] or self.file_rows[-1])

    def release_token_pages(self) -> None:
        """Release the mapped pages of token ids, which count as memory of the process; reading maps them again."""
        if self.token_file is not None:
            self.token_file.madvise(MADV_DONTNEED)

    @property
    def num_truncated(self) -> int:
        """Rows whose text was longer than its chunks."""
        return self.tokens.num_truncated if self.tokens else 0

    def row_location(self, index: int) -> str:
        """A row for messages: `reviews.csv row 17 (line 23)`."""
        return row_location(self.paths[self.file_index[index]], int(self.file_rows[index]), int(self.lines[index]))


def max_cell_characters(roles: Roles, *, max_length: int, max_chunks: int) -> dict[str, int]:
    """Text column -> characters of a cell to read: one more than are tokenised, so that truncation is noticed."""
    whole = (roles.id, roles.group)  # a text column that is also one of these is read to its end
    return {name: characters_read(max_length, max_chunks) + 1 for name in roles.text if name not in whole}


def encode_chunk(
    chunk: Chunk, roles: Roles, tokenizer: PreTrainedTokenizerFast | None, *, max_length: int, max_chunks: int
) -> EncodedRows:
    """One chunk in memory. Label and group are encoded if the chunk has their columns.

    Raises `InputError` with row, column and content for a numeric cell that is not a finite float32 number.
    """
    windows = encode_windows(
        iter([chunk]), roles, tokenizer, max_length=max_length, max_chunks=max_chunks, window_rows=max(1, len(chunk))
    )
    return next(windows)


def encode_windows(
    chunks: Iterator[Chunk],
    roles: Roles,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    max_length: int,
    max_chunks: int,
    window_rows: int,
) -> Iterator[EncodedRows]:
    """Consecutive chunks joined in memory to windows of `window_rows` rows; an empty chunk gives an empty window.

    Chunks of long texts have fewer rows; windows do not depend on that. A window ends earlier when its ids, labels and
    categories reach MAX_WINDOW_CHARACTERS.
    """
    kept = [name for name in dict.fromkeys([roles.id, roles.label, *roles.categories]) if name is not None]
    pieces: list[Arrays] = []
    books: dict[str, CodeBook] = defaultdict(CodeBook)
    num_rows = num_truncated = num_characters = 0

    def assembled() -> EncodedRows:
        return assemble(
            join_arrays(pieces),
            vocabularies=[books[name].values() for name in roles.categories],
            label_values=books[roles.label].values() if roles.label is not None else [],
            paths=paths,
            max_chunks=max_chunks,
            num_truncated=num_truncated,
        )

    for chunk in chunks:
        paths = chunk.paths
        arrays, chunk_truncated = encode_arrays(
            chunk, roles, tokenizer, max_length=max_length, max_chunks=max_chunks, books=books, first_row=num_rows
        )
        pieces.append(arrays)
        num_rows, num_truncated = num_rows + len(chunk), num_truncated + chunk_truncated
        num_characters += sum(sum(map(len, chunk.cells[name])) for name in kept if name in chunk.cells)
        if num_rows >= window_rows or num_characters >= MAX_WINDOW_CHARACTERS or not num_rows:
            yield assembled()
            pieces, books, num_rows, num_truncated, num_characters = [], defaultdict(CodeBook), 0, 0, 0
    if pieces:
        yield assembled()


def join_arrays(pieces: Sequence[Arrays]) -> Arrays:
    """The arrays of consecutive chunks, concatenated."""
    if len(pieces) == 1:
        return pieces[0]
    joined = {}
    for name in pieces[0]:
        arrays = [piece[name] for piece in pieces]
        if name in OFFSET_ARRAYS:
            ends = np.cumsum([array[-1] for array in arrays])
            arrays = [arrays[0], *(array[1:] + end for array, end in zip(arrays[1:], ends[:-1], strict=True))]
        joined[name] = np.concatenate(arrays)
    return joined


def encode_arrays(
    chunk: Chunk,
    roles: Roles,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    max_length: int,
    max_chunks: int,
    books: dict[str, CodeBook],
    first_row: int = 0,
) -> tuple[Arrays, int]:
    """Name -> array of a chunk that begins at row `first_row`, and the number of truncated texts. Extends `books`."""
    cells = chunk.cells
    numbers = np.empty((len(chunk), len(roles.numbers) + len(roles.dates)), dtype=np.float64)
    for index, name in enumerate(roles.numbers):
        numbers[:, index] = _parse_column(cells[name], column=name, row_location=chunk.row_location)
    for index, name in enumerate(roles.dates, start=len(roles.numbers)):
        numbers[:, index] = _parse_dates(cells[name], roles.date_order, column=name, row_location=chunk.row_location)
    codes = np.empty((len(chunk), len(roles.categories)), dtype=np.int32)
    for index, name in enumerate(roles.categories):
        codes[:, index] = books[name].encode(cells[name])
    arrays = {
        "numbers": numbers,
        "category_codes": codes,
        "file_index": chunk.file_index.astype(np.int32),
        "file_rows": chunk.row,
        "lines": chunk.line,
    }
    if roles.label in cells:
        arrays["label_codes"] = books[roles.label].encode(cells[roles.label])
    if roles.group in cells:
        arrays["group_codes"] = _hash_cells(cells[roles.group], first_row)
    if roles.id in cells:
        ids = StringColumn.of(cells[roles.id])
        arrays |= {"id_bytes": ids.data, "id_offsets": ids.offsets, "id_codes": _hash_cells(cells[roles.id], first_row)}
    num_truncated = 0
    if roles.text:
        tokens = tokenise(tokenizer, join_texts(cells, roles.text), max_length=max_length, max_chunks=max_chunks)
        arrays |= {"token_ids": tokens.ids, "chunk_offsets": tokens.chunk_offsets, "row_chunks": tokens.row_chunks}
        num_truncated = tokens.num_truncated
    return arrays, num_truncated


def assemble(
    arrays: Arrays,
    *,
    vocabularies: list[list[str]],
    label_values: list[str],
    paths: list[str],
    max_chunks: int,
    num_truncated: int,
) -> EncodedRows:
    """`EncodedRows` from the arrays of `encode_arrays`."""
    tokens = None
    if "token_ids" in arrays:
        tokens = Tokens(arrays["token_ids"], arrays["chunk_offsets"], arrays["row_chunks"], num_truncated)
    return EncodedRows(
        num_rows=len(arrays["file_rows"]),
        max_chunks=max_chunks,
        tokens=tokens,
        numbers=arrays["numbers"],
        category_codes=arrays["category_codes"],
        vocabularies=vocabularies,
        label_codes=arrays.get("label_codes"),
        label_values=label_values,
        group_codes=arrays.get("group_codes"),
        ids=StringColumn(arrays["id_bytes"], arrays["id_offsets"]) if "id_bytes" in arrays else None,
        id_codes=arrays.get("id_codes"),
        paths=paths,
        file_index=arrays["file_index"],
        file_rows=arrays["file_rows"],
        lines=arrays["lines"],
    )


def number_of(cell: str) -> float:
    """The number of a cell in Python's notation; 1 and 0 for true and false; NaN for MISSING_NUMBERS.

    Raises `ValueError` for any other text, for digits grouped by _, and for a number that is not finite in float32.
    """
    try:
        number = float(cell)
    except ValueError:
        if cell in BOOLEANS:
            return float(BOOLEANS[cell] == "true")
        if cell.strip().lower() in MISSING_NUMBERS:
            return math.nan
        raise
    if "_" in cell or abs(number) > MAX_FLOAT32:
        raise ValueError(cell)
    return number


def _parse_column(cells: Sequence[str], *, column: str, row_location: Callable[[int], str]) -> np.ndarray:
    """A numeric column -> float64 [N], NaN = missing."""
    try:  # fast path: a column of valid numbers only
        numbers = np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
        if "_" not in "".join(cells) and not (np.abs(numbers) > MAX_FLOAT32).any():
            return numbers
    except ValueError:
        numbers = np.empty(len(cells), dtype=np.float64)
    for index, cell in enumerate(cells):
        try:
            numbers[index] = number_of(cell)
        except ValueError:
            expected = "expected a finite number (such as 3.5 or 1e5, at most 3.4e38) or an empty cell"
            raise InputError(
                f"{row_location(index)}, column {column!r}: {expected}, found {format_for_message(cell)}"
            ) from None
    return numbers


def _parse_dates(cells: Sequence[str], order: str, *, column: str, row_location: Callable[[int], str]) -> np.ndarray:
    """A date column -> seconds, float64 [N], NaN = missing."""
    seconds: dict[str, float] = {}  # of each distinct cell
    for index, cell in enumerate(cells):
        if cell in seconds:
            continue
        try:
            missing = cell.strip().lower() in MISSING_DATES
            seconds[cell] = math.nan if missing else seconds_of(cell, order)
        except AmbiguousDate:
            expected = "expected a date whose order of day and month is known"
            advice = "write the year first, or train with date_order: day_first or month_first"
            raise InputError(
                f"{row_location(index)}, column {column!r}: {expected}, found {format_for_message(cell)}: {advice}"
            ) from None
        except ValueError:
            order_named = f" with {order.replace('_', ' ')}" if order != "unambiguous" else ""
            expected = f"expected a date{order_named} (such as 2019-09-24 or 2019-09-24T10:15:00Z) or an empty cell"
            raise InputError(
                f"{row_location(index)}, column {column!r}: {expected}, found {format_for_message(cell)}"
            ) from None
    return np.fromiter((seconds[cell] for cell in cells), dtype=np.float64, count=len(cells))


def _hash_cells(cells: Sequence[str], first_row: int) -> np.ndarray:
    """63-bit hashes [N] int64 of cells that are only compared; an empty cell gets a negative number of its own.

    Codes would need a dictionary of all groups or ids in memory. Among ten million hashes the probability of any
    collision is below 1e-5.
    """
    digests = b"".join([blake2b(cell.encode("utf-8"), digest_size=8).digest() for cell in cells])
    hashes = (np.frombuffer(digests, dtype="<u8") >> 1).astype(np.int64)
    empty = [index for index, cell in enumerate(cells) if not cell]
    hashes[empty] = -1 - first_row - np.array(empty, dtype=np.int64)
    return hashes
