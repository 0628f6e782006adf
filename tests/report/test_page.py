"""The page: every section with its figures or its reason, accessible, and every text of a report escaped."""

import copy
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mmbert_core.report import page, page_details
from mmbert_core.report.page import SECTIONS, render
from mmbert_core.report.report_schema import check_report, report_of
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import check_structure
from tests.support import reports
from tests.support.page_tree import Element, tree_of

NAMES = [
    "Headline",
    "Warnings",
    "Baselines",
    "Threshold",
    "Calibration",
    "ROC",
    "Precision and recall",
    "Confusion",
    "Scores",
    "Training",
    "Slices",
    "Importance",
    "Errors",
    "Config",
    "Data",
    "Versions",
]


def page_of(report: dict[str, Any]) -> str:
    """The page of a report.json, also of one that its check would refuse."""
    return render(report_of(report))


@pytest.fixture(scope="module", params=reports.EXAMPLES)
def html(request) -> str:
    return page_of(reports.EXAMPLES[request.param]())


def sections_of(html: str) -> dict[str, Element]:
    return {section.attributes["id"]: section for section in tree_of(html).all("section")}


def section(report: dict, name: str) -> Element:
    return sections_of(page_of(report))[name]


def row_of(table_text: Element, head: str) -> list[str]:
    """The cells of the first row that begins with `head`."""
    return next(
        [cell.text for cell in row.children]
        for row in table_text.all("tr")
        if isinstance(row.children[0], Element) and row.children[0].text == head
    )


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


# ---- what the sections say ----


def test_headline_shows_six_figures_with_interval_and_best_baseline():
    report = reports.binary_report()
    report["metrics"]["model"]["mcc"] = {"value": None, "interval": None, "reason": "only one class in the labels"}
    tree = section(report, "headline")
    cards = [element.text for element in tree.all("div") if "card" in element.classes]
    assert len(cards) == 6
    assert cards[0] == "auroc0.9575[0.9465, 0.9665]0.0151 better than the best baseline: 0.9424 (text only)"
    assert (
        cards[4] == "log_loss0.2042[0.1932, 0.2132]0.0151 better than the best baseline: 0.2193 (text only)"
    )  # less is better
    report["metrics"]["names"] = ["recall", "precision", *report["metrics"]["names"]]
    cards = [element.text for element in section(report, "headline").all("div") if "card" in element.classes]
    assert (
        all(re.fullmatch(r"(recall|precision)0\.\d{4}\[0\.\d{4}, 0\.\d{4}\]", each) for each in cards[:2])
        and "better" in cards[2]
    )
    assert (
        row_of(tree, "mcc") == ["mcc", "–", "", "only one class in the labels"]
        and row_of(tree, "recall")[1] == "0.9540"
    )


def test_a_model_below_its_baseline_says_so():
    report = reports.binary_report()
    for row in report["baselines"]["rows"]:
        row["metrics"]["auroc"]["value"] = 0.97
        row["metrics"]["log_loss"]["value"] = 0.1
    cards = section(report, "headline").text
    assert (
        "0.0125 worse than the best baseline: 0.9700" in cards
        and "0.1042 worse than the best baseline: 0.1000" in cards
    )
    assert "better" not in section(report | {"baselines": {"reason": "no labels"}}, "headline").text


def test_the_model_and_its_baselines_have_every_metric():
    tree = section(reports.binary_report(), "baselines")
    assert "The model is above all baselines in auroc: 0.958 against 0.942 (text only)." in tree.text
    assert row_of(tree, "auroc") == [
        "auroc",
        "0.9575[0.9465, 0.9665]",
        "0.6575",
        "0.7675[0.7565, 0.7765]",
        "0.9424[0.9314, 0.9514]",
    ]
    assert len(list(tree.all("tr"))) == 1 + len(reports.METRICS)


def test_threshold_and_calibration_have_reasons_and_figures():
    report = reports.binary_report()
    report["threshold"] |= {"value": 0.5, "precision": None, "reason": "no threshold reaches precision 0.99"}
    report["calibration"] |= {
        "temperature": 1.0,
        "bins": [],
        "calibrated_bins": None,
        "reason": "150 validation rows, at least 200 are needed",
    }
    sections = sections_of(page_of(report))
    assert (
        "no threshold reaches precision 0.99" in sections["threshold"].text
        and "0.5000" in sections["threshold"].text
        and "with recall 0.9540" in sections["threshold"].text
    )
    assert "precision0.8909" in sections["threshold"].text  # of the report's rows, at that threshold
    assert "150 validation rows" in sections["calibration"].text
    assert row_of(sections["threshold"], "0.95") == ["0.95", "0.9727", "0.1855", "0.6975", "430.0", "18.0"]


def test_curves_are_read_off_at_round_rates():
    report = reports.binary_report()
    report["roc"]["curves"] = {"1": {"x": [0, 0.01, 0.04, 0.3, 1], "y": [0, 0.5, 0.7, 0.9, 1], "area": 0.9}}
    report["precision_recall"]["curves"] = {
        "1": {"x": [0.1, 0.5, 0.85, 1], "y": [1, 0.9, 0.8, 0.3], "area": 0.8, "share": 0.3}
    }
    sections = sections_of(page_of(report))
    assert row_of(sections["roc"], "1") == ["1", "0.9000", "0.5000", "0.7000", "0.7000", "0.7000"]
    assert row_of(sections["precision-and-recall"], "1") == [
        "1",
        "0.8000",
        "30.0%",
        "0.9000",
        "0.8000",
        "0.3000",
        "0.3000",
    ]


def test_precision_and_recall_steps_do_not_depend_on_the_order_of_the_points():
    report = reports.binary_report()
    turned = copy.deepcopy(report)
    for curve in turned["precision_recall"]["curves"].values():
        curve["x"].reverse()
        curve["y"].reverse()
    assert page_of(report) == page_of(turned)


def test_confusion_has_each_class_and_the_pairs_taken_for_each_other():
    report = reports.report(["a", "b", "c"], [[80, 15, 5], [0, 50, 0], [30, 0, 70]])
    tree = section(report, "confusion")
    pairs = next(table for table in tree.all("table") if "Most frequent mistakes" in table.text)
    assert [[cell.text for cell in row.children] for row in pairs.all("tr")][1:] == [
        ["c", "a", "30", "30.0%"],
        ["a", "b", "15", "15.0%"],
        ["a", "c", "5", "5.0%"],
    ]
    assert row_of(tree, "a") == ["a", "100", "110", "0.7273", "0.8000", "0.7619"]
    [folded] = tree.all("details")
    assert row_of(folded, "a") == ["a", "80", "15", "5"]


def test_the_most_frequent_of_very_many_classes_are_drawn():
    names = [f"c{index}" for index in range(60)]
    report = reports.report(names, [[(index + 1) if row == index else 0 for row in range(60)] for index in range(60)])
    tree = section(report, "confusion")
    assert "Of 60 classes the 40 most frequent ones are drawn." in tree.text
    [folded] = tree.all("details")
    assert [row.children[0].text for row in folded.all("tr")][1:] == names[20:]


def test_training_names_the_best_step():
    tree = section(reports.binary_report(), "training")
    assert "step 240, the best in val/auroc" in tree.text and row_of(tree, "240 (best)")[1] == "0.21"
    report = reports.binary_report()
    report["training"] |= {"validations": [], "best_step": None, "metric": None, "train_loss": [], "lr": []}
    assert section(report, "training").text.count("no values") == 2


def test_slices_say_what_is_left_out_and_why_a_figure_is_missing():
    report = reports.binary_report()
    tree = section(report, "slices")
    assert "only one class in the labels" in tree.text and "left" not in tree.text
    assert [row.children[2].text[:6] for row in tree.all("tr")][1:3] == ["0.8553", "0.8621"]
    report["slices"]["rows"] = reports.slice_rows(["0", "1"], ["a", "b"], 150)
    tree = section(report, "slices")
    assert (
        f"301 slices; the {page_details.MAX_SLICES} worst are shown" in tree.text
        and len(list(tree.all("tr"))) == 1 + page_details.MAX_SLICES
    )


def test_a_wrong_row_shows_its_text_unchanged_with_both_signs_marked_without_colour():
    report = reports.binary_report()
    report["errors"]["rows"] = [
        {
            "place": "test.csv, row 3",
            "id": None,
            "label": "0",
            "pred": "1",
            "prob": 0.998,
            "columns": {"Age": "39"},
            "method": "gradient x input",
            "tokens": [["not", -0.7], [" so", 0.05], [" very", 0.2], [" good", 1.0], ["\n", 0.0], ["<b>", None]],
        },
        {
            "place": "test.csv, row 4",
            "id": "x",
            "label": "0",
            "pred": "1",
            "prob": None,
            "columns": {},
            "tokens": [],
            "method": None,
        },
    ]
    tree = section(report, "errors")
    [text] = (element for element in tree.all("div") if "tokens" in element.classes)
    assert text.text == "not so very good\n<b>"
    assert [(mark.attributes["class"], mark.text) for mark in text.all("mark")] == [
        ("n3", "not"),
        ("p1", "very"),
        ("p3", "good"),
    ]
    assert "Strongest for: good (1.00), very (0.20); against: not (-0.70) (gradient x input)" in tree.text
    css = CSS
    assert (
        "mark.p1, mark.p2, mark.p3 { text-decoration: underline solid" in css
        and "mark.n1, mark.n2, mark.n3 { text-decoration: underline dashed" in css
    )
    assert "test.csv, row 4, id x" in tree.text
    assert "every row is right" in section(reports.binary_report() | {"errors": {"rows": []}}, "errors").text


def test_config_data_and_versions_are_listed():
    sections = sections_of(page_of(reports.binary_report()))
    assert row_of(sections["config"], "lr") == ["lr", "0.0002"] and row_of(sections["config"], "text_name") == [
        "text_name",
        '["Title", "Review Text"]',
    ]
    assert row_of(sections["config"], "head_lr") == ["head_lr", "null"] and row_of(
        sections["config"], "microbatches_per_step"
    ) == ["microbatches_per_step", "4"]
    assert (
        row_of(sections["data"], "class 1") == ["class 1", *["1,933 (82.3%)"] * 3]
        and "7,345,678" in sections["data"].text
    )
    assert row_of(sections["versions"], "torch") == ["torch", "2.13.0"]


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


CSS = (Path(page.__file__).parent / "templates/report.css").read_text(encoding="utf-8")
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


def test_a_threshold_of_every_row_is_said_in_words():
    report = reports.binary_report()
    report["threshold"] |= {"value": -1.0}
    report["threshold"]["table"].append(
        {
            "threshold": -1.0,
            "precision": 0.8,
            "recall": 1.0,
            "f1": 0.9,
            "alerts_per_1000": 1000.0,
            "false_alerts_per_1000": 200.0,
        }
    )
    sections = sections_of(page_of(report))
    assert (
        "Every row counts as class" in sections["threshold"].text
        and row_of(sections["threshold"], "every row")[2] == "1.0000"
    )
    assert "Dashed: the threshold, every row." in sections["scores"].text
    assert "-1.0" not in sections["threshold"].text + sections["scores"].text
