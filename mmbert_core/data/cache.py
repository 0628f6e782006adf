"""A table's arrays on disk, built once per node and memory-mapped by every process.

A store is a folder named by a hash of all that decides its content, so it is never out of date: another file, column,
tokenizer or length is another folder. It is raw arrays and a meta.json; it appears by a rename, whole or not at all.
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
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerFast

from mmbert_core.data.encoding import (
    RUNNING_ENDS,
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

STORE_FORMAT = 2  # counts up when the arrays or what decides their content change
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
        "num_cut": schema.whole(0),
    }
)
SHARE_OF_MEMORY = 0.5  # of what is free, that a table may take to be read ahead of its use
READ_AT_ONCE = 1 << 20  # bytes; the system does not hear a wish for much more
SECONDS_BEFORE_SAYING = 10.0  # that this process waits for another one's build; most take less

logger = logging.getLogger(__name__)


def fingerprint_files(paths: Sequence[str]) -> dict[str, dict[str, int | str]]:
    """path -> its size in bytes and SHA-256. Raises `InputError` for a file that cannot be read."""
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
    """The columns that a store of `paths` holds. Reads headers only; raises the `InputError`s of `resolve_columns`."""
    label = [roles.label] if roles.label is not None else []
    return resolve_columns(
        paths, required_columns(roles, label_optional=label_optional), label, tsv_quoting=tsv_quoting
    )


def required_columns(roles: Roles, *, label_optional: bool = False) -> list[str]:
    """The columns that a store's files must have."""
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
    """The rows of `paths`, memory-mapped from `cache_path`; built there first if no process has done so.

    Needs no process group: the first process to take the lock of the store builds, the others of the node wait for it.
    Memory stays bounded by `chunk_rows`. `progress` is called with the number of rows done after every chunk of a build.
    Raises the `InputError`s of `read_chunks` and `encode_arrays`; nothing is left behind by a build that failed.
    """
    files = expand_paths(paths)
    columns = check_columns(files, roles, label_optional=label_optional, tsv_quoting=tsv_quoting)
    stats = [_stat_of(path) for path in files]
    fingerprints = fingerprint_files(files)
    identity = {
        "format": STORE_FORMAT,
        "files": [[fingerprints[path]["sha256"], "".join(Path(path).suffixes[-2:]).lower()] for path in files],
        "columns": columns,
        "roles": asdict(roles),
        "tokenizer": tokenizer_fingerprint(tokenizer) if roles.text else None,
        "lengths": [max_length, max_chunks] if roles.text else None,
        "tsv_quoting": tsv_quoting if any(format_of(path) == ".tsv" for path in files) else None,
    }
    folder = Path(cache_path) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    if not is_whole(folder):
        with _locked(folder) as has_lock:
            if not is_whole(folder):  # another process may have built it while this one waited
                if has_lock:
                    _clear(folder)
                max_characters = max_cell_characters(roles, max_length=max_length, max_chunks=max_chunks)
                chunks = read_chunks(
                    files,
                    columns,
                    optional=[roles.label] if roles.label is not None else [],
                    max_characters=max_characters,
                    keep_end=keeps_end(tokenizer),
                    chunk_rows=chunk_rows,
                    tsv_quoting=tsv_quoting,
                )
                with suppress(_AlreadyThere), _published(folder, has_lock) as temporary:
                    _build(
                        temporary,
                        chunks,
                        roles,
                        tokenizer,
                        columns=columns,
                        max_length=max_length,
                        max_chunks=max_chunks,
                        progress=progress,
                    )
                    for path, stat in zip(files, stats, strict=True):
                        if _stat_of(path) != stat:
                            raise InputError(f"{path}: the file changed while it was read")
    rows = _open(folder, files)
    rows.fingerprints, rows.tsv_quoting = fingerprints, tsv_quoting
    return rows


class _AlreadyThere(Exception):
    """Another process, of a file system without locks, has built the same store meanwhile."""


@contextmanager
def _published(folder: Path, has_lock: bool) -> Iterator[Path]:
    """`atomic_folder`, which never replaces a whole store that other processes read: its content would be the same."""
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
            if not has_lock and is_whole(folder):
                raise _AlreadyThere
    except OSError:
        if has_lock or not is_whole(folder):  # else it came between that look and the rename
            raise


def _stat_of(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Only one process of the node at a time; the lock goes with the process that holds it, however it ends. False where there are none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as stream:
        has_lock = True
        try:
            if not lock_file(stream, seconds=SECONDS_BEFORE_SAYING):
                logger.info("waiting for another process that builds %s", folder)
                lock_file(stream, seconds=None)
        except OSError as error:  # every process builds it, and the last one's stays
            has_lock = False
            logger.warning(
                "%s: this file system has no locks (%s); a cache_path on another one avoids double work",
                folder.parent,
                error.strerror,
            )
        yield has_lock


def _clear(folder: Path) -> None:
    """Remove what a killed build or a damaged disk left. Only under the lock."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in folder.parent.glob(f"{TEMPORARY_PREFIX}{folder.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


# ---- writing ----


class _ArrayFiles:
    """Arrays that grow at their end, one raw file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, dict[str, Any]] = {}
        self.last: dict[str, int] = {}

    def append(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if name in RUNNING_ENDS:
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
    columns: Sequence[str],
    max_length: int,
    max_chunks: int,
    progress: Callable[[int], None] | None,
) -> None:
    books: dict[str, CodeBook] = defaultdict(CodeBook)
    files = _ArrayFiles(folder)
    num_rows = num_truncated = 0
    nothing = np.zeros(0, dtype=np.int64)
    empty = Chunk(pd.DataFrame(columns=list(columns), dtype=object), [], nothing, nothing, nothing)
    for chunk in prefetch_one(_after(empty, chunks)):  # the empty chunk gives a table without rows its arrays
        arrays, cut = encode_arrays(
            chunk, roles, tokenizer, max_length=max_length, max_chunks=max_chunks, books=books, first_row=num_rows
        )
        files.append(arrays)
        num_rows += len(chunk)
        num_truncated += cut
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


def _after(first: Chunk, others: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from others


# ---- reading ----


def _num_bytes(array: dict[str, Any]) -> int:
    return math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize


def is_whole(folder: Path) -> bool:
    """Whether every file is there in its full size; a folder that somebody thinned out is built again."""
    try:
        arrays = read_meta(folder)["arrays"]
        return all((folder / f"{name}.bin").stat().st_size == _num_bytes(array) for name, array in arrays.items())
    except (OSError, ValueError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    return read_json(folder / META, META_JSON, max_bytes=MAX_META_BYTES)


def _open(folder: Path, paths: list[str]) -> EncodedRows:
    meta = read_meta(folder)
    arrays, mappings = {}, {}
    for name, array in meta["arrays"].items():
        shape, dtype = tuple(array["shape"]), np.dtype(array["dtype"])
        if not _num_bytes(array):  # nothing cannot be mapped
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
    if sum(map(len, mappings.values())) < SHARE_OF_MEMORY * available_bytes():
        Thread(target=_read_ahead, args=([folder / f"{name}.bin" for name in mappings],), daemon=True).start()
    return rows


def _read_ahead(paths: list[Path]) -> None:
    """Have the system read what would else come from the disk page by page, because rows are asked for in random order."""
    for path in paths:
        with suppress(OSError), open(path, "rb") as stream:
            for start in range(0, os.fstat(stream.fileno()).st_size, READ_AT_ONCE):
                os.posix_fadvise(stream.fileno(), start, READ_AT_ONCE, os.POSIX_FADV_WILLNEED)
