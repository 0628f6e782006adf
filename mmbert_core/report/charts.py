"""Charts as inline SVG: pure functions of numbers and names.

Every chart has a title and a description for screen readers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from markupsafe import Markup

from mmbert_core.report.formatting import count, decimals, figure, is_number, percent, short
from mmbert_core.report.report_schema import Bin
from mmbert_core.report.svg import (
    MARKERS,
    STYLES,
    element,
    length,
    marker,
    path,
    picture,
    range_of,
    swatch,
    tick_label,
    ticks,
    together,
)
from mmbert_core.report.thinning import evenly_spaced

WIDTH, HEIGHT = 380, 300  # of a chart, in units of its view box, as all lengths here
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 10, 40  # margins around a plot, for the labels of its axes
MAX_POINTS = 400  # of a curve: about one per unit of width
MAX_MARKED = 60  # points of a curve with markers; a curve with more points has none
MAX_LABEL = 48  # characters of an axis label


@dataclass(frozen=True)
class Axis:
    """The label and the range of one axis of a plot."""

    label: str
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Line:
    """A curve through points; `step`: y stays constant until the next x. `marker`: "dot", "square" or none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    step: bool = False
    marker: str = ""


@dataclass(frozen=True)
class Guide:
    """A thin dashed line from one point to another, with a label at its end."""

    start: tuple[float, float]
    end: tuple[float, float]
    label: str = ""


@dataclass(frozen=True)
class Texts:
    """A chart's title and its description for screen readers."""

    title: str
    desc: str


@dataclass(frozen=True)
class Chart:
    """A chart with the texts around it on the page: a title, a legend of (swatch, name, words), and a note."""

    title: str
    svg: Markup | None  # None: no values to draw
    legend: Sequence[tuple[Markup, str, str]] = ()
    note: str = ""


def legend(lines: Sequence[Line], words: Sequence[str] = ()) -> list[tuple[Markup, str, str]]:
    """(swatch, name, words) of each line; `words` are "" where there are none for a line."""
    return [(swatch(line.style, line.marker), line.name, text or "") for line, text in zip_longest(lines, words)]


# ---- charts ----


def plot(lines: Sequence[Line], x: Axis, y: Axis, texts: Texts, *, guides: Sequence[Guide] = ()) -> Markup:
    """Lines and step curves between two axes."""
    frame = Frame(x, y, WIDTH, HEIGHT)
    drawn = [*map(frame.guide, guides), *map(frame.line, lines)]
    return picture(WIDTH, HEIGHT, texts.title, texts.desc, frame.axes(), *drawn)


def histograms(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    texts: Texts,
    *,
    label: str,
    dashed_at: float | None = None,
) -> Markup:
    """Histograms in a column, each scaled to its own largest bin, with a dashed line through all at `dashed_at`.

    `edges` [bins + 1], `counts`: name -> [bins].
    """
    row_height = 92
    height = len(counts) * row_height + BOTTOM
    x_of = Frame(Axis(label, edges[0], edges[-1]), Axis(""), WIDTH, height, left=RIGHT).x_of
    drawn = []
    for index, (name, column) in enumerate(counts.items()):
        bottom, highest = (index + 1) * row_height, max(column, default=0)
        bars = []
        for (low, high), value in zip(pairwise(edges), column, strict=False):
            if value:
                start, bar_height = x_of(low) + 0.5, value / highest * (row_height - 32)
                width = max(x_of(high) - x_of(low) - 1, 0.5)
                bars.append(element("rect", x=start, y=bottom - bar_height, width=width, height=bar_height))
        words = f"{short(name, 26)}: {count(sum(column))} rows, at most {count(highest)} in a bar"
        drawn.append(element("text", words, x=RIGHT, y=bottom - row_height + 20, class_="strong"))
        drawn.append(element("g", *bars or [""], class_=f"fill s{index % STYLES}"))
        drawn.append(path(f"M{RIGHT} {bottom}H{WIDTH - RIGHT}", class_="axis"))
        if dashed_at is not None:
            drawn.append(path(f"M{length(x_of(dashed_at))} {bottom - row_height + 28}V{bottom}", class_="guide"))
    axis = _x_axis(edges[0], edges[-1], x_of, height, label, 15)
    return picture(WIDTH, height, texts.title, texts.desc, *drawn, *axis)


def reliability(series: Mapping[str, Sequence[Bin]], texts: Texts, *, x_label: str, y_label: str) -> Markup:
    """Bins as points (mean predicted, share found), with the diagonal where both are equal; empty bins are left out."""
    lines = []
    for style, (name, bins) in enumerate(series.items()):
        full = [bin_ for bin_ in bins if bin_.rows and is_number(bin_.mean) and is_number(bin_.share)]
        x, y = [bin_.mean for bin_ in full], [bin_.share for bin_ in full]
        lines.append(Line(name, x, y, style, marker=MARKERS[style % 2]))
    return plot(lines, Axis(x_label), Axis(y_label), texts, guides=[Guide((0, 0), (1, 1))])


Interval = Sequence[float] | None


def interval_dots(
    rows: Sequence[tuple[str, float, Interval]], texts: Texts, *, label: str, dashed_at: float | None = None
) -> Markup:
    """`rows` of (name, value, interval or None) in a column on one scale, each value written next to its name.

    `dashed_at`: a value with a dashed line through all rows.
    """
    row_height, height = 40, len(rows) * 40 + BOTTOM
    known = [bound for _, value, ends in rows for bound in (value, *(ends or ()))]
    low, high = range_of(known, around=[] if dashed_at is None else [dashed_at])
    x_of = Frame(Axis(label, low, high), Axis(""), WIDTH, height, left=RIGHT).x_of
    drawn = [] if dashed_at is None else [path(f"M{length(x_of(dashed_at))} 4V{height - BOTTOM}", class_="guide")]
    for index, (name, value, ends) in enumerate(rows):
        middle, style = index * row_height + 30, min(index, 1)
        words, kind = f"{short(name, 34)}: {decimals(value)}", "strong" if index == 0 else ""
        drawn.append(element("text", words, x=RIGHT, y=middle - 13, class_=kind))
        drawn.append(path(f"M{RIGHT} {middle}H{WIDTH - RIGHT}", class_="grid"))
        drawn.append(_whisker(x_of, value, ends, middle, style, 5))
    return picture(WIDTH, height, texts.title, texts.desc, *drawn, *_x_axis(low, high, x_of, height, label, 17))


# ---- charts in table cells ----


def interval_dot(value: float, ends: Interval, scale: tuple[float, float], *, reference: float | None = None) -> Markup:
    """A value with its interval; `reference`: a value marked by a dashed line."""
    x_of = Frame(Axis("", *scale), Axis(""), 120, 18, left=5, right=5).x_of
    line = [path(f"M{length(x_of(reference))} 1V17", class_="guide")] if reference is not None else []
    title = f"{decimals(value)}" + (f", from {decimals(ends[0])} to {decimals(ends[1])}" if ends else ", no interval")
    desc = f"all rows: {decimals(reference)}" if reference is not None else ""
    return picture(120, 18, title, desc, *line, _whisker(x_of, value, ends, 9, 0, 4), kind="cell")


def bar(value: float, spread: float | None, scale: tuple[float, float]) -> Markup:
    """A bar from zero to `value`, leftwards if that is negative, with the spread as a thin line at its end."""
    x_of = Frame(Axis("", *scale), Axis(""), 160, 18, left=2, right=2).x_of
    zero, end = x_of(0.0), x_of(value)
    kind, width = "fill s0" if value >= 0 else "fill s1", max(abs(end - zero), 0.5)
    drawn = [element("rect", class_=kind, x=min(zero, end), y=4, width=width, height=10, rx=1.5)]
    if spread:
        drawn.append(path(f"M{length(x_of(value - spread))} 9H{length(x_of(value + spread))}", class_="whisker"))
    return picture(160, 18, figure(value), "", *drawn, path(f"M{length(zero)} 1V17", class_="axis"), kind="cell")


def shares(pairs: Sequence[tuple[str, float]]) -> Markup:
    """A stacked bar of (name, share) pairs; of more than STYLES, the largest ones and the sum of the others."""
    if len(pairs) > STYLES:
        pairs = sorted(pairs, key=lambda pair: -pair[1])
        pairs = [*pairs[: STYLES - 1], ("all others", sum(share for _, share in pairs[STYLES - 1 :]))]
    drawn, start = [], 0.0
    for style, (name, share) in enumerate(pairs):
        width = max(share, 0.0) * 100
        if width:
            hover = element("title", f"{short(name)}: {percent(share)}")
            size = {"x": start, "y": 0, "width": max(width - 0.6, 0), "height": 10}
            drawn.append(element("rect", hover, class_=f"fill s{style % STYLES}", **size))
        start += width
    title = ", ".join(f"{short(name)} {percent(share)}" for name, share in pairs)
    return picture(100, 10, title, "shares of the classes", *drawn, kind="strip")


# ---- frames ----


class Frame:
    """Converts numbers to lengths inside the margins, and draws axes, lines and guides there."""

    def __init__(
        self, x: Axis, y: Axis, width: float, height: float, *, left: float = LEFT, right: float = RIGHT
    ) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = left, width - right, TOP, height - BOTTOM

    def x_of(self, value: float) -> float:
        return self.left + (self.right - self.left) * _share_of(value, self.x)

    def y_of(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * _share_of(value, self.y)

    def axes(self) -> Markup:
        drawn = []
        for value in ticks(self.y.low, self.y.high):
            y = self.y_of(value)
            drawn.append(path(f"M{self.left} {length(y)}H{self.right}", class_="grid"))
            drawn.append(element("text", tick_label(value), x=self.left - 6, y=y + 4, class_="end"))
        for value in ticks(self.x.low, self.x.high):
            drawn.append(element("text", tick_label(value), x=self.x_of(value), y=self.bottom + 16, class_="mid"))
        drawn.append(path(f"M{self.left} {self.top}V{self.bottom}H{self.right}", class_="axis"))
        middle, centre = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        drawn.append(element("text", short(self.x.label, MAX_LABEL), x=middle, y=self.bottom + 34, class_="mid"))
        turned = f"rotate(-90 11 {length(centre)})"
        drawn.append(element("text", short(self.y.label, MAX_LABEL), x=11, y=centre, class_="mid", transform=turned))
        return together(drawn)

    def line(self, line: Line) -> Markup:
        pairs = zip(line.x, line.y, strict=False)
        known = [(self.x_of(x), self.y_of(y)) for x, y in pairs if is_number(x) and is_number(y)]
        points = [known[index] for index in evenly_spaced(len(known), MAX_POINTS)] if known else []
        if not points:
            return Markup("")
        (x, y), *rest = points
        data = f"M{length(x)} {length(y)}"
        for x, y in rest:
            data += f"H{length(x)}V{length(y)}" if line.step else f"L{length(x)} {length(y)}"
        marked = bool(line.marker) and len(points) <= MAX_MARKED
        dots = [marker(x, y, line.marker) for x, y in points] if marked else []
        hover = element("title", short(line.name, 60))
        return element("g", hover, path(data), *dots, class_=f"line s{line.style % STYLES}")

    def guide(self, guide: Guide) -> Markup:
        (x1, y1), (x2, y2) = ((self.x_of(x), self.y_of(y)) for x, y in (guide.start, guide.end))
        side, x = ("end", x2 - 4) if x2 > (self.left + self.right) / 2 else ("", x2 + 4)
        label = element("text", short(guide.label), x=x, y=y2 + 12, class_=side) if guide.label else Markup("")
        return path(f"M{length(x1)} {length(y1)}L{length(x2)} {length(y2)}", class_="guide") + label


def _share_of(value: float, axis: Axis) -> float:
    """The position of a number between the ends of an axis, 0 to 1."""
    return min(1.0, max(0.0, (value - axis.low) / (axis.high - axis.low))) if axis.high > axis.low else 0.5


def _x_axis(
    low: float, high: float, x_of: Callable[[float], float], height: float, label: str, below: float
) -> list[Markup]:
    """Tick labels, `below` units under the frame, and the label of the axis."""
    y = height - BOTTOM + below
    numbers = [element("text", tick_label(value), x=x_of(value), y=y, class_="mid") for value in ticks(low, high)]
    return [*numbers, element("text", short(label, MAX_LABEL), x=WIDTH // 2, y=height - 6, class_="mid")]


def _whisker(
    x_of: Callable[[float], float], value: float, ends: Interval, middle: float, style: int, radius: float
) -> Markup:
    """A value's marker, a dot for style 0 and a square for style 1, with its interval as a line."""
    line = [path(f"M{length(x_of(ends[0]))} {middle}H{length(x_of(ends[1]))}")] if ends else []
    dot = marker(x_of(value), middle, MARKERS[style], radius)
    return element("g", *line, dot, class_=f"line solid s{style}")
