"""What the sections of the page say: each figure where it belongs, and reasons where there are none."""

import copy
import re

from mmbert_core.report import page_details
from tests.support import reports
from tests.support.report_pages import CSS, page_of, row_of, section, sections_of


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
    chosen = sections_of(page_of(report))["threshold"].text
    assert "validation rows with " in chosen and "recall 0.9540" in chosen and "could not be followed" not in chosen
    report["threshold"] |= {"value": 0.5, "precision": None, "reason": "no threshold reaches precision 0.99"}
    report["calibration"] |= {
        "temperature": 1.0,
        "reason": "150 validation rows, at least 200 are needed",
    }
    sections = sections_of(page_of(report))
    assert "could not be followed: no threshold reaches precision 0.99. " in sections["threshold"].text
    assert "0.5000" in sections["threshold"].text and "chosen on" not in sections["threshold"].text
    assert "precision0.8909" in sections["threshold"].text  # of the report's rows, at that threshold
    assert "not calibrated 150 validation rows" in sections["calibration"].text
    assert "mean calibrated" not in sections["calibration"].text and "share found" in sections["calibration"].text
    report["threshold"] |= {"rule": "given", "reason": "given when the model was loaded, not chosen on rows"}
    assert "The threshold was given when the model was loaded, " in sections_of(page_of(report))["threshold"].text
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
    assert (
        "mark.p1, mark.p2, mark.p3 { text-decoration: underline solid" in CSS
        and "mark.n1, mark.n2, mark.n3 { text-decoration: underline dashed" in CSS
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
