"""The page: every section with its figures or its reason, accessible, and every text of a report escaped."""

import copy
import json
import re
from xml.etree import ElementTree

import pytest

from mmbert_core.report.page import SECTIONS
from mmbert_core.report.report_schema import check_report
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import check_structure
from tests.support import reports
from tests.support.page_tree import Element, tree_of
from tests.support.report_pages import CSS, page_of, section, sections_of

NAMES = (
    "Headline,Warnings,Baselines,Blend,Threshold,Calibration,ROC,Precision and recall,Confusion,Scores,Training,Slices,"
    "Importance,Errors,Config,Data,Versions"
).split(",")


@pytest.fixture(scope="module", params=reports.EXAMPLES)
def html(request) -> str:
    return page_of(reports.EXAMPLES[request.param]())


# ---- every section ----


def test_every_section_is_there_under_its_name_and_in_the_nav(html):
    sections = sections_of(html)
    assert [next(tree.all("h2")).text for tree in sections.values()] == NAMES == [name for name, *_ in SECTIONS]
    assert all(len(tree.text) > len(name) for name, tree in zip(NAMES, sections.values()))
    [nav] = tree_of(html).all("nav")
    assert [link.attributes["href"] for link in nav.all("a")] == [f"#{name}" for name in sections] and [
        link.text for link in nav.all("a")
    ] == NAMES


def test_a_section_without_figures_says_why():
    sections = sections_of(page_of(reports.empty_report()))
    for (_, key, *_), tree in zip(SECTIONS, sections.values(), strict=True):
        assert f"no {key} without labels" in tree.text and not list(tree.all("svg")) and not list(tree.all("table"))
    incomplete = reports.binary_report()
    del incomplete["importance"]
    assert "not in this report" in section(incomplete, "importance").text


def test_charts_and_tables_where_there_are_figures():
    for report in (reports.binary_report(), reports.multiclass_report()):
        sections = sections_of(page_of(report))
        with_charts = {
            name
            for name, tree in sections.items()
            if any(svg.attributes.get("role") == "img" for svg in tree.all("svg"))
        }
        expected = {
            "baselines",
            "calibration",
            "roc",
            "precision-and-recall",
            "confusion",
            "scores",
            "training",
            "slices",
            "importance",
        }
        assert with_charts == expected | ({"threshold"} if report["task"] == "binary" else set())
        assert all(list(sections[name].all("table")) for name in with_charts)  # the same figures as text
    assert "several classes" in sections["threshold"].text


def test_the_page_is_a_function_of_the_report():
    report = reports.binary_report()
    before = copy.deepcopy(report)
    assert page_of(report) == page_of(json.loads(json.dumps(report))) and report == before


def test_another_format_is_one_error_line():
    with pytest.raises(InputError, match="report.json: format_version: expected 1, found 2"):
        check_structure(reports.binary_report() | {"format_version": 2}, check_report, "report.json")


# ---- readable by anybody ----


def test_headings_ids_and_landmarks(html):
    root = tree_of(html)
    [page] = root.all("html")
    assert page.attributes["lang"] == "en" and [
        len(list(root.all(tag))) for tag in ("main", "nav", "header", "h1")
    ] == [1, 1, 1, 1]
    assert next(root.all("title")).text  # the page's, in its head: those of the pictures come later
    levels = [int(element.tag[1]) for element in root.all() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1 and all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:]))
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert {link.attributes["href"][1:] for link in root.all("a")} <= set(ids)
    assert {element.attributes["aria-labelledby"] for element in root.all("section")} <= set(ids)
    first = next(element for element in root.all() if "href" in element.attributes)
    assert first.classes == {"skip"} and first.attributes["href"] == "#content"


def test_tables_have_captions_and_scopes_and_boxes_names_for_the_keyboard(html):
    root = tree_of(html)
    for table in root.all("table"):
        assert table.children[0].tag == "caption" and table.children[0].text
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in table.all("th"))
        widths = {len(row.children) for row in table.all("tr")}
        assert len(widths) == 1, table.children[0].text
    boxes = [element for element in root.all() if element.classes & {"scroll", "long"}]
    assert all(
        box.attributes.get("tabindex") == "0"
        and box.attributes.get("role") == "region"
        and box.attributes.get("aria-label")
        for box in boxes
    )
    in_boxes = sum(len(list(box.all("table"))) for box in boxes)
    assert in_boxes == len(list(root.all("table")))


def test_pictures_are_well_formed_and_named(html):
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        if tree.get("aria-hidden") != "true":
            assert tree.get("role") == "img" and tree[0].tag == "title" and tree[0].text
    assert len(pictures) == len(list(tree_of(html).all("svg")))


def luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", root)) for root in re.findall(r":root \{[^}]*\}", CSS))
# Text on the colour behind it, at least 4.5 to 1; lines, bars and marks at least 3 to 1.
TEXT_ON = [(text, ground) for text in ("text", "muted", "accent") for ground in ("page", "surface", "sunken")]
TEXT_ON += [("good", "surface"), ("bad", "surface"), ("text", "warn-soft")]
TEXT_ON += [("accent", "accent-soft"), ("text", "accent-soft")]
TEXT_ON += [(f"t{index}", f"h{index}") for index in range(6)]
TEXT_ON += [("text", f"{sign}{index}") for sign in "pn" for index in (1, 2, 3)]
MARK_ON = [(f"s{index}", "surface") for index in range(10)]
MARK_ON += [("strong-line", "surface"), ("accent", "surface"), ("accent", "page")]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out(palette):
    assert LIGHT.keys() == DARK.keys() and len(LIGHT) == 40
    weak = [
        (text, ground, round(contrast(palette[text], palette[ground]), 2))
        for text, ground in TEXT_ON
        if contrast(palette[text], palette[ground]) < 4.5
    ]
    weak += [
        (mark, ground, round(contrast(palette[mark], palette[ground]), 2))
        for mark, ground in MARK_ON
        if contrast(palette[mark], palette[ground]) < 3
    ]
    assert weak == []


def test_the_style_sheet_knows_its_colours_and_the_readers_wishes():
    css = CSS
    used = set(re.findall(r"var\(--([\w-]+)\)", css))
    assert used - LIGHT.keys() == set() and LIGHT.keys() - used == set()
    for wish in (
        "@media screen and (prefers-color-scheme: dark)",
        "@media print",
        ":focus-visible",
        "@media (max-width: 30rem)",
    ):
        assert wish in css
    assert css.count("{") == css.count("}")


# ---- alone and safe ----


def test_nothing_is_loaded_and_nothing_runs(html):
    root = tree_of(html)
    tags = {element.tag for element in root.all()}
    assert (
        tags
        & {
            "script",
            "img",
            "link",
            "iframe",
            "object",
            "embed",
            "form",
            "input",
            "use",
            "image",
            "base",
            "foreignobject",
            "a:href",
        }
        == set()
    )
    attributes = {name for element in root.all() for name in element.attributes}
    assert not [
        name
        for name in attributes
        if name.startswith("on") or name in ("src", "srcset", "style", "data", "xlink:href", "action", "xmlns")
    ]
    assert all(element.attributes["href"].startswith("#") for element in root.all() if "href" in element.attributes)
    [style] = root.all("style")
    assert "url(" not in style.text and "@import" not in style.text and "http" not in style.text
    policies = [
        element.attributes["content"]
        for element in root.all("meta")
        if element.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (
        len(policies) == 1
        and policies[0].startswith("default-src 'none'; style-src 'unsafe-inline';")
        and "script" not in policies[0]
    )


def test_no_text_of_a_report_makes_an_element_or_an_attribute():
    def shape(root: Element) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (element.tag, tuple(element.attributes)) for element in root.all() if element.tag != "wbr"
        ]  # names may break after "/" and "_"

    plain = "x" * len(reports.HOSTILE)
    hostile = page_of(reports.hostile_report())
    assert shape(tree_of(hostile)) == shape(tree_of(page_of(reports.hostile_report(plain))))
    for task in ("binary", "multiclass"):
        reasons = [
            page_of(reports.changed(reports.empty_report() | {"task": task}, lambda value, end=end: value + end))
            for end in (reports.HOSTILE, plain)
        ]
        assert shape(tree_of(reasons[0])) == shape(tree_of(reasons[1]))
    written = tree_of(hostile).text
    assert (
        written.count("<script>document.title='hit'</script>\"'&</style></title></svg>--><img src=x onerror=alert(1)>")
        > 150
    )
    assert written.count("{{ 7 * 7 }}{% include 'page.html' %}{# note #}") > 150  # no text is read as a template
    assert "\u2400\u241b\ufffd\ufffd" in written  # NUL, escape, half a surrogate pair, an override of the direction


def test_any_page_can_be_written_as_utf8_without_control_characters(html):
    html.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", html)


def test_texts_without_letters_and_right_to_left_keep_their_place():
    report = reports.binary_report() | {
        "title": "",
        "class_names": ["", "\u05d0\u05d1\u05d2"],
        "label_name": "\u202e\u202e",
    }
    root = tree_of(page_of(report))
    assert "(empty)" in next(root.all("h1")).text
    assert "\u05d0\u05d1\u05d2" in [element.text for element in root.all("bdi")]


def test_numbers_that_are_null_or_not_finite_are_no_error():
    report = reports.binary_report()

    def without_numbers(tree, kept=("format_version", "counts", "edges", "rows", "repeats")):
        if isinstance(tree, dict):
            return {
                key: value if key in kept and not isinstance(value, list) else without_numbers(value)
                for key, value in tree.items()
            }
        if isinstance(tree, list):
            return [without_numbers(item) for item in tree]
        return float("nan") if isinstance(tree, float) else tree

    html = page_of(without_numbers(report) | {"scores": report["scores"]})
    assert not re.search(r"\bnan\b", re.sub("<code>.*?</code>", "", html))  # the config's values are shown as they are
    assert sections_of(html).keys() == sections_of(page_of(report)).keys()


def test_a_big_report_makes_a_page_of_less_than_two_megabytes():
    html = page_of(reports.big_report())
    assert 500_000 < len(html.encode("utf-8")) < 2_000_000
