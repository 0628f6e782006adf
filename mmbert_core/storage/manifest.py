"""MANIFEST.json: the size and SHA-256 of each file that a folder was written with."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmbert_core.storage.files import read_json, sha256_of
from mmbert_core.storage.schema import constant, mapping, record, text, whole

MANIFEST = "MANIFEST.json"
ENTRY = record({"bytes": whole(0), "sha256": text(pattern="[0-9a-f]{64}")})

Entries = Mapping[str, Mapping[str, Any]]  # path below the folder, with "/" -> its "bytes" and "sha256"


def manifest_of(
    folder: Path, names: Iterable[str], *, version: int, paths: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """The content of MANIFEST.json for the files `names` of a folder; `paths`: those that have a temporary name now."""
    sources = {name: (paths or {}).get(name, Path(folder) / name) for name in names}
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for name, path in sources.items()}
    return {"format_version": version, "files": files}


def read_manifest(folder: Path, *, version: int) -> Entries:
    """The entries of a folder's manifest.

    Raises `InputError` for another structure or version, `OSError` where it cannot be read.
    """
    check = record({"format_version": constant(version), "files": mapping(ENTRY)})
    return read_json(Path(folder) / MANIFEST, check)["files"]


def why_different(path: Path, entry: Mapping[str, Any]) -> str | None:
    """How a file differs from its entry in the manifest, for a message; None if it does not. Reads the whole file."""
    try:
        if not path.is_file():
            return "missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            if not _differs_in_line_ends_alone(path, entry):
                return f"expected {entry['bytes']} bytes, found {size}"
            if path.suffix == ".json":
                return None
            return "its line ends were changed to CRLF, as git does with core.autocrlf"
        return None if sha256_of(path) == entry["sha256"] else "content differs from the manifest"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _differs_in_line_ends_alone(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the manifest's one with CRLF instead of LF. JSON means the same: its texts escape line ends."""
    if not entry["bytes"] < path.stat().st_size <= 2 * entry["bytes"] or path.suffix == ".safetensors":
        return False
    content = path.read_bytes().replace(b"\r\n", b"\n")
    return len(content) == entry["bytes"] and hashlib.sha256(content).hexdigest() == entry["sha256"]


def first_difference(folder: Path, entries: Entries) -> tuple[str, str] | None:
    """The name of the first file that differs from its entry, and how; None if all are the same."""
    for name, entry in entries.items():
        if reason := why_different(Path(folder) / name, entry):
            return name, reason
    return None
