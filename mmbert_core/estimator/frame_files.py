"""Data frames as the files of a run: each cell becomes the text that a CSV file would hold."""

import csv
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.estimator.classes import labels_of
from mmbert_core.runtime.errors import InputError, RunError, format_for_message
from mmbert_core.storage.files import TEMPORARY_PREFIX
from mmbert_core.tables.table import frame_to_chunk

LABEL_NAMES = ("label", "y", "target", "y_true")  # of labels without a name; the first that is no column
OTHER_ROWS = re.compile("(train|val)_path was ")  # of a run that is resumed: the paths are named after the content
SET_OUTPUT = "a scikit-learn transformer gives one after set_output(transform='pandas')"


@dataclass(frozen=True)
class LabelledRows:
    """N rows with labels."""

    frame: pd.DataFrame  # without the label
    labels: np.ndarray  # [N]
    label: str  # the label's name


def check_frame(frame: Any, name: str = "X") -> pd.DataFrame:
    """The frame. Raises `InputError` for anything else: arrays have no names of columns."""
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"{name}: expected a data frame, found {type(frame).__name__}; {SET_OUTPUT}")
    return frame


def labelled_rows(frame: Any, y: Any, label: str | None, *, name: str = "X") -> LabelledRows:
    """The rows with their labels: `y` [N], or the column `label` of the frame.

    `y` may also be a column of the frame, which then is no input. Raises `InputError` for both, for neither, and for a
    missing label.
    """
    frame = check_frame(frame, name)
    if (y is None) == (label is None):
        found = "both" if label is not None else "neither"
        raise InputError(f"{name}: expected labels as y, or the name of a column as label, found {found}")
    if label is not None:
        frame_to_chunk(frame.iloc[:0], [str(label)])
        return _split(frame, str(label), name)
    labels, columns = labels_of(y, len(frame)), set(map(str, frame.columns))
    given = getattr(y, "name", None)
    if given is None:
        return LabelledRows(frame, labels, next(free for free in _free_names() if free not in columns))
    if str(given) not in columns:
        return LabelledRows(frame, labels, str(given))
    split = _split(frame, str(given), name)
    if not np.array_equal(split.labels, labels):
        raise InputError(f"y: its name {str(given)!r} is that of a column with other values: rename one of them")
    return split


def _free_names() -> Iterator[str]:
    yield from LABEL_NAMES
    yield from (f"label_{number}" for number in range(2, 10**9))


def _split(frame: pd.DataFrame, label: str, name: str) -> LabelledRows:
    index = list(map(str, frame.columns)).index(label)
    labels = labels_of(frame.iloc[:, index], len(frame), f"{name}, column {format_for_message(label)}")
    return LabelledRows(frame.drop(columns=frame.columns[index]), labels, label)


def labelled_eval_set(eval_set: Any, label: str) -> LabelledRows | None:
    """The validation rows of `fit`: a frame with the column `label`, a pair (X, y), or a list of one such pair."""
    if isinstance(eval_set, list) and len(eval_set) == 1:
        [eval_set] = eval_set
    if eval_set is None:
        return None
    if isinstance(eval_set, pd.DataFrame):
        return labelled_rows(eval_set, None, label, name="eval_set")
    if not (isinstance(eval_set, (tuple, list)) and len(eval_set) == 2):
        expected = f"expected a pair (X, y), or a data frame with the column {label!r}"
        raise InputError(f"eval_set: {expected}, found {type(eval_set).__name__}")
    frame, y = check_frame(eval_set[0], "eval_set"), eval_set[1]
    if label in set(map(str, frame.columns)):
        frame = frame.drop(columns=frame.columns[list(map(str, frame.columns)).index(label)])
    return LabelledRows(frame, labels_of(y, len(frame), "eval_set"), label)


def csv_of(
    frame: pd.DataFrame, columns: Sequence[str], optional: Sequence[str], cells: Mapping[str, Sequence[str]]
) -> str:
    """The text of a CSV file: `columns` of the frame, those of `optional` that it has, and the columns of `cells`.

    Every cell is quoted, so that none is changed by reading it back. Raises `InputError` for a column that is missing
    and a cell that is not a single value.
    """
    table = frame_to_chunk(frame, columns, optional).cells | cells
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return stream.getvalue()


@contextmanager
def written_rows(folder: Path, texts: Mapping[str, str]) -> Iterator[dict[str, Path]]:
    """The files of a block, by name: `<name>.csv` in a folder of `folder`, which is removed at the end.

    The folder is named after the content, so that the same rows have the same paths, as resuming a run needs it, and
    other rows never replace them.
    """
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:16]
    rows = folder / "rows" / digest
    rows.mkdir(parents=True, exist_ok=True)
    paths = {name: rows / f"{name}.csv" for name in contents}
    try:
        for name, path in paths.items():
            temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
            temporary.write_bytes(contents[name])
            os.replace(temporary, path)
        yield paths
    finally:
        shutil.rmtree(rows, ignore_errors=True)
        if not any(rows.parent.iterdir()):
            rows.parent.rmdir()


@contextmanager
def frames_in_errors(names: Mapping[Path, str]) -> Iterator[None]:
    """Errors of the block name the frame instead of the file of its rows, which the user does not know."""
    try:
        yield
    except (InputError, RunError) as error:
        message = str(error).removeprefix("command line: ")
        for path, name in names.items():
            message = re.sub(rf"{re.escape(str(path))}( row \d+)?( \(line \d+\))?", rf"{name}\1", message)
        if OTHER_ROWS.search(message):
            message = "model_path: the run in this folder has other rows: choose another folder"
        raise type(error)(message) from None
