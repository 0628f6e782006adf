"""The classes in their order, and label cells as class indices."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.storage.schema import array, record, text
from mmbert_core.tables.cells import index_by_form, normal_form

INTEGER = re.compile(r"[+-]?[0-9]+")
LABELS_JSON = record({"names": array(text(non_empty=True), min_length=2, distinct=True)})
UNKNOWN = -1  # class index of a label that is missing or not a class


@dataclass(frozen=True)
class Labels:
    """The classes of a task. `names[k]` is the label text of class k, in its first spelling in the training file.

    A label cell belongs to the class whose name has the same normal form, such as True to a class true.
    """

    names: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        values: Iterable[str],
        *,
        num_classes: int,
        positive_label: str | None = None,
        column: str = "label",
        row_location: Callable[[int], str] = "row {}".format,
        others: Callable[[int], str] = lambda index: "",
    ) -> "Labels":
        """Classes of the label texts `values` (repeats allowed): sorted as integers if all are, else by code point.

        Texts with the same normal form are one class; only numbers must have one spelling. `positive_label` becomes
        class 1 of two classes. For messages, `row_location(i)` is the row of `values[i]` and `others(i)` the result of
        `other_rows` for all rows with this value.
        Raises `InputError` for a missing label, a single class, another number of classes than `num_classes`, two
        spellings of one number, and a positive_label that is not a class.
        """
        first: dict[str, int] = {}  # label text -> its first index in `values`
        for index, value in enumerate(values):
            first.setdefault(value, index)
        if "" in first:
            found = f"found an empty cell{others(first[''])}"
            raise InputError(f"{row_location(first[''])}, column {column!r}: expected a label, {found}")
        _check_spellings(sorted(first), first, column=column, row_location=row_location, others=others)
        by_form = spellings_by_form(first)
        merged = "".join(f"; {line}" for line in _merged_spellings(by_form))
        first = {spellings[0]: first[spellings[0]] for spellings in by_form.values()}
        are_integers = all(INTEGER.fullmatch(name) for name in first)
        names = sorted(first, key=lambda name: (int(name), name)) if are_integers else sorted(first)
        if len(names) == 1:
            found = f"all training rows have the label {format_for_message(names[0])}"
            raise InputError(f"{row_location(0)}, column {column!r}: {found}, expected {num_classes} classes{merged}")
        if len(names) != num_classes:
            index, found = 0, f"{len(names)}: {list_for_message(names)}"
            if len(names) > num_classes:  # the first row of the first class beyond num_classes
                newest = list(first)[num_classes]
                index = first[newest]
                found += f"; {format_for_message(newest)} is in this row for the first time{others(index)}"
            expected = f"expected {num_classes} classes (num_classes) in the training rows"
            raise InputError(f"{row_location(index)}, column {column!r}: {expected}, found {found}{merged}")
        if positive_label is not None:
            _check_positive_label(positive_label, names)
            names = [name for name in names if name != positive_label] + [positive_label]
        return cls(tuple(names))

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def index_of_form(self) -> dict[str, int]:
        """Normal form -> class index: the first of names with the same form, which only older model folders have."""
        return index_by_form(self.index_of)

    def lookup(self, values: Sequence[str]) -> np.ndarray:
        """Label texts -> class indices [len(values)] int64, `UNKNOWN` for a text that is not a class."""
        indices = [self.index_of.get(value, self.index_of_form.get(normal_form(value), UNKNOWN)) for value in values]
        return np.array(indices, dtype=np.int64)

    def check_known(
        self, indices: np.ndarray, label_of: Callable[[int], str], *, column: str, row_location: Callable[[int], str]
    ) -> None:
        """Raise `InputError` with the first three rows when any of `indices` [N] is `UNKNOWN`."""
        unknown = np.flatnonzero(indices == UNKNOWN)
        if len(unknown) == 0:
            return
        first = label_of(int(unknown[0]))
        found = f"found {format_for_message(first)}" if first else "found an empty cell"
        expected = f"expected one of the labels {list_for_message(self.names)}"
        others = other_rows(unknown, row_location)
        raise InputError(f"{row_location(int(unknown[0]))}, column {column!r}: {expected}, {found}{others}")

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Labels":
        return cls(tuple(value["names"]))


def other_rows(rows: np.ndarray, row_location: Callable[[int], str]) -> str:
    """For a message about the first of `rows`: how many there are, and two more of them; "" for one row."""
    if len(rows) == 1:
        return ""
    return f" ({len(rows)} such rows; also {', '.join(row_location(int(row)) for row in rows[1:3])})"


def spellings_by_form(values: Iterable[str]) -> dict[str, list[str]]:
    """Normal form -> the different label texts that have it, in order of appearance."""
    spellings: dict[str, list[str]] = {}
    for value in dict.fromkeys(values):
        spellings.setdefault(normal_form(value), []).append(value)
    return spellings


def spelling_warnings(values: Iterable[str], column: str) -> list[str]:
    """Lines about one class with several spellings, and about several classes that may be meant as one."""
    by_form = spellings_by_form(value for value in values if value)
    lines = [f"column {column!r}: {line}" for line in _merged_spellings(by_form)]
    similar: dict[str, list[str]] = {}
    for form, spellings in by_form.items():
        similar.setdefault(" ".join(form.split()).casefold(), []).append(spellings[0])
    for names in similar.values():
        if len(names) > 1:
            differ = f"the labels {list_for_message(names)} differ by spaces or case only"
            lines.append(f"column {column!r}: {differ} and are {len(names)} classes: are they meant as one?")
    return lines


def _merged_spellings(by_form: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each class with several spellings; in ASCII, because composed and decomposed letters look the same."""
    return [
        f"the labels {' and '.join(map(ascii, spellings[:3]))} are one class, written in different ways"
        for spellings in by_form.values()
        if len(spellings) > 1
    ]


def _check_positive_label(positive_label: str, names: Sequence[str]) -> None:
    """Raise `InputError` when it is not one of two classes."""
    if positive_label not in names:
        same = next((name for name in names if normal_form(name) == normal_form(positive_label)), None)
        hint = f"; write it as in the training file: {ascii(same)}, not {ascii(positive_label)}" if same else ""
        expected = f"expected one of the labels {list_for_message(names)}"
        raise InputError(f"positive_label: {expected}, found {positive_label!r}{hint}")
    if len(names) != 2:
        raise InputError(f"positive_label: expected 2 classes to choose from, found {len(names)}")


def _check_spellings(
    names: Sequence[str],
    first: dict[str, int],
    *,
    column: str,
    row_location: Callable[[int], str],
    others: Callable[[int], str],
) -> None:
    """Raise `InputError` for one number written in two ways, such as "1" and "1.0" or "01": a mistake in the file."""
    spelling: dict[float, str] = {}  # number -> its label
    for name in names:
        try:
            number = float(name)
        except ValueError:
            continue
        if "_" in name:  # float() accepts 1_0, which is a text here
            continue
        if number in spelling:
            both = f"{format_for_message(spelling[number])} and {format_for_message(name)}"
            index = max(first[spelling[number]], first[name])
            found = f"expected one spelling of a label, found {both} for the same number"
            raise InputError(f"{row_location(index)}, column {column!r}: {found}{others(index)}")
        spelling[number] = name
