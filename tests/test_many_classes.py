"""A run of 400 classes: bounded work, files, page and output; test_metrics.json has the figures of every class."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbert_core import cli, console
from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.evaluation import baselines, class_ranking, metrics
from mmbert_core.evaluation.decision import Decision
from mmbert_core.report import results as report_results
from mmbert_core.report.build import render_again
from mmbert_core.report.model_card import describe
from mmbert_core.report.page import render
from mmbert_core.report.report_schema import report_of
from mmbert_core.report.results import listed_figures
from mmbert_core.training import decision_fit
from tests.support import tiny
from tests.support.page_tree import Element, tree_of

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_CLASSES, MANY = 400, [f"product/{index:04d}" for index in range(400)]


def write_rows(path: Path, num_rows: int) -> None:
    """Class k is that of every 400th row; class 0 has 60 rows more."""
    rng = np.random.default_rng(num_rows)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row_id", "text", "age", "amount", "kind", "label"])
        for row in range(num_rows + 60):
            words = " ".join(rng.choice(tiny.WORDS, size=3))
            label = MANY[row % NUM_CLASSES if row < num_rows else 0]
            writer.writerow([f"{path.stem} {row}", words, rng.integers(100), 1.5, rng.choice(["a", "b"]), label])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One epoch. A call of torchmetrics fails: its functions would compute 400 curves or 160,000 counts."""
    folder = tmp_path_factory.mktemp("many")
    settings = tiny.settings(folder, num_rows=8)
    for name, num_rows in (("train", 800), ("val", 400), ("test", 400)):
        write_rows(folder / f"{name}.csv", num_rows)
    settings |= {"is_binary": False, "num_classes": NUM_CLASSES, "max_epochs": 1, "batch_size": 32, "lr": 1e-2}
    settings["early_stop_metric"] = "val/f1_macro"
    config = Config(**settings, metric_choices=("accuracy", "auroc", "average_precision_class_product/0007"))
    rows_sorted: list[int] = []
    original = class_ranking._rare_rankings

    def counted(preds: np.ndarray, labels: np.ndarray, classes: Any, weights: np.ndarray) -> Any:
        rows_sorted.append(len(classes))
        return original(preds, labels, classes, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "functional", None)
        patch.setattr(report_results, "write_plots", lambda *_, **__: [])
        patch.setattr(class_ranking, "_rare_rankings", counted)
        results = tiny.train(config)
    [test] = (folder / "run").glob("multimodal_bert-*")
    return {
        "config": config,
        "figures": results.test_metrics,
        "folder": folder / "run",
        "test": test,
        "ranked": sum(rows_sorted),
        "report": json.loads((test / "report.json").read_text()),
        "page": tree_of((test / "report.html").read_text()),
    }


def sections_of(page: Element) -> dict[str, Element]:
    return {section.attributes["id"]: section for section in page.all("section")}


def test_every_class_has_its_figure_and_only_those_with_enough_rows_are_resampled(
    run: dict[str, Any],
) -> None:
    written = json.loads((run["test"] / "test_metrics.json").read_text())
    keys = [f"test/average_precision_class_{name}" for name in MANY]
    assert all(0 < written[key] <= 1 for key in keys) and len(written["baselines"]["most frequent class"]) >= 412
    intervals = written["intervals"]
    assert written["test/accuracy"] > 0.1 and intervals["test/accuracy"] and intervals["test/log_loss"]
    # a class of one row has no interval: 37 % of the resamples would not contain it
    assert intervals[keys[0]] and not any(intervals[key] for key in keys[1:])
    assert run["ranked"] == 1


def test_files_of_a_run_do_not_grow_with_the_square_of_its_classes(run: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in (*run["folder"].iterdir(), *run["test"].iterdir())}
    assert sizes["report.json"] < 200_000 and sizes["report.html"] < 300_000
    assert sizes["summary.json"] < 20_000 and sizes["README.md"] < 6_000 and sizes["metrics.jsonl"] < 20_000
    data = run["report"]["data"]["train"]
    assert len(data["classes"]) == 30 and data["classes_left_out"] == 370
    assert sum(data["classes"].values()) + data["rows_left_out"] == 860
    assert "and 370 more classes" in "\n".join(describe(run["folder"]))


def test_the_page_lists_some_classes_and_names_the_file_of_the_others(run: dict[str, Any]) -> None:
    texts = {name: section.text for name, section in sections_of(run["page"]).items()}
    line = "Of the 400 classes those with the lowest average precision are listed; 389 more are in test_metrics.json."
    assert line in texts["headline"]
    assert "product/0007" in texts["headline"]  # the config names it
    assert all("The 10 most frequent of 400 classes." in texts[name] for name in ("roc", "precision-and-recall"))
    assert "400 classes are too many for a grid" in texts["confusion"]
    assert "The counts of all 400 classes are in report.json." in texts["confusion"]
    assert "all other classes" in texts["data"] and "all others" in texts["slices"]
    # the longest table is that of the config
    assert max(len(list(table.all("tr"))) for table in run["page"].all("table")) <= 80
    counts = run["report"]["confusion"]
    assert "counts" not in counts and len(counts["mistakes"]) == 15
    assert sum(counts["labelled"]) == sum(counts["predicted"]) == 460
    label, chosen, rows = counts["mistakes"][0]
    assert rows == max(mistake[2] for mistake in counts["mistakes"]) and label != chosen
    assert render_again(run["test"]).read_text() == render(report_of(run["report"]))


def test_the_output_fits_a_screen(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    console.print_figures(run["figures"], run["config"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and "... 389 more classes in test_metrics.json" in lines[-3]
    assert "average_precision_class_product/0007" in "".join(lines)


def test_up_to_thirty_classes_nothing_is_left_out() -> None:
    figures = {f"test/average_precision_class_{index}": index / 31 for index in range(30)}
    figures |= {"undefined": {}, "intervals": {}, "baselines": {}}
    config = Config(text_name=("text",), label_name="label", model_path="run", is_binary=False, num_classes=31)
    assert listed_figures(figures, "test", config) == (figures, 0)
    more = {**figures, "test/average_precision_class_30": None}
    listed, num_left_out = listed_figures(more, "test", config)
    assert num_left_out == 21 and sum(key.startswith("test/") for key in listed) == 10
    assert "test/average_precision_class_9" in listed
    assert listed_figures({"test/num_rows": 3}, "test", config)[0]["test/num_rows"] == 3


def test_a_model_folder_of_many_classes_is_evaluated_like_its_run(
    run: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_results, "write_plots", lambda *_, **__: [])
    caplog.set_level(logging.WARNING)
    table = str(run["folder"].parent / "test.csv")
    assert cli.main(["evaluate", str(run["folder"]), table, "--output", str(tmp_path), "--num_threads", "1"]) == 0
    [test] = tmp_path.glob("multimodal_bert-*")
    assert json.loads((test / "report.json").read_text())["confusion"] == run["report"]["confusion"]
    assert not [record for record in caplog.records if "section of the report" in record.message]


def test_columns_of_very_many_classes_have_no_baseline(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows x classes of the fit are bounded, because it would take minutes; more than 500 classes give a reason."""
    assert "columns only" in run["figures"]["baselines"]
    assert run["figures"]["no_baselines"] == {"text only": "more than 50 classes"}
    data = prepare(run["config"])
    assert len(decision_fit.sample(data.train, 0, 30)[0]) == 860
    assert len(decision_fit.sample(data.train, 0, 10_000)[0]) == 150
    monkeypatch.setitem(baselines.MAX_CLASSES, baselines.COLUMNS_ONLY, 399)
    assert decision_fit.fit_baselines(data, run["config"]).reasons["columns only"] == "more than 399 classes"


@pytest.mark.parametrize(("num_classes", "expected"), [(30, [0.2, 0.3]), (31, None)])
def test_an_interval_above_its_value_is_omitted_with_many_classes(
    num_classes: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean average precision of many rare classes has such intervals, because resamples repeat rows."""
    monkeypatch.setattr(
        report_results, "bootstrap_intervals", lambda preds, labels, names, **_: {name: (0.2, 0.3) for name in names}
    )
    labels = np.arange(90) % num_classes
    preds = np.full((90, num_classes), 1 / num_classes, np.float32)  # average precision 1 / K, AUROC one half
    config = Config(text_name=("text",), label_name="label", model_path="run", is_binary=False, num_classes=num_classes)
    names = [str(index) for index in range(num_classes)]
    figures = report_results.figures_of(
        preds, labels, None, stage="test", config=config, class_names=names, decision=Decision()
    )
    assert figures["intervals"]["test/average_precision"] == expected and figures["test/average_precision"] < 0.2
    assert report_results.around((0.2, 0.3), 0.2) == (0.2, 0.3) and report_results.around(None, 0.2) is None
