"""Rows as batches of tensors, and a config as prepared datasets. Floor 1; imports errors, config and every file of data/ before it.

N rows of a dataset, B rows of a batch, C chunks of a text, T tokens of a chunk, F numbers with indicators, K categories.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from mmbert_core.config import Config
from mmbert_core.data.encoding import EncodedRows, encode_chunk
from mmbert_core.data.features import Features, unseen_counts
from mmbert_core.data.labels import Labels
from mmbert_core.data.splits import sample_rows, split_rows
from mmbert_core.data.store import check_columns, open_or_build
from mmbert_core.data.table import Chunk, Roles, expand_paths, shown
from mmbert_core.data.tokens import Tokens, load_tokenizer
from mmbert_core.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Rows that are scored together. Token ids are [B, C, T] where a text may have several chunks, else [B, T]."""

    row_index: torch.Tensor  # [B] int64, positions in the dataset; always on the CPU
    input_ids: torch.Tensor  # int64 [B, T], [B, C, T], or [B, 0] for a columns-only model
    attention_mask: torch.Tensor  # int64, the same shape; 1 where there is a token
    numbers: torch.Tensor  # [B, F] float32
    categories: torch.Tensor  # [B, K] int64
    labels: torch.Tensor | None  # [B] int64
    ids: list[str] | None
    num_tokens: int  # real ones
    padded_tokens: int  # cells of input_ids

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its inputs and labels on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "row_index"}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)


class Dataset:
    """Some rows of a table as the model sees them. A position counts the dataset's own rows from 0."""

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
        """`rows` picks rows of `encoded`, none: all. With `require_labels` a missing or unknown label is an `InputError`."""
        self.encoded = encoded
        self.name = name
        self.rows = np.arange(encoded.num_rows, dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)  # [N]
        self._features = features
        self._lookups = features.category_lookup(encoded.vocabularies)
        self._pad_token_id = pad_token_id
        self.lengths = _lengths_of(encoded.tokens, self.rows)  # [N] int64, real tokens over all chunks; 1 without text
        self.label_index: np.ndarray | None = None  # [N] int64, -1 where missing or unknown
        if encoded.label_codes is not None:
            self.label_index = labels.lookup(encoded.label_values)[encoded.label_codes[self.rows]]
            if require_labels:
                labels.check_known(self.label_index, self.label_string, column=label_column, where=self.where)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_labels(self) -> bool:
        """Whether the table has a label column."""
        return self.label_index is not None

    def where(self, position: int) -> str:
        """Place of a row for messages: file, row, line."""
        return self.encoded.where(int(self.rows[position]))

    def ids(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of the rows, byte for byte; the table must have them."""
        assert self.encoded.ids is not None, "no id column was read"
        return self.encoded.ids.take(self.rows[positions])

    def label_string(self, position: int) -> str:
        """The label cell as it stands in the table."""
        assert self.encoded.label_codes is not None, "no label column was read"
        return self.encoded.label_values[self.encoded.label_codes[self.rows[position]]]

    def label_strings(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        return [self.label_string(position) for position in positions]

    def unseen(self) -> dict[str, int]:
        """Categorical column -> its cells with a value that training never saw; columns without one are left out."""
        return dict(unseen_counts(self._lookups, self.encoded.category_codes[self.rows], self._features.category_names))

    def batch(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `positions` [B], padded to the longest text among them. Touches no other row."""
        positions = np.asarray(positions, dtype=np.int64)
        rows = self.rows[positions]
        codes = self.encoded.category_codes[rows]
        categories = np.empty(codes.shape, dtype=np.int64)
        for place, lookup in enumerate(self._lookups):
            categories[:, place] = lookup[codes[:, place]]
        input_ids, mask = _padded(self.encoded.tokens, rows, self._pad_token_id)  # [B, C, T]
        if self.encoded.max_chunks == 1 or self.encoded.tokens is None:
            input_ids, mask = input_ids[:, 0], mask[:, 0]
        return Batch(
            row_index=torch.from_numpy(positions),
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            numbers=torch.from_numpy(self._features.transform_numbers(self.encoded.numbers[rows])),
            categories=torch.from_numpy(categories),
            labels=None if self.label_index is None else torch.from_numpy(self.label_index[positions]),
            ids=None if self.encoded.ids is None else self.encoded.ids.take(rows),
            num_tokens=int(mask.sum()),
            padded_tokens=input_ids.size,
        )


def _lengths_of(tokens: Tokens | None, rows: np.ndarray) -> np.ndarray:
    if tokens is None:
        return np.ones(len(rows), dtype=np.int64)
    return tokens.chunk_offsets[tokens.row_chunks[rows + 1]] - tokens.chunk_offsets[tokens.row_chunks[rows]]


def _padded(tokens: Tokens | None, rows: np.ndarray, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of `rows` [B] -> two int64 [B, C, T]; C and T are the most that a row needs."""
    if tokens is None:
        return np.zeros((len(rows), 1, 0), dtype=np.int64), np.zeros((len(rows), 1, 0), dtype=np.int64)
    first = tokens.row_chunks[rows]  # [B]
    num_chunks = tokens.row_chunks[rows + 1] - first  # [B]
    place = np.arange(num_chunks.max(initial=1))  # [C]
    is_chunk = place < num_chunks[:, None]  # [B, C]
    chunk = np.where(is_chunk, first[:, None] + place, first[:, None])
    starts = tokens.chunk_offsets[chunk]
    lengths = np.where(is_chunk, tokens.chunk_offsets[chunk + 1] - starts, 0)
    token = np.arange(lengths.max(initial=0))  # [T]
    is_token = token < lengths[:, :, None]  # [B, C, T]
    input_ids = np.full(is_token.shape, pad_token_id, dtype=np.int64)
    flat = input_ids.reshape(chunk.size, len(token))
    for place, (start, length) in enumerate(zip(starts.ravel().tolist(), lengths.ravel().tolist(), strict=True)):
        flat[place, :length] = tokens.ids[start : start + length]
    return input_ids, is_token.astype(np.int64)


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
    """A chunk in memory as a dataset. A label column may be there; its cells need not be known (index -1) and stay as they are."""
    encoded = encode_chunk(chunk, roles, tokenizer, max_length=max_length, max_chunks=max_chunks)
    return Dataset(encoded, None, features, labels, pad_token_id=_pad_token_id(tokenizer), name="prediction", require_labels=False)


# ---- from a config to datasets ----


@dataclass
class Data:
    """All that a run knows about its data. Every process of a run holds an equal one."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    features: Features
    labels: Labels
    tokenizer: PreTrainedTokenizerFast | None  # None: a columns-only model
    fingerprints: dict[str, dict[str, int | str]]  # path of every file read -> bytes, sha256


def prepare(config: Config) -> Data:
    """Read, check and encode all files of a config; fit labels and features on the training rows alone.

    Every process calls it; it needs no process group. Raises `InputError`, one line, for every mistake in the data.
    """
    roles = Roles.from_config(config)
    ungrouped = replace(roles, group=None)
    train_roles = ungrouped if config.val_path else roles
    _check_files(config, train_roles)
    tokenizer = load_tokenizer(config.encoder) if roles.text else None
    encode = partial(
        open_or_build,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_chunks=config.max_chunks,
        cache_path=config.cache_path or Path(config.model_path) / "cache",
    )
    tables = {"train": encode(config.train_path, train_roles)}
    if config.val_path:
        tables["val"] = encode(config.val_path, ungrouped)
    if config.test_path:
        tables["test"] = encode(config.test_path, ungrouped, label_optional=True)
    for table in (tables["train"], tables.get("val")):
        if table is not None and table.num_rows == 0:
            raise InputError(f"{table.paths[0]}: expected rows, found a header only")
    train = tables["train"]
    labels = _fit_labels(train, config)
    train_rows, val_rows = _choose_rows(train, labels, config)
    features = Features.fit(train.numbers, train.category_codes, train.vocabularies, roles, rows=train_rows, where=train.paths[0])
    dataset = partial(Dataset, features=features, labels=labels, pad_token_id=_pad_token_id(tokenizer), label_column=config.label_name)
    val = dataset(train, val_rows, name="val") if len(val_rows) else None
    if "val" in tables:
        val = dataset(tables["val"], None, name="val")
    data = Data(
        train=dataset(train, train_rows, name="train"),
        val=val,
        test=dataset(tables["test"], None, name="test") if "test" in tables else None,
        features=features,
        labels=labels,
        tokenizer=tokenizer,
        fingerprints={path: value for table in tables.values() for path, value in table.fingerprints.items()},
    )
    _report(data, config)
    return data


def _pad_token_id(tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Any id does where there is no padding token: the mask hides it."""
    return 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _check_files(config: Config, train_roles: Roles) -> None:
    """What can be known before the first row is read: files there, none in two roles, all columns there."""
    if not config.train_path:
        raise InputError("train_path: expected at least one file, found none")
    train_files = {os.path.realpath(path) for path in expand_paths(config.train_path)}
    check_columns(config.train_path, train_roles)
    for key in ("val_path", "test_path"):
        paths = getattr(config, key)
        for path in expand_paths(paths):
            if os.path.realpath(path) in train_files:
                raise InputError(f"{key}: {path} is in train_path too, expected files that the model is not trained on")
        if paths:
            check_columns(paths, replace(train_roles, group=None), label_optional=key == "test_path")


def _fit_labels(train: EncodedRows, config: Config) -> Labels:
    codes, first_rows = np.unique(train.label_codes, return_index=True)
    return Labels.fit(
        [train.label_values[code] for code in codes],
        num_classes=config.num_classes,
        positive_label=config.positive_label,
        column=config.label_name,
        where=lambda index: train.where(int(first_rows[index])),
    )


def _choose_rows(train: EncodedRows, labels: Labels, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training table for training and for validation (none where val_path has them)."""
    rows = sample_rows(train.num_rows, config.max_train_rows, config.seed)
    classes = labels.lookup(train.label_values)[train.label_codes[rows]]
    missing = set(range(len(labels.names))) - set(np.unique(classes).tolist())
    if missing:
        name = shown(labels.names[min(missing)])
        raise InputError(f"max_train_rows: expected rows of every class, found none of class {name} among {len(rows)} sampled training rows")
    if config.val_path or config.val_fraction == 0:
        return rows, rows[:0]
    groups = None if train.group_codes is None else train.group_codes[rows]
    train_places, val_places = split_rows(classes, groups, val_fraction=config.val_fraction, seed=config.seed)
    if len(val_places) == 0:
        logger.warning("no validation: taking any of %d training rows or groups would leave a class without training rows", len(rows))
    return rows[train_places], rows[val_places]


def _report(data: Data, config: Config) -> None:
    """Say once what a user would want to know about the rows: texts cut, values unseen, ids on both sides."""
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    tables = list({id(part.encoded): part.encoded for part in parts}.values())
    num_cut = sum(table.num_cut for table in tables)
    if num_cut:
        num_rows = sum(table.num_rows for table in tables)
        size = f"{config.max_chunks} x {config.max_length} tokens (max_chunks x max_length)"
        logger.warning("%d of %d texts are longer than %s and were cut", num_cut, num_rows, size)
    for part in parts[1:]:
        for column, count in part.unseen().items():
            logger.warning("%s: %d cells of column %r hold a value that no training row has", part.name, count, column)
        codes = part.encoded.id_codes
        if codes is not None and part.encoded is not data.train.encoded:
            shared = np.flatnonzero(np.isin(codes, data.train.encoded.id_codes[data.train.rows]) & (codes >= 0))  # below 0: empty
            if len(shared):
                logger.warning("%s: %d rows have an id of a training row, first %s", part.name, len(shared), part.where(int(shared[0])))
