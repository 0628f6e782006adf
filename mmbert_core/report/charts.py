"""Charts as inline SVG: pure functions of numbers and names.

Colours, fonts and dashes are classes of the page's style sheet (page_style); lengths are units of each chart's own view box.
Every chart names itself (title) and says what it shows (desc).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmbert_core.report.formatting import brief, count, decimals, figure, is_number, percent, short, text

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 10, 40  # margins that hold the axes' words
STYLES = 10  # of lines: a colour and a dash each, then from the first again
MARKERS = ("dot", "square")  # of the first and the second of two
MAX_POINTS = 400  # of a curve: about one for a unit of the picture
MAX_MARKED = 60  # points of a curve; more carry no markers
SHADES = (
    0.0,
    0.02,
    0.1,
    0.25,
    0.5,
)  # a confusion cell's share of its label's rows up to which it has shade 0, 1, ...; shade 5 above
MAX_WORDS = 48  # characters of an axis' name
MAX_NUMBERED = 10  # classes whose confusion cells carry numbers
CELL = 18  # side of a confusion cell without a number


@dataclass(frozen=True)
class Axis:
    """The words and the range of one side of a plot."""

    label: str
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Curve:
    """Points joined by lines, or by steps that hold a y until the next x; `marker`: "dot", "square" or none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    step: bool = False
    marker: str = ""


@dataclass(frozen=True)
class Guide:
    """A thin dashed line from one point to another, with a word beside its end."""

    start: tuple[float, float]
    end: tuple[float, float]
    label: str = ""


# ---- frames ----


def svg(width: float, height: float, title: str, desc: str, inside: str, *, kind: str = "chart") -> str:
    """One picture; `kind` is its class, `inside` markup."""
    box = f'class="{kind}" viewBox="0 0 {_n(width)} {_n(height)}" role="img"'
    # a strip fills its cell; a wide chart keeps its size and scrolls; all others are as wide as their place
    stretch = {"strip": ' preserveAspectRatio="none"', "chart wide": f' width="{_n(width)}" height="{_n(height)}"'}.get(
        kind, ""
    )
    return f"<svg {box}{stretch}><title>{text(title)}</title><desc>{text(desc)}</desc>{inside}</svg>"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, `most` at the most."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * power) <= most - 1 + 1e-9
    )
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def range_of(values: Sequence[float], *, around: Sequence[float] = ()) -> tuple[float, float]:
    """The lowest and highest of some numbers with a little air; never empty."""
    known = [value for value in (*values, *around) if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    air = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - air, high + air


def plot(curves: Sequence[Curve], x: Axis, y: Axis, *, title: str, desc: str, guides: Sequence[Guide] = ()) -> str:
    """Lines and step curves between two axes."""
    frame = _Frame(x, y, WIDTH, HEIGHT)
    lines = "".join(frame.guide(guide) for guide in guides) + "".join(frame.curve(curve) for curve in curves)
    return svg(WIDTH, HEIGHT, title, desc, frame.axes() + lines)


def swatch(style: int, marker: str = "") -> str:
    """A bit of line for a legend; the name beside it says the rest."""
    mark = {"dot": '<circle cx="14" cy="6" r="3.5"/>', "square": '<rect x="11" y="3" width="6" height="6"/>'}.get(
        marker, ""
    )
    return (
        f'<svg class="swatch s{style % STYLES}" viewBox="0 0 28 12" aria-hidden="true"><path d="M0 6H28"/>{mark}</svg>'
    )


# ---- charts ----


def histograms(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    *,
    label: str,
    title: str,
    desc: str,
    mark: float | None = None,
) -> str:
    """One histogram under the other, each as high as its own largest bin; `mark` is a dashed line through all."""
    each = 92
    height = len(counts) * each + BOTTOM
    x_of = _Frame(Axis(label, edges[0], edges[-1]), Axis(""), WIDTH, height, left=RIGHT).x_of
    parts = []
    for place, (name, column) in enumerate(counts.items()):
        bottom, most = (place + 1) * each, max(column, default=0)
        bars = [
            (x_of(low), x_of(high), value / most * (each - 32))
            for low, high, value in zip(edges, edges[1:], column)
            if value
        ]
        rects = "".join(
            f'<rect x="{_n(a + 0.5)}" y="{_n(bottom - high)}" width="{_n(max(b - a - 1, 0.5))}" height="{_n(high)}"/>'
            for a, b, high in bars
        )
        words = f"{short(name, 26)}: {count(sum(column))} rows, at most {count(most)} in a bar"
        parts.append(
            f'<text x="{RIGHT}" y="{bottom - each + 20}" class="strong">{text(words)}</text><g class="fill s{place % STYLES}">{rects}</g>'
        )
        parts.append(f'<path class="axis" d="M{RIGHT} {bottom}H{WIDTH - RIGHT}"/>')
        if mark is not None:
            parts.append(f'<path class="guide" d="M{_n(x_of(mark))} {bottom - each + 28}V{bottom}"/>')
    numbers = "".join(
        f'<text x="{_n(x_of(at))}" y="{height - BOTTOM + 15}" class="mid">{_tick(at)}</text>'
        for at in ticks(edges[0], edges[-1])
    )
    middle = f'<text x="{WIDTH // 2}" y="{height - 6}" class="mid">{text(short(label, MAX_WORDS))}</text>'
    return svg(WIDTH, height, title, desc, "".join(parts) + numbers + middle)


def reliability(
    series: Mapping[str, Sequence[Mapping[str, float]]], *, x_label: str, y_label: str, title: str, desc: str
) -> str:
    """Bins as points (`mean` predicted, `share` found) beside the diagonal on which both agree; bins without rows are left out."""
    curves = []
    for style, (name, bins) in enumerate(series.items()):
        full = [part for part in bins if part["rows"] and is_number(part["mean"]) and is_number(part["share"])]
        curves.append(
            Curve(
                name,
                [part["mean"] for part in full],
                [part["share"] for part in full],
                style,
                marker=MARKERS[style % 2],
            )
        )
    return plot(curves, Axis(x_label), Axis(y_label), title=title, desc=desc, guides=[Guide((0, 0), (1, 1))])


def interval_dots(
    rows: Sequence[tuple[str, float, Sequence[float] | None]], *, label: str, title: str, desc: str
) -> str:
    """(name, value, (low, high) or None) one under the other on one scale, each number written beside its name."""
    bounds = [bound for _, value, ends in rows for bound in (value, *(ends or ()))]
    each, height = 40, len(rows) * 40 + BOTTOM
    low, high = range_of(bounds)
    x_of = _Frame(Axis(label, low, high), Axis(""), WIDTH, height, left=RIGHT).x_of
    parts = []
    for place, (name, value, ends) in enumerate(rows):
        middle, style = place * each + 30, min(place, 1)
        words = f"{short(name, 34)}: {decimals(value)}"
        parts.append(
            f'<text x="{RIGHT}" y="{middle - 13}" class="{"strong" if place == 0 else ""}">{text(words)}</text>'
        )
        parts.append(
            f'<path class="grid" d="M{RIGHT} {middle}H{WIDTH - RIGHT}"/>'
            + _whisker(x_of, value, ends, middle, style, 5)
        )
    numbers = "".join(
        f'<text x="{_n(x_of(at))}" y="{height - BOTTOM + 17}" class="mid">{_tick(at)}</text>' for at in ticks(low, high)
    )
    return svg(
        WIDTH,
        height,
        title,
        desc,
        "".join(parts)
        + numbers
        + f'<text x="{WIDTH // 2}" y="{height - 6}" class="mid">{text(short(label, MAX_WORDS))}</text>',
    )


def interval_dot(
    value: float, ends: Sequence[float] | None, scale: tuple[float, float], *, reference: float | None = None
) -> str:
    """The same for a cell of a table; `reference` is a dashed line across."""
    x_of = _Frame(Axis("", *scale), Axis(""), 120, 18, left=5, right=5).x_of
    line = f'<path class="guide" d="M{_n(x_of(reference))} 1V17"/>' if reference is not None else ""
    said = f"{decimals(value)}" + (f", from {decimals(ends[0])} to {decimals(ends[1])}" if ends else ", no interval")
    desc = f"all rows: {decimals(reference)}" if reference is not None else ""
    return svg(120, 18, said, desc, line + _whisker(x_of, value, ends, 9, 0, 4), kind="cell")


def bar(value: float, spread: float | None, scale: tuple[float, float]) -> str:
    """A bar from zero for a cell of a table, its spread as a thin line at its end; below zero it runs left."""
    x_of = _Frame(Axis("", *scale), Axis(""), 160, 18, left=2, right=2).x_of
    zero, end = x_of(0.0), x_of(value)
    parts = f'<rect class="fill {"s0" if value >= 0 else "s1"}" x="{_n(min(zero, end))}" y="4" width="{_n(max(abs(end - zero), 0.5))}" height="10" rx="1.5"/>'
    if spread:
        parts += f'<path class="whisker" d="M{_n(x_of(value - spread))} 9H{_n(x_of(value + spread))}"/>'
    return svg(160, 18, figure(value), "", parts + f'<path class="axis" d="M{_n(zero)} 1V17"/>', kind="cell")


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """Shares of a whole side by side, for a cell of a table; of many the largest, the others as one."""
    if len(parts) > STYLES:
        parts = sorted(parts, key=lambda part: -part[1])
        parts = [*parts[: STYLES - 1], ("all others", sum(share for _, share in parts[STYLES - 1 :]))]
    made, start = [], 0.0
    for style, (name, share) in enumerate(parts):
        width = max(share, 0.0) * 100
        hover = f"<title>{text(short(name))}: {percent(share)}</title>"
        made.append(
            f'<rect class="fill s{style % STYLES}" x="{_n(start)}" y="0" width="{_n(max(width - 0.6, 0))}" height="10">{hover}</rect>'
            if width
            else ""
        )
        start += width
    said = ", ".join(f"{short(name)} {percent(share)}" for name, share in parts)
    return svg(100, 10, said, "shares of the classes", "".join(made), kind="strip")


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str, desc: str) -> str:
    """Labels down, predictions across; shaded by the share of the label's rows. Few classes carry their numbers, many a hover text."""
    numbered = len(names) <= MAX_NUMBERED
    side = max(46, 300 // max(len(names), 1)) if numbered else CELL
    side = min(side, 96)
    most = 14 if numbered else 18
    left = 34 + 6.4 * max((min(len(short(name, most)), most) for name in names), default=1)
    top = 26 + (left - 30 if not numbered or len(names) > 3 else 18)
    cells = "".join(
        _confusion_row(row, place, names, (left, top + place * side, side), numbered)
        for place, row in enumerate(counts)
    )
    words = []
    for place, name in enumerate(names):
        at = (place + 0.5) * side
        words.append(f'<text x="{_n(left - 6)}" y="{_n(top + at + 4)}" class="end">{text(short(name, most))}</text>')
        turned = f' transform="rotate(-90 {_n(left + at + 4)} {_n(top - 6)})"' if not numbered or len(names) > 3 else ""
        place_of_name = (
            f'x="{_n(left + at + (4 if turned else 0))}" y="{_n(top - 6)}" class="{"" if turned else "mid"}"{turned}'
        )
        words.append(f"<text {place_of_name}>{text(short(name, most))}</text>")
    width, height = left + len(names) * side + 8, top + len(names) * side + 8
    words.append(f'<text x="{_n(left)}" y="14" class="strong">predicted</text>')
    words.append(
        f'<text x="12" y="{_n(top + len(names) * side / 2)}" class="strong mid" transform="rotate(-90 12 {_n(top + len(names) * side / 2)})">label</text>'
    )
    kind = "chart" if numbered else "chart wide"
    # few classes keep the size of their words: the picture is as wide as the others
    return svg(max(width, WIDTH) if numbered else width, height, title, desc, cells + "".join(words), kind=kind)


def shade(share: float) -> int:
    """0 for none, up to 5: fine steps for few rows, for that is where the mistakes are."""
    return next((index for index, edge in enumerate(SHADES) if share <= edge), len(SHADES))


def shades() -> str:
    """The shades with what they stand for, as a legend."""
    words = [f"up to {edge:.0%}" for edge in SHADES[1:]] + [f"above {SHADES[-1]:.0%}"]
    made = []
    for index, word in enumerate(words, 1):
        square = f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><rect class="h{index}" width="28" height="12" rx="2"/></svg>'
        made.append(f"<li>{square}<span>{word}</span></li>")
    return f'<ul class="legend flat">{"".join(made)}</ul>'


# ---- parts ----


class _Frame:
    """Where numbers lie inside the margins."""

    def __init__(
        self, x: Axis, y: Axis, width: float, height: float, *, left: float = LEFT, right: float = RIGHT
    ) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = left, width - right, TOP, height - BOTTOM

    def x_of(self, value: float) -> float:
        return self.left + (self.right - self.left) * _share(value, self.x)

    def y_of(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * _share(value, self.y)

    def axes(self) -> str:
        made = []
        for at in ticks(self.y.low, self.y.high):
            made.append(f'<path class="grid" d="M{self.left} {_n(self.y_of(at))}H{self.right}"/>')
            made.append(f'<text x="{self.left - 6}" y="{_n(self.y_of(at) + 4)}" class="end">{_tick(at)}</text>')
        for at in ticks(self.x.low, self.x.high):
            made.append(f'<text x="{_n(self.x_of(at))}" y="{self.bottom + 16}" class="mid">{_tick(at)}</text>')
        made.append(f'<path class="axis" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>')
        middle, centre = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        made.append(
            f'<text x="{_n(middle)}" y="{self.bottom + 34}" class="mid">{text(short(self.x.label, MAX_WORDS))}</text>'
        )
        made.append(
            f'<text x="11" y="{_n(centre)}" class="mid" transform="rotate(-90 11 {_n(centre)})">{text(short(self.y.label, MAX_WORDS))}</text>'
        )
        return "".join(made)

    def curve(self, curve: Curve) -> str:
        points = [(self.x_of(a), self.y_of(b)) for a, b in thin(list(zip(curve.x, curve.y)), MAX_POINTS)]
        if not points:
            return ""
        (x, y), *rest = points
        path = f"M{_n(x)} {_n(y)}" + "".join(
            f"H{_n(a)}V{_n(b)}" if curve.step else f"L{_n(a)} {_n(b)}" for a, b in rest
        )
        dots = (
            "".join(_marker(a, b, curve.marker) for a, b in points)
            if curve.marker and len(points) <= MAX_MARKED
            else ""
        )
        return f'<g class="line s{curve.style % STYLES}"><title>{text(short(curve.name, 60))}</title><path d="{path}"/>{dots}</g>'

    def guide(self, guide: Guide) -> str:
        (x1, y1), (x2, y2) = ((self.x_of(a), self.y_of(b)) for a, b in (guide.start, guide.end))
        side, at = ("end", x2 - 4) if x2 > (self.left + self.right) / 2 else ("", x2 + 4)
        word = (
            f'<text x="{_n(at)}" y="{_n(y2 + 12)}" class="{side}">{text(short(guide.label))}</text>'
            if guide.label
            else ""
        )
        return f'<path class="guide" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>{word}'


def thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the finite points, evenly spread, both ends among them."""
    known = [point for point in points if is_number(point[0]) and is_number(point[1])]
    if len(known) <= most:
        return known
    return [known[round(index * (len(known) - 1) / (most - 1))] for index in range(most)]


def _share(value: float, axis: Axis) -> float:
    """Where a number lies between the ends of an axis, 0 to 1."""
    return min(1.0, max(0.0, (value - axis.low) / (axis.high - axis.low))) if axis.high > axis.low else 0.5


def _confusion_row(
    row: Sequence[int], place: int, names: Sequence[str], at: tuple[float, float, float], numbered: bool
) -> str:
    """The cells of one label; cells without rows are only drawn where all carry a number."""
    left, top, side = at
    whole, made = sum(row), []
    for column, value in enumerate(row):
        share = value / whole if whole else 0.0
        x = left + column * side
        if value or numbered:
            hover = f"<title>label {text(short(names[place]))}, predicted {text(short(names[column]))}: {count(value)} ({percent(share)})</title>"
            edge = ' class="right"' if place == column else ""  # the diagonal has an outline: right without any colour
            cell = f'<rect x="{_n(x + 1)}" y="{_n(top + 1)}" width="{_n(side - 2)}" height="{_n(side - 2)}" rx="2"{edge}>{hover}</rect>'
            number = (
                f'<text x="{_n(x + side / 2)}" y="{_n(top + side / 2 + 4)}" class="mid">{brief(value)}</text>'
                if numbered
                else ""
            )
            made.append(f'<g class="h{shade(share)}">{cell}{number}</g>')
    frame = f'<path class="grid" d="M{_n(left)} {_n(top)}h{_n(len(row) * side)}"/>' if not numbered else ""
    return frame + "".join(made)


def _whisker(
    x_of: Callable[[float], float], value: float, ends: Sequence[float] | None, middle: float, style: int, radius: float
) -> str:
    """A dot (the first) or a square with its interval."""
    line = f'<path d="M{_n(x_of(ends[0]))} {middle}H{_n(x_of(ends[1]))}"/>' if ends else ""
    return f'<g class="line solid s{style}">{line}{_marker(x_of(value), middle, MARKERS[style], radius)}</g>'


def _marker(x: float, y: float, kind: str, radius: float = 3.5) -> str:
    if kind == "dot":
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>'
    return f'<rect x="{_n(x - radius)}" y="{_n(y - radius)}" width="{_n(2 * radius)}" height="{_n(2 * radius)}"/>'


def _tick(value: float) -> str:
    """0.2, 300, 1.5e-4: short enough for the margin."""
    return (
        figure(value) if value == 0 or abs(value) >= 0.001 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    )


def _n(value: float) -> str:
    """A length, a tenth of a unit exact: shorter than Python writes it."""
    return f"{value:.1f}".removesuffix(".0")
