"""What a cell says: the text of a typed value, the one normal form of category and label cells, words for true and false.

Ids, groups and texts have no normal form: they are compared and kept byte for byte.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

# A boolean as JSON and Parquet, Python and pandas, or R and spreadsheets write it.
BOOLEANS = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
DIGITS = {"true": "1", "false": "0"}
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # 1.0: what pandas makes of 1 in a column with missing values
# date, time, fraction of a second, zone: pandas writes as many digits of the fraction as the longest of a column needs
POINT_IN_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
DURATION = re.compile(r"(-?[0-9]+ days)(?: (\+?[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?)?")  # as pandas writes it


def normal_form(cell: str) -> str:
    """The text by which a category or label cell is compared: equal for cells that mean the same in different formats.

    Composed letters (Unicode NFC); true and false in lower case; 1.0 and -3.00 as 1 and -3; a point in time at midnight as
    its date, others and durations without what is 0 at their end. All other texts stay as they are, also 007, 1e5 and 1_0. The normal form of a normal form is itself.
    """
    if cell.isascii():
        if cell in BOOLEANS:
            return BOOLEANS[cell]
        if found := WHOLE_FLOAT.fullmatch(cell):
            return "0" if found[1] == "-0" else found[1]
        if found := POINT_IN_TIME.fullmatch(cell):
            date, time, fraction, zone = found.groups(default="")
            return (
                _trimmed(date, time, fraction)
                if not zone
                else f"{date} {time}{_digits(fraction)}{'+00:00' if zone == 'Z' else zone}"
            )
        if found := DURATION.fullmatch(cell):
            return _trimmed(*found.groups(default=""))
        return cell
    return unicodedata.normalize("NFC", cell)


def _trimmed(days: str, time: str, fraction: str) -> str:
    """A point in time or a duration, without a time of 0."""
    time += _digits(fraction)
    return days if time in ("", "00:00:00") else f"{days} {time}"


def _digits(fraction: str) -> str:
    """The fraction of a second without zeros at its end."""
    return fraction.rstrip("0").rstrip(".")


def index_by_form(index_of: Mapping[str, int]) -> dict[str, int]:
    """Normal form -> index of the first value of `index_of` that has it.

    A column of true and false is often stored as 1 and 0, and the other way round: values that a table does not have
    itself stand for those that it has. A column with other whole numbers counts something, and true is none of them.
    """
    by_form = {normal_form(value): index for value, index in reversed(index_of.items())}
    if not by_form.keys() & DIGITS.values():
        return by_form | {digit: by_form[word] for word, digit in DIGITS.items() if word in by_form}
    if not by_form.keys() & DIGITS.keys() and not any(
        WHOLE_NUMBER.fullmatch(form) and form not in DIGITS.values() for form in by_form
    ):
        return by_form | {word: by_form[digit] for word, digit in DIGITS.items() if digit in by_form}
    return by_form


def text_of(value: Any) -> str:
    """The text of a typed cell: "" for a missing value, true/false, whole numbers exactly, other numbers at their shortest.

    Missing are None, NaN of any type, NaT and pandas' NA.
    Raises `ValueError` for what is no single value (a list, an object, bytes that are not UTF-8) and for text with a NUL character.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a NUL character")
        return value if type(value) is str else str(value)  # without the class of a numpy string
    if value is None:
        return ""
    kind = type(value)  # the exact types first: nearly all cells, and many of them
    if kind is int:
        return str(value)
    if kind is float:
        return "" if value != value else repr(value)
    if kind is bool:
        return "true" if value else "false"
    if isinstance(value, (list, dict, tuple, set, frozenset, np.ndarray, pd.Series, pd.Index, pd.DataFrame)):
        raise ValueError(f"a {type(value).__name__}")
    if _is_missing(value):
        return ""
    if isinstance(value, np.bool_):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)) and not isinstance(
        value, np.timedelta64
    ):  # numpy counts a timedelta among the integers
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return repr(float(value)) if isinstance(value, float) else str(value)  # float32: its own shortest text
    if isinstance(value, bytes):
        return text_of(value.decode("utf-8"))
    if isinstance(value, (np.datetime64, datetime)):
        return _text_or_own(pd.Timestamp, value)
    if isinstance(value, (np.timedelta64, timedelta)):
        return _text_or_own(pd.Timedelta, value)
    return str(value)


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT:
        return True
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, Decimal):
        return value.is_nan()
    return isinstance(value, (np.datetime64, np.timedelta64)) and bool(np.isnat(value))


def _text_or_own(kind: type, value: Any) -> str:
    """A point in time or a duration as pandas writes it into a CSV; outside its range, as its own type writes it."""
    try:
        return str(kind(value))
    except (ValueError, OverflowError):
        return str(value)
