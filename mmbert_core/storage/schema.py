"""Checks of JSON: bounds on the text, and a declared structure of types, ranges, lengths and keys.

A check is a function of one value that raises `Mismatch`. Checks are nested in the same way as the file:

    LABELS = record({"names": array(text(non_empty=True), min_length=2, distinct=True)})
    check_structure(value, LABELS, "labels.json")  # InputError: labels.json: names[1]: expected a text, found null
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from mmbert_core.runtime.errors import InputError, format_for_message

MAX_DEPTH = 50  # of nested lists and objects
MAX_INTEGER = 2**63 - 1
MAX_NAMED_KEYS = 12  # keys listed in a message

Check = Callable[[Any], None]


class Mismatch(ValueError):
    """A value that its check refuses: what was `expected`, and the `keys` that lead to the value, innermost first."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.keys: list[str | int] = []

    def __str__(self) -> str:
        path = ""
        for key in reversed(self.keys):
            if isinstance(key, str) and key.isidentifier():
                path += f".{key}" if path else key
            else:
                path += f"[{format_for_message(key)}]"
        return f"{path}: {super().__str__()}" if path else super().__str__()


def check_structure(value: Any, check: Check, source: str) -> None:
    """Raise `InputError`, one line that names `source` and the key, when `check` refuses `value`."""
    try:
        check(value)
    except Mismatch as error:
        raise InputError(f"{source}: {error}") from None


# ---- from text to values ----


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text (bytes: UTF-8).

    Raises `ValueError`, one line, for a text that is not JSON or contains what this package never writes: a key twice
    in an object, NaN and Infinity, numbers beyond float64 or 64-bit integers, half a surrogate pair, and lists or
    objects nested deeper than `MAX_DEPTH`.
    """
    too_deep = f"expected lists and objects at most {MAX_DEPTH} deep, found deeper ones"
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant, object_pairs_hook=_object_of
        )
    except RecursionError:
        raise ValueError(too_deep) from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(too_deep)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError, a ValueError
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"expected whole numbers below 2**63, found {format_for_message(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"expected numbers within float64, found {format_for_message(digits)}")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, found {word}")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"expected each key once, found {format_for_message(repeated)} twice in an object")
    return values


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested deeper than `depth`. A loop over levels: recursion would hit its limit."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(depth):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, (list, dict))]
        if not level:
            return False
    return bool(level)


# ---- values in messages ----


def describe(value: Any) -> str:
    """A JSON value in the words of a message, after "found"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:  # Python refuses to print thousands of digits
        return f"a whole number of {value.bit_length()} bits"
    return f"the text {format_for_message(value)}" if isinstance(value, str) else format_for_message(value)


# ---- checks of single values ----


def anything(value: Any) -> None:
    """No check: for values that are kept without being used."""


def text(*, non_empty: bool = False, choices: Collection[str] | None = None, pattern: str | None = None) -> Check:
    """A text. `choices`: one of these; `pattern`: a regular expression that matches the whole text."""
    expected = "a text" + (" that is not empty" if non_empty else "")
    if choices is not None:
        expected = f"one of {', '.join(choices)}"
    elif pattern is not None:
        expected = f"a text like {pattern}"

    def is_allowed(value: str) -> bool:
        is_choice = choices is None or value in choices
        return is_choice and (value != "" or not non_empty) and (not pattern or bool(re.fullmatch(pattern, value)))

    def check(value: Any) -> None:
        if not isinstance(value, str) or not is_allowed(value):
            raise Mismatch(expected, describe(value))

    return check


def boolean(value: Any) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise Mismatch("true or false", describe(value))


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Check:
    """A finite number from `low` to `high`, both included, and larger than `above`."""
    bounds = [f"of at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    bounds += [f"of at most {high:g}"] * (high < math.inf)
    expected = f"a finite number {' and '.join(bounds)}".strip()

    def check(value: Any) -> None:
        if type(value) not in (int, float) or not (low <= value <= high and above < value < math.inf):
            raise Mismatch(expected, describe(value))

    return check


def whole(low: int = -MAX_INTEGER, high: int = MAX_INTEGER) -> Check:
    """A whole number from `low` to `high`, both included. 1.0 is refused."""
    bounds = [f"of at least {low}"] * (low > -MAX_INTEGER) + [f"of at most {high}"] * (high < MAX_INTEGER)
    expected = f"a whole number {' and '.join(bounds)}".strip()

    def check(value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Mismatch(expected, describe(value))

    return check


def constant(wanted: str | int) -> Check:
    """Exactly this value, such as a version."""

    def check(value: Any) -> None:
        if type(value) is not type(wanted) or value != wanted:
            raise Mismatch(str(wanted), describe(value))

    return check


# ---- checks of structures ----


def nullable(inner: Check) -> Check:
    """null, or a value that `inner` allows."""

    def check(value: Any) -> None:
        if value is not None:
            try:
                inner(value)
            except Mismatch as error:
                if error.keys:
                    raise
                raise Mismatch(f"{error.expected} or null", describe(value)) from None

    return check


def either(*checks: Check) -> Check:
    """A value that one of `checks` allows. A mismatch inside a structure is reported with its key."""

    def check(value: Any) -> None:
        expected = []
        for inner in checks:
            try:
                return inner(value)
            except Mismatch as error:
                if error.keys:
                    raise
                expected.append(error.expected)
        raise Mismatch(" or ".join(dict.fromkeys(expected)), describe(value))

    return check


def array(
    item: Check,
    *,
    length: int | None = None,
    min_length: int = 0,
    max_length: int | None = None,
    distinct: bool = False,
) -> Check:
    """A list whose items `item` allows; `distinct`: the items, texts or numbers, are all different."""
    low, high = (length, length) if length is not None else (min_length, max_length)
    bound = f" of {length}" if length is not None else f" of at least {low}" if low else ""
    expected = f"a list{bound}" + (f" of at most {high}" if length is None and high is not None else "")

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) < low or (high is not None and len(value) > high):
            raise Mismatch(expected, describe(value))
        _check_items(item, enumerate(value))
        if distinct and len(set(value)) != len(value):
            seen: set[Any] = set()
            repeated = next(entry for entry in value if entry in seen or seen.add(entry))
            raise Mismatch("a list without repeats", f"{format_for_message(repeated)} twice")

    return check


def mapping(item: Check, *, keys: Check = anything) -> Check:
    """An object with keys that `keys` allows and values that `item` allows."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Mismatch("an object", describe(value))
        for key in value:
            keys(key)
        _check_items(item, value.items())

    return check


def record(
    required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, others: bool | Check = False
) -> Check:
    """An object with these keys. `others`: whether it may have more, such as later versions write, or their check."""
    known = {**required, **(optional or {})}
    other = others if callable(others) else anything

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Mismatch("an object", describe(value))
        for key in required:
            if key not in value:
                raise Mismatch(f"the key {key!r}", "none")
        for key in value:
            if not others and key not in known:
                names = ", ".join(list(known)[:MAX_NAMED_KEYS]) + (", ..." if len(known) > MAX_NAMED_KEYS else "")
                raise Mismatch(f"only the keys {names}", f"{format_for_message(key)} too")
        for key, inner_value in value.items():
            _check_items(known.get(key, other), [(key, inner_value)])

    return check


def _check_items(check: Check, items: Any) -> None:
    """Check the value of each (key, value) pair; adds the key to a mismatch."""
    for key, value in items:
        try:
            check(value)
        except Mismatch as error:
            error.keys.append(key)
            raise
