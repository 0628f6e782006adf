"""A fitted estimator's files: its model folder, copied to another folder or carried as bytes."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbert_core.data.column_roles import ColumnRole
from mmbert_core.estimator.classes import CLASSES_JSON, Classes
from mmbert_core.inference.model_files import (
    CARD,
    PREDICTION_FILES,
    SUMMARY,
    WEIGHTS,
    is_encoder_file,
    prediction_files,
    read_folder_json,
)
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.storage.files import atomic_folder, write_json
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.storage.schema import array, constant, mapping, record, text

ESTIMATOR = "estimator.json"  # what a model folder needs to be an estimator again
FORMAT_VERSION = 1
OTHER_FILES = (SUMMARY, CARD, "metrics.jsonl", ESTIMATOR, MANIFEST)  # that belong to the model, besides its own
ESTIMATOR_JSON = record(
    {
        "format_version": constant(FORMAT_VERSION),
        "classes": CLASSES_JSON,
        "columns": array(text(), distinct=True),
        "roles": mapping(record({"role": text(), "reason": text()})),
    }
)


class TemporaryFolder:
    """A folder that is removed together with this object, but only by the process that created it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mmbert-"))
        weakref.finalize(self, _remove, str(self.path), os.getpid())


def _remove(path: str, process_id: int) -> None:
    if os.getpid() == process_id:  # else in a forked copy
        shutil.rmtree(path, ignore_errors=True)


def write_estimator(folder: Path, classes: Classes, columns: list[str], roles: Mapping[str, ColumnRole]) -> None:
    """Write estimator.json: classes with their dtype, columns of the training frame, and roles with reasons."""
    values = {
        "format_version": FORMAT_VERSION,
        "classes": classes.to_json(),
        "columns": columns,
        "roles": {name: {"role": found.role, "reason": found.reason} for name, found in roles.items()},
    }
    write_json(folder / ESTIMATOR, values)


def read_estimator(folder: Path, names: tuple[str, ...]) -> tuple[Classes, list[str], dict[str, ColumnRole]] | None:
    """Classes, columns and roles; None for a folder without estimator.json. `names`: the labels of the model.

    Raises `InputError` for another structure, and for other classes than the model's.
    """
    if not (folder / ESTIMATOR).is_file():
        return None
    value: dict[str, Any] = read_folder_json(folder / ESTIMATOR, ESTIMATOR_JSON)
    try:
        classes = Classes.from_json(value["classes"], names)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{folder / ESTIMATOR}: classes: {error}") from None
    return classes, value["columns"], {name: ColumnRole(**found) for name, found in value["roles"].items()}


def model_file_names(folder: Path) -> list[str]:
    """The files that belong to the model, as paths below its folder; the weights are the last."""
    names = [name for name in prediction_files(folder) if name != WEIGHTS]
    return [*names, *(name for name in OTHER_FILES if (folder / name).is_file()), WEIGHTS]


def copy_model(folder: Path, target: Path) -> None:
    """Copy the model's files to `target`, which must be new or empty. Raises `InputError` for another one."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: exists already: expected a new folder")
    with atomic_folder(target) as temporary:
        for name in model_file_names(folder):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)


def read_model(folder: Path) -> dict[str, bytes]:
    """The content of the model's files by name. Raises `InputError` where they cannot be read."""
    try:
        return {name: (folder / name).read_bytes() for name in model_file_names(folder)}
    except OSError as error:
        raise InputError(f"{folder}: the files of the model cannot be read: {error.strerror}") from None


def write_model(files: Mapping[str, bytes], folder: Path) -> None:
    """Write what `read_model` has read. Raises `InputError` for a name of no file of a model, and without manifest."""
    for name in files:
        if name not in (*PREDICTION_FILES, *OTHER_FILES) and not is_encoder_file(name):
            raise InputError(f"expected files of a model folder, found {format_for_message(name)}")
    if MANIFEST not in files:
        raise InputError(f"expected the files of a model folder with {MANIFEST}, found none of this name")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
