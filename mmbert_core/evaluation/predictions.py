"""The prediction file: columns, decimals, quoting. Floor 1; imports nothing of ours.

`<id_name>` (if set), `prob` (several classes: `prob_<class>` each), `label` (if the input has it), `pred`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

BINARY_THRESHOLD = 0.5
NEEDS_QUOTES = frozenset('\t\n\r"')


def predicted_classes(preds: np.ndarray, *, threshold: float = BINARY_THRESHOLD) -> np.ndarray:
    """Class index [N] int64 from probabilities of class 1 [N] (1 above the threshold), or of all classes [N, K] (the first largest)."""
    return (preds > threshold).astype(np.int64) if preds.ndim == 1 else preds.argmax(axis=1)


def header(class_names: Sequence[str], *, is_binary: bool, id_name: str | None, has_labels: bool) -> list[str]:
    """Column names of a prediction file."""
    probabilities = ["prob"] if is_binary else [f"prob_{name}" for name in class_names]
    return [*([id_name] if id_name else []), *probabilities, *(["label"] if has_labels else []), "pred"]


def prediction_rows(preds: np.ndarray, class_names: Sequence[str], *, ids: Sequence[str] | None, labels: Sequence[str] | None) -> Iterator[list[str]]:
    """Cells of each row. Probabilities are the shortest decimals that read back to the same float32."""
    preds = np.asarray(preds, dtype=np.float32)
    predicted = predicted_classes(preds)
    for index, row in enumerate(preds[:, None] if preds.ndim == 1 else preds):
        cells = [] if ids is None else [ids[index]]
        cells += [str(value) for value in row]
        cells += [] if labels is None else [labels[index]]
        yield [*cells, class_names[predicted[index]]]


def tsv_line(cells: Sequence[str]) -> str:
    """One line; cells with tabs, line breaks or quotes are quoted as the csv module and pandas read them (doubled quotes)."""
    return "\t".join('"' + cell.replace('"', '""') + '"' if NEEDS_QUOTES & set(cell) else cell for cell in cells) + "\n"
