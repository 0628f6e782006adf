"""Charts: well-formed SVG whose marks stand where the numbers say."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mmbert_core.report import charts, confusion_chart
from mmbert_core.report.charts import Axis, Guide, Line, Texts
from mmbert_core.report.report_schema import Bin
from mmbert_core.report.svg import range_of, swatch, ticks
from mmbert_core.report.thinning import evenly_along, evenly_spaced

TEXTS = Texts("t", "d")
HOSTILE = """</title></svg><script>alert(1)</script>"'&\x00\ud800"""


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def path_of(svg: str) -> str:
    """The data of the first curve."""
    return parsed(svg).find("g[@class='line s0']/path").get("d")


def words_of(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 300, [0, 100, 200, 300]),
        (0.89, 0.957, [0.9, 0.92, 0.94]),
        (-0.1, 0.35, [-0.1, 0, 0.1, 0.2, 0.3]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_numbers_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_size_are_few_and_inside():
    for power in range(-12, 13):
        for high in (1.0, 1.7, 3.3, 9.9):
            positions = ticks(0.1 * 10**power, high * 10**power)
            assert (
                2 <= len(positions) <= 6
                and 0.0999 * 10**power <= positions[0]
                and positions[-1] <= high * 1.001 * 10**power
            )


def test_small_numbers_fit_the_margin():
    svg = charts.plot([Line("a", [0, 20_000], [0, 2e-4])], Axis("step", 0, 20_000), Axis("", 0, 2e-4), texts=TEXTS)
    assert [word for word in words_of(svg) if word][:5] == [
        "0",
        "5e-5",
        "1e-4",
        "1.5e-4",
        "2e-4",
    ] and "20,000" in words_of(svg)


def test_range_of_has_air_and_is_never_empty():
    assert range_of([0.9, 0.8, math.nan]) == pytest.approx((0.795, 0.905))
    for values in ([], [0.0], [5.0], [math.nan]):
        low, high = range_of(values)
        assert low < high


def test_a_curve_goes_from_corner_to_corner():
    svg = charts.plot([Line("a", [0, 1], [0, 1])], Axis("x"), Axis("y"), texts=TEXTS)
    left, right, top, bottom = charts.LEFT, charts.WIDTH - charts.RIGHT, charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert path_of(svg) == f"M{left} {bottom}L{right} {top}"


def test_a_step_holds_its_value_until_the_next():
    svg = charts.plot([Line("a", [1, 0.5, 0], [0, 0.5, 1], step=True)], Axis("x"), Axis("y"), texts=TEXTS)
    assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+){2}", path_of(svg))


def test_a_long_curve_is_thinned_with_both_ends_and_without_gaps_of_nan():
    y = [math.nan if index == 7 else 0.5 for index in range(5000)]
    svg = charts.plot([Line("a", range(5000), y)], Axis("x", 0, 4999), Axis("y"), texts=TEXTS)
    assert path_of(svg).count("L") == charts.MAX_POINTS - 1 and "nan" not in svg
    assert path_of(svg).startswith(f"M{charts.LEFT} ") and f"L{charts.WIDTH - charts.RIGHT} " in path_of(svg)


@pytest.mark.parametrize("num_points", [1, 2, 399, 400, 401, 4321])
def test_thinned_points_are_ascending_and_have_both_ends(num_points):
    x = np.linspace(0, 1, num_points) ** 3
    for kept in (evenly_spaced(num_points, 400), evenly_along(x, x**0.1, 400)):
        assert len(kept) <= 400 and (kept[0], kept[-1]) == (0, num_points - 1) and (np.diff(kept) > 0).all()
        assert num_points > 400 or kept.tolist() == list(range(num_points))


def test_a_curve_of_many_points_carries_no_markers():
    for points, markers in ((charts.MAX_MARKED, charts.MAX_MARKED), (charts.MAX_MARKED + 1, 0)):
        svg = charts.plot([Line("a", range(points), range(points), marker="dot")], Axis("x"), Axis("y"), texts=TEXTS)
        assert len(list(parsed(svg).iter("circle"))) == markers


def test_numbers_outside_stay_at_the_edge():
    svg = charts.plot(
        [Line("a", [-5, 9], [7, -3])], Axis("x"), Axis("y"), texts=TEXTS, guides=[Guide((2, 0), (2, 5), "far")]
    )
    numbers = [float(number) for number in re.findall(r"[\d.]+", path_of(svg))]
    assert max(numbers) <= charts.WIDTH and min(numbers) >= 0


def test_each_histogram_is_scaled_to_its_own_largest_bin():
    svg = charts.histograms([0, 0.5, 1], {"a": [1, 2], "b": [3000, 1500]}, label="p", texts=TEXTS, dashed_at=0.5)
    heights = [[float(bar.get("height")) for bar in group.iter("rect")] for group in parsed(svg).iter("g")]
    assert heights == [[30, 60], [60, 30]]
    assert words_of(svg)[:2] == ["a: 3 rows, at most 2 in a bar", "b: 4,500 rows, at most 3,000 in a bar"]
    assert len([path for path in parsed(svg).iter("path") if path.get("class") == "guide"]) == 2


def test_histograms_of_no_rows_are_empty_and_not_an_error():
    assert not list(parsed(charts.histograms([0, 1], {"a": [0]}, label="p", texts=TEXTS)).iter("rect"))


def test_reliability_leaves_empty_bins_out():
    full, empty = (
        Bin(low=0, high=0.5, rows=5, mean=0.25, share=0.5),
        Bin(low=0.5, high=1, rows=0, mean=None, share=None),
    )
    svg = charts.reliability({"before": [full, empty], "after": [full]}, x_label="x", y_label="y", texts=TEXTS)
    assert (
        len(list(parsed(svg).iter("circle"))) == 1 and len(list(parsed(svg).iter("rect"))) == 1
    )  # a dot before, a square after


def test_interval_dots_share_one_scale():
    svg = charts.interval_dots([("model", 0.9, (0.85, 0.95)), ("base", 0.6, None)], label="auroc", texts=TEXTS)
    [dot], [square] = list(parsed(svg).iter("circle")), list(parsed(svg).iter("rect"))
    assert float(dot.get("cx")) > float(square.get("x")) + 100
    whisker = parsed(svg).find("g[@class='line solid s0']/path").get("d")
    left, right = (float(number) for number in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker).groups())
    assert left < float(dot.get("cx")) < right
    assert words_of(svg)[:2] == ["model: 0.9000", "base: 0.6000"]


def test_a_bar_below_zero_runs_left():
    def ends(svg):
        bar = parsed(svg).find("rect")
        return float(bar.get("x")), float(bar.get("x")) + float(bar.get("width"))

    up, down = ends(charts.bar(0.5, 0.1, (-1, 1))), ends(charts.bar(-0.5, None, (-1, 1)))
    assert down[1] == up[0] == 80 and up[1] > 80 > down[0]


def test_shares_of_many_classes_are_the_largest_and_the_others():
    rects = list(parsed(charts.shares([(f"class {index}", 1 / 30) for index in range(30)])).iter("rect"))
    assert len(rects) == 10 and rects[-1].find("title").text == "all others: 70.0%"
    assert len(list(parsed(charts.shares([("a", 0.0), ("b", 1.0)])).iter("rect"))) == 1


def test_few_classes_carry_numbers_and_many_hover_texts():
    few = confusion_chart.confusion_grid([[90, 10], [0, 1_234_567]], ["no", "yes"], texts=TEXTS)
    assert {"90", "10", "0", "1M"} <= set(words_of(few))
    names = [f"class number {index}" for index in range(30)]
    many = parsed(
        confusion_chart.confusion_grid(
            [[index + column for column in range(30)] for index in range(30)], names, texts=TEXTS
        )
    )
    hovers = [title.text for title in many.iter("title")]
    assert (
        "label class number 3, predicted class number 4: 7 (1.3%)" in hovers and len(hovers) == 900
    )  # the empty cell of 0, 0 is not drawn, the chart's own title is
    assert len([rect for rect in many.iter("rect") if rect.get("class") == "right"]) == 29
    assert float(many.get("width")) == float(many.get("viewBox").split()[2]) < 900


def test_shades_are_fine_where_the_mistakes_are():
    assert [confusion_chart.shade(share) for share in (0, 0.001, 0.02, 0.05, 0.2, 0.5, 0.51, 1)] == [
        0,
        1,
        1,
        2,
        3,
        4,
        5,
        5,
    ]


def all_charts(name: str) -> list[str]:
    full = Bin(low=0, high=1, rows=5, mean=0.25, share=0.5)
    texts = Texts(name, name)
    return [
        charts.plot(
            [Line(name, [0, 1], [0, 1], style, marker=marker) for style, marker in enumerate(("", "dot", "square"))],
            Axis(name),
            Axis(name),
            guides=[Guide((0, 0), (1, 1), name)],
            texts=texts,
        ),
        charts.histograms([0, 0.5, 1], {name: [1, 2]}, label=name, texts=texts),
        charts.reliability({name: [full]}, x_label=name, y_label=name, texts=texts),
        charts.interval_dots([(name, 0.9, (0.85, 0.95))], label=name, texts=texts),
        charts.interval_dot(0.9, (0.8, 1.0), (0.5, 1.0), reference=0.95),
        charts.bar(0.5, 0.1, (-1, 1)),
        charts.shares([(name, 0.4), ("b", 0.6)]),
        confusion_chart.confusion_grid([[1, 2], [3, 4]], [name, "b"], texts=texts),
        confusion_chart.confusion_grid([[1] * 12] * 12, [name] * 12, texts=texts),
    ]


def test_every_chart_is_well_formed_and_named_and_no_name_leaves_its_place():
    for svg, plain in zip(all_charts(HOSTILE), all_charts("plain"), strict=True):
        tree = parsed(svg)
        assert tree.get("role") == "img" and tree[0].tag == "title" and tree[0].text and tree[1].tag == "desc"
        assert [element.tag for element in tree.iter()] == [element.tag for element in parsed(plain).iter()]
        svg.encode("utf-8")
    assert swatch(3) != swatch(4) and parsed(swatch(3)).get("aria-hidden") == "true"
    assert [words for _, words in confusion_chart.shades()][-1] == "above 50%"
