"""`mmbert compare`: paired figures, what differs, disputed rows; runs that cannot be compared are one line."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbert_core import cli, compare_runs
from mmbert_core.compared_runs import open_run, read_probabilities, read_rows
from mmbert_core.comparison import (
    COMPARISON,
    MAX_ROWS,
    PAGE,
    render_comparison_again,
    texts_or_reason,
    write_comparison,
)
from mmbert_core.config import Config
from mmbert_core.evaluation.intervals import metric_draws
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.inference.model_folder import config_record
from mmbert_core.inference.output_file import prediction_columns, table_line, table_rows
from mmbert_core.report.comparison_page import outcome, render_comparison
from mmbert_core.report.comparison_schema import ComparedValue, Comparison
from mmbert_core.report.typed_json import to_json
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.files import write_json
from tests.report.test_report_file import mutated
from tests.support import tiny
from tests.support.page_tree import tree_of
from tests.support.report_pages import row_of, sections_of
from tests.support.reports import HOSTILE

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES, TIME = ("fine", "abuse"), "2026-01-31-12-00-00"


def write_run(
    folder: Path,
    preds: np.ndarray,
    labels: np.ndarray | None,
    *,
    names: Sequence[str] = NAMES,
    ids: Sequence[str] | None = None,
    time: str = TIME,
    threshold: float = 0.5,
    **changes: Any,
) -> Path:
    """A finished run as far as a comparison reads it: config, labels, and a test that the package's functions write."""
    is_binary = preds.ndim == 1
    settings: dict[str, Any] = {
        "train_path": ("train.csv",),
        "test_path": (str(folder.parent / "test.csv"),),
        "text_name": ("subject", "message"),
        "tab_field_list": ("amount",),
        "label_name": "verdict",
        "id_name": None if ids is None else "message_id",
        "encoder": "encoder",
        "model_path": str(folder),
        "is_binary": is_binary,
        "num_classes": len(names),
    }
    test = folder / f"multimodal_bert-{time}"
    test.mkdir(parents=True)
    resolved = {"pooling": "cls", "precision": "fp32"}
    write_json(folder / "config.json", config_record(Config(**(settings | changes)), resolved))
    write_json(folder / "labels.json", {"names": list(names)})
    columns = prediction_columns(
        preds,
        names,
        is_binary=is_binary,
        id_name=settings["id_name"],
        ids=ids,
        labels=None if labels is None else [names[index] for index in labels],
        calibrated=preds,
        threshold=threshold,
    )
    (test / "test_result_0.tsv").write_text("".join([table_line(columns), *table_rows(columns)]), encoding="utf-8")
    figures = {"test/num_rows": len(preds)}
    write_json(
        test / "test_metrics.json",
        figures if labels is None else figures | {"threshold": threshold if is_binary else None},
    )
    return folder


def rows_of(num_rows: int, num_classes: int = 2, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels, and the probabilities of a weaker and a stronger model that mostly err on the same rows."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    noise, models = rng.normal(size=(num_rows, num_classes)), []
    for strength in (1.0, 1.6):
        logits = strength * np.eye(num_classes)[labels] + noise + 0.3 * rng.normal(size=noise.shape)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        models.append((probabilities[:, 1] if num_classes == 2 else probabilities).astype(np.float32))
    return labels, models


def write_test_file(path: Path, labels: np.ndarray, names: Sequence[str] = NAMES) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["message_id", "subject", "message", "amount", "verdict"])
        for row, label in enumerate(labels):
            writer.writerow([f"m{row}", f"subject {row}", "a\nmessage", row / 2, names[label]])


IDS = [f"m{row}" for row in range(400)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    labels, (weak, strong) = rows_of(400)
    write_test_file(folder / "test.csv", labels)
    write_run(folder / "weak", weak, labels, ids=IDS, threshold=0.3)
    write_run(folder / "strong", strong, labels, ids=IDS, lr=1e-3, seed=7)
    return [str(folder / "weak"), str(folder / "strong")]


@pytest.fixture(scope="module")
def comparison(runs: list[str]) -> Comparison:
    return compare_runs(runs)


def line_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error line of a refused comparison."""
    capsys.readouterr()
    assert cli.main(["compare", *words]) == 2
    output = capsys.readouterr()
    # a busy machine may report progress before the error
    [line] = [line for line in output.err.splitlines() if not line.endswith("seconds so far")]
    assert line.startswith("error: ") and not output.out
    return line


# ---- figures ----


def test_each_metric_has_its_difference_and_the_paired_interval_of_a_plain_bootstrap(comparison):
    labels, models = rows_of(400)
    expected = [
        compute_metrics(
            preds, labels, ["auroc", "f1_score", "log_loss"], "binary", 2, "test", threshold=threshold
        ).values
        for preds, threshold in zip(models, (0.3, 0.5))
    ]
    for metric in ("auroc", "f1_score", "log_loss"):
        weak, strong = (comparison.metrics.runs[name][metric] for name in ("weak", "strong"))
        assert (weak.value, strong.value) == tuple(values[f"test/{metric}"] for values in expected)
        assert strong.difference == strong.value - weak.value and weak.difference is None
        assert strong.interval[0] <= strong.difference <= strong.interval[1]
    generator, differences = np.random.default_rng(0), []
    for _ in range(1000):
        weights = generator.poisson(1.0, 400)
        losses = [-np.log(np.where(labels == 1, preds, 1 - preds.astype(np.float64))) for preds in models]
        differences.append(weights @ (losses[1] - losses[0]) / weights.sum())
    found = comparison.metrics.runs["strong"]["log_loss"].interval
    assert found == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-9)
    assert comparison.metrics.main == "auroc" and comparison.metrics.names[0] == "auroc"
    [verdict] = comparison.metrics.verdicts
    assert verdict.startswith("strong is better: auroc 0.")


def test_another_reference_turns_the_signs(runs, comparison):
    first, other = comparison, compare_runs(runs, against=f"{runs[1]}/")
    assert other.reference == "strong" and other.names == ["weak", "strong"] and other.others == ["weak"]
    auroc, turned = first.metrics.runs["strong"]["auroc"], other.metrics.runs["weak"]["auroc"]
    assert turned.difference == -auroc.difference
    assert turned.interval == pytest.approx([-auroc.interval[1], -auroc.interval[0]])
    assert other.metrics.verdicts[0].startswith("weak is worse: ")


def test_better_and_worse_follow_the_metric_and_the_interval():
    above, around = ComparedValue(value=1.0, difference=0.2, interval=[0.1, 0.3]), [-0.1, 0.3]
    assert (outcome("auroc", above), outcome("log_loss", above)) == ("better", "worse")
    assert outcome("auroc", ComparedValue(value=1.0, difference=0.1, interval=around)) == ""
    assert outcome("ece", ComparedValue(value=1.0, difference=0.1)) == ""


def test_settings_that_differ_and_rows_that_only_one_predicts_right(comparison):
    assert {setting.key: setting.values for setting in comparison.settings} == {
        "lr": {"weak": "2e-05", "strong": "0.001"},
        "seed": {"weak": "0", "strong": "7"},
    }
    labels, (weak, strong) = rows_of(400)
    was_right, is_right = (weak > 0.3) == labels, (strong > 0.5) == labels
    agreement = comparison.agreement["strong"]
    assert (
        agreement.only_this == (is_right & ~was_right).sum() and agreement.both_wrong == (~is_right & ~was_right).sum()
    )
    assert agreement.both_right + agreement.only_reference + agreement.only_this + agreement.both_wrong == 400


# ---- rows ----


def test_the_rows_with_the_largest_differences_and_their_texts(comparison):
    labels, models = rows_of(400)
    of_label = [np.where(labels == 1, preds, 1 - preds.astype(np.float64)) for preds in models]
    order = np.argsort(-np.abs(of_label[0] - of_label[1]), kind="stable")[:MAX_ROWS]
    rows = comparison.disputed_rows.rows
    assert comparison.disputed_rows.without_texts is None and [row.row - 1 for row in rows] == order.tolist()
    for row, position in zip(rows, order):
        assert row.id == f"m{position}" and row.label == NAMES[labels[position]]
        assert row.text == f"subject {position} a\nmessage" and row.columns == {"amount": str(position / 2)}
        assert row.probabilities["strong"] == pytest.approx(of_label[1][position])
        assert row.preds["weak"] == NAMES[int(models[0][position] > 0.3)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (
            lambda path: path.write_text(path.read_text().replace("m7,", "m7b,")),
            "row 8 (line 16): has another id than in",
        ),
        (lambda path: path.write_text(path.read_text().replace("3.5,abuse", "3.5,fine")), "has another label than"),
        (lambda path: path.write_text(path.read_text() + "m400,a,b,1,fine\n"), "the test had 400 rows, found more"),
        (
            lambda path: path.write_text("message_id,subject,message,amount,verdict\n"),
            "has 0 rows now, the test had 400",
        ),
        (lambda path: path.write_text(path.read_text().replace("amount", "sum")), "column 'amount' not found"),
    ],
)
def test_without_the_rows_of_the_test_file_ids_alone_and_why(runs, tmp_path, change, reason):
    folder = shutil.copytree(Path(runs[0]).parent, tmp_path / "runs")
    for name in ("weak", "strong"):
        path = folder / name / "config.json"
        path.write_text(path.read_text().replace(str(Path(runs[0]).parent), str(folder)))
    change(folder / "test.csv")
    run = open_run(folder / "weak")
    texts, why = texts_or_reason(run, read_rows(run), [7, 300])
    assert texts == [None, None] and reason in why


def test_rows_without_texts_have_their_ids(tmp_path):
    labels, models = rows_of(40)
    paths = [write_run(tmp_path / name, preds, labels, ids=IDS[:40]) for name, preds in zip("ab", models)]
    section = compare_runs(paths).disputed_rows
    assert section.without_texts.startswith("ids alone, as the test file is not as it was: ")
    assert len(section.rows) == MAX_ROWS and all(
        row.id and row.text is None and not row.columns for row in section.rows
    )


# ---- the newest test, and a test of its own ----


def test_the_newest_test_counts_and_is_named_and_a_test_folder_is_itself(tmp_path, capsys):
    labels, (weak, strong) = rows_of(60)
    write_run(tmp_path / "a", weak, labels)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newer = write_run(tmp_path / "c", strong, labels, time="2026-02-01-12-00-00")
    shutil.move(next(newer.glob("multimodal_bert-*")), tmp_path / "b")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "b: multimodal_bert-2026-02-01-12-00-00 is the newest of its 2 tests" in output
    assert "no ids in a, b: these rows are paired by their order" in output
    comparison = compare_runs(sorted((tmp_path / "b").glob("multimodal_bert-*")))
    assert [Path(name).name for name in comparison.names] == [run.test_folder for run in comparison.runs]
    assert comparison.runs[0].test_folder.endswith(TIME) and comparison.metrics.verdicts
    same = compare_runs([tmp_path / "a", tmp_path / "b" / f"multimodal_bert-{TIME}"])
    assert same.disputed_rows.reason.startswith("all runs give") and same.agreement["b"].other_class == 0
    value = same.metrics.runs["b"]["auroc"]
    assert value.difference == 0 and value.interval is None
    assert "0.0000 compared with a; no resample of the rows changes" in same.metrics.verdicts[0]


def test_a_trained_run_and_its_evaluation_on_the_same_rows(tmp_path):
    settings = tiny.settings(tmp_path, max_epochs=1, text_name=(), num_rows=16)
    tiny.train(Config(**settings))
    run, test = tmp_path / "run", str(tmp_path / "test.csv")
    assert cli.main(["evaluate", str(run), test, "--threshold", "0.7"]) == 0
    folders = sorted(map(str, run.glob("multimodal_bert-*")))
    assert cli.main(["compare", *folders, "--output", str(tmp_path / "compared")]) == 0
    values = json.loads((tmp_path / "compared" / COMPARISON).read_text())
    for name, folder in zip(values["metrics"]["runs"], folders):
        figures = json.loads((Path(folder) / "test_metrics.json").read_text())
        for metric, value in values["metrics"]["runs"][name].items():
            assert value["value"] == figures[f"test/{metric}"], metric
    assert values["runs"][1]["threshold"] == 0.7
    first = open_run(folders[0])
    assert first.inputs == [test] and len(read_rows(first).ids) == 37


# ---- several classes ----


def test_several_classes_have_figures_by_class_instead_of_curves(tmp_path):
    labels, models = rows_of(200, 4)
    names = ["a", "b", "c", "d"]
    paths = [write_run(tmp_path / name, preds, labels, names=names) for name, preds in zip(("x", "y"), models)]
    comparison = compare_runs(paths)
    assert [row.name for row in comparison.classes.rows] == names and comparison.roc.reason
    second = comparison.classes.rows[1].runs["y"]
    is_right = models[1].argmax(axis=1) == labels
    assert second.right == (is_right & (labels == 1)).sum() and second.recall == pytest.approx(second.right / 50)
    assert second.average_precision.difference is not None and second.average_precision.interval
    sections = sections_of(render_comparison(comparison))
    assert list(sections) == ["runs", "metrics", "settings", "calibration", "classes", "agreement", "disagreement"]
    assert row_of(sections["classes"], "b")[1] == "50"


def test_hundreds_of_classes_and_a_bounded_page(tmp_path):
    labels, models = rows_of(900, 300)
    names = [f"product/{index:03d}" for index in range(300)]
    paths = [write_run(tmp_path / name, preds, labels, names=names) for name, preds in zip(("x", "y"), models)]
    comparison = compare_runs(paths)
    assert len(comparison.classes.rows) == 300
    assert comparison.metrics.runs["y"]["auroc"].interval is None  # too many resamples lack one of the classes
    by_auroc, by_accuracy = comparison.metrics.verdicts
    assert by_auroc.endswith("there is no interval.") and by_accuracy.startswith("y is better: accuracy")
    html = render_comparison(comparison)
    assert len(html) < 100_000 and "25 of 300 classes" in tree_of(html).text
    draws = [metric_draws(preds, labels, ["accuracy"], class_names=names)["accuracy"] for preds in models]
    expected = np.quantile(draws[1] - draws[0], [0.025, 0.975])
    assert comparison.metrics.runs["y"]["accuracy"].interval == pytest.approx(expected)


# ---- the page ----


def test_the_page_has_the_curves_of_all_runs_and_is_written_again_from_its_json(runs, tmp_path, capsys):
    assert cli.main(["compare", *runs, "--output", str(tmp_path / "new" / "folder")]) == 0
    folder = tmp_path / "new" / "folder"
    html = (folder / PAGE).read_text()
    sections = sections_of(html)
    for key in ("roc", "precision-and-recall", "calibration"):
        [chart] = [svg for svg in sections[key].all("svg") if svg.attributes.get("role") == "img"]
        assert [next(line.all("title")).text for line in chart.all("g") if "line" in line.classes] == ["weak", "strong"]
    assert row_of(sections["settings"], "lr") == ["lr", "2e-05", "0.001"]
    assert "better" in row_of(sections["metrics"], "auroc")[2] and "http:" not in html
    (folder / PAGE).unlink()
    assert cli.main(["report", str(folder)]) == 0 and (folder / PAGE).read_text() == html
    values = json.loads((folder / COMPARISON).read_text())
    del values["metrics"]["runs"]["strong"]
    write_json(folder / COMPARISON, values)
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 2
    assert "compare.json: metrics.runs: expected the key 'strong'" in capsys.readouterr().err


def test_a_damaged_compare_json_is_a_page_or_one_line(comparison, tmp_path):
    values, lines = to_json(comparison), []
    for seed in range(150):
        (tmp_path / COMPARISON).write_text(mutated(values, seed), encoding="utf-8", errors="surrogatepass")
        try:
            assert render_comparison_again(tmp_path).read_text().endswith("</html>\n")
        except InputError as error:
            lines.append(str(error))
    assert 20 < len(lines) < 130 and all(line.startswith(str(tmp_path)) and "\n" not in line for line in lines)


def test_without_output_a_new_folder_by_its_time(comparison, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = write_comparison(comparison)
    assert page.parent.name.startswith("comparison-20") and (page.parent / COMPARISON).is_file()


def test_no_text_of_a_run_makes_an_element(tmp_path):
    hostile = "".join(letter for letter in HOSTILE if letter not in "\x00\ud800/\r")
    pages = []
    for number, text in enumerate((hostile, "x" * len(hostile))):
        folder, names = tmp_path / str(number), (f"0{text}", f"1{text}")
        labels, models = rows_of(40)
        folder.mkdir()
        write_test_file(folder / "test.csv", labels, names)
        ids = [f"m{row}" for row in range(40)]
        paths = [
            write_run(folder / f"{name}{text[:90]}", preds, labels, names=names, ids=ids, cache_path=name + text)
            for name, preds in zip("ab", models)
        ]
        pages.append(tree_of(render_comparison(compare_runs(paths))))
    shapes = [[(each.tag, tuple(each.attributes)) for each in page.all() if each.tag != "wbr"] for page in pages]
    assert shapes[0] == shapes[1] and pages[0].text.count("<script>") > 50


# ---- what cannot be compared ----


def test_runs_that_differ_are_one_line_with_the_first_difference(tmp_path, capsys):
    labels, (weak, strong) = rows_of(30)
    ids = [str(row) for row in range(30)]
    first = str(write_run(tmp_path / "first", weak, labels, ids=ids))

    def refused(name: str, *options: str, **changes: Any) -> str:
        values: dict[str, Any] = {"preds": strong, "labels": labels, "ids": ids, **changes}
        return line_of(capsys, first, str(write_run(tmp_path / name, **values)), *options)

    rows = f"expected the test rows of {tmp_path / 'first'}/multimodal_bert-{TIME}, found others"
    fewer = refused("fewer", preds=strong[:29], labels=labels[:29], ids=ids[:29])
    assert f"{rows}: 29 rows, there 30" in fewer
    assert f"{rows}: row 8 has the id 'seven', there '7'" in refused("ids", ids=[*ids[:7], "seven", *ids[8:]])
    changed = np.where(np.arange(30) == 4, 1 - labels, labels)
    assert f"{rows}: row 5 has the label 'abuse', there 'fine'" in refused("labels", labels=changed)
    assert "'spam' is a class of" in refused("classes", names=("fine", "spam"))
    turned = refused("turned", names=NAMES[::-1], labels=1 - labels)
    assert "found class 1 'fine', there 'abuse'" in turned and "positive_label" in turned
    assert "expected the figures of labelled rows" in refused("unlabelled", labels=None)
    assert "found 'nan'" in refused("nan", preds=np.where(labels == 1, strong, np.nan))
    assert "--against: expected one of the runs 'first', 'against', found 'third'" in refused(
        "against", "--against", "third"
    )


def test_folders_without_a_run_or_a_test(tmp_path, capsys):
    labels, (weak, strong) = rows_of(30)
    run, other = (str(write_run(tmp_path / name, weak, labels)) for name in ("run", "other"))
    assert "expected two runs or more, found 1" in line_of(capsys, run)
    assert "expected different runs or tests" in line_of(capsys, run, f"{run}/.")
    assert "expected the folder of a run, found none" in line_of(capsys, run, str(tmp_path / "gone"))
    assert "found no config.json and no test_result_0.tsv" in line_of(capsys, run, str(tmp_path))
    alone = shutil.copytree(next(Path(other).glob("multi*")), tmp_path / "alone")
    assert "expected a test inside the folder of its run" in line_of(capsys, run, str(alone))
    predictions = next(Path(other).glob("multi*/*.tsv"))
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join([*lines[:3], lines[3].replace("0.", "0,", 1), *lines[4:]]))
    assert "row 3 (line 4), column 'prob': expected a probability" in line_of(capsys, run, other)
    (Path(other) / "labels.json").write_text("{")
    assert "labels.json: not a JSON file" in line_of(capsys, run, other)
    shutil.rmtree(predictions.parent)
    assert f"`mmbert evaluate {other} LABELLED_FILE` writes one" in line_of(capsys, run, other)
    with pytest.raises(InputError, match="has changed while it was read"):
        read_probabilities(open_run(run), 29)
