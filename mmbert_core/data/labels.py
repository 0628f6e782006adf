"""Class names in their order, and label cells as class indices."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.storage.schema import array, record, text
from mmbert_core.tables.cells import index_by_form, normal_form

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
LABELS_JSON = record({"names": array(text(non_empty=True), min_length=2, distinct=True)})
UNKNOWN = -1  # index of a label that is missing or none of the classes


@dataclass(frozen=True)
class Labels:
    """The classes of a task. `names[k]` is the label text of class k, exactly as it stands in the training file (first spelling).

    Label cells belong to the class whose name has the same normal form, such as True to a class true.
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
        """Classes of the label texts `values` (repeats allowed): sorted as numbers if all are whole numbers, else by code point.

        Texts with one normal form are one class, but for numbers, whose spellings must not differ. `positive_label`
        becomes class 1 of two classes. `row_location(i)` is the place of `values[i]`, `others(i)` what `other_rows` says of its rows.
        Raises `InputError`: a missing label, one class only, another number of classes than `num_classes`,
        two spellings of one number, a positive_label that is no class.
        """
        first: dict[str, int] = {}
        for index, value in enumerate(values):
            first.setdefault(value, index)
        if "" in first:
            raise InputError(
                f"{row_location(first[''])}, column {column!r}: expected a label, found an empty cell{others(first[''])}"
            )
        _check_spellings(sorted(first), first, column=column, row_location=row_location, others=others)
        by_form = spellings_by_form(first)
        merged = "".join(f"; {line}" for line in _merged(by_form))
        first = {spellings[0]: first[spellings[0]] for spellings in by_form.values()}
        are_numbers = all(WHOLE_NUMBER.fullmatch(name) for name in first)
        names = sorted(first, key=lambda name: (int(name), name)) if are_numbers else sorted(first)
        if len(names) == 1:
            raise InputError(
                f"{row_location(0)}, column {column!r}: all training rows have the label {format_for_message(names[0])}, expected {num_classes} classes{merged}"
            )
        if len(names) != num_classes:
            place, found = row_location(0), f"{len(names)}: {list_for_message(names)}"
            if len(names) > num_classes:  # a label too many is one that comes late
                newest = list(first)[num_classes]
                place, found = (
                    row_location(first[newest]),
                    f"{found}; {format_for_message(newest)} is in this row for the first time{others(first[newest])}",
                )
            raise InputError(
                f"{place}, column {column!r}: expected {num_classes} classes (num_classes) in the training rows, found {found}{merged}"
            )
        if positive_label is not None:
            if positive_label not in names:
                same = next((name for name in names if normal_form(name) == normal_form(positive_label)), None)
                hint = (
                    ""
                    if same is None
                    else f"; write it as in the training file: {ascii(same)}, not {ascii(positive_label)}"
                )
                raise InputError(
                    f"positive_label: expected one of the labels {list_for_message(names)}, found {positive_label!r}{hint}"
                )
            if num_classes != 2:
                raise InputError(f"positive_label: expected 2 classes to choose from, found {num_classes}")
            names = [name for name in names if name != positive_label] + [positive_label]
        return cls(tuple(names))

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @cached_property
    def index_of_form(self) -> dict[str, int]:
        """By normal form; of names with equal ones, which older folders may have, the first; 1 and 0 also as true and false."""
        return index_by_form(self.index_of)

    def lookup(self, values: Sequence[str]) -> np.ndarray:
        """Distinct label texts -> class indices [len(values)] int64, `UNKNOWN` where it is no class."""
        indices = [self.index_of.get(value, self.index_of_form.get(normal_form(value), UNKNOWN)) for value in values]
        return np.array(indices, dtype=np.int64)

    def check_known(
        self, indices: np.ndarray, label_of: Callable[[int], str], *, column: str, row_location: Callable[[int], str]
    ) -> None:
        """Raise `InputError` with the first three places when any of `indices` [N] is `UNKNOWN`."""
        unknown = np.flatnonzero(indices == UNKNOWN)
        if len(unknown) == 0:
            return
        first = label_of(int(unknown[0]))
        found = f"found {format_for_message(first)}" if first else "found an empty cell"
        expected = f"expected one of the labels {list_for_message(self.names)}"
        raise InputError(
            f"{row_location(int(unknown[0]))}, column {column!r}: {expected}, {found}{other_rows(unknown, row_location)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Labels":
        return cls(tuple(value["names"]))


def other_rows(rows: np.ndarray, row_location: Callable[[int], str]) -> str:
    """What a message that names the first of `rows` says of the rest: how many, and where two more are."""
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
    """Lines about label texts that are one class in two spellings, or two classes that may be meant as one."""
    by_form = spellings_by_form(value for value in values if value)
    lines = [f"column {column!r}: {line}" for line in _merged(by_form)]
    similar: dict[str, list[str]] = {}
    for form, spellings in by_form.items():
        similar.setdefault(" ".join(form.split()).casefold(), []).append(spellings[0])
    for names in similar.values():
        if len(names) > 1:
            lines.append(
                f"column {column!r}: the labels {list_for_message(names)} differ by spaces or case only and are {len(names)} classes: are they meant as one?"
            )
    return lines


def _merged(by_form: Mapping[str, Sequence[str]]) -> list[str]:
    """What is said of spellings that are one class; in ASCII, for composed and decomposed letters look the same."""
    several = [spellings for spellings in by_form.values() if len(spellings) > 1]
    return [
        f"the labels {' and '.join(map(ascii, spellings[:3]))} are one class, written in different ways"
        for spellings in several
    ]


def _check_spellings(
    names: Sequence[str],
    first: dict[str, int],
    *,
    column: str,
    row_location: Callable[[int], str],
    others: Callable[[int], str],
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
            both = f"{format_for_message(spelling[number])} and {format_for_message(name)}"
            newest = max(first[spelling[number]], first[name])
            raise InputError(
                f"{row_location(newest)}, column {column!r}: expected one spelling of a label, found {both} for the same number{others(newest)}"
            )
        spelling[number] = name
