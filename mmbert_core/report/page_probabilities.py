"""Values for the page's sections Threshold, Calibration, ROC, Precision and recall, and Scores.

Each section's function takes the section and the whole report, and returns the values for the macro of the section's
key in probabilities.html.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.report import charts
from mmbert_core.report.charts import Axis, Chart, Guide, Line, Texts
from mmbert_core.report.formatting import count, decimals, figure, is_number, percent, short
from mmbert_core.report.report_schema import Bin, Calibration, Curve, Curves, Report, Scores, Threshold, ThresholdRow
from mmbert_core.report.svg import MARKERS
from mmbert_core.report.typed_json import Missing

RATES = ("precision", "recall", "f1")
FALSE_RATES, RECALLS = (0.01, 0.05, 0.1, 0.2), (0.5, 0.8, 0.9, 0.95)  # columns of the curves' tables

View = dict[str, Any]


# ---- thresholds and calibration ----


def threshold(section: Threshold, report: Report) -> View:
    """The chosen threshold with its figures on these rows and on the validation rows, and other thresholds."""
    rows = sorted((row for row in section.table if is_number(row.threshold)), key=lambda row: row.threshold)
    chosen = next((row for row in rows if row.threshold == section.value), ThresholdRow())
    cards = [("threshold", threshold_words(section.value)), *((key, decimals(getattr(chosen, key))) for key in RATES)]
    on_validation = ((key, getattr(section, key)) for key in RATES)
    return {
        "section": section,
        "cards": [*cards, ("alerts per 1,000 rows", decimals(chosen.alerts_per_1000, 1))],
        "on_validation": ", ".join(f"{key} {decimals(value)}" for key, value in on_validation if is_number(value)),
        "is_every_row": is_number(section.value) and section.value < 0,
        "positive": positive_class(report.class_names),
        "chart": threshold_chart(rows, section.value) if rows else None,
        "rows": [(threshold_words(row.threshold, figure), row) for row in reversed(rows)],
    }


def threshold_chart(rows: Sequence[ThresholdRow], chosen: float | None) -> Chart:
    values = [max(row.threshold, 0) for row in rows]
    lines = [Line(key, *_points(values, [getattr(row, key) for row in rows]), style) for style, key in enumerate(RATES)]
    guides = [Guide((max(chosen, 0), 0), (max(chosen, 0), 1), "chosen")] if is_number(chosen) else []
    texts = Texts("Precision, recall and F1 by threshold", f"{len(rows)} thresholds; the table has the figures")
    svg = charts.plot(lines, Axis("threshold"), Axis("value"), texts, guides=guides)
    return Chart(texts.title, svg, charts.legend(lines))


def threshold_words(value: Any, write: Callable[[Any, int], str] = decimals) -> str:
    """A threshold with 4 digits; a threshold below 0 is not a probability: every row is above it."""
    return "every row" if is_number(value) and value < 0 else write(value, 4)


def calibration(section: Calibration, report: Report) -> View:
    """Bins of predicted probability and share found, before and after dividing the logits by the temperature."""
    series = {"uncalibrated": section.bins, "calibrated": [] if section.reason else section.calibrated_bins}
    series = {title: bins for title, bins in series.items() if bins}
    cards = [("temperature", figure(section.temperature, 4)), ("ece before", decimals(section.ece_before))]
    cards += [("ece after", decimals(section.ece_after)), ("validation rows", count(section.rows))]
    about = probability_words(report.task, report.class_names)
    heads = ["" if title == "uncalibrated" else title for title in series]
    return {"section": section, "cards": cards, **calibration_view(series, about, heads)}


def calibration_view(series: Mapping[str, Sequence[Bin]], about: str, heads: Sequence[str]) -> View:
    """The bins of each series in one chart and a table with `heads`. `about`: what is predicted, in words."""
    rows = []
    for bins in zip_longest(*series.values()):
        first = next(bin_ for bin_ in bins if bin_)
        rows.append((f"{decimals(first.low, 2)}–{decimals(first.high, 2)}", bins))
    chart = calibration_chart(series, about) if series else None
    return {"chart": chart, "heads": heads, "rows": rows}


def calibration_chart(series: Mapping[str, Sequence[Bin]], about: str) -> Chart:
    texts = Texts("Probability and share found", "On the diagonal both are equal; the table has the figures")
    svg = charts.reliability(series, texts, x_label=f"{about}, mean of a bin", y_label="share found")
    lines = [Line(title, (), (), style, marker=MARKERS[style]) for style, title in enumerate(series)]
    return Chart(texts.title, svg, charts.legend(lines))


def scores(section: Scores, report: Report) -> View:
    """Rows by probability, one histogram for each class (or for right and wrong)."""
    chosen = None if isinstance(report.threshold, Missing) else report.threshold.value
    has_threshold = is_number(chosen)
    label = probability_words(report.task, report.class_names)
    desc = "; ".join(f"{short(title)}: {count(sum(column))} rows" for title, column in section.counts.items())
    texts, dashed_at = Texts("Rows by probability", desc), max(chosen, 0) if has_threshold else None
    svg = charts.histograms(section.edges, section.counts, texts, label=label, dashed_at=dashed_at)
    bins = zip(pairwise(section.edges), *section.counts.values(), strict=False)
    return {
        "chart": Chart(texts.title, svg),
        "threshold": threshold_words(chosen) if has_threshold else None,
        "label": label,
        "titles": list(section.counts),
        "rows": [(f"{figure(low)}–{figure(high)}", values) for (low, high), *values in bins],
    }


# ---- curves ----


def roc(section: Curves, report: Report) -> View:
    return {**roc_view(section.curves, "class"), **left_out(section, report)}


def roc_view(curves: Mapping[str, Curve], head: str) -> View:
    """The curves in one chart and a table; `head`: what has a curve, as the table's first column."""
    lines = [Line(title, curve.x, curve.y, style) for style, (title, curve) in enumerate(curves.items())]
    texts = Texts("True and false positive rate", areas(curves))
    x, y = Axis("false positive rate"), Axis("true positive rate")
    svg = charts.plot(lines, x, y, texts, guides=[Guide((0, 0), (1, 1))])
    legend = charts.legend(lines, [f"area {decimals(curve.area)}" for curve in curves.values()])
    rows = []
    for title, curve in curves.items():
        found = [highest(curve, lambda x, rate=rate: x <= rate) for rate in FALSE_RATES]
        rows.append((title, curve, found))
    heads = [f"{rate:.0%}" for rate in FALSE_RATES]
    return {"chart": Chart(texts.title, svg, legend), "rows": rows, "heads": heads, "head": head, "num_drawn": None}


def precision_recall(section: Curves, report: Report) -> View:
    return {**precision_recall_view(section.curves, "class"), **left_out(section, report)}


def precision_recall_view(curves: Mapping[str, Curve], head: str) -> View:
    """As `roc_view`."""
    lines = []
    for style, (title, curve) in enumerate(curves.items()):
        # From high recall to low: each precision is drawn down to the next lower recall, as average precision sums it.
        points = sorted(zip(*_points(curve.x, curve.y), strict=True), key=lambda point: -point[0])
        lines.append(Line(title, [x for x, _ in points], [y for _, y in points], style, step=True))
    shares = {curve.share for curve in curves.values()}
    share = next(iter(shares)) if len(shares) == 1 else None
    guides = [Guide((0, share), (1, share), "share of rows")] if is_number(share) else []
    texts = Texts("Precision by recall", areas(curves))
    svg = charts.plot(lines, Axis("recall"), Axis("precision"), texts, guides=guides)
    words = [f"area {decimals(curve.area)}, {percent(curve.share)} of rows" for curve in curves.values()]
    rows = []
    for title, curve in curves.items():
        found = [highest(curve, lambda x, recall=recall: x >= recall) for recall in RECALLS]
        rows.append((title, curve, found))
    chart, heads = Chart(texts.title, svg, charts.legend(lines, words)), [f"{recall:.0%}" for recall in RECALLS]
    return {"chart": chart, "rows": rows, "heads": heads, "head": head, "num_drawn": None}


def highest(curve: Curve, is_allowed: Callable[[float], bool]) -> float | None:
    """The highest y of the points whose x is allowed; None without such a point."""
    return max((y for x, y in zip(*_points(curve.x, curve.y), strict=True) if is_allowed(x)), default=None)


def areas(curves: Mapping[str, Curve]) -> str:
    return "; ".join(f"{short(title)}: area {decimals(curve.area)}" for title, curve in curves.items())


def left_out(section: Curves, report: Report) -> View:
    """The number of curves if some classes are left out, else None; and the number of classes."""
    num_classes = len(report.class_names)
    return {"num_drawn": len(section.curves) if num_classes > FEW_CLASSES else None, "num_classes": num_classes}


# ---- words and points ----


def positive_class(class_names: Sequence[str]) -> str:
    """The name of class 1, whose probability a binary model predicts."""
    return (class_names or ["0", "1"])[-1]


def probability_words(task: str | None, class_names: Sequence[str]) -> str:
    is_binary = task == "binary"
    return f"probability of {short(positive_class(class_names))}" if is_binary else "probability of the chosen class"


def _points(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[float], list[float]]:
    """`x` and `y` without the points in which one is not a finite number."""
    known = [point for point in zip(x, y, strict=False) if all(map(is_number, point))]
    return [point[0] for point in known], [point[1] for point in known]
