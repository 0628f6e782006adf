"""Encoded rows on disk: built once per node, memory-mapped by every process.

The cache of a table is a folder of raw arrays and a meta.json. Its name is a hash of everything that its content
depends on (files, columns, tokenizer, lengths), so that it is never out of date. It is written under a temporary name
and then renamed, so that a folder with the final name is complete.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mmbert_core.data.encoding import (
    OFFSET_ARRAYS,
    Arrays,
    CodeBook,
    EncodedRows,
    assemble,
    encode_arrays,
    max_cell_characters,
)
from mmbert_core.data.prefetch import prefetch_one
from mmbert_core.data.tokens import keeps_end, tokenizer_fingerprint
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.memory import available_bytes
from mmbert_core.storage import schema
from mmbert_core.storage.file_lock import lock_file
from mmbert_core.storage.files import TEMPORARY_PREFIX, atomic_folder, read_json, sha256_of, write_json
from mmbert_core.tables.csv_reader import AUTO
from mmbert_core.tables.readers import format_of
from mmbert_core.tables.table import CHUNK_ROWS, Chunk, Roles, expand_paths, read_chunks, resolve_columns

CACHE_FORMAT = 2  # increased when the arrays change, or what their content depends on
META = "meta.json"
MAX_META_BYTES = 2**30  # the distinct values of all categories and labels
ARRAY_JSON = schema.record(
    {"shape": schema.array(schema.whole(0), min_length=1), "dtype": schema.text(pattern="[<>|][biuf][0-9]")}
)
VALUES_JSON = schema.array(schema.text(), distinct=True)
META_JSON = schema.record(
    {
        "arrays": schema.mapping(ARRAY_JSON, keys=schema.text(pattern="[a-z_]+")),
        "vocabularies": schema.array(VALUES_JSON),
        "label_values": VALUES_JSON,
        "max_chunks": schema.whole(1),
        "num_cut": schema.whole(0),  # texts that were truncated
    }
)
READAHEAD_SHARE = 0.5  # of the available memory; larger caches are not read in advance
READAHEAD_BYTES = 1 << 20  # per call; Linux ignores much larger requests
SECONDS_UNTIL_LINE = 10.0  # of waiting for another process's build

logger = logging.getLogger(__name__)


def fingerprint_files(paths: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """Path -> its size in bytes and its SHA-256. Raises `InputError` for a file that cannot be read."""
    fingerprints = {}
    for path in paths:
        try:
            fingerprints[path] = {"bytes": os.path.getsize(path), "sha256": sha256_of(Path(path))}
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return fingerprints


def check_columns(
    paths: Sequence[str], roles: Roles, *, label_optional: bool = False, tsv_quoting: str = AUTO
) -> list[str]:
    """The columns of the cache of `paths`. Reads only headers; raises the `InputError`s of `resolve_columns`."""
    label = [roles.label] if roles.label is not None else []
    return resolve_columns(
        paths, required_columns(roles, label_optional=label_optional), label, tsv_quoting=tsv_quoting
    )


def required_columns(roles: Roles, *, label_optional: bool = False) -> list[str]:
    """The columns that the files must have."""
    label = [roles.label] if roles.label is not None and not label_optional else []
    return [*roles.inputs(), *([roles.group] if roles.group is not None else []), *label]


def open_or_build_cache(
    paths: Sequence[str],
    roles: Roles,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    max_length: int,
    max_chunks: int,
    cache_path: str | Path,
    label_optional: bool = False,
    tsv_quoting: str = AUTO,
    chunk_rows: int = CHUNK_ROWS,
    progress: Callable[[int], None] | None = None,
) -> EncodedRows:
    """The rows of `paths`, memory-mapped from a folder in `cache_path` that is built first where it does not exist.

    Needs no process group: the first process to take the lock builds, the others of the node wait. `chunk_rows` bounds
    the memory of a build, which calls `progress` with the number of rows done after every chunk.
    Raises the `InputError`s of `read_chunks` and `encode_arrays`; a build that fails leaves no files.
    """
    files = expand_paths(paths)
    columns = check_columns(files, roles, label_optional=label_optional, tsv_quoting=tsv_quoting)
    stats = [_stat_of(path) for path in files]
    fingerprints = fingerprint_files(files)
    lengths = {"max_length": max_length, "max_chunks": max_chunks}
    identity = {
        "format": CACHE_FORMAT,
        "files": [[fingerprints[path]["sha256"], "".join(Path(path).suffixes[-2:]).lower()] for path in files],
        "columns": columns,
        "roles": {name: value for name, value in asdict(roles).items() if roles.dates or not name.startswith("date")},
        "tokenizer": tokenizer_fingerprint(tokenizer) if roles.text else None,
        "lengths": [max_length, max_chunks] if roles.text else None,
        "tsv_quoting": tsv_quoting if any(format_of(path) == ".tsv" for path in files) else None,
    }
    folder = Path(cache_path) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    if not is_complete(folder):
        chunks = read_chunks(
            files,
            columns,
            optional=[roles.label] if roles.label is not None else [],
            max_characters=max_cell_characters(roles, **lengths),
            keep_end=keeps_end(tokenizer),
            chunk_rows=chunk_rows,
            tsv_quoting=tsv_quoting,
        )
        chunks = chain([_empty_chunk(columns)], chunks)  # a table without rows gets its empty arrays from it
        with _build_folder(folder) as temporary:
            if temporary is not None:
                _build(temporary, chunks, roles, tokenizer, **lengths, progress=progress)
                for path, stat in zip(files, stats, strict=True):
                    if _stat_of(path) != stat:
                        raise InputError(f"{path}: the file changed while it was read")
    rows = _open(folder, files)
    rows.fingerprints, rows.tsv_quoting = fingerprints, tsv_quoting
    return rows


class _BuiltMeanwhile(Exception):
    """Another process has built the same cache during this build, on a file system without locks."""


@contextmanager
def _build_folder(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder` at the end; None if another process of the node has built it meanwhile.

    A complete cache is never replaced: other processes may have mapped it.
    """
    with _locked(folder) as has_lock:
        if is_complete(folder):
            yield None
            return
        if has_lock:
            _remove_leftovers(folder)
        try:
            with suppress(_BuiltMeanwhile), atomic_folder(folder) as temporary:
                yield temporary
                if not has_lock and is_complete(folder):
                    raise _BuiltMeanwhile
        except OSError:
            if has_lock or not is_complete(folder):  # else another process renamed its folder after the check
                raise


def _stat_of(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Exclusive among the processes of the node; yields False on a file system without locks.

    The lock ends with the process that holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as stream:
        has_lock = True
        try:
            if not lock_file(stream, seconds=SECONDS_UNTIL_LINE):
                logger.info("waiting for another process that builds %s", folder)
                lock_file(stream, seconds=None)
        except OSError as error:  # then every process builds the cache, and the first one to finish publishes it
            has_lock = False
            logger.warning(
                "%s: this file system has no locks (%s); a cache_path on another one avoids double work",
                folder.parent,
                error.strerror,
            )
        yield has_lock


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed build or a damaged disk left. The caller holds the lock."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in folder.parent.glob(f"{TEMPORARY_PREFIX}{folder.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


# ---- writing ----


class _ArrayFiles:
    """One raw file for each array; arrays are appended chunk by chunk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, dict[str, Any]] = {}
        self.last: dict[str, int] = {}  # last value of each array of offsets

    def append(self, arrays: Arrays) -> None:
        """Append the arrays of the next chunk; its offsets continue those of the chunks before."""
        for name, array in arrays.items():
            if name in OFFSET_ARRAYS:
                if name in self.last:
                    array = array[1:] + self.last[name]
                self.last[name] = int(array[-1]) if len(array) else self.last[name]
            shape = self.shapes.setdefault(name, {"dtype": array.dtype.str, "shape": [0, *array.shape[1:]]})
            shape["shape"][0] += len(array)
            with open(self.folder / f"{name}.bin", "ab") as stream:
                stream.write(array.tobytes())


def _build(
    folder: Path,
    chunks: Iterator[Chunk],
    roles: Roles,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    max_length: int,
    max_chunks: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Encode the chunks and write their arrays, then meta.json, into `folder`."""
    books: dict[str, CodeBook] = defaultdict(CodeBook)
    files = _ArrayFiles(folder)
    num_rows = num_truncated = 0
    for chunk in prefetch_one(chunks):
        arrays, chunk_truncated = encode_arrays(
            chunk, roles, tokenizer, max_length=max_length, max_chunks=max_chunks, books=books, first_row=num_rows
        )
        files.append(arrays)
        num_rows += len(chunk)
        num_truncated += chunk_truncated
        if progress is not None and len(chunk):
            progress(num_rows)
    meta = {
        "arrays": files.shapes,
        "vocabularies": [books[name].values() for name in roles.categories],
        "label_values": books[roles.label].values() if roles.label is not None else [],
        "max_chunks": max_chunks,
        "num_cut": num_truncated,
    }
    write_json(folder / META, meta)


def _empty_chunk(columns: Sequence[str]) -> Chunk:
    empty = np.zeros(0, dtype=np.int64)
    return Chunk({name: [] for name in columns}, [], empty, empty, empty)


# ---- reading ----


def _num_bytes(array: dict[str, Any]) -> int:
    return math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize


def is_complete(folder: Path) -> bool:
    """Whether every file exists with its full size; if not, the cache is built again."""
    try:
        arrays = read_meta(folder)["arrays"]
        return all((folder / f"{name}.bin").stat().st_size == _num_bytes(array) for name, array in arrays.items())
    except (OSError, ValueError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    return read_json(folder / META, META_JSON, max_bytes=MAX_META_BYTES)


def _open(folder: Path, paths: list[str]) -> EncodedRows:
    """The rows of a complete cache, memory-mapped; `paths` are the files that it was built from."""
    meta = read_meta(folder)
    arrays, mappings = {}, {}
    for name, array in meta["arrays"].items():
        shape, dtype = tuple(array["shape"]), np.dtype(array["dtype"])
        if not _num_bytes(array):  # an empty file cannot be mapped
            arrays[name] = np.zeros(shape, dtype=dtype)
            continue
        with open(folder / f"{name}.bin", "rb") as stream:
            mappings[name] = mmap(stream.fileno(), 0, access=ACCESS_READ)
        arrays[name] = np.frombuffer(mappings[name], dtype).reshape(shape)
    rows = assemble(
        arrays,
        vocabularies=meta["vocabularies"],
        label_values=meta["label_values"],
        paths=paths,
        max_chunks=meta["max_chunks"],
        num_truncated=meta["num_cut"],
    )
    rows.token_file = mappings.get("token_ids")
    rows.mappings = {str(folder / f"{name}.bin"): mapping for name, mapping in mappings.items()}
    if sum(map(len, mappings.values())) < READAHEAD_SHARE * available_bytes():
        Thread(target=_prefetch_files, args=([folder / f"{name}.bin" for name in mappings],), daemon=True).start()
    return rows


def _prefetch_files(paths: list[Path]) -> None:
    """Ask the kernel to read the files in order: training reads rows in random order, one page at a time."""
    for path in paths:
        with suppress(OSError), open(path, "rb") as stream:
            for start in range(0, os.fstat(stream.fileno()).st_size, READAHEAD_BYTES):
                os.posix_fadvise(stream.fileno(), start, READAHEAD_BYTES, os.POSIX_FADV_WILLNEED)
