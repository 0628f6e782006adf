"""Files that are either complete or absent: written under a temporary name, synced, renamed."""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmbert_core.runtime.errors import InputError, shorten
from mmbert_core.storage.schema import Check, check_structure, parse_json

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"
TIME_FORMAT = "%Y-%m-%d-%H-%M-%S"
LOCK = "run.lock"
MEGABYTE = 2**20  # bytes
MAX_JSON_BYTES = 64 * MEGABYTE  # of a JSON file; its values take several times as much memory


def sync_path(path: Path) -> None:
    """Force a file or folder to disk, so that after a crash a later rename is not there without the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add `path` and the free space to an `OSError` of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(
            error.errno, f"{error.strerror} ({free_bytes(Path(path).parent) / MEGABYTE:.1f} MB free)", str(path)
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees either the old file or the new one, complete."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        with path_in_errors(path), open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, check: Check | None = None, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file, checked against the structure `check`. All JSON files are read with this function.

    Raises `InputError`, one line that names the file (and the key), for text that `schema.parse_json` refuses, more
    than `max_bytes`, a device or pipe, and another structure; `OSError` for a file that cannot be read.
    """
    path = Path(path)
    if stat.S_ISREG(path.stat().st_mode) or path.is_dir():  # opening a pipe would wait for a writer
        with open(path, "rb") as stream:
            content = stream.read(max_bytes + 1)
    else:
        raise InputError(f"{path}: expected a file, found a device or a pipe")
    if len(content) > max_bytes:
        raise InputError(f"{path}: expected at most {max_bytes / MEGABYTE:g} MB of JSON, found more")
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({shorten(str(error), 200)})") from None
    if check is not None:
        check_structure(value, check, str(path))
    return value


@contextmanager
def mode_of_new_files(path: Path) -> Iterator[None]:
    """Give the file that the block writes the umask's mode, as any new file: safetensors would make it private."""
    path = Path(path)
    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def why_unreadable(path: Path) -> str | None:
    """Why a file or folder cannot be read, for a message; None if it can be read or does not exist."""
    try:
        status = os.stat(path)
    except PermissionError:
        return "permission denied (in one of the folders above it)"
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    wanted = os.R_OK | os.X_OK if stat.S_ISDIR(status.st_mode) else os.R_OK
    if os.access(path, wanted):
        return None
    return f"permission denied (its mode is {stat.S_IMODE(status.st_mode):04o}, its owner user {status.st_uid})"


def check_readable(*paths: Path) -> None:
    """Raise `InputError` for the first file or folder that exists and cannot be read."""
    for path in paths:
        if reason := why_unreadable(path):
            raise InputError(f"{path}: cannot be read: {reason}")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, not atomically. Raises `OSError`.

    The same tensors give the same bytes. With a second metadata key they would not: safetensors writes metadata keys
    in random order.
    """
    try:
        with mode_of_new_files(path):
            save_file(dict(tensors), str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk, for example
        found = re.search(r"os error (\d+)", str(error))
        details = [int(found[1]), os.strerror(int(found[1])), str(path)] if found else [f"{path}: {error}"]
        raise OSError(*details) from None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `final`; rename it to `final` when the block ends without an error.

    Every file in it and both folders are synced before the rename. On an error the temporary folder is removed, and an
    existing `final` stays unchanged.
    """
    final = Path(final)
    if not final.parent.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        sync_path(final.parent.parent)
    temporary = final.parent / f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}"
    old = final.parent / f"{TEMPORARY_PREFIX}old-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with path_in_errors(final):
            yield temporary
        for path in sorted(temporary.rglob("*")):
            sync_path(path)
        sync_path(temporary)
        if has_old := os.path.lexists(final):
            os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            if has_old:
                os.rename(old, final)
            raise
        sync_path(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # the next start of the run removes the rest (`remove_stale_temporaries`)
            remove_path(old)


def names_by_time(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield `<prefix>-<local time>` in `parent` for this second and all later ones, without paths that exist."""
    now = time.time()
    for seconds in count():
        path = Path(parent) / f"{prefix}-{time.strftime(TIME_FORMAT, time.localtime(now + seconds))}"
        if not os.path.lexists(path):
            yield path


def make_folder_by_time(parent: Path, prefix: str) -> Path:
    """Create a new folder with a name of `names_by_time`, and return it. Safe when several processes do so at once."""
    for path in names_by_time(parent, prefix):
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("names_by_time never ends")


def remove_path(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content. A missing path is not an error."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_stale_temporaries(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove temporary files of interrupted writes (with `names`: of these files only) from `folder`, and log it."""
    pattern = ".*" if names is None else f"(old-)?({'|'.join(map(re.escape, names))})(-[0-9]+)?"
    for path in sorted(Path(folder).glob(f"{TEMPORARY_PREFIX}*")):
        if re.fullmatch(re.escape(TEMPORARY_PREFIX) + pattern, path.name, re.DOTALL):
            try:
                remove_path(path)
                logger.info("removed %s, left by an interrupted write", path)
            except OSError as error:  # harmless, and the next start tries again
                logger.warning("%s, left by an interrupted write, could not be removed: %s", path, error.strerror)


# ---- free space ----


def missing_space(folder: Path, num_bytes: int) -> str:
    """For an error message: how many megabytes are needed, and how many are free."""
    return f"need {num_bytes / MEGABYTE:.1f} MB, have {free_bytes(folder) / MEGABYTE:.1f} MB at {folder}"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
