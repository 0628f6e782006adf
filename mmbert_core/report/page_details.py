"""Values for the page's sections Training, Slices, Importance, Errors, Config, Data and Versions.

Each section's function takes the section and the whole report, and returns the values for the macro of the section's
key in details.html.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup

from mmbert_core.report import charts
from mmbert_core.report.charts import Axis, Chart, Guide, Line, Texts
from mmbert_core.report.formatting import BEFORE_FINE_TUNING, bounds, figure, is_number
from mmbert_core.report.report_schema import (
    Cell,
    Column,
    DataSummary,
    Errors,
    Importance,
    Report,
    Slice,
    Slices,
    Split,
    Training,
    WrongRow,
)
from mmbert_core.report.svg import range_of
from mmbert_core.report.typed_json import Missing

MAX_SLICES = 200  # rows of the table, the worst ones
MAX_ERRORS = 50
MAX_SPANS = 500  # of a text
LONG_TEXT = 1500  # characters; a longer text scrolls in its own box
MIN_WEIGHT = 0.1  # absolute weight of a span that is highlighted
SPLITS = {"train": "training", "val": "validation", "test": "test"}

View = dict[str, Any]


# ---- training ----


def training(section: Training, report: Report) -> View:
    """Charts by step: losses, the metric that chose the best step, and the learning rate. The best step is marked."""
    validations, best, metric = section.validations, section.best_step, section.metric
    train_loss = Line("training loss", *_known(section.steps, section.train_loss))
    val_loss = Line("validation loss", *_by_step(validations, "val_loss"), 1, marker="square")
    plots = [("Loss", [train_loss, val_loss], best)]
    if metric:
        line = Line(metric, *_by_step(validations, metric), marker="dot")
        plots.append((f"{metric} of the validation rows", [line], best))
    plots.append(("Learning rate", [Line("learning rate", *_known(section.steps, section.lr))], None))
    keys = list(dict.fromkeys(key for row in validations for key in row if key != "step"))
    return {
        "charts": [by_step_chart(*plot) for plot in plots],
        "best": best,
        "metric": metric or "val_loss",
        "before_fine_tuning": BEFORE_FINE_TUNING,
        "keys": keys,
        "rows": [(row.get("step"), [row.get(key) for key in keys]) for row in validations],
    }


def by_step_chart(title: str, lines: Sequence[Line], best: Any) -> Chart:
    drawn = [line for line in lines if line.x]
    if not drawn:
        return Chart(title, None)
    low, high = range_of([value for line in drawn for value in line.y])
    last = max(max(line.x) for line in drawn)
    guides = [Guide((best, low), (best, high), "best")] if is_number(best) else []
    desc = "; ".join(f"{line.name} from {figure(line.y[0], 4)} to {figure(line.y[-1], 4)}" for line in drawn)
    svg = charts.plot(drawn, Axis("step", 0, max(last, 1)), Axis("", low, high), Texts(title, desc), guides=guides)
    return Chart(title, svg, charts.legend(drawn) if len(drawn) > 1 else [], note=f"{desc}.")


def _known(steps: Sequence[Any], values: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Steps and values, without the pairs in which one is not a finite number."""
    pairs = zip(steps, values, strict=False)
    known = [(step, value) for step, value in pairs if is_number(step) and is_number(value)]
    return [step for step, _ in known], [value for _, value in known]


def _by_step(validations: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return _known([row.get("step") for row in validations], [row.get(key) for row in validations])


# ---- slices and importance ----


@dataclass(frozen=True)
class SliceRow:
    """A row of the table of slices: the first metric as a dot, other metrics as values, the shares of the classes."""

    slice: Slice
    value: float | None
    interval: tuple[float, float] | None
    dot: Markup | None  # None where the value is undefined
    others: list[tuple[float | None, str]]  # value, or why there is none
    shares: Markup | None
    largest: tuple[str, float] | None  # class and share


def slices(section: Slices, report: Report) -> View:
    """The slices, worst first, their dots on one scale with the value of all rows."""
    metric, listed = section.metric, section.rows[:MAX_SLICES]
    model = {} if isinstance(report.metrics, Missing) else report.metrics.model
    whole = (model.get(metric) or Cell()).value
    names = [metric, *dict.fromkeys(key for row in listed for key in row.metrics if key != metric)]
    values = [value for row in listed for value in (row.metrics.get(metric), *(row.intervals.get(metric) or ()))]
    scale = range_of(list(filter(is_number, values)), around=[whole] if is_number(whole) else [])
    return {
        "metric": metric,
        "others": names[1:],
        "whole": whole,
        "num_slices": len(section.rows),
        "max_slices": MAX_SLICES,
        "rows": [slice_row(row, names, scale, whole, report.class_names) for row in listed],
    }


def slice_row(
    row: Slice, names: Sequence[str], scale: tuple[float, float], whole: Any, class_names: Sequence[str]
) -> SliceRow:
    metric, *others = names
    value, ends = row.metrics.get(metric), bounds(row.intervals.get(metric))
    reference = whole if is_number(whole) else None
    shares, largest = classes_of_slice(row, class_names)
    return SliceRow(
        slice=row,
        value=value,
        interval=ends,
        dot=charts.interval_dot(value, ends, scale, reference=reference) if is_number(value) else None,
        others=[(row.metrics.get(key), row.undefined.get(key) or "") for key in others],
        shares=shares,
        largest=largest,
    )


def classes_of_slice(row: Slice, class_names: Sequence[str]) -> tuple[Markup | None, tuple[str, float] | None]:
    """A chart of the classes' shares in a slice, and the largest share (with two classes: that of class 1)."""
    pairs = zip(class_names, row.share_of_classes or [], strict=False)
    shares = [(title, share) for title, share in pairs if is_number(share)]
    if row.largest_classes:  # with very many classes, the report has only the largest shares
        shares = [(class_names[index], share) for index, share in row.largest_classes]
    if not shares:
        return None, None
    largest = shares[-1] if len(class_names) == 2 else max(shares, key=lambda pair: pair[1])
    if row.largest_classes:
        shares.append(("all others", max(0.0, 1 - sum(share for _, share in shares))))
    return charts.shares(shares), largest


def importance(section: Importance, report: Report) -> View:
    """How much the metric drops when a column's cells are permuted."""
    scale = range_of([end for item in section.items for end in drop_ends(item)], around=[0.0])
    rows = []
    for item in section.items:
        spread = item.spread if is_number(item.spread) else None
        rows.append((item, spread, charts.bar(item.drop, spread, scale) if is_number(item.drop) else None))
    return {"section": section, "rows": rows}


def drop_ends(item: Column) -> tuple[float, ...]:
    """Both ends of the drop with its spread; () without a drop."""
    spread = item.spread if is_number(item.spread) else 0
    return (item.drop - (spread or 0), item.drop + (spread or 0)) if is_number(item.drop) else ()


# ---- wrong rows ----


@dataclass(frozen=True)
class WrongRowView:
    row: WrongRow
    spans: list[tuple[str, str, str]]  # space before, text, class of its highlight
    num_left_out: int  # spans
    is_long: bool
    strongest: list[tuple[str, list[tuple[str, float]]]]  # ("for" or "against", [(span, weight), ...])


def errors(section: Errors, report: Report) -> View:
    """Wrong rows, each with its text and how much each span contributed to the predicted class."""
    listed = section.rows[:MAX_ERRORS]
    return {
        "num_rows": len(section.rows),
        "num_listed": len(listed),
        "has_tokens": any(row.tokens for row in listed),
        "rows": [wrong_row(row) for row in listed],
    }


def wrong_row(row: WrongRow) -> WrongRowView:
    listed = row.tokens[:MAX_SPANS]
    return WrongRowView(
        row=row,
        spans=highlighted(listed),
        num_left_out=len(row.tokens) - len(listed),
        is_long=sum(len(str(text)) for text, _ in listed) > LONG_TEXT,
        strongest=strongest(row.tokens),
    )


def highlighted(tokens: Sequence[Sequence[Any]]) -> list[tuple[str, str, str]]:
    """(space before, text, class) of adjacent spans with the same class, joined; the space is not highlighted."""
    spans = []
    for kind, group in groupby(tokens, key=lambda token: highlight_class(token[1])):
        words = "".join(str(text) for text, _ in group)
        bare = words.lstrip() if kind else words
        spans.append((words[: len(words) - len(bare)], bare, kind))
    return spans


def highlight_class(weight: Any) -> str:
    """CSS class of a span's highlight: "p1" to "p3" for the predicted class, "n1" to "n3" against, "" for none."""
    if not is_number(weight) or abs(weight) < MIN_WEIGHT:
        return ""
    return ("p" if weight > 0 else "n") + ("1" if abs(weight) < 0.3 else "2" if abs(weight) < 0.6 else "3")


def strongest(tokens: Sequence[Sequence[Any]]) -> list[tuple[str, list[tuple[str, float]]]]:
    """The five spans of the largest weights for and against the predicted class."""
    known = [(str(text).strip(), weight) for text, weight in tokens if is_number(weight) and str(text).strip()]
    known.sort(key=lambda pair: -abs(pair[1]))
    sides = {
        "for": [pair for pair in known if pair[1] >= MIN_WEIGHT][:5],
        "against": [pair for pair in known if pair[1] <= -MIN_WEIGHT][:5],
    }
    return [(side, pairs) for side, pairs in sides.items() if pairs]


# ---- config, versions, data ----


def config(section: Mapping[str, Any], report: Report) -> View:
    """Every key of the config, and the values that were resolved from it, such as those of auto."""
    return {"given": as_text(section), "resolved": as_text(report.resolved)}


def versions(section: Mapping[str, Any], report: Report) -> View:
    return {"versions": as_text(section)}


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as JSON, texts unchanged."""
    return {
        key: value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in values.items()
    }


def data(section: DataSummary, report: Report) -> View:
    """Rows and classes of each split, and the files with their fingerprints."""
    splits = {title: getattr(section, key) for key, title in SPLITS.items()}
    known = {title: split for title, split in splits.items() if isinstance(split, Split) and split.rows is not None}
    missing = {title: split for title, split in splits.items() if isinstance(split, Missing) and split != Missing()}
    classes = dict.fromkeys(name for split in known.values() for name in split.classes or {})
    return {
        "reasons": [(title, split.reason) for title, split in missing.items()],
        "splits": known,
        "classes": [(name, [(split.classes or {}).get(name) for split in known.values()]) for name in classes],
        "has_left_out": any(split.classes_left_out for split in known.values()),
        "files": section.files,
    }
