"""The prediction file: its columns, format, quoting and number format; it is written atomically.

Columns: `<id_name>` (if set), `prob` (several classes: `prob_<class>` each), `label` (if the input has it), `pred`,
`prob_calibrated` (of class 1; several classes: of the predicted one).
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes
from mmbert_core.runtime import distributed
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import TEMPORARY_PREFIX, path_in_errors, sync_path
from mmbert_core.tables.table import check_path

STANDARD = "-"  # the name of standard input and output
NEEDS_QUOTES = frozenset('\t\n\r"')  # in TSV and CSV alike
OTHER_FORMATS = frozenset(
    ".parquet .jsonl .ndjson .json .xlsx .xls .ods .feather .arrow .gz .zip .bz2 .xz .zst".split()
)
# Spreadsheets evaluate a cell that begins with one of these as a formula, unless it is a number.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Columns = dict[str, Sequence[str] | np.ndarray]


def header(class_names: Sequence[str], *, is_binary: bool, id_name: str | None, has_labels: bool) -> list[str]:
    """Column names of a prediction file."""
    probabilities = ["prob"] if is_binary else [f"prob_{name}" for name in class_names]
    ids, labels = [id_name] if id_name else [], ["label"] if has_labels else []
    return [*ids, *probabilities, *labels, "pred", "prob_calibrated"]


def prediction_columns(
    preds: np.ndarray,
    class_names: Sequence[str],
    *,
    is_binary: bool,
    id_name: str | None,
    ids: Sequence[str] | None,
    labels: Sequence[str] | None,
    calibrated: np.ndarray,
    threshold: float = BINARY_THRESHOLD,
) -> Columns:
    """The columns of a prediction file by name: ids and labels unchanged, probabilities float32 [N], predicted classes.

    `preds`: probabilities [N] of class 1, or [N, K]; they and the threshold decide the class. `calibrated`: the same
    after calibration, only written.
    """
    shape = (len(preds), 1 if is_binary else len(class_names))
    preds, calibrated = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (preds, calibrated))
    chosen = predicted_classes(preds[:, 0] if is_binary else preds, threshold=threshold)
    predicted = [class_names[index] for index in chosen]
    of_chosen = calibrated[np.arange(len(chosen)), 0 if is_binary else chosen]
    names = header(class_names, is_binary=is_binary, id_name=id_name, has_labels=labels is not None)
    cells = [*([ids] if id_name else []), *preds.T, *([] if labels is None else [labels]), predicted, of_chosen]
    return dict(zip(names, cells, strict=True))


def output_delimiter(name: str) -> str:
    """A comma for a prediction file named .csv, else a tab. Raises `InputError` for the suffix of another format."""
    suffix = Path(name).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise InputError(
            f"{name}: expected an output that ends in .tsv or .csv, found {suffix}: "
            "predictions are written as TSV or CSV"
        )
    return "," if suffix == ".csv" else "\t"


def table_rows(columns: Columns, *, delimiter: str = "\t", sheet_safe: bool = False) -> Iterator[str]:
    """The lines of a prediction file after its header."""
    return (table_line(row, delimiter=delimiter, sheet_safe=sheet_safe) for row in zip(*columns.values(), strict=True))


def table_line(cells: Iterable[str | np.float32], *, delimiter: str = "\t", sheet_safe: bool = False) -> str:
    """One line. A probability is written as the shortest decimal that reads back to the same float32.

    Texts with the delimiter, line breaks or quotes are quoted as the csv module and pandas read them (doubled quotes).
    With `sheet_safe` a text that spreadsheets would compute as a formula gets a ' before it; numbers never do.
    """
    texts, needs_quotes = [], NEEDS_QUOTES | {delimiter}
    for cell in cells:
        text = str(cell)
        if sheet_safe and isinstance(cell, str) and text.startswith(FORMULA_STARTS) and not NUMBER.fullmatch(text):
            text = "'" + text
        texts.append('"' + text.replace('"', '""') + '"' if needs_quotes & set(text) else text)
    return delimiter.join(texts) + "\n"


@contextmanager
def open_output(output: str | Path, inputs: Sequence[str], context: DistContext) -> Iterator[TextIO]:
    """Collective. A text stream to a prediction file, which gets its name when the block ends without an error.

    "-" is standard output. Ranks other than 0 write to nothing. Raises `InputError` for an output that cannot be
    written.
    """
    if str(output) == STANDARD:
        with open(sys.stdout.fileno(), "w", encoding="utf-8", newline="", closefd=False) as stream:
            yield stream
        return
    output = Path(output)
    check_output(inputs, output)
    temporary = output.with_name(f"{TEMPORARY_PREFIX}{output.name}-{os.getpid()}")
    try:
        distributed.on_main(lambda: _create_temporary(temporary, output))
        with (
            path_in_errors(output),
            open(temporary if context.is_main else os.devnull, "w", encoding="utf-8", newline="") as stream,
        ):
            yield stream
            stream.flush()
            if context.is_main:
                os.fsync(stream.fileno())
        distributed.on_main(lambda: _publish(temporary, output))
    finally:
        if context.is_main:
            temporary.unlink(missing_ok=True)


def check_output(inputs: Sequence[str], output: Path) -> None:
    """Raise `InputError` for an output that is an input, a folder or a device, is not UTF-8 or has no folder."""
    check_path(output)
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist")
    if output.exists() and not output.is_file():
        raise InputError(f"{output}: expected a file to write, found a {'folder' if output.is_dir() else 'device'}")
    if output.exists() and any(os.path.samefile(path, output) for path in inputs):
        raise InputError(f"{output}: is the input file; choose another output")


def _create_temporary(temporary: Path, output: Path) -> None:
    """Rank 0 only. Create the empty file, so that an output that cannot be written is refused before the prediction."""
    try:
        temporary.touch()
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None


def _publish(temporary: Path, output: Path) -> None:
    """Rank 0 only. Rename the finished file."""
    os.replace(temporary, output)
    sync_path(output.parent)
