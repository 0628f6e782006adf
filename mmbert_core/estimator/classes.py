"""The classes of a fitted classifier as values of the labels it was given, and as the texts of a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.storage.schema import array, boolean, either, number, record, text, whole
from mmbert_core.tables.table import frame_to_chunk

NUMBERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float16", "float32", "float64"]
TEXT, OBJECT = "str", "object"  # numpy's texts of fixed width; Python's texts
CLASSES_JSON = record(
    {
        "dtype": text(choices=(*NUMBERS, "bool", TEXT, OBJECT)),
        "values": array(either(text(), boolean, whole(), number()), min_length=2),
    }
)


@dataclass(frozen=True)
class Classes:
    """K classes in the order of their values, as scikit-learn has them."""

    values: np.ndarray  # [K], of the labels' dtype
    texts: tuple[str, ...]  # of each class: what a cell of a file holds

    @classmethod
    def fit(cls, labels: np.ndarray) -> "Classes":
        """The classes of labels [N]: texts, booleans or whole numbers. Raises `InputError` for others, and for one."""
        try:
            values = np.unique(labels)
        except TypeError:
            kinds = sorted({type(value).__name__ for value in labels.tolist()})
            raise InputError(f"y: expected labels of one type, found {', '.join(kinds)}") from None
        if values.dtype.kind == "O":
            values = _of_one_type(values)
        if values.dtype.kind == "f" and (values % 1 != 0).any():
            first = format_for_message(values[values % 1 != 0][0].item())
            raise InputError(f"y: expected classes (texts, booleans or whole numbers), found {first}")
        if values.dtype.kind not in "biufUO":
            raise InputError(f"y: expected classes (texts, booleans or whole numbers), found {values.dtype}")
        if len(values) < 2:
            found = f"only {format_for_message(values.tolist()[0])}" if len(values) else "no row"
            raise InputError(f"y: expected two classes or more, found {found}")
        return cls(values, _texts_of(values))

    @classmethod
    def from_names(cls, names: Sequence[str]) -> "Classes":
        """The classes of a model folder that was not written by an estimator: texts."""
        return cls(np.array(sorted(names), dtype=object), tuple(sorted(names)))

    def __len__(self) -> int:
        return len(self.values)

    def cells(self, labels: np.ndarray) -> list[str]:
        """Labels [N] as the cells of a file."""
        return _texts_of(labels)

    def to_json(self) -> dict[str, Any]:
        dtype = TEXT if self.values.dtype.kind == "U" else self.values.dtype.name
        return {"dtype": dtype, "values": self.values.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any], names: Sequence[str]) -> "Classes":
        """Raises `ValueError` unless the values are those of the labels `names` of the model folder."""
        values = np.array(value["values"], dtype=None if value["dtype"] == TEXT else value["dtype"])
        texts = _texts_of(values)
        if sorted(texts) != sorted(names):
            found = f"expected the labels {list_for_message(sorted(names))}, found {list_for_message(sorted(texts))}"
            raise ValueError(found)
        return cls(values, tuple(texts))


def _of_one_type(values: np.ndarray) -> np.ndarray:
    """Sorted objects [K]: texts unchanged, booleans and whole numbers as numpy's."""
    kinds = {type(value) for value in values}
    if all(issubclass(kind, str) for kind in kinds):
        return values
    if all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return values.astype(bool)
    if all(issubclass(kind, (int, float, np.number)) and kind is not bool for kind in kinds):
        return np.array(values.tolist())
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InputError(f"y: expected classes (texts, booleans or whole numbers), found {names}")


def _texts_of(values: np.ndarray) -> tuple[str, ...]:
    return tuple(frame_to_chunk(pd.DataFrame({"y": values}), ["y"]).cells["y"])


def labels_of(y: Any, num_rows: int, name: str = "y") -> np.ndarray:
    """Labels [N] as an array of their own dtype. Raises `InputError` for another shape and for missing labels."""
    labels = y.to_numpy() if isinstance(y, (pd.Series, pd.Index, pd.DataFrame)) else np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(f"{name}: expected one label a row, found an array of shape {labels.shape}")
    if len(labels) != num_rows:
        raise InputError(f"{name}: expected {num_rows} labels, one for each row of the frame, found {len(labels)}")
    is_missing = pd.isna(labels)
    if labels.dtype.kind in "OU":
        is_missing[~is_missing] = labels[~is_missing] == ""
    if is_missing.any():
        found = f"found none in {is_missing.sum()} of {num_rows}, first in row {np.argmax(is_missing) + 1}"
        raise InputError(f"{name}: expected a label in every row, {found}")
    return labels
