"""Typed values as text, and the normal form in which category and label cells are compared.

Ids, groups and texts have no normal form: they are compared and stored byte for byte.
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

# Booleans as JSON and Parquet, as Python and pandas, and as R and spreadsheets write them -> normal form.
BOOLEANS = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
DIGITS = {"true": "1", "false": "0"}
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")  # such as 1.0, which pandas writes for 1 if cells are missing
# date, time, fraction of a second, time zone; pandas pads the fractions of a column to the same number of digits
TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
DURATION = re.compile(r"(-?[0-9]+ days)(?: (\+?[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?)?")  # as pandas writes it


def normal_form(cell: str) -> str:
    """The text by which a category or label cell is compared: equal for one value written by different formats.

    Unicode NFC; true and false in lower case; 1.0 and -3.00 as 1 and -3; a timestamp at midnight as its date; other
    timestamps and durations without trailing zeros of the fraction. All other texts are unchanged, also 007, 1e5 and
    1_0. The function is idempotent.
    """
    if cell.isascii():
        if cell in BOOLEANS:
            return BOOLEANS[cell]
        if found := WHOLE_FLOAT.fullmatch(cell):
            return "0" if found[1] == "-0" else found[1]
        if found := TIMESTAMP.fullmatch(cell):
            date, time, fraction, zone = found.groups(default="")
            if not zone:
                return _drop_zero_time(date, time, fraction)
            return f"{date} {time}{_drop_zeros(fraction)}{'+00:00' if zone == 'Z' else zone}"
        if found := DURATION.fullmatch(cell):
            return _drop_zero_time(*found.groups(default=""))
        return cell
    return unicodedata.normalize("NFC", cell)


def _drop_zero_time(days: str, time: str, fraction: str) -> str:
    """A timestamp or a duration as text; only its date or its days where the time is zero."""
    time += _drop_zeros(fraction)
    return days if time in ("", "00:00:00") else f"{days} {time}"


def _drop_zeros(fraction: str) -> str:
    return fraction.rstrip("0").rstrip(".")


def index_by_form(index_of: Mapping[str, int]) -> dict[str, int]:
    """Normal form -> index of the first value of `index_of` that has it.

    A column of true and false is often stored as 1 and 0, or the other way round: where `index_of` has one of these
    pairs, the other is added with the same indices. Where 1 and 0 occur with other whole numbers, they are counts or
    codes, and true and false are not added.
    """
    by_form = {normal_form(value): index for value, index in reversed(index_of.items())}
    if not by_form.keys() & DIGITS.values():
        return by_form | {digit: by_form[word] for word, digit in DIGITS.items() if word in by_form}
    has_other_numbers = any(WHOLE_NUMBER.fullmatch(form) and form not in DIGITS.values() for form in by_form)
    if not by_form.keys() & DIGITS.keys() and not has_other_numbers:
        return by_form | {word: by_form[digit] for word, digit in DIGITS.items() if digit in by_form}
    return by_form


def text_of(value: Any) -> str:
    """The text of a typed cell: true or false, integers exactly, other numbers as shortest decimals, "" where missing.

    Missing values are None, NaN of any type, NaT and pandas' NA. Raises `ValueError` for a value that is not a scalar
    (a list, an object), for bytes that are not UTF-8, and for text with a NUL character.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a NUL character")
        return value if type(value) is str else str(value)  # a numpy string as a plain str
    if value is None:
        return ""
    kind = type(value)  # exact types first, for speed: this runs once a cell
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
    if isinstance(value, (int, np.integer)) and not isinstance(value, np.timedelta64):  # a subclass of np.integer
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return repr(float(value)) if isinstance(value, float) else str(value)  # float32: its own shortest decimal
    if isinstance(value, bytes):
        return text_of(value.decode("utf-8"))
    if isinstance(value, (np.datetime64, datetime)):
        return _text_by_pandas(pd.Timestamp, value)
    if isinstance(value, (np.timedelta64, timedelta)):
        return _text_by_pandas(pd.Timedelta, value)
    return str(value)


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT:
        return True
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, Decimal):
        return value.is_nan()
    return isinstance(value, (np.datetime64, np.timedelta64)) and bool(np.isnat(value))


def _text_by_pandas(pandas_type: type, value: Any) -> str:
    """A timestamp or a duration as pandas writes it into a CSV; outside pandas' range, `str(value)`."""
    try:
        return str(pandas_type(value))
    except (ValueError, OverflowError):
        return str(value)
