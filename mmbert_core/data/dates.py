"""Date columns: cells to seconds, and seconds to the numbers that the model reads: age, month, weekday, hour.

N rows, F numeric columns, D date columns, U units of all date columns.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np

from mmbert_core.data.splits import select_rows
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import array, record, text

AGE, MONTH, WEEKDAY, HOUR = UNITS = ("age in days", "month", "weekday", "hour")  # weekday: 0 is Monday
SECONDS_PER_DAY = 86_400
EPOCH = datetime(1970, 1, 1)
MONTHS = "january february march april may june july august september october november december".split()
DATE = re.compile(
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,? )?"
    r"(?:([0-9]{4})([-/.])([0-9]{1,2})\2([0-9]{1,2})|([0-9]{4})([0-9]{2})([0-9]{2})"  # year, month, day
    r"|([0-9]{1,2})([-/.])([0-9]{1,2})\9([0-9]{4})"  # day and month, or month and day; year
    r"|([0-9]{1,2})[ -]([a-z]{3,9})[ -]([0-9]{4})|([a-z]{3,9}) ([0-9]{1,2}),? ([0-9]{4}))"  # with the month's name
    r"(?:(?:t|,? )([0-9]{1,2}):([0-9]{2})(?::([0-9]{2})(?:[.,][0-9]+)?)?(?: ?([ap])m)?"
    r"(?: ?(?:z|utc|gmt|[+-][0-9]{2}(?::?[0-9]{2})?))?)?"
)


DATES_JSON = record(
    {
        "names": array(text(), min_length=1, distinct=True),
        "newest": array(text(pattern="[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")),
        "units": array(array(text(choices=UNITS), distinct=True)),
    }
)


class AmbiguousDate(ValueError):
    """A date such as 03/04/2019, of which it is not known whether day or month comes first."""


def seconds_of(cell: str, order: str = "unambiguous") -> float:
    """Seconds from 1970-01-01 to a date with or without a time, as it is written: its time zone is not applied.

    `order`: whether the day or the month comes first where the year is last: day_first, month_first, or unambiguous
    for dates of which only one can be meant. Raises `AmbiguousDate`, and `ValueError` for any other text.
    """
    found = DATE.fullmatch(cell.strip().lower())
    if found is None:
        raise ValueError(cell)
    groups = found.groups()
    year, month, day = (int(groups[index] or groups[index + more] or 0) for index, more in ((0, 4), (2, 3), (3, 3)))
    if groups[7]:
        first, second, year = int(groups[7]), int(groups[9]), int(groups[10])
        if order == "unambiguous" and first <= 12 and second <= 12 and first != second:
            raise AmbiguousDate(cell)
        is_day_first = order == "day_first" or (order == "unambiguous" and first > 12)
        day, month = (first, second) if is_day_first else (second, first)
    elif name := groups[12] or groups[14]:
        day, year = int(groups[11] or groups[15]), int(groups[13] or groups[16])
        month = next((number for number, known in enumerate(MONTHS, start=1) if known.startswith(name)), 0)
    hour, minute, second = (int(group or 0) for group in groups[17:20])
    if groups[20]:  # am or pm
        if not 1 <= hour <= 12:
            raise ValueError(cell)
        hour = hour % 12 + 12 * (groups[20] == "p")
    return (datetime(year, month, day, hour, minute, second) - EPOCH).total_seconds()


def unit_of(seconds: np.ndarray, unit: str, newest: float) -> np.ndarray:
    """One of UNITS of dates in `seconds` [N] float64, NaN where missing; the age is that on the `newest` date."""
    if unit == AGE:
        return (newest - seconds) / SECONDS_PER_DAY
    known = np.where(np.isnan(seconds), 0, seconds)
    days = np.floor(known / SECONDS_PER_DAY).astype(np.int64)
    if unit == MONTH:
        numbers = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12 + 1
    elif unit == WEEKDAY:
        numbers = (days + date(1970, 1, 1).weekday()) % 7
    else:
        numbers = np.floor((known - days * SECONDS_PER_DAY) / 3600)
    return np.where(np.isnan(seconds), math.nan, numbers)


@dataclass(frozen=True)
class DateColumns:
    """The date columns of a run: their units, and the newest date of the training rows, from which ages count."""

    names: tuple[str, ...]  # D
    newest: tuple[str, ...]  # D, ISO 8601
    units: tuple[tuple[str, ...], ...]  # D, of UNITS; the hour only where a training row has a time

    @classmethod
    def fit(
        cls, seconds: np.ndarray, names: Sequence[str], *, rows: np.ndarray, source: str = "training rows"
    ) -> "DateColumns":
        """Of `seconds` [N, D] at the training `rows`. Raises `InputError` for a column without any date."""
        newest, units = [], []
        for index, name in enumerate(names):
            column = select_rows(seconds[:, index], rows)
            known = column[~np.isnan(column)]
            if not len(known):
                found = f"found no value in any of {len(column)} rows"
                raise InputError(f"{source}, column {name!r}: expected dates, {found}")
            newest.append((EPOCH + timedelta(seconds=float(known.max()))).isoformat())
            units.append(UNITS if (known % SECONDS_PER_DAY).any() else UNITS[:-1])
        return cls(tuple(names), tuple(newest), tuple(units))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DateColumns":
        """From a value that DATES_JSON has checked. Raises `InputError` for lengths that differ and for no date."""
        if not len(value["names"]) == len(value["newest"]) == len(value["units"]):
            raise InputError(f"dates: expected {len(value['names'])} entries of newest and units, as of names")
        columns = cls(tuple(value["names"]), tuple(value["newest"]), tuple(map(tuple, value["units"])))
        if not all(columns.units):
            raise InputError("dates: expected units of each column, found none")
        try:
            columns.newest_seconds()
        except ValueError as error:
            raise InputError(f"dates: newest: {error}") from None
        return columns

    @property
    def unit_names(self) -> tuple[str, ...]:
        """U names of numeric columns, such as `Date received (age in days)`."""
        return tuple(f"{name} ({unit})" for name, units in zip(self.names, self.units, strict=True) for unit in units)

    def newest_seconds(self) -> list[float]:
        return [(datetime.fromisoformat(newest) - EPOCH).total_seconds() for newest in self.newest]

    def column(self, numbers: np.ndarray, index: int, rows: np.ndarray) -> np.ndarray:
        """Column `index` of `expand(numbers)`, of the given rows only."""
        first = numbers.shape[1] - len(self.names)
        sources = [(date, unit) for date, units in enumerate(self.units) for unit in units]
        if index < first:
            return select_rows(numbers[:, index], rows)
        source, unit = sources[index - first]
        return unit_of(select_rows(numbers[:, first + source], rows), unit, self.newest_seconds()[source])

    def expand(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers and seconds [N, F + D] -> numbers and units of the dates [N, F + U]."""
        first, newest = numbers.shape[1] - len(self.names), self.newest_seconds()
        columns = [
            unit_of(numbers[:, first + index], unit, newest[index])
            for index, units in enumerate(self.units)
            for unit in units
        ]
        return np.concatenate([numbers[:, :first], np.stack(columns, axis=1)], axis=1)
