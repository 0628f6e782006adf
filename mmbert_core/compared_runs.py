"""The test of a finished run, read again: its settings, its labelled rows, their probabilities and their texts.

N rows, K classes. Nothing is computed with the model.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.data.labels import LABELS_JSON, UNKNOWN, Labels
from mmbert_core.data.tokens import join_texts
from mmbert_core.hooks import MODEL_CLASS
from mmbert_core.inference.model_files import (
    CONFIG,
    CONFIG_JSON,
    FIGURES_JSON,
    LABELS,
    read_folder_json,
    read_summary,
)
from mmbert_core.inference.output_file import header
from mmbert_core.report.build import REPORT
from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.storage.files import read_json
from mmbert_core.storage.schema import array, record, text
from mmbert_core.tables.csv_reader import STANDARD
from mmbert_core.tables.readers import header_of
from mmbert_core.tables.table import Chunk, Roles, check_path, read_chunks

PREDICTIONS, FIGURES = "test_result_0.tsv", "test_metrics.json"
MAX_CHARACTERS = 4000  # of a cell on the page
INPUTS_JSON = record({"input": array(text(non_empty=True), min_length=1)}, others=True)  # of report.json


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with one of its tests; the predictions are read by `read_rows` and `read_probabilities`."""

    path: str  # as the user gave it
    folder: Path
    test_folder: Path
    other_tests: int  # older test folders of the run
    config: Config
    labels: Labels
    settings: Mapping[str, Any]  # of the config, and what was resolved from it
    files: Mapping[str, str]  # path of each file of the run's data -> its SHA-256
    threshold: float | None  # of two classes

    @property
    def predictions(self) -> Path:
        return self.test_folder / PREDICTIONS

    @property
    def inputs(self) -> Sequence[str]:
        """The files whose rows were tested: from the report of the test, or else from the config."""
        try:
            return read_json(self.test_folder / REPORT, INPUTS_JSON)["input"]
        except (OSError, ValueError):
            return self.config.test_path


@dataclass(frozen=True)
class LabelledRows:
    """Ids (None: the run's table has none) and class indices [N] int64 of tested rows, in the order of the table."""

    ids: list[str] | None
    labels: np.ndarray


# ---- the folders ----


def open_run(path: str | Path) -> EvaluatedRun:
    """The run in the folder `path`, with its newest test; or the test folder `path` with the run in the folder above.

    Raises `InputError` where there is no run, no test, or a file of them that is not as a run writes it.
    """
    check_path(path)
    given = Path(os.path.abspath(path))
    if not given.is_dir():
        raise InputError(f"{path}: expected the folder of a run, found {'a file' if given.exists() else 'none'}")
    if (given / CONFIG).is_file():
        tests = sorted(found.parent for found in given.glob(f"{MODEL_CLASS}-*/{PREDICTIONS}"))
        if not tests:
            advice = f"`mmbert evaluate {path} LABELLED_FILE` writes one"
            raise InputError(
                f"{path}: expected a run with a test, found no {MODEL_CLASS}-<time>/{PREDICTIONS}: {advice}"
            )
        return _run_of(str(path), given, tests[-1], len(tests) - 1)
    if not (given / PREDICTIONS).is_file():
        raise InputError(f"{path}: expected the folder of a run or of its test, found no {CONFIG} and no {PREDICTIONS}")
    if not (given.parent / CONFIG).is_file():
        raise InputError(f"{path}: expected a test inside the folder of its run, found no {CONFIG} in {given.parent}")
    return _run_of(str(path), given.parent, given, 0)


def _run_of(path: str, folder: Path, test_folder: Path, other_tests: int) -> EvaluatedRun:
    values = read_folder_json(folder / CONFIG, CONFIG_JSON)
    config = config_from_dict(values["config"], source=f"{folder / CONFIG}: config")
    labels = Labels.from_json(read_folder_json(folder / LABELS, LABELS_JSON))
    figures = read_folder_json(test_folder / FIGURES, FIGURES_JSON)
    if config.is_binary and figures.get("threshold") is None:
        raise InputError(f"{test_folder / FIGURES}: expected the figures of labelled rows, found no threshold")
    data, _ = read_summary(folder)
    return EvaluatedRun(
        path=path,
        folder=folder,
        test_folder=test_folder,
        other_tests=other_tests,
        config=config,
        labels=labels,
        settings={**config.to_dict(), **{f"{key} (resolved)": value for key, value in values["resolved"].items()}},
        files={name: about["sha256"] for name, about in data.get("files", {}).items()},
        threshold=figures["threshold"] if config.is_binary else None,
    )


def check_same_classes(run: EvaluatedRun, first: EvaluatedRun) -> None:
    """Raise `InputError`, one line, unless both runs have the same classes in the same order."""
    names, expected = run.labels.names, first.labels.names
    if names == expected:
        return
    if others := [name for name in names if name not in expected] or [name for name in expected if name not in names]:
        owner = run if others[0] in names else first
        found = f"{format_for_message(others[0])} is a class of {owner.path} only"
        raise InputError(f"{run.path}: expected the classes of {first.path}, found others: {found}")
    index = 1 if run.config.is_binary else next(k for k, name in enumerate(names) if name != expected[k])
    found = f"{format_for_message(names[index])}, there {format_for_message(expected[index])}"
    raise InputError(
        f"{run.path}: expected the classes in the order of {first.path}, found class {index} {found}: "
        "its figures are about another class (positive_label)"
    )


# ---- the predictions ----


def read_rows(run: EvaluatedRun) -> LabelledRows:
    """Ids and labels. Raises `InputError` for a file without labels or rows, and for one that is no run's."""
    id_name = _id_column(run)
    wanted = [*([] if id_name is None else [id_name]), "label"]
    ids: list[str] = []
    labels = []
    for chunk in read_chunks([str(run.predictions)], wanted, tsv_quoting=STANDARD):
        ids += [] if id_name is None else chunk.cells[id_name]
        cells = chunk.cells["label"]
        indices = run.labels.lookup(cells)
        run.labels.check_known(indices, cells.__getitem__, column="label", row_location=chunk.row_location)
        labels.append(indices)
    if not labels:
        raise InputError(f"{run.predictions}: expected rows, found none")
    return LabelledRows(None if id_name is None else ids, np.concatenate(labels))


def read_probabilities(run: EvaluatedRun, num_rows: int) -> np.ndarray:
    """Probabilities float32: [N] of class 1 (binary), or [N, K]. Raises `InputError` for a cell that is not one."""
    names = ["prob"] if run.config.is_binary else [f"prob_{name}" for name in run.labels.names]
    preds = np.empty((num_rows, len(names)), dtype=np.float32)
    start = 0
    for chunk in read_chunks([str(run.predictions)], names, tsv_quoting=STANDARD):
        if start + len(chunk) > num_rows:
            raise InputError(f"{run.predictions}: has changed while it was read")
        for column, name in enumerate(names):
            preds[start : start + len(chunk), column] = _numbers_of(chunk, name)
        start += len(chunk)
    if start != num_rows:
        raise InputError(f"{run.predictions}: has changed while it was read")
    return preds[:, 0] if run.config.is_binary else preds


def _id_column(run: EvaluatedRun) -> str | None:
    """The id column of the prediction file. Raises `InputError` unless its header is that of the run."""
    columns = header_of(str(run.predictions), STANDARD)
    names, is_binary = run.labels.names, run.config.is_binary
    for id_name in dict.fromkeys((run.config.id_name, None)):
        if columns == header(names, is_binary=is_binary, id_name=id_name, has_labels=True):
            return id_name
    if "label" not in columns:
        raise InputError(f"{run.predictions}: expected labelled test rows, found no column 'label'")
    raise InputError(f"{run.predictions}: expected the columns of this run, found {list_for_message(columns)}")


def _numbers_of(chunk: Chunk, column: str) -> np.ndarray:
    """The probabilities of a column, float32 [N]."""
    cells = chunk.cells[column]
    try:
        values = np.array(list(map(float, cells)), dtype=np.float32)
    except ValueError:
        values = np.array([_number_or_nan(cell) for cell in cells])
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        found = f"found {format_for_message(cells[wrong[0]])}"
        location = chunk.row_location(int(wrong[0]))
        raise InputError(f"{location}, column {column!r}: expected a probability from 0 to 1, {found}")
    return values


def _number_or_nan(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def check_same_rows(run: EvaluatedRun, rows: LabelledRows, first: EvaluatedRun, expected: LabelledRows) -> None:
    """Raise `InputError`, one line with the first difference, unless both runs were tested on the same rows.

    Ids are compared where both runs have them.
    """
    prefix = f"{run.test_folder}: expected the test rows of {first.test_folder}, found others"
    if len(rows.labels) != len(expected.labels):
        raise InputError(f"{prefix}: {len(rows.labels):,} rows, there {len(expected.labels):,}")
    if rows.ids is not None and expected.ids is not None and rows.ids != expected.ids:
        index = next(index for index, pair in enumerate(zip(rows.ids, expected.ids, strict=True)) if pair[0] != pair[1])
        found = f"{format_for_message(rows.ids[index])}, there {format_for_message(expected.ids[index])}"
        raise InputError(f"{prefix}: row {index + 1:,} has the id {found}")
    different = np.flatnonzero(rows.labels != expected.labels)
    if len(different):
        index = int(different[0])
        of_row, there = (run.labels.names[each.labels[index]] for each in (rows, expected))
        raise InputError(
            f"{prefix}: row {index + 1:,} has the label {format_for_message(of_row)}, there {format_for_message(there)}"
        )


# ---- the texts ----


@dataclass(frozen=True)
class RowTexts:
    """What a test file has about one row: where it is, its text, and its cells by column."""

    location: str
    text: str
    columns: dict[str, str]


def read_texts(run: EvaluatedRun, rows: LabelledRows, positions: Sequence[int]) -> list[RowTexts]:
    """Texts and columns of the rows at `positions`, read again from the test file.

    Raises `InputError` where the file is gone or cannot be read, or does not have `rows`, all in the same order.
    """
    roles, inputs = Roles.from_config(run.config), run.inputs
    if not inputs:
        raise InputError(f"{run.folder / CONFIG}: names no test file")
    wanted, kept = set(positions), dict[int, RowTexts]()
    keys = [name for name in (roles.id if rows.ids is not None else None, roles.label) if name is not None]
    others = [name for name in roles.features() if name not in roles.text]
    limits = {name: MAX_CHARACTERS for name in roles.features() if name not in keys}
    start = 0
    for chunk in read_chunks(
        inputs, [*keys, *roles.features()], max_characters=limits, tsv_quoting=run.config.tsv_quoting
    ):
        _check_rows(chunk, start, run, rows)
        for position in sorted(wanted & set(range(start, start + len(chunk)))):
            cells = {name: [chunk.cells[name][position - start]] for name in roles.features()}
            [joined] = join_texts(cells, roles.text) if roles.text else [""]
            columns = {name: cells[name][0] for name in others}
            kept[position] = RowTexts(chunk.row_location(position - start), joined, columns)
        start += len(chunk)
    if start != len(rows.labels):
        raise InputError(f"{', '.join(inputs)}: has {start:,} rows now, the test had {len(rows.labels):,}")
    return [kept[position] for position in positions]


def _check_rows(chunk: Chunk, start: int, run: EvaluatedRun, rows: LabelledRows) -> None:
    """Raise `InputError` for the first row of a chunk that is not a row of the test. `start`: position of its first."""
    indices = run.labels.lookup(chunk.cells[run.config.label_name])
    ids = [] if rows.ids is None else chunk.cells[run.config.id_name]
    for index, label in enumerate(indices.tolist()):
        position = start + index
        if position >= len(rows.labels):
            raise InputError(f"{chunk.row_location(index)}: the test had {len(rows.labels):,} rows, found more")
        is_same_id = not ids or ids[index] == rows.ids[position]
        if not is_same_id or label == UNKNOWN or label != rows.labels[position]:
            kind = "label" if is_same_id else "id"
            raise InputError(f"{chunk.row_location(index)}: has another {kind} than in the test")
