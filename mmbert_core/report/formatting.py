"""Formats of texts and numbers on a page, and how texts are made safe for HTML and SVG.

Values that are not `Markup` are escaped when they are put into markup. `name` and `escaped` return markup, all other
functions plain text.
"""

import math
import re
from typing import Any

from markupsafe import Markup, escape

NO_VALUE = "–"
BEFORE_FINE_TUNING = "the model before fine-tuning"  # what step 0 is
# Control characters are drawn as ␀, ␁, ...
CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {13: "\n", 0x7F: "\u2421"}
# C1 controls and noncharacters are not allowed in HTML; direction overrides would reorder the text around them.
NOT_ALLOWED = (
    *range(0x80, 0xA0),
    0xFFFE,
    0xFFFF,
    *range(0xFDD0, 0xFDF0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
CONTROL |= dict.fromkeys(NOT_ALLOWED, "\ufffd")
SURROGATES = re.compile("[\ud800-\udfff]")


# ---- text ----


def clean(value: object) -> str:
    """Text that is allowed in HTML and XML: control characters as symbols, halves of surrogate pairs as U+FFFD."""
    return SURROGATES.sub("\ufffd", str(value)).translate(CONTROL)


def finalize(value: object) -> object:
    """The templates' `finalize`: cleans each value that is not markup. The environment escapes it afterwards."""
    return value if isinstance(value, Markup) else clean(value)


def escaped(value: object) -> Markup:
    """Cleaned and escaped, for the content of an element or of a quoted attribute; markup is not changed."""
    return escape(finalize(value))


def short(value: object, max_length: int = 24) -> str:
    """Cleaned, at most `max_length` characters."""
    cleaned = clean(value)
    return cleaned if len(cleaned) <= max_length else cleaned[: max_length - 1] + "…"


def name(value: object) -> Markup:
    """A name from the data: it may wrap after "_", "/" and ".", and its text direction does not affect other texts."""
    if not str(value):
        return Markup('<span class="muted">(empty)</span>')
    may_break = re.sub(r"([_/.]+)(?=\w)", r"\1<wbr>", str(escaped(value)))  # of str: Markup would escape the <wbr>
    return Markup("<bdi>{}</bdi>").format(Markup(may_break))


# ---- numbers ----


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def decimals(value: Any, digits: int = 4) -> str:
    """0.9812; a value that rounds to zero has no minus sign."""
    if not is_number(value):
        return NO_VALUE
    written = f"{value:,.{digits}f}"
    return written.lstrip("-") if not written.strip("-0.,") else written


def signed(value: Any, digits: int = 4) -> str:
    """+0.0123, -0.0123; a value that rounds to zero has no sign."""
    written = decimals(value, digits)
    return f"+{written}" if is_number(value) and value > 0 and written.strip("0.") else written


def count(value: Any) -> str:
    """12,345"""
    return f"{round(value):,}" if is_number(value) else NO_VALUE


def brief(value: Any) -> str:
    """At most six characters of a number below 10^12: 12,345, then 123k, 12M."""
    if not is_number(value) or abs(value) < 100_000:
        return count(value)
    divisor, unit = next((pair for pair in ((1e3, "k"), (1e6, "M")) if abs(value) < 1000 * pair[0]), (1e9, "G"))
    return f"{value / divisor:.0f}{unit}"


def percent(value: Any) -> str:
    """0.823 -> 82.3%"""
    return f"{value:.1%}" if is_number(value) else NO_VALUE


def figure(value: Any, digits: int = 3) -> str:
    """A number of any size: 0.0002, 1.5e-07, 12,345."""
    if not is_number(value):
        return NO_VALUE
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def bounds(ends: Any) -> tuple[float, float] | None:
    """Both ends of an interval, or None where one is missing."""
    return (ends[0], ends[1]) if ends and is_number(ends[0]) and is_number(ends[1]) else None


def interval(ends: Any) -> str:
    """[0.9712, 0.9881], or "" without an interval."""
    known = bounds(ends)
    return f"[{decimals(known[0])}, {decimals(known[1])}]" if known else ""
