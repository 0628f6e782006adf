"""Class names in their order, and label cells as class indices. Floor 1; imports errors, table."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmbert_core.data.table import shown
from mmbert_core.errors import InputError

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
UNKNOWN = -1  # index of a label that is missing or none of the classes


@dataclass(frozen=True)
class Labels:
    """The classes of a task. `names[k]` is the label text of class k, exactly as it stands in the training file."""

    names: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        values: Iterable[str],
        *,
        num_classes: int,
        positive_label: str | None = None,
        column: str = "label",
        where: Callable[[int], str] = "row {}".format,
        others: Callable[[int], str] = lambda index: "",
    ) -> "Labels":
        """Classes of the label texts `values` (repeats allowed): sorted as numbers if all are whole numbers, else by code point.

        `positive_label` becomes class 1 of two classes. `where(i)` is the place of `values[i]`, `others(i)` what
        `other_rows` says of its rows.
        Raises `InputError`: a missing label, one class only, another number of classes than `num_classes`,
        two spellings of one number, a positive_label that is no class.
        """
        first: dict[str, int] = {}
        for index, value in enumerate(values):
            first.setdefault(value, index)
        if "" in first:
            raise InputError(f"{where(first[''])}, column {column!r}: expected a label, found an empty cell{others(first[''])}")
        names = sorted(first, key=lambda name: (int(name), name)) if all(WHOLE_NUMBER.fullmatch(name) for name in first) else sorted(first)
        _check_spellings(names, first, column=column, where=where, others=others)
        if len(names) == 1:
            raise InputError(f"{where(0)}, column {column!r}: all training rows have the label {shown(names[0])}, expected {num_classes} classes")
        if len(names) != num_classes:
            place, found = where(0), f"{len(names)}: {_listed(names)}"
            if len(names) > num_classes:  # a label too many is one that comes late
                newest = list(first)[num_classes]
                place, found = where(first[newest]), f"{found}; {shown(newest)} is in this row for the first time{others(first[newest])}"
            raise InputError(f"{place}, column {column!r}: expected {num_classes} classes (num_classes) in the training rows, found {found}")
        if positive_label is not None:
            if positive_label not in names:
                raise InputError(f"positive_label: expected one of the labels {_listed(names)}, found {positive_label!r}")
            if num_classes != 2:
                raise InputError(f"positive_label: expected 2 classes to choose from, found {num_classes}")
            names = [name for name in names if name != positive_label] + [positive_label]
        return cls(tuple(names))

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def lookup(self, values: Sequence[str]) -> np.ndarray:
        """Distinct label texts -> class indices [len(values)] int64, `UNKNOWN` where it is no class."""
        return np.array([self.index_of.get(value, UNKNOWN) for value in values], dtype=np.int64)

    def check_known(self, indices: np.ndarray, label_of: Callable[[int], str], *, column: str, where: Callable[[int], str]) -> None:
        """Raise `InputError` with the first three places when any of `indices` [N] is `UNKNOWN`."""
        unknown = np.flatnonzero(indices == UNKNOWN)
        if len(unknown) == 0:
            return
        first = label_of(int(unknown[0]))
        found = f"found {shown(first)}" if first else "found an empty cell"
        expected = f"expected one of the labels {_listed(self.names)}"
        raise InputError(f"{where(int(unknown[0]))}, column {column!r}: {expected}, {found}{other_rows(unknown, where)}")

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Labels":
        return cls(tuple(value["names"]))


def other_rows(rows: np.ndarray, where: Callable[[int], str]) -> str:
    """What a message that names the first of `rows` says of the rest: how many, and where two more are."""
    if len(rows) == 1:
        return ""
    return f" ({len(rows)} such rows; also {', '.join(where(int(row)) for row in rows[1:3])})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")


def _check_spellings(
    names: Sequence[str], first: dict[str, int], *, column: str, where: Callable[[int], str], others: Callable[[int], str]
) -> None:
    """One number written in two ways ("1" beside "1.0" or "01") is a mistake in the file, never two classes."""
    spelling: dict[float, str] = {}
    for name in names:
        try:
            number = float(name)
        except ValueError:
            continue
        if "_" in name:  # Python's own digit grouping: 1_0 is a name here
            continue
        if number in spelling:
            both = f"{shown(spelling[number])} and {shown(name)}"
            newest = max(first[spelling[number]], first[name])
            raise InputError(f"{where(newest)}, column {column!r}: expected one spelling of a label, found {both} for the same number{others(newest)}")
        spelling[number] = name
