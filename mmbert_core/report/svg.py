"""Elements of inline SVG, scales and ticks, for all charts.

Colours, fonts and dashes are classes in report.css. Lengths are in units of each picture's own view box.
"""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from mmbert_core.report.formatting import escaped, figure

STYLES = 10  # of lines, each a colour and a dash pattern; the eleventh line has the first style again
MARKERS = ("dot", "square")  # of the first and the second series of a chart


def element(tag: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """`<tag attribute="...">children</tag>`. Texts that are not markup are escaped, numbers rounded to tenths.

    In attribute names `_` stands for a hyphen (`aria_hidden`), and a trailing one is dropped (`class_`).
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), escaped(_attribute(value)))
        for key, value in attributes.items()
    )
    if not children:
        return Markup("<{}{}/>").format(tag, written)
    return Markup("<{}{}>{}</{}>").format(tag, written, together(children), tag)


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else length(value)


def together(elements: Iterable[str | Markup]) -> Markup:
    """The elements, escaped, one after the other."""
    return Markup("").join(map(escaped, elements))


def length(value: float) -> str:
    """A length rounded to tenths, without ".0": keeps the page small."""
    return f"{value:.1f}".removesuffix(".0")


def picture(width: float, height: float, title: str, desc: str, *inside: Markup, kind: str = "chart") -> Markup:
    """One picture with its title and description; `kind` is its CSS class."""
    size: dict[str, str | float] = {}
    if kind == "strip":  # stretched to its table cell
        size = {"preserveAspectRatio": "none"}
    elif kind == "chart wide":  # keeps its size and scrolls; all others are as wide as the element around them
        size = {"width": width, "height": height}
    named = element("title", title), element("desc", desc)
    box = f"0 0 {length(width)} {length(height)}"
    return element("svg", *named, *inside, class_=kind, viewBox=box, role="img", **size)


def path(data: str, **attributes: str | float) -> Markup:
    return element("path", **attributes, d=data)


# ---- scales ----


def ticks(low: float, high: float, max_ticks: int = 6) -> list[float]:
    """At most `max_ticks` round numbers from low to high, evenly spaced."""
    if not high > low:
        return [low]
    rough = (high - low) / (max_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (factor * power for factor in (1, 2, 2.5, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= max_ticks - 1 + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """0.2, 300, 1.5e-4: short enough for the margin."""
    if value == 0 or abs(value) >= 0.001:
        return figure(value)
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def range_of(values: Sequence[float], *, around: Sequence[float] = ()) -> tuple[float, float]:
    """The range of the finite numbers in `values` and `around`, with a margin of 5 %; its ends always differ."""
    known = [value for value in (*values, *around) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin


# ---- marks ----


def marker(x: float, y: float, kind: str, radius: float = 3.5) -> Markup:
    if kind == "dot":
        return element("circle", cx=x, cy=y, r=radius)
    return element("rect", x=x - radius, y=y - radius, width=2 * radius, height=2 * radius)


def swatch(style: int, kind: str = "") -> Markup:
    """A short line with its marker, for a legend; hidden from screen readers, which read the name next to it."""
    mark = (marker(14, 6, kind, 3.5 if kind == "dot" else 3),) if kind else ()
    line = path("M0 6H28")
    return element("svg", line, *mark, class_=f"swatch s{style % STYLES}", viewBox="0 0 28 12", aria_hidden="true")
