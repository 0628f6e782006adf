"""The page of a comparison of runs, and whether a difference is for the better. R runs."""

from collections.abc import Sequence
from typing import Any

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.metrics import lower_is_better
from mmbert_core.report import charts
from mmbert_core.report.build import HEADLINE
from mmbert_core.report.charts import Chart, Texts
from mmbert_core.report.comparison_schema import (
    Agreement,
    ClassOfRun,
    ComparedBins,
    ComparedClasses,
    ComparedMetrics,
    ComparedRun,
    ComparedSetting,
    ComparedValue,
    Comparison,
    DisputedRows,
)
from mmbert_core.report.formatting import bounds, decimals, is_number, short, signed
from mmbert_core.report.page import Sections, render_sections
from mmbert_core.report.page_details import LONG_TEXT
from mmbert_core.report.page_probabilities import (
    calibration_view,
    precision_recall_view,
    probability_words,
    roc_view,
)
from mmbert_core.report.page_quality import MAX_LISTED
from mmbert_core.report.report_schema import Curves

MAX_CHARTS = 6  # of differences, one for each run

View = dict[str, Any]


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML. The same comparison gives the same page."""
    return render_sections("comparison_page.html", comparison, SECTIONS, optional=OPTIONAL)


def outcome(metric: str, value: ComparedValue) -> str:
    """ "better" or "worse" where the interval of the difference does not contain 0, else ""."""
    ends = bounds(value.interval)
    if ends is None or ends[0] <= 0 <= ends[1]:
        return ""
    return "better" if (ends[0] > 0) != lower_is_better(metric) else "worse"


# ---- runs, metrics, settings ----


def runs(section: Sequence[ComparedRun], comparison: Comparison) -> View:
    return {
        "rows": section,
        "reference": comparison.reference,
        "notes": comparison.notes,
        "is_binary": comparison.task == "binary",
    }


def metrics(section: ComparedMetrics, comparison: Comparison) -> View:
    """The verdicts, a chart of differences for each other run, and every metric of every run."""
    rows = []
    for metric in section.names:
        values = [section.runs[name].get(metric) or ComparedValue() for name in comparison.names]
        rows.append((metric, [(value, outcome(metric, value)) for value in values]))
    drawn = (differences_chart(name, section, comparison.reference) for name in comparison.others[:MAX_CHARTS])
    return {
        "verdicts": section.verdicts,
        "charts": [chart for chart in drawn if chart is not None],
        "reference": comparison.reference,
        "heads": comparison.names,
        "num_compared": len(section.names) * len(comparison.others),
        "rows": rows,
    }


def differences_chart(name: str, section: ComparedMetrics, reference: str) -> Chart | None:
    """The differences of the first metrics of a report, in all of which higher is better; None without any."""
    values = {metric: section.runs[name].get(metric) or ComparedValue() for metric in HEADLINE}
    dots = [
        (metric, value.difference, bounds(value.interval))
        for metric, value in values.items()
        if is_number(value.difference)
    ]
    if not dots:
        return None
    desc = "; ".join(f"{metric} {signed(difference)}" for metric, difference, _ in dots)
    title = f"{short(name, 30)}: difference to {short(reference, 30)}"
    svg = charts.interval_dots(dots, Texts(title, desc), label="difference, right of the line: better", dashed_at=0.0)
    return Chart(title, svg)


def settings(section: Sequence[ComparedSetting], comparison: Comparison) -> View:
    rows = [(setting.key, [setting.values[name] for name in comparison.names]) for setting in section]
    return {"heads": comparison.names, "rows": rows}


# ---- probabilities ----


def roc(section: Curves, comparison: Comparison) -> View:
    return roc_view(section.curves, "run")


def precision_recall(section: Curves, comparison: Comparison) -> View:
    return precision_recall_view(section.curves, "run")


def calibration(section: ComparedBins, comparison: Comparison) -> View:
    words = probability_words(comparison.task, comparison.class_names)
    return calibration_view(section.bins, words, list(section.bins))


# ---- classes and rows ----


def classes(section: ComparedClasses, comparison: Comparison) -> View:
    """All classes; of many, those in which the runs differ most."""
    listed = section.rows
    if len(listed) > FEW_CLASSES:

        def spread(index: int) -> int:
            right = [of_run.right for of_run in listed[index].runs.values()]
            return max(right) - min(right)

        listed = [listed[index] for index in sorted(range(len(listed)), key=spread, reverse=True)[:MAX_LISTED]]
    rows = [(row, [class_cell(row.runs[name]) for name in comparison.names]) for row in listed]
    return {
        "heads": comparison.names,
        "num_listed": len(rows),
        "num_classes": len(section.rows),
        "rows": rows,
    }


def class_cell(of_run: ClassOfRun) -> tuple[ClassOfRun, str]:
    return of_run, outcome("average_precision", of_run.average_precision)


def agreement(section: dict[str, Agreement], comparison: Comparison) -> View:
    heads = ["right in both", f"only in {short(comparison.reference)}", "only in this run", "wrong in both"]
    return {
        "reference": comparison.reference,
        "heads": [*heads, "another class predicted"],
        "num_rows": comparison.num_rows,
        "rows": list(section.items()),
    }


def disputed_rows(section: DisputedRows, comparison: Comparison) -> View:
    """Each row with the runs' probabilities of its label and their predictions, as a text for each run."""
    rows = []
    for row in section.rows:
        of_runs = {
            name: f"{decimals(row.probabilities[name])}, predicted {short(row.preds[name])}"
            for name in comparison.names
        }
        rows.append((row, of_runs, len(row.text or "") > LONG_TEXT))
    return {"without_texts": section.without_texts, "rows": rows}


SECTIONS: Sections = (
    ("Runs", "runs", "comparison", runs),
    ("Metrics", "metrics", "comparison", metrics),
    ("Settings", "settings", "comparison", settings),
    ("ROC", "roc", "probabilities", roc),
    ("Precision and recall", "precision_recall", "probabilities", precision_recall),
    ("Calibration", "calibration", "comparison", calibration),
    ("Classes", "classes", "comparison", classes),
    ("Agreement", "agreement", "comparison", agreement),
    ("Disagreement", "disputed_rows", "comparison", disputed_rows),
)
OPTIONAL = ("roc", "precision_recall", "classes")  # each for two classes or for several
