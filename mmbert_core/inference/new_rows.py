"""New rows encoded for a loaded model: files in windows of constant memory, rows in memory at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd

from mmbert_core.data.batches import WINDOW
from mmbert_core.data.dataset import Dataset, dataset_for_prediction, encode_for_prediction
from mmbert_core.data.encoding import encode_windows, max_cell_characters
from mmbert_core.data.tokens import keeps_end
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import Chunk, Roles, frame_to_chunk, read_chunks, records_to_chunk


def encode_files(
    loaded: LoadedModel,
    inputs: Sequence[str],
    *,
    tsv_quoting: str,
    tokenizer_in_use: Callable[[], AbstractContextManager[None]],
) -> Iterator[Dataset]:
    """The rows of files in windows of WINDOW rows, which are the same on every rank.

    `tokenizer_in_use` is entered while a window is encoded. Raises `InputError` for rows that cannot be read.
    """
    config, roles = loaded.config, Roles.from_config(loaded.config)
    lengths = {"max_length": config.max_length, "max_chunks": config.max_chunks}
    chunks = read_chunks(
        inputs,
        roles.inputs(),
        optional=(config.label_name,),
        max_characters=max_cell_characters(roles, **lengths),
        keep_end=keeps_end(loaded.tokenizer),
        chunk_rows=WINDOW,
        tsv_quoting=tsv_quoting,
    )
    windows = encode_windows(chunks, roles, loaded.tokenizer, window_rows=WINDOW, **lengths)
    while True:
        with tokenizer_in_use():
            encoded = next(windows, None)
        if encoded is None:
            return
        yield dataset_for_prediction(encoded, loaded.tokenizer, loaded.features, loaded.labels)


def rows_to_chunk(loaded: LoadedModel, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> Chunk:
    """A data frame or a list of dicts as a chunk of a table; label and id may be left out.

    Raises `InputError` for a missing column, an invalid cell or rows of another type.
    """
    if not isinstance(rows, pd.DataFrame) and not (
        isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)
    ):
        raise InputError(f"rows: expected a dict, a list of dicts or a data frame, found {type(rows).__name__}")
    roles = Roles.from_config(loaded.config)
    optional = [name for name in (roles.id, roles.label) if name is not None]
    to_chunk = frame_to_chunk if isinstance(rows, pd.DataFrame) else records_to_chunk
    return to_chunk(rows, roles.features(), optional)


def encode_chunk(loaded: LoadedModel, chunk: Chunk) -> Dataset:
    """The rows of a chunk, encoded. Not thread-safe: uses the tokenizer."""
    config = loaded.config
    return encode_for_prediction(
        chunk,
        Roles.from_config(config),
        loaded.tokenizer,
        loaded.features,
        loaded.labels,
        max_length=config.max_length,
        max_chunks=config.max_chunks,
    )
