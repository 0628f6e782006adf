"""The training range of the numbers for model folders that lack it, from the run's own cache.

Older folders hold medians, means and deviations, but not the range. The cache that the
run left next to them still has the training rows. It is believed when its rows, chosen as the run chose them, have the
statistics of the folder.
N rows of a table, F numeric columns.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.cache import META, is_whole, read_meta
from mmbert_core.data.encoding import EncodedRows, assemble
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.prepare import choose_rows
from mmbert_core.tables.table import Roles

logger = logging.getLogger(__name__)

MAX_STORES = 20  # that are looked at: a run leaves three
MAX_CELLS = 50_000_000  # of a table that is looked at: some seconds
OF_TEXTS = ("token_ids", "chunk_offsets", "row_chunks")


def recover_number_ranges(features: Features, labels: Labels, config: Config, folder: Path) -> Features:
    """`features` with minimums and maximums, where the cache in `folder`, or the configured one, has the training rows."""
    if features.minimums is not None or not features.number_names:
        return features
    caches = [folder / "cache", *([Path(config.cache_path)] if config.cache_path else [])]
    for store in _stores(caches):
        try:
            fitted = _fitted(store, features, labels, config)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's cache holds, the model is loaded without it
            logger.debug("%s: not the training rows: %s: %s", store, type(error).__name__, error)
            continue
        if _is_equal(fitted, features):
            logger.info("the training range of the numbers, which this older folder lacks, was found in %s", store)
            return replace(features, minimums=fitted.minimums, maximums=fitted.maximums)
    return features


def _stores(caches: list[Path]) -> Iterator[Path]:
    paths = dict.fromkeys(path.parent for cache in caches for path in sorted(cache.glob(f"*/{META}")))
    yield from list(paths)[:MAX_STORES]


def _is_equal(fitted: Features, features: Features) -> bool:
    """Whether all that an older folder holds of the numbers is the same; other machines round sums otherwise."""

    def is_close(name: str) -> bool:
        return np.allclose(getattr(fitted, name), getattr(features, name), rtol=1e-6, atol=0)

    exact = ("number_names", "medians", "has_indicator")
    return (
        all(getattr(fitted, name) == getattr(features, name) for name in exact)
        and is_close("means")
        and is_close("stds")
    )


def _fitted(store: Path, features: Features, labels: Labels, config: Config) -> Features:
    """The statistics of the numeric columns over the rows of a store that a run of `config` would train on.

    Raises `ValueError`, and what damaged files raise, for a store that is none of a training table.
    """
    rows = _read(store)
    if rows.numbers.shape != (rows.num_rows, len(features.number_names)) or rows.numbers.size > MAX_CELLS:
        expected = f"at most {MAX_CELLS} numbers of {len(features.number_names)} columns"
        raise ValueError(f"expected {expected}, found shape {rows.numbers.shape}")
    train_rows, _ = choose_rows(rows, labels, config)
    roles = replace(Roles.from_config(config), categories=())
    return Features.fit(rows.numbers, np.zeros((rows.num_rows, 0), dtype=np.int32), [], roles, rows=train_rows)


def _read(store: Path) -> EncodedRows:
    """The rows of a store without their texts, memory-mapped."""
    if not is_whole(store):
        raise ValueError("a file is missing or of another size")
    meta = read_meta(store)
    files = {name: array for name, array in meta["arrays"].items() if name not in OF_TEXTS}
    arrays = {name: _mapped(store / f"{name}.bin", array) for name, array in files.items()}
    texts = {"vocabularies": meta["vocabularies"], "label_values": meta["label_values"]}
    return assemble(arrays, **texts, paths=[str(store)], max_chunks=1, num_truncated=0)


def _mapped(path: Path, array: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(array["shape"]), np.dtype(array["dtype"])
    return np.memmap(path, dtype=dtype, mode="r", shape=shape) if all(shape) else np.zeros(shape, dtype=dtype)
