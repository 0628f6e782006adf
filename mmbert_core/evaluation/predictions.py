"""The prediction file: columns, format, decimals, quoting, cells that a spreadsheet would compute. Floor 1; imports errors.

`<id_name>` (if set), `prob` (several classes: `prob_<class>` each), `label` (if the input has it), `pred`, `prob_calibrated`
(of class 1; several classes: of the predicted one).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmbert_core.errors import InputError

BINARY_THRESHOLD = 0.5
NEEDS_QUOTES = frozenset('\t\n\r"')  # in any format
OTHER_FORMATS = frozenset({".parquet", ".jsonl", ".ndjson", ".json", ".xlsx", ".xls", ".ods", ".feather", ".arrow", ".gz", ".zip", ".bz2", ".xz", ".zst"})
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # a spreadsheet computes a cell that begins so
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # and is right to

Columns = dict[str, Sequence[str] | np.ndarray]


def predicted_classes(preds: np.ndarray, *, threshold: float = BINARY_THRESHOLD) -> np.ndarray:
    """Class index [N] int64 from probabilities of class 1 [N] (1 above the threshold), or of all classes [N, K] (the first largest)."""
    # float64: a threshold between two neighbouring float32 must not become one of them
    return (preds > np.float64(threshold)).astype(np.int64) if preds.ndim == 1 else preds.argmax(axis=1)


def header(class_names: Sequence[str], *, is_binary: bool, id_name: str | None, has_labels: bool) -> list[str]:
    """Column names of a prediction file."""
    probabilities = ["prob"] if is_binary else [f"prob_{name}" for name in class_names]
    return [*([id_name] if id_name else []), *probabilities, *(["label"] if has_labels else []), "pred", "prob_calibrated"]


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
    """The columns of a prediction file by name: ids and labels as they are, probabilities float32 [N], predicted class names.

    `calibrated` are the probabilities `preds` [N] or [N, K] after calibration; which class is predicted is told by `preds`.
    """
    shape = (len(preds), 1 if is_binary else len(class_names))
    preds, calibrated = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (preds, calibrated))
    chosen = predicted_classes(preds[:, 0] if is_binary else preds, threshold=threshold)
    predicted = [class_names[index] for index in chosen]
    of_chosen = calibrated[np.arange(len(chosen)), 0 if is_binary else chosen]
    cells = [*([ids] if id_name else []), *preds.T, *([] if labels is None else [labels]), predicted, of_chosen]
    return dict(zip(header(class_names, is_binary=is_binary, id_name=id_name, has_labels=labels is not None), cells, strict=True))


def output_delimiter(name: str) -> str:
    """Comma for a prediction file named .csv, else a tab. Raises `InputError` for the suffix of another format of data."""
    suffix = Path(name).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise InputError(f"{name}: expected an output that ends in .tsv or .csv, found {suffix}: predictions are written as TSV or CSV")
    return "," if suffix == ".csv" else "\t"


def table_rows(columns: Columns, *, delimiter: str = "\t", sheet_safe: bool = False) -> Iterator[str]:
    """The lines of a prediction file below its header."""
    return (table_line(row, delimiter=delimiter, sheet_safe=sheet_safe) for row in zip(*columns.values(), strict=True))


def table_line(cells: Iterable[str | np.float32], *, delimiter: str = "\t", sheet_safe: bool = False) -> str:
    """One line. A probability is the shortest decimal that reads back to the same float32.

    Texts with the delimiter, line breaks or quotes are quoted as the csv module and pandas read them (doubled quotes). With
    `sheet_safe` a text that spreadsheets would take for a formula gets a ' before it; numbers never do.
    """
    texts, needs_quotes = [], NEEDS_QUOTES | {delimiter}
    for cell in cells:
        text = str(cell)
        if sheet_safe and isinstance(cell, str) and text.startswith(FORMULA_STARTS) and not NUMBER.fullmatch(text):
            text = "'" + text
        texts.append('"' + text.replace('"', '""') + '"' if needs_quotes & set(text) else text)
    return delimiter.join(texts) + "\n"
