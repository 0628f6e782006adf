"""The confusion matrix as inline SVG. K classes."""

from collections.abc import Sequence

from markupsafe import Markup

from mmbert_core.report.charts import WIDTH, Texts
from mmbert_core.report.formatting import brief, count, percent, short
from mmbert_core.report.svg import element, length, path, picture

SHADES = (0.0, 0.02, 0.1, 0.25, 0.5)  # largest share of the label's rows of shade 0, 1, ...; shade 5 is above the last
MAX_NUMBERED = 10  # classes of a grid with numbers in its cells; with more classes, cells have a hover text only
CELL, MAX_CELL = 18, 96  # sides of a cell without a number, and of the largest cell with one


def confusion_grid(counts: Sequence[Sequence[int]], names: Sequence[str], texts: Texts) -> Markup:
    """`counts` [K, K]: labels down, predictions across; shaded by the share of the label's rows."""
    numbered = len(names) <= MAX_NUMBERED
    side = min(max(46, 300 // max(len(names), 1)) if numbered else CELL, MAX_CELL)
    max_length = 14 if numbered else 18
    upright = not numbered or len(names) > 3  # the columns' names are turned by 90 degrees
    left = 34 + 6.4 * max((min(len(short(name, max_length)), max_length) for name in names), default=1)
    top = 26 + (left - 30 if upright else 18)
    drawn = []
    for index, row in enumerate(counts):
        drawn += _row(row, index, names, (left, top + index * side, side), numbered)
    for index, name in enumerate(names):
        middle = (index + 0.5) * side
        drawn.append(element("text", short(name, max_length), x=left - 6, y=top + middle + 4, class_="end"))
        if upright:
            x, turned = left + middle + 4, f"rotate(-90 {length(left + middle + 4)} {length(top - 6)})"
            drawn.append(element("text", short(name, max_length), x=x, y=top - 6, class_="", transform=turned))
        else:
            drawn.append(element("text", short(name, max_length), x=left + middle, y=top - 6, class_="mid"))
    width, height, centre = left + len(names) * side + 8, top + len(names) * side + 8, top + len(names) * side / 2
    drawn.append(element("text", "predicted", x=left, y=14, class_="strong"))
    turned = f"rotate(-90 12 {length(centre)})"
    drawn.append(element("text", "label", x=12, y=centre, class_="strong mid", transform=turned))
    # with few classes the picture is as wide as the other charts, so that its texts have the same size
    width, kind = (max(width, WIDTH), "chart") if numbered else (width, "chart wide")
    return picture(width, height, texts.title, texts.desc, *drawn, kind=kind)


def _row(
    row: Sequence[int], index: int, names: Sequence[str], corner: tuple[float, float, float], numbered: bool
) -> list[Markup]:
    """The cells of one label. `corner`: left, top, and side of a cell. Without numbers, empty cells are not drawn."""
    left, top, side = corner
    total = sum(row)
    drawn = [] if numbered else [path(f"M{length(left)} {length(top)}h{length(len(row) * side)}", class_="grid")]
    for column, value in enumerate(row):
        if not value and not numbered:
            continue
        share = value / total if total else 0.0
        x = left + column * side
        words = f"label {short(names[index])}, predicted {short(names[column])}: {count(value)} ({percent(share)})"
        size: dict[str, str | float] = {"x": x + 1, "y": top + 1, "width": side - 2, "height": side - 2, "rx": 2}
        if index == column:
            size["class_"] = "right"  # the diagonal has an outline, so that colour is not needed to see it
        cell = [element("rect", element("title", words), **size)]
        if numbered:
            cell.append(element("text", brief(value), x=x + side / 2, y=top + side / 2 + 4, class_="mid"))
        drawn.append(element("g", *cell, class_=f"h{shade(share)}"))
    return drawn


def shade(share: float) -> int:
    """0 for no rows, up to 5. The steps are finer for small shares, which mistakes have."""
    return next((index for index, edge in enumerate(SHADES) if share <= edge), len(SHADES))


def shades() -> list[tuple[Markup, str]]:
    """(square, words) of a legend: each shade and its range of shares."""
    words = [f"up to {edge:.0%}" for edge in SHADES[1:]] + [f"above {SHADES[-1]:.0%}"]
    legend = []
    for index, word in enumerate(words, 1):
        square = element("rect", class_=f"h{index}", width=28, height=12, rx=2)
        legend.append((element("svg", square, class_="swatch", viewBox="0 0 28 12", aria_hidden="true"), word))
    return legend
