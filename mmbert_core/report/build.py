"""The report of evaluated rows, as report.json and report.html. Rank 0 only.

A section that fails is replaced by the reason: an error in a report does not end a run.
"""

import logging
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.encoding import number_of
from mmbert_core.evaluation.baselines import DESCRIPTIONS
from mmbert_core.evaluation.metrics import METRICS
from mmbert_core.evaluation.slices import MIN_ROWS, slices_of
from mmbert_core.inference.permutation_importance import permutation_importance
from mmbert_core.report import curves
from mmbert_core.report.blend_members import blend_section
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.page import render
from mmbert_core.report.report_schema import (
    Baseline,
    Baselines,
    Cell,
    Importance,
    Metrics,
    Report,
    Slice,
    Slices,
    check_report,
    report_of,
)
from mmbert_core.report.results import listed_figures, main_metric, verdict
from mmbert_core.report.typed_json import Missing, from_json, to_json
from mmbert_core.report.wrong_rows import errors_section
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.progress import slow_step
from mmbert_core.runtime.versions import VERSIONS
from mmbert_core.storage.files import read_json, write_json, write_text
from mmbert_core.storage.schema import Check
from mmbert_core.tables.cells import BOOLEANS
from mmbert_core.tables.table import read_chunks

logger = logging.getLogger(__name__)

REPORT, PAGE = "report.json", "report.html"
HEADLINE = ("auroc", "average_precision", "f1_score", "precision", "recall", "accuracy")
SLICE_METRICS = ("f1_score", "accuracy")  # in addition to the main one
MAX_SLICES = 400

Section = TypeVar("Section")


def write_report(evaluate: Callable[[], EvaluatedRows], folder: Path) -> bool:
    """Write report.json and report.html of the rows that `evaluate` returns. Returns whether both were written.

    Raises `OSError` only; every other error is logged as a warning.
    """
    try:
        report = build_report(evaluate())
        with slow_step(PAGE):
            write_json(folder / REPORT, to_json(report))
            write_text(folder / PAGE, render(report))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - test_metrics.json is already written
        logger.warning("no %s: %s: %s", PAGE, type(error).__name__, error)
        return False
    return True


def render_again(folder: Path) -> Path:
    """Write report.html again from the report.json in `folder`; returns its path.

    Raises `InputError` for a missing or invalid report.json.
    """
    try:
        return render_from_json(folder / REPORT, folder / PAGE, check_report, lambda value: render(report_of(value)))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: expected the folder of a test or of `mmbert evaluate`, found no {REPORT}"
        ) from None


def render_from_json(path: Path, page: Path, check: Check, render_value: Callable[[Any], str]) -> Path:
    """Write `page`, rendered from the values of the JSON file `path`; returns `page`.

    Raises `InputError` for an invalid file and for values that cannot be rendered, `FileNotFoundError`.
    """
    value = read_json(path, check)
    try:
        html = render_value(value)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: expected a report that can be drawn, found one that cannot ({reason})") from None
    write_text(page, html)
    return page


def build_report(evaluated: EvaluatedRows) -> Report:
    """The report with all sections; a section without figures has the reason instead."""
    config, dataset = evaluated.loaded.config, evaluated.dataset
    paths = dataset.encoded.paths
    files = ", ".join(Path(path).name for path in paths)
    warnings = evaluated.warnings
    return Report(
        title=f"{Path(evaluated.model_path).resolve().name}: {len(dataset):,} rows of {files}",
        created=time.strftime("%Y-%m-%d %H:%M"),
        model_path=evaluated.model_path,
        input=list(paths),
        num_rows=len(dataset),
        has_labels=dataset.has_labels,
        task=config.task,
        class_names=list(evaluated.class_names),
        label_name=config.label_name,
        warnings=warnings if isinstance(warnings, Missing) else list(warnings),
        **labelled_sections(evaluated),
        training=evaluated.training,
        config=config.to_dict(),
        resolved=dict(evaluated.loaded.resolved),
        data=evaluated.data,
        versions={**VERSIONS, "python": platform.python_version()},
    )


def labelled_sections(evaluated: EvaluatedRows) -> dict[str, Any]:
    """The sections that compare predictions with labels, by key of the report."""
    preds, names, decision = evaluated.preds, evaluated.class_names, evaluated.loaded.decision
    if not evaluated.dataset.has_labels or len(evaluated.dataset) == 0:
        labels = np.empty(0)
        reason = Missing("no labelled rows")
    else:
        labels = evaluated.labels
        reason = None if np.isfinite(preds).all() else Missing("predictions that are not finite")
    sections: dict[str, Callable[[], Any]] = {
        "metrics": lambda: metrics_section(evaluated),
        "baselines": lambda: baselines_section(evaluated),
        **({} if evaluated.loaded.blend is None else {"blend": lambda: blend_section(evaluated)}),
        "threshold": lambda: curves.threshold_section(preds, labels, decision),
        "calibration": lambda: curves.calibration_section(preds, labels, decision),
        "roc": lambda: curves.roc_section(preds, labels, names),
        "precision_recall": lambda: curves.precision_recall_section(preds, labels, names),
        "confusion": lambda: curves.confusion_section(preds, labels, len(names), evaluated.threshold),
        "scores": lambda: curves.scores_section(preds, labels, names),
        "slices": lambda: slices_section(evaluated),
        "importance": lambda: importance_section(evaluated),
        "errors": lambda: errors_section(evaluated),
    }
    return {key: reason or section_or_error(key, section) for key, section in sections.items()}


def section_or_error(key: str, section: Callable[[], Section]) -> Section | Missing:
    """The result of `section`, or its error as the reason, so that the rest of the report is written."""
    try:
        with slow_step(f"report, {key}"):
            return section()
    except Exception as error:  # noqa: BLE001
        logger.warning("a section of the report is missing: %s: %s", type(error).__name__, error)
        return Missing(f"{type(error).__name__}: {error}")


# ---- sections ----


def metrics_section(evaluated: EvaluatedRows) -> Metrics:
    figures, num_left_out = listed_figures(evaluated.figures, "test", evaluated.loaded.config)
    names = [*HEADLINE, *(name for name in METRICS if name not in HEADLINE)]
    names += [key.removeprefix("test/") for key in figures if key.startswith("test/average_precision_class_")]
    model: dict[str, Cell | None] = {name: cell(figures, f"test/{name}") for name in names}
    return Metrics(names=names, model=model, classes_left_out=num_left_out)


def cell(figures: Mapping[str, Any], key: str) -> Cell:
    """The value, interval and reason of one metric in test_metrics.json's figures."""
    interval = figures.get("intervals", {}).get(key)
    return Cell(
        value=figures.get(key),
        interval=None if interval is None else list(interval),
        reason=figures.get("undefined", {}).get(key),
    )


def baselines_section(evaluated: EvaluatedRows) -> Baselines | Missing:
    figures, _ = listed_figures(evaluated.figures, "test", evaluated.loaded.config)
    rows = []
    for name, values in figures["baselines"].items():
        metrics: dict[str, Cell | None] = {
            key.removeprefix("test/"): Cell(value=value) for key, value in values.items()
        }
        rows.append(Baseline(name=name, how=DESCRIPTIONS[name], metrics=metrics))
    if not rows:
        return Missing("the model folder has none")
    return Baselines(rows=rows, verdict=verdict(evaluated.figures, "test", evaluated.loaded.config))


def slices_section(evaluated: EvaluatedRows) -> Slices | Missing:
    metric = slice_metric(evaluated.loaded.config)
    columns = evaluated.dataset.cells(np.arange(len(evaluated.dataset)))
    if evaluated.slice_columns:
        columns = named_columns(evaluated, columns)
    if not columns:
        return Missing("the model has no columns, and none were named")
    slices = slices_of(
        evaluated.preds,
        evaluated.labels,
        columns,
        tuple(dict.fromkeys([metric, *SLICE_METRICS])),
        class_names=evaluated.class_names,
        threshold=evaluated.threshold,
    )
    if not slices:
        return Missing(f"no value and no quarter of a column has {MIN_ROWS} rows")
    return Slices(metric=metric, rows=[from_json(Slice, row.to_json()) for row in slices[:MAX_SLICES]])


def slice_metric(config: Config) -> str:
    """The main metric; accuracy if the main one needs rows of all of several classes, which a slice may lack."""
    metric = main_metric(config)
    return "accuracy" if not config.is_binary and metric.startswith(("auroc", "average_precision")) else metric


def named_columns(evaluated: EvaluatedRows, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The `slice_columns`: the model's from `columns`, others from the file, as numbers if all cells are numbers."""
    wanted = list(dict.fromkeys(evaluated.slice_columns))
    others = [name for name in wanted if name not in columns]
    cells: dict[str, list[str]] = {name: [] for name in others}
    encoded = evaluated.dataset.encoded
    if others:
        for chunk in read_chunks(encoded.paths, others, tsv_quoting=encoded.tsv_quoting):
            for name in others:
                cells[name] += chunk.cells[name]
    rows = evaluated.dataset.rows
    read: dict[str, Any] = {name: [values[row] for row in rows] for name, values in cells.items()}
    for name, values in read.items():
        if not BOOLEANS.keys() & set(values):  # true and false stay two texts instead of 1 and 0
            with suppress(ValueError):
                read[name] = np.array([number_of(value) for value in values])
    return {name: columns[name] if name in columns else read[name] for name in wanted}


def importance_section(evaluated: EvaluatedRows) -> Importance | Missing:
    config = evaluated.loaded.config
    values = permutation_importance(
        evaluated.loaded.model,
        evaluated.dataset,
        task=evaluated.task,
        metric=main_metric(config),
        class_names=evaluated.class_names,
        threshold=evaluated.threshold,
        text_name=", ".join(config.text_name),
        seed=config.seed,
    )
    return Missing(values["reason"]) if set(values) == {"reason"} else from_json(Importance, values)
