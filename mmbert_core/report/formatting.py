"""Text, numbers and tables as HTML that no text can break out of.

Every function returns finished markup; whatever comes from outside passes `text` on its way in.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "–"  # a number that is not there
MAX_ROWS = 25  # of a table; a longer one scrolls in its box
CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {
    13: "\n",
    0x7F: "\u2421",
}  # drawn as ␀, ␁, ...
CONTROL |= {
    code: "\ufffd" for code in (*range(0x80, 0xA0), 0xFFFE, 0xFFFF, *range(0xFDD0, 0xFDF0))
}  # nor are these allowed in HTML
CONTROL |= {
    code: "\ufffd" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}  # would turn the order of what stands beside them
SURROGATES = re.compile("[\ud800-\udfff]")


# ---- text ----


def clean(value: object) -> str:
    """Text that any HTML or XML file can hold: control characters as pictures, halves of surrogate pairs as U+FFFD."""
    return SURROGATES.sub("\ufffd", str(value)).translate(CONTROL)


def text(value: object) -> str:
    """Escaped for the inside of an element and of a quoted attribute."""
    return html.escape(clean(value), quote=True)


def short(value: object, most: int = 24) -> str:
    """Clean, not escaped, at most `most` characters."""
    cleaned = clean(value)
    return cleaned if len(cleaned) <= most else cleaned[: most - 1] + "…"


def name(value: object) -> str:
    """Escaped; a long name may break after "_", "/" and ".". Texts of its own direction do not turn their neighbours."""
    return (
        "<bdi>" + re.sub(r"([_/.]+)(?=\w)", r"\1<wbr>", text(value)) + "</bdi>"
        if str(value)
        else '<span class="muted">(empty)</span>'
    )


# ---- numbers ----


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def decimals(value: Any, places: int = 4) -> str:
    """0.9812; no minus before zero."""
    if not is_number(value):
        return NOTHING
    written = f"{value:,.{places}f}"
    return written.lstrip("-") if not written.strip("-0.,") else written


def count(value: Any) -> str:
    """12,345"""
    return f"{round(value):,}" if is_number(value) else NOTHING


def brief(value: Any) -> str:
    """At most six characters of a number below 10^12: 12,345, then 123k, 12M."""
    if not is_number(value) or abs(value) < 100_000:
        return count(value)
    return (
        f"{value / 1e3:.0f}k"
        if abs(value) < 1e6
        else f"{value / 1e6:.0f}M"
        if abs(value) < 1e9
        else f"{value / 1e9:.0f}G"
    )


def percent(value: Any) -> str:
    """0.823 -> 82.3%"""
    return f"{value:.1%}" if is_number(value) else NOTHING


def figure(value: Any, digits: int = 3) -> str:
    """A number of any size: 0.0002, 1.5e-07, 12,345."""
    if not is_number(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def bounds(ends: Any) -> tuple[float, float] | None:
    """Both ends of an interval, or None where one is missing."""
    return (ends[0], ends[1]) if ends and is_number(ends[0]) and is_number(ends[1]) else None


def interval(ends: Any) -> str:
    """[0.9712, 0.9881], or nothing."""
    known = bounds(ends)
    return f"[{decimals(known[0])}, {decimals(known[1])}]" if known else ""


# ---- elements ----


def note(words: str) -> str:
    """A paragraph in a quieter colour; `words` is markup."""
    return f'<p class="note">{words}</p>'


def reason(value: object) -> str:
    """Why something is not shown."""
    return f'<p class="reason"><span class="tag">not shown</span> {text(value)}</p>'


def scroll_box(inside: str, label: str, *, kind: str = "") -> str:
    """What may be wider (`kind` "tall": or higher) than the page; the keyboard reaches and names it."""
    return (
        f'<div class="{f"scroll {kind}".strip()}" tabindex="0" role="region" aria-label="{text(label)}">{inside}</div>'
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table in its own box. `caption` is plain text; heads and cells are markup; the first cell names the row.

    Each head may begin with ">" for a column of numbers, which stands right.
    """
    sides = ["num" if head.startswith(">") else "" for head in heads]
    head_row = "".join(
        f'<th scope="col"{_class(side)}>{head.removeprefix(">")}</th>' for head, side in zip(heads, sides)
    )
    body = []
    for row in rows:
        cells = "".join(f"<td{_class(side)}>{cell}</td>" for cell, side in zip(row[1:], sides[1:]))
        body.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    made = f"<table><caption>{text(caption)}</caption><thead><tr>{head_row}</tr></thead><tbody>{chr(10).join(body)}</tbody></table>"
    return scroll_box(made, caption, kind=f"{kind} tall".strip() if len(body) > MAX_ROWS else kind)


def details(summary: str, inside: str) -> str:
    """Folded away until asked for; `summary` is plain text."""
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def card(label: str, value: str, *lines: str) -> str:
    """A big figure under its name; all are markup."""
    below = "".join(f'<span class="line">{line}</span>' for line in lines if line)
    return f'<div class="card"><span class="label">{label}</span><span class="big">{value}</span>{below}</div>'


def cards(made: Iterable[str], *, kind: str = "") -> str:
    return f'<div class="{f"cards {kind}".strip()}">{"".join(made)}</div>'


def figures_row(made: Iterable[str]) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">{"".join(made)}</div>'


def beside(made: str, figures: str) -> str:
    """A chart and the table of its figures."""
    return f'<div class="beside">{made}<div>{figures}</div></div>'


def chart(heading: str, svg: str, below: str = "") -> str:
    """A chart with its name above and, below, what it says in words; `heading` is plain text, the others markup."""
    return f"<figure><figcaption>{text(heading)}</figcaption>{svg}{below}</figure>"


def _class(side: str) -> str:
    return f' class="{side}"' if side else ""
