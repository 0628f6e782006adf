"""The training range of numeric columns for model folders that lack it, from the run's own cache.

Older folders (see `features.OPTIONAL`) hold medians, means and standard deviations, but no minimums and maximums. The
cache that the run left next to them still has the training rows. It is used if its rows, split as the run did, have
the statistics of the folder.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.cache import META, is_complete, read_meta
from mmbert_core.data.encoding import EncodedRows, assemble
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.prepare import choose_rows
from mmbert_core.tables.table import Roles

logger = logging.getLogger(__name__)

MAX_CACHES = 20  # that are examined; a run writes three
MAX_CELLS = 50_000_000  # of a table that is examined: takes a few seconds
TEXT_ARRAYS = ("token_ids", "chunk_offsets", "row_chunks")


def recover_number_ranges(features: Features, labels: Labels, config: Config, folder: Path) -> Features:
    """`features` with minimums and maximums if the cache in `folder`, or the configured one, has the training rows."""
    if features.minimums is not None or not features.number_names:
        return features
    parents = [folder / "cache", *([Path(config.cache_path)] if config.cache_path else [])]
    for cache in _cache_folders(parents):
        try:
            fitted = _fit(cache, features, labels, config)
        except Exception as error:  # noqa: BLE001 - a damaged or foreign cache must not stop the loading of a model
            logger.debug("%s: not the training rows: %s: %s", cache, type(error).__name__, error)
            continue
        if _is_equal(fitted, features):
            logger.info("the training range of the numbers, which this older folder lacks, was found in %s", cache)
            return replace(features, minimums=fitted.minimums, maximums=fitted.maximums)
    return features


def _cache_folders(parents: list[Path]) -> Iterator[Path]:
    paths = dict.fromkeys(path.parent for parent in parents for path in sorted(parent.glob(f"*/{META}")))
    yield from list(paths)[:MAX_CACHES]


def _is_equal(fitted: Features, features: Features) -> bool:
    """Whether the statistics that an older folder has are equal, except for the rounding of sums on another machine."""

    def is_close(name: str) -> bool:
        return np.allclose(getattr(fitted, name), getattr(features, name), rtol=1e-6, atol=0)

    exact = ("number_names", "medians", "has_indicator")
    is_exact = all(getattr(fitted, name) == getattr(features, name) for name in exact)
    return is_exact and is_close("means") and is_close("stds")


def _fit(cache: Path, features: Features, labels: Labels, config: Config) -> Features:
    """The statistics of the numeric columns over the rows of a cache that a run of `config` would train on.

    Raises `ValueError`, and any error of damaged files, for a cache that is not that of a training table.
    """
    rows = _read(cache)
    if rows.numbers.shape != (rows.num_rows, len(features.number_names)) or rows.numbers.size > MAX_CELLS:
        expected = f"at most {MAX_CELLS} numbers of {len(features.number_names)} columns"
        raise ValueError(f"expected {expected}, found shape {rows.numbers.shape}")
    train_rows, _ = choose_rows(rows, labels, config)
    roles = replace(Roles.from_config(config), categories=())
    return Features.fit(rows.numbers, np.zeros((rows.num_rows, 0), dtype=np.int32), [], roles, rows=train_rows)


def _read(cache: Path) -> EncodedRows:
    """The rows of a cache without their texts, memory-mapped."""
    if not is_complete(cache):
        raise ValueError("a file is missing or of another size")
    meta = read_meta(cache)
    files = {name: array for name, array in meta["arrays"].items() if name not in TEXT_ARRAYS}
    arrays = {name: _mapped(cache / f"{name}.bin", array) for name, array in files.items()}
    texts = {"vocabularies": meta["vocabularies"], "label_values": meta["label_values"]}
    return assemble(arrays, **texts, paths=[str(cache)], max_chunks=1, num_truncated=0)


def _mapped(path: Path, array: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(array["shape"]), np.dtype(array["dtype"])
    return np.memmap(path, dtype=dtype, mode="r", shape=shape) if all(shape) else np.zeros(shape, dtype=dtype)
