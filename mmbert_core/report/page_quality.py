"""Values for the page's sections Headline, Warnings, Baselines, Blend and Confusion.

Each section's function takes the section and the whole report, and returns the values for the macro of the section's
key in quality.html. K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmbert_core.evaluation.metrics import ONE_SIDED, lower_is_better
from mmbert_core.report import charts
from mmbert_core.report.charts import Chart, Texts
from mmbert_core.report.confusion_chart import MAX_NUMBERED, confusion_grid, shades
from mmbert_core.report.curves import MAX_MISTAKES
from mmbert_core.report.formatting import bounds, decimals, is_number, short
from mmbert_core.report.report_schema import Baseline, Baselines, Blend, Cell, Confusion, Metrics, Report
from mmbert_core.report.typed_json import Missing

HEADLINE = 6  # metrics with a card of their own
MAX_CLASSES = 40  # of the confusion grid: with more, the most frequent ones
MAX_LISTED = 25  # classes of the table without a grid: as many as need no scrolling

View = dict[str, Any]


# ---- metrics ----


@dataclass(frozen=True)
class HeadlineCard:
    """A metric in large type, with its `gain` over the best baseline: positive where the model is better."""

    metric: str
    cell: Cell
    baseline: str | None = None
    baseline_value: float = 0.0
    gain: float = 0.0


def headline(metrics: Metrics, report: Report) -> View:
    """The first metrics as cards, each compared with the best baseline; then all metrics."""
    cells = {metric: metrics.model.get(metric) or Cell() for metric in metrics.names}
    baselines = [] if isinstance(report.baselines, Missing) else report.baselines.rows
    return {
        "cards": [headline_card(metric, cells[metric], baselines) for metric in metrics.names[:HEADLINE]],
        "cells": [(metric, cells[metric]) for metric in metrics.names],
        "has_intervals": any(bounds(cell.interval) for cell in cells.values()),
        "has_notes": any(cell.reason for cell in cells.values()),
        "num_classes": len(report.class_names),
        "num_left_out": metrics.classes_left_out,
    }


def headline_card(metric: str, cell: Cell, baselines: Sequence[Baseline]) -> HeadlineCard:
    best = best_baseline(metric, baselines)
    if not is_number(cell.value) or best is None or metric in ONE_SIDED:
        return HeadlineCard(metric, cell)
    name, value = best
    return HeadlineCard(metric, cell, name, value, (cell.value - value) * (-1 if lower_is_better(metric) else 1))


def best_baseline(metric: str, baselines: Sequence[Baseline]) -> tuple[str, float] | None:
    """Name and value of the baseline that is best in a metric."""
    values = {row.name: (row.metrics.get(metric) or Cell()).value for row in baselines}
    known = [(name, value) for name, value in values.items() if is_number(value)]
    if not known:
        return None
    return min(known, key=lambda pair: pair[1]) if lower_is_better(metric) else max(known, key=lambda pair: pair[1])


def warnings(lines: Sequence[str], report: Report) -> View:
    return {"lines": lines}


def baselines(section: Baselines, report: Report) -> View:
    """The verdict, the first metric on one scale, and every metric of every baseline."""
    model = Metrics(names=[], model={}) if isinstance(report.metrics, Missing) else report.metrics
    names = model.names or list(dict.fromkeys(metric for row in section.rows for metric in row.metrics))
    columns = [("this model", "", model.model), *((row.name, row.how or "", row.metrics) for row in section.rows)]
    rows = [(metric, [values.get(metric) or Cell() for _, _, values in columns]) for metric in names]
    chart = None
    if names:
        first = zip(columns, rows[0][1], strict=True)
        dots = [(title, cell.value, bounds(cell.interval)) for (title, _, _), cell in first if is_number(cell.value)]
        chart = baselines_chart(names[0], dots) if dots else None
    heads = [(title, how) for title, how, _ in columns]
    return {"verdict": section.verdict, "chart": chart, "heads": heads, "rows": rows}


def baselines_chart(metric: str, dots: Sequence[tuple[str, float, tuple[float, float] | None]]) -> Chart:
    desc = "; ".join(f"{short(title, 40)} {decimals(value)}" for title, value, _ in dots)
    title = f"{metric} of the model and of simple models"
    return Chart(title, charts.interval_dots(dots, Texts(title, desc), label=metric))


def blend(section: Blend, report: Report) -> View:
    """The blend, then its members: what each is, its weight, its log loss on validation rows, metrics alone."""
    rows = [(row, [(row.metrics.get(metric) or Cell()).value for metric in section.metrics]) for row in section.rows]
    return {"metrics": section.metrics, "rows": rows, "val_rows": section.val_rows}


# ---- classes ----


@dataclass(frozen=True)
class ClassRow:
    """How many rows have this label and how many were predicted as it, and the metrics that follow."""

    name: str
    labelled: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Mistake:
    """Rows of one class that were predicted as another."""

    label: str
    predicted: str
    rows: int
    share: float  # of the label's rows


def confusion(section: Confusion, report: Report) -> View:
    """The grid and its tables; with many classes, only the most frequent mistakes and classes."""
    names = report.class_names
    if section.counts is None:
        return confusion_of_many(section, names)
    counts = section.counts
    labelled = [sum(row) for row in counts]
    order: Sequence[int] = range(len(names))
    if len(names) > MAX_CLASSES:
        order = sorted(sorted(order, key=lambda index: -labelled[index])[:MAX_CLASSES])
    drawn, titles = [[counts[row][column] for column in order] for row in order], [names[index] for index in order]
    texts = Texts("Labels and predictions", "Rows are labels, columns predictions; the tables have the figures")
    right = [row[index] for index, row in enumerate(counts)]
    predicted = [sum(row[index] for row in counts) for index in range(len(names))]
    return {
        "num_classes": len(names),
        "num_drawn": len(titles),
        "is_wide": len(titles) > MAX_NUMBERED,
        "chart": Chart(texts.title, confusion_grid(drawn, titles, texts)),
        "shades": shades(),
        "classes": class_rows(names, right, labelled, predicted),
        "mistakes": most_frequent_mistakes(counts, names) if len(names) > 2 else [],
        "titles": titles,
        "counts": list(zip(titles, drawn, strict=True)),
    }


def most_frequent_mistakes(counts: Sequence[Sequence[int]], names: Sequence[str]) -> list[Mistake]:
    pairs = ((value, row, column) for row, line in enumerate(counts) for column, value in enumerate(line))
    mistakes = sorted((pair for pair in pairs if pair[0] and pair[1] != pair[2]), key=lambda pair: -pair[0])
    return [
        Mistake(names[row], names[column], value, value / sum(counts[row]))
        for value, row, column in mistakes[:MAX_MISTAKES]
    ]


def confusion_of_many(section: Confusion, names: Sequence[str]) -> View:
    right, labelled, predicted = section.right or [], section.labelled or [], section.predicted or []
    listed = sorted(range(len(names)), key=lambda index: -labelled[index])[:MAX_LISTED]
    columns = ([column[index] for index in listed] for column in (names, right, labelled, predicted))
    return {
        "num_classes": len(names),
        "chart": None,
        "mistakes": [
            Mistake(names[label], names[chosen], rows, rows / labelled[label])
            for label, chosen, rows in section.mistakes or []
        ],
        "classes": class_rows(*columns),
        "num_without_rows": sum(not rows for rows in labelled),
        "num_never_found": sum(bool(rows) and not hits for rows, hits in zip(labelled, right, strict=True)),
    }


def class_rows(
    names: Sequence[str], right: Sequence[int], labelled: Sequence[int], predicted: Sequence[int]
) -> list[ClassRow]:
    """Precision, recall and F1 of classes from their counts."""
    rows = []
    for name, hits, with_label, chosen in zip(names, right, labelled, predicted, strict=True):
        precision, recall = (hits / whole if whole else None for whole in (chosen, with_label))
        f1 = 2 * hits / (chosen + with_label) if chosen + with_label else None
        rows.append(ClassRow(name, with_label, chosen, precision, recall, f1))
    return rows
