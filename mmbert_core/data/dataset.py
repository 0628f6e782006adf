"""Rows of a table as batches of tensors.

N rows of a dataset, B rows of a batch, C chunks of a text, T tokens of a chunk, F numbers with indicators,
K categories.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from mmbert_core.data.encoding import EncodedRows, encode_chunk
from mmbert_core.data.features import POOLED, Features, OutOfRange, Unseen, out_of_range_cells, unseen_cells
from mmbert_core.data.labels import Labels
from mmbert_core.data.splits import select_rows
from mmbert_core.data.tokens import Tokens
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.cells import normal_form
from mmbert_core.tables.table import Chunk, Roles

MAX_ROWS_IN_MEMORY = 8192  # texts read from the mapped cache before its pages are released


@dataclass
class Batch:
    """B rows as tensors. Token ids are [B, C, T] where a text may have several chunks, else [B, T]."""

    row_index: torch.Tensor  # [B] int64, positions in the dataset; always on the CPU
    input_ids: torch.Tensor  # int64 [B, T], [B, C, T], or [B, 0] for a columns-only model
    attention_mask: torch.Tensor  # int64, the same shape; 1 for a token, 0 for padding
    numbers: torch.Tensor  # [B, F] float32
    categories: torch.Tensor  # [B, K] int64
    labels: torch.Tensor | None  # [B] int64
    ids: list[str] | None

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with columns and labels on `device`. Token ids stay: the model packs them before it moves them."""
        is_gpu = torch.device(device).type == "cuda"
        moved = {}
        for name in ("numbers", "categories", "labels"):
            if (value := getattr(self, name)) is not None:
                # without pinned memory the copy would wait until the GPU is idle
                value = value.pin_memory() if is_gpu and value.device.type == "cpu" else value
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


class Dataset:
    """Rows of a table as input of the model. A position counts the dataset's rows from 0."""

    def __init__(
        self,
        encoded: EncodedRows,
        rows: np.ndarray | None,
        features: Features,
        labels: Labels,
        *,
        pad_token_id: int,
        name: str,
        label_column: str = "label",
        require_labels: bool = True,
    ) -> None:
        """`rows` (sorted) selects rows of `encoded`; None: all.

        Raises `InputError` for a missing or unknown label if `require_labels`.
        """
        self.encoded = encoded
        self.name = name
        self.packed = False  # set by training: whether the model concatenates the texts of a batch instead of padding
        rows = np.arange(encoded.num_rows) if rows is None else rows
        self.rows = np.asarray(rows, dtype=np.int64)  # [N]
        self._num_rows_in_memory = 0
        self.features = features
        self._lookups = features.category_lookup(encoded.vocabularies)
        self._pad_token_id = pad_token_id
        self.lengths = _lengths_of(encoded.tokens, self.rows)  # [N] int64, real tokens over all chunks; 1 without text
        self.label_index: np.ndarray | None = None  # [N] int64, -1 where missing or unknown
        if encoded.label_codes is not None:
            self.label_index = labels.lookup(encoded.label_values)[select_rows(encoded.label_codes, self.rows)]
            if require_labels:
                labels.check_known(
                    self.label_index, self.label_string, column=label_column, row_location=self.row_location
                )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_labels(self) -> bool:
        """Whether the table has a label column."""
        return self.label_index is not None

    def row_location(self, position: int) -> str:
        """A row for messages: file, row, line."""
        return self.encoded.row_location(int(self.rows[position]))

    def ids(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of the rows, byte for byte; the table must have an id column."""
        self.encoded.check_files()
        assert self.encoded.ids is not None, "no id column was read"
        return self.encoded.ids.take(self.rows[positions])

    def label_string(self, position: int) -> str:
        """The label cell, unchanged."""
        assert self.encoded.label_codes is not None, "no label column was read"
        return self.encoded.label_values[self.encoded.label_codes[self.rows[position]]]

    def label_strings(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """The label cells, unchanged."""
        self.encoded.check_files()
        return [self.label_string(position) for position in positions]

    def check_token_ids(self, num_rows: int) -> None:
        """Raise `InputError`, with the row, for a token id that an embedding of `num_rows` rows does not have."""
        tokens = self.encoded.tokens
        if tokens is None or int(tokens.ids.max(initial=0)) < num_rows:
            return
        token = int(np.argmax(tokens.ids >= num_rows))
        chunk = np.searchsorted(tokens.chunk_offsets, token, side="right") - 1
        row = np.searchsorted(tokens.row_chunks, chunk, side="right") - 1
        raise InputError(
            f"{self.encoded.row_location(int(row))}: its text has the token id {tokens.ids[token]}, "
            f"the model's embedding has {num_rows} rows: tokens were added to the tokenizer without "
            "model.resize_token_embeddings(len(tokenizer)) before training"
        )

    def unseen(self) -> Unseen:
        """Categorical column -> its cells with a value that no training row has; a pooled value is none of these."""
        codes, vocabularies = self.encoded.category_codes, self.encoded.vocabularies
        lookups = self._lookups
        if self.features.pooled is not None:
            lookups = self.features.category_lookup(vocabularies, pooled_index=POOLED)
        return {
            name: unseen_cells(lookups[index], select_rows(codes[:, index], self.rows), vocabularies[index])
            for index, name in enumerate(self.features.category_names)
        }

    def out_of_range(self) -> OutOfRange:
        """Numeric column -> its numbers outside the training range."""
        numbers = self.encoded.numbers
        return {
            name: out_of_range_cells(self.features, index, self.features.number_column(numbers, index, self.rows))
            for index, name in enumerate(self.features.number_names)
        }

    def cost(self, positions: Sequence[int] | np.ndarray) -> int:
        """The cost of these rows as one micro-batch: their tokens if packed, else chunks times the longest chunk.

        Without text, the number of rows.
        """
        self.encoded.check_files()
        tokens, rows = self.encoded.tokens, self.rows[positions]
        if tokens is None:
            return len(rows)
        if self.packed:
            return int(self.lengths[positions].sum())
        if self.encoded.max_chunks == 1:
            return len(rows) * int(self.lengths[positions].max(initial=1))
        first, last = tokens.row_chunks[rows], tokens.row_chunks[rows + 1]
        chunks = np.concatenate([np.arange(start, stop) for start, stop in zip(first, last, strict=True)])
        return len(chunks) * int((tokens.chunk_offsets[chunks + 1] - tokens.chunk_offsets[chunks]).max(initial=1))

    def columns(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Imputed numbers and their indicators [B, F] float32, and category indices [B, K] int64."""
        self.encoded.check_files()
        rows = self.rows[positions]
        codes = self.encoded.category_codes[rows]
        categories = np.empty(codes.shape, dtype=np.int64)
        for index, lookup in enumerate(self._lookups):
            categories[:, index] = lookup[codes[:, index]]
        return self.features.transform_numbers(self.encoded.numbers[rows]), categories

    def token_ids(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Concatenated token ids [L] int32, and offsets [B + 1]: text b is `ids[offsets[b] : offsets[b + 1]]`."""
        self.encoded.check_files()
        tokens, rows = self.encoded.tokens, self.rows[positions]
        assert tokens is not None, "no text column was read"
        self._release_pages_before(len(rows))
        starts, ends = tokens.chunk_offsets[tokens.row_chunks[rows]], tokens.chunk_offsets[tokens.row_chunks[rows + 1]]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        if len(rows) and (starts[1:] == ends[:-1]).all():  # adjacent in the file: no copy
            return tokens.ids[starts[0] : ends[-1]], offsets
        ids = [tokens.ids[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return np.concatenate([np.zeros(0, np.int32), *ids]), offsets

    def token_chunks(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids as `token_ids` gives them, offsets [Q + 1] of the chunks in them, and the row [Q] of each chunk."""
        ids, _ = self.token_ids(positions)
        tokens, rows = self.encoded.tokens, self.rows[positions]
        first, counts = tokens.row_chunks[rows], tokens.row_chunks[rows + 1] - tokens.row_chunks[rows]  # [B]
        row_of_chunk = np.repeat(np.arange(len(rows)), counts)
        of_row = np.arange(len(row_of_chunk)) - np.repeat(np.cumsum(counts) - counts, counts)
        chunks = first[row_of_chunk] + of_row
        lengths = tokens.chunk_offsets[chunks + 1] - tokens.chunk_offsets[chunks]
        return ids, np.concatenate([[0], np.cumsum(lengths)]), row_of_chunk

    def _release_pages_before(self, num_rows: int) -> None:
        """Call before reading `num_rows` texts: releases the pages of the earlier ones when these are many."""
        self._num_rows_in_memory += num_rows
        if self._num_rows_in_memory > MAX_ROWS_IN_MEMORY:
            self._num_rows_in_memory = num_rows
            self.encoded.release_token_pages()

    def used_token_ids(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The distinct token ids of these rows and of padding [U] int64, ascending."""
        ids, _ = self.token_ids(positions)
        return np.unique(np.append(ids, self._pad_token_id)).astype(np.int64)

    def cells(self, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray | list[str]]:
        """Column -> raw numbers [B] (NaN: missing), or normal forms of categories ("": missing)."""
        self.encoded.check_files()
        rows, encoded = self.rows[positions], self.encoded
        numbers = self.features.raw_numbers(encoded.numbers[rows])
        cells: dict[str, np.ndarray | list[str]] = {
            name: numbers[:, index] for index, name in enumerate(self.features.number_names)
        }
        named = zip(self.features.category_names, encoded.vocabularies, strict=True)
        for index, (name, vocabulary) in enumerate(named):
            cells[name] = [normal_form(vocabulary[code]) for code in encoded.category_codes[rows, index].tolist()]
        return cells

    def batch(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `positions` [B], padded to the longest text among them."""
        self.encoded.check_files()
        positions = np.asarray(positions, dtype=np.int64)
        self._release_pages_before(len(positions))
        rows = self.rows[positions]
        numbers, categories = self.columns(positions)
        input_ids, mask = _padded(self.encoded.tokens, rows, self._pad_token_id)  # [B, C, T]
        if self.encoded.max_chunks == 1 or self.encoded.tokens is None:
            input_ids, mask = input_ids[:, 0], mask[:, 0]
        return Batch(
            row_index=torch.from_numpy(positions),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            numbers=torch.from_numpy(numbers),
            categories=torch.from_numpy(categories),
            labels=None if self.label_index is None else torch.from_numpy(self.label_index[positions]),
            ids=None if self.encoded.ids is None else self.encoded.ids.take(rows),
        )


def _lengths_of(tokens: Tokens | None, rows: np.ndarray) -> np.ndarray:
    """Number of tokens of each of `rows` [N] int64, over all chunks; 1 without text."""
    if tokens is None:
        return np.ones(len(rows), dtype=np.int64)
    if len(rows) == len(tokens.row_chunks) - 1:
        return np.diff(tokens.chunk_offsets[tokens.row_chunks])
    return tokens.chunk_offsets[tokens.row_chunks[rows + 1]] - tokens.chunk_offsets[tokens.row_chunks[rows]]


def _padded(tokens: Tokens | None, rows: np.ndarray, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of `rows` [B], int64 [B, C, T] each. C and T: as many as the largest row needs."""
    if tokens is None:
        return np.zeros((len(rows), 1, 0), dtype=np.int64), np.zeros((len(rows), 1, 0), dtype=np.int64)
    first = tokens.row_chunks[rows]  # [B]
    num_chunks = tokens.row_chunks[rows + 1] - first  # [B]
    chunk_of_row = np.arange(num_chunks.max(initial=1))  # [C]
    is_chunk = chunk_of_row < num_chunks[:, None]  # [B, C]
    chunk = np.where(is_chunk, first[:, None] + chunk_of_row, first[:, None])
    starts = tokens.chunk_offsets[chunk]
    lengths = np.where(is_chunk, tokens.chunk_offsets[chunk + 1] - starts, 0)
    token = np.arange(lengths.max(initial=0))  # [T]
    is_token = token < lengths[:, :, None]  # [B, C, T]
    input_ids = np.full(is_token.shape, pad_token_id, dtype=np.int64)
    flat = input_ids.reshape(chunk.size, len(token))
    for index, (start, length) in enumerate(zip(starts.ravel().tolist(), lengths.ravel().tolist(), strict=True)):
        flat[index, :length] = tokens.ids[start : start + length]
    return input_ids, is_token.astype(np.int64)


def pad_token_id_of(tokenizer: PreTrainedTokenizerFast | None) -> int:
    """The id of padding; 0 for a tokenizer without one, because the attention mask hides it."""
    return 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_for_prediction(
    chunk: Chunk,
    roles: Roles,
    tokenizer: PreTrainedTokenizerFast | None,
    features: Features,
    labels: Labels,
    *,
    max_length: int,
    max_chunks: int,
) -> Dataset:
    """A chunk in memory as a dataset. It may have a label column, whose cells may be unknown (index -1)."""
    encoded = encode_chunk(chunk, roles, tokenizer, max_length=max_length, max_chunks=max_chunks)
    return dataset_for_prediction(encoded, tokenizer, features, labels)


def dataset_for_prediction(
    encoded: EncodedRows, tokenizer: PreTrainedTokenizerFast | None, features: Features, labels: Labels
) -> Dataset:
    """All rows; their labels, if any, may be unknown (index -1)."""
    return Dataset(
        encoded,
        None,
        features,
        labels,
        pad_token_id=pad_token_id_of(tokenizer),
        name="prediction",
        require_labels=False,
    )
