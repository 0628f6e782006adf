"""Finished runs compared on the same test rows: differences of their metrics with paired bootstrap intervals.

N rows, K classes, R runs, D draws.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmbert_core.compared_runs import (
    EvaluatedRun,
    LabelledRows,
    RowTexts,
    check_same_classes,
    check_same_rows,
    open_run,
    read_probabilities,
    read_rows,
    read_texts,
)
from mmbert_core.evaluation.class_counts import ClassCounts, class_counts
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.intervals import metric_draws, paired_interval
from mmbert_core.evaluation.metrics import CLASS_PREFIX, MetricValues, compute_metrics, metric_names
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes
from mmbert_core.report.build import HEADLINE, render_from_json
from mmbert_core.report.comparison_page import outcome, render_comparison
from mmbert_core.report.comparison_schema import (
    Agreement,
    ClassOfRun,
    ComparedBins,
    ComparedClass,
    ComparedClasses,
    ComparedMetrics,
    ComparedRun,
    ComparedSetting,
    ComparedValue,
    Comparison,
    DisputedRow,
    DisputedRows,
    check_comparison,
    comparison_of,
)
from mmbert_core.report.curves import bins_of, precision_recall_section, roc_section
from mmbert_core.report.formatting import signed
from mmbert_core.report.page_details import as_text
from mmbert_core.report.page_quality import class_rows
from mmbert_core.report.report_schema import Bin, Curve, Curves
from mmbert_core.report.results import around, defined_metric
from mmbert_core.report.typed_json import Missing, to_json
from mmbert_core.runtime.errors import InputError, list_for_message
from mmbert_core.runtime.progress import slow_step
from mmbert_core.storage.files import make_folder_by_time, write_json, write_text

logger = logging.getLogger(__name__)

COMPARISON, PAGE = "compare.json", "compare.html"
FOLDER = "comparison"  # and the time, where no folder is given
ALWAYS_DEFINED = "accuracy"  # the metric of a second verdict, where the main one has no interval
MAX_ROWS = 20  # rows on which the runs disagree
OWN_SETTINGS = ("model_path",)  # differ in all runs, and are in the list of runs


def compare_runs(runs: Sequence[str | os.PathLike[str]], *, against: str | None = None) -> Comparison:
    """The runs (folders of runs, or of tests inside them) on the test rows that they have in common.

    `against`: the run, one of `runs`, with which the others are compared; None: the first. Raises `InputError` for
    fewer than two runs, for one that has no test, and where test rows or classes differ.
    """
    opened = [open_run(path) for path in runs]
    names = names_of(opened)
    reference = reference_of(opened, names, against)
    for run in opened:
        check_same_classes(run, opened[0])
    with slow_step("reading the test rows"):
        rows = [read_rows(run) for run in opened]
    for run, of_run in zip(opened, rows, strict=True):
        check_same_rows(run, of_run, opened[0], rows[0])
    labels, results = rows[0].labels, {}
    for name, run in zip(names, opened, strict=True):
        with slow_step(f"{name}: metrics and their draws"):
            results[name] = result_of(run, labels)
    own, class_names = opened[names.index(reference)], opened[0].labels.names
    is_binary = own.config.is_binary
    others = [name for name in names if name != reference]
    return Comparison(
        title=f"{' and '.join(names) if len(names) < 4 else f'{len(names)} runs'} on {len(labels):,} test rows",
        created=time.strftime("%Y-%m-%d %H:%M"),
        task=own.config.task,
        class_names=list(class_names),
        label_name=own.config.label_name,
        num_rows=len(labels),
        reference=reference,
        runs=[compared_run(name, run) for name, run in zip(names, opened, strict=True)],
        notes=notes_of(dict(zip(names, opened, strict=True)), rows),
        metrics=metrics_of(results, reference, own, class_names),
        settings=settings_of(dict(zip(names, opened, strict=True))),
        roc=curves_of(results, "roc"),
        precision_recall=curves_of(results, "precision_recall"),
        calibration=ComparedBins(bins={name: result.bins for name, result in results.items()}),
        classes=Missing() if is_binary else classes_of(results, reference, class_names),
        agreement={name: agreement_of(results[reference], results[name], labels) for name in others},
        disputed_rows=disputed_rows(results, own, rows[names.index(reference)]),
    )


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write compare.json and compare.html into `folder`, by default a new one here; returns the path of the page."""
    if folder is None:
        folder = make_folder_by_time(Path("."), FOLDER)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMPARISON, to_json(comparison))
    write_text(folder / PAGE, render_comparison(comparison))
    return folder / PAGE


def render_comparison_again(folder: Path) -> Path:
    """Write compare.html again from the compare.json in `folder`; returns its path. Raises `InputError`."""
    return render_from_json(
        folder / COMPARISON, folder / PAGE, check_comparison, lambda value: render_comparison(comparison_of(value))
    )


# ---- the runs ----


def names_of(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A short name for each run: its folder's, or else the path as given. Raises `InputError` for fewer than two."""
    if len(runs) < 2:
        raise InputError(f"compare: expected two runs or more, found {len(runs)}")
    choices: tuple[Callable[[EvaluatedRun], str], ...] = (
        lambda run: run.folder.name,
        lambda run: os.path.normpath(run.path),
        lambda run: str(run.test_folder),
    )
    for choice in choices:
        names = [choice(run) for run in runs]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise InputError(f"compare: expected different runs or tests, found {twice} twice")


def reference_of(runs: Sequence[EvaluatedRun], names: Sequence[str], against: str | None) -> str:
    """The name of the run `against`, which may be a name or a path as given. Raises `InputError` for another one."""
    if against is None:
        return names[0]
    for name, run in zip(names, runs, strict=True):
        if against == name or os.path.normpath(against) == os.path.normpath(run.path):
            return name
    raise InputError(f"--against: expected one of the runs {list_for_message(names)}, found {against!r}")


def compared_run(name: str, run: EvaluatedRun) -> ComparedRun:
    return ComparedRun(
        name=name,
        folder=str(run.folder),
        test_folder=run.test_folder.name,
        other_tests=run.other_tests,
        threshold=run.threshold,
    )


def notes_of(runs: Mapping[str, EvaluatedRun], rows: Sequence[LabelledRows]) -> list[str]:
    """Lines about tests that were chosen, and about rows without ids."""
    notes = [
        f"{name}: {run.test_folder.name} is the newest of its {run.other_tests + 1} tests"
        for name, run in runs.items()
        if run.other_tests
    ]
    without = [name for name, of_run in zip(runs, rows, strict=True) if of_run.ids is None]
    if without:
        notes.append(f"no ids in {', '.join(without)}: these rows are paired by their order and compared by labels")
    return notes


def settings_of(runs: Mapping[str, EvaluatedRun]) -> list[ComparedSetting]:
    """The settings, and the files of the same path, that are not the same in all runs; as text."""
    texts = {name: as_text(run.settings) for name, run in runs.items()}
    keys = dict.fromkeys(key for of_run in texts.values() for key in of_run if key not in OWN_SETTINGS)
    found = {key: {name: of_run.get(key, "not set") for name, of_run in texts.items()} for key in keys}
    paths = dict.fromkeys(path for run in runs.values() for path in run.files)
    for path in paths:
        if all(path in run.files for run in runs.values()):
            found[f"{path} (sha256)"] = {name: run.files[path] for name, run in runs.items()}
    return [ComparedSetting(key=key, values=values) for key, values in found.items() if len(set(values.values())) > 1]


# ---- one run ----


@dataclass(frozen=True)
class RunResult:
    """What is compared of one run; its probabilities [N, K] are not kept."""

    values: MetricValues
    draws: Mapping[str, np.ndarray]  # metric -> values [D], the same draws of rows in all runs
    predicted: np.ndarray  # [N] class indices
    of_label: np.ndarray  # [N] probability of the row's own label, float64
    counts: ClassCounts
    roc: Curve | None  # of two classes
    precision_recall: Curve | None
    bins: list[Bin]

    def value(self, metric: str) -> float | None:
        return self.values.values[f"test/{metric}"]


def result_of(run: EvaluatedRun, labels: np.ndarray) -> RunResult:
    """Read a run's probabilities and compute all that is compared. Raises `InputError`."""
    preds, config, names = read_probabilities(run, len(labels)), run.config, run.labels.names
    threshold = BINARY_THRESHOLD if run.threshold is None else run.threshold
    metrics, wanted = metric_names(names), {"class_names": names, "threshold": threshold}
    values = compute_metrics(preds, labels, metrics, config.task, len(names), "test", **wanted)
    defined = [metric for metric in metrics if values.values[f"test/{metric}"] is not None]
    predicted = predicted_classes(preds, threshold=threshold)
    probabilities = preds.astype(np.float64) if config.is_binary else preds
    if config.is_binary:
        of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    else:
        of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    sections = (roc_section, precision_recall_section) if config.is_binary else ()
    curves = [section(preds, labels, names) for section in sections] or [Missing(), Missing()]
    roc, precision_recall = (None if isinstance(each, Missing) else each.curves[names[1]] for each in curves)
    return RunResult(
        values=values,
        draws=metric_draws(preds, labels, defined, **wanted),
        predicted=predicted,
        of_label=of_label,
        counts=class_counts(labels, predicted, len(names)),
        roc=roc,
        precision_recall=precision_recall,
        bins=bins_of(preds, labels),
    )


# ---- metrics ----


def metrics_of(
    results: Mapping[str, RunResult], reference: str, run: EvaluatedRun, class_names: Sequence[str]
) -> ComparedMetrics:
    """All metrics of rows; those of single classes only for two classes (`classes_of` has them for several)."""
    names = [name for name in metric_names(class_names) if run.config.is_binary or not name.startswith(CLASS_PREFIX)]
    main = defined_metric(results[reference].values.values, "test", run.config)
    main = main if main in names else names[0]
    names = list(dict.fromkeys([main, *HEADLINE, *names]))
    of_runs = {
        name: {metric: compared_value(metric, result, results[reference]) for metric in names}
        for name, result in results.items()
    }
    verdicts = []
    for name, values in of_runs.items():
        if name != reference:
            verdicts.append(verdict(name, reference, main, values[main]))
            if values[main].difference and values[main].interval is None and main != ALWAYS_DEFINED:
                verdicts.append(verdict(name, reference, ALWAYS_DEFINED, values[ALWAYS_DEFINED]))
    return ComparedMetrics(main=main, names=names, runs=of_runs, verdicts=verdicts)


def compared_value(metric: str, result: RunResult, reference: RunResult) -> ComparedValue:
    """A metric and, for a run that is not the reference, its difference with the paired interval."""
    value, other = result.value(metric), reference.value(metric)
    if value is None:
        return ComparedValue(reason=result.values.undefined.get(f"test/{metric}"))
    if result is reference or other is None:
        return ComparedValue(value=value)
    interval = None
    if metric in result.draws and metric in reference.draws:
        interval = paired_interval(result.draws[metric], reference.draws[metric])
    if len(result.counts.right) > FEW_CLASSES:
        interval = around(interval, value - other)
    return ComparedValue(value=value, difference=value - other, interval=None if interval is None else list(interval))


def verdict(name: str, reference: str, metric: str, value: ComparedValue) -> str:
    """Whether a run is better than the reference in a metric, as a sentence."""
    if value.difference is None:
        return f"{name}: no comparison in {metric}: {value.reason or f'undefined for {reference}'}."
    by = f"{metric} {value.value:.4f}, {signed(value.difference)} compared with {reference}"
    if value.interval is None:
        equal = "no resample of the rows changes the difference" if not value.difference else "there is no interval"
        return f"{name}: {by}; {equal}."
    ends = f"95 % interval {signed(value.interval[0])} to {signed(value.interval[1])}"
    word = outcome(metric, value)
    doubt = "which contains 0: the difference may be chance"
    return f"{name} is {word}: {by} ({ends})." if word else f"{name}: {by} ({ends}), {doubt}."


def curves_of(results: Mapping[str, RunResult], key: str) -> Curves | Missing:
    """The curve of class 1 of each run; `Missing` for several classes."""
    curves = {name: curve for name, result in results.items() if (curve := getattr(result, key)) is not None}
    return Curves(curves=curves) if curves else Missing()


def classes_of(results: Mapping[str, RunResult], reference: str, class_names: Sequence[str]) -> ComparedClasses:
    """Counts and rates of each class, and its average precision with the difference, in each run."""
    of_runs = {}
    for name, result in results.items():
        counts = [column.astype(np.int64).tolist() for column in (result.counts.right, result.counts.labelled)]
        counts.append(result.counts.predicted.astype(np.int64).tolist())
        of_runs[name] = list(zip(class_rows(class_names, *counts), counts[0], strict=True))
    rows = []
    for index, title in enumerate(class_names):
        runs = {}
        for name, of_run in of_runs.items():
            row, right = of_run[index]
            runs[name] = ClassOfRun(
                predicted=row.predicted,
                right=right,
                precision=row.precision,
                recall=row.recall,
                f1=row.f1,
                average_precision=compared_value(f"{CLASS_PREFIX}{title}", results[name], results[reference]),
            )
        rows.append(ComparedClass(name=title, rows=of_runs[reference][index][0].labelled, runs=runs))
    return ComparedClasses(rows=rows)


# ---- rows ----


def agreement_of(reference: RunResult, result: RunResult, labels: np.ndarray) -> Agreement:
    is_right, was_right = result.predicted == labels, reference.predicted == labels
    return Agreement(
        both_right=int((is_right & was_right).sum()),
        only_reference=int((~is_right & was_right).sum()),
        only_this=int((is_right & ~was_right).sum()),
        both_wrong=int((~is_right & ~was_right).sum()),
        other_class=int((result.predicted != reference.predicted).sum()),
    )


def disputed_rows(results: Mapping[str, RunResult], run: EvaluatedRun, rows: LabelledRows) -> DisputedRows | Missing:
    """The rows with the largest range over the runs of the probability of the row's own label, the largest first.

    `run` and `rows`: those of the reference, whose test file has the texts.
    """
    of_label = np.stack([result.of_label for result in results.values()])  # [R, N]
    ranges = of_label.max(axis=0) - of_label.min(axis=0)
    worst = [int(row) for row in np.argsort(-ranges, kind="stable")[:MAX_ROWS] if ranges[row] > 0]
    if not worst:
        return Missing("all runs give each row's label the same probability")
    texts, reason = texts_or_reason(run, rows, worst)
    names = run.labels.names
    found = [
        DisputedRow(
            row=row + 1,
            id=None if rows.ids is None else rows.ids[row],
            label=names[rows.labels[row]],
            probabilities={name: float(result.of_label[row]) for name, result in results.items()},
            preds={name: names[result.predicted[row]] for name, result in results.items()},
            location=None if about is None else about.location,
            text=None if about is None else about.text,
            columns={} if about is None else about.columns,
        )
        for row, about in zip(worst, texts, strict=True)
    ]
    return DisputedRows(rows=found, without_texts=reason)


def texts_or_reason(
    run: EvaluatedRun, rows: LabelledRows, positions: Sequence[int]
) -> tuple[list[RowTexts | None], str | None]:
    """Texts and columns of rows; where the test file does not have them any more, None for each, and why."""
    try:
        with slow_step("texts of the test file"):
            return list(read_texts(run, rows, positions)), None
    except (InputError, OSError) as error:
        return [None] * len(positions), f"ids alone, as the test file is not as it was: {error}"
