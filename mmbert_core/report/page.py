"""A report as one HTML page that needs no network, no script and no other file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment

from mmbert_core.report import page_details, page_probabilities, page_quality
from mmbert_core.report.formatting import (
    NO_VALUE,
    brief,
    count,
    decimals,
    figure,
    finalize,
    interval,
    is_number,
    name,
    percent,
    short,
    signed,
)
from mmbert_core.report.report_schema import Report
from mmbert_core.report.typed_json import Missing
from mmbert_core.runtime.templates import environment

# Title, key of the report, template with the macro of that name, and the function that prepares the macro's values.
Sections = Sequence[tuple[str, str, str, Callable[[Any, Any], dict[str, Any]]]]
SECTIONS: Sections = (
    ("Headline", "metrics", "quality", page_quality.headline),
    ("Warnings", "warnings", "quality", page_quality.warnings),
    ("Baselines", "baselines", "quality", page_quality.baselines),
    ("Blend", "blend", "quality", page_quality.blend),
    ("Threshold", "threshold", "probabilities", page_probabilities.threshold),
    ("Calibration", "calibration", "probabilities", page_probabilities.calibration),
    ("ROC", "roc", "probabilities", page_probabilities.roc),
    ("Precision and recall", "precision_recall", "probabilities", page_probabilities.precision_recall),
    ("Confusion", "confusion", "quality", page_quality.confusion),
    ("Scores", "scores", "probabilities", page_probabilities.scores),
    ("Training", "training", "details", page_details.training),
    ("Slices", "slices", "details", page_details.slices),
    ("Importance", "importance", "details", page_details.importance),
    ("Errors", "errors", "details", page_details.errors),
    ("Config", "config", "details", page_details.config),
    ("Data", "data", "details", page_details.data),
    ("Versions", "versions", "details", page_details.versions),
)
OPTIONAL = ("blend",)  # sections that a page leaves out where the report lacks them


@dataclass(frozen=True)
class PageSection:
    """A section of the page: the values for its macro (`view`), or the reason why the section is empty."""

    title: str
    key: str
    template: str
    reason: str | None
    view: dict[str, Any]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def render(report: Report) -> str:
    """The page as HTML; a section without figures shows its reason. The same report gives the same page."""
    return render_sections("page.html", report, SECTIONS, optional=OPTIONAL)


def render_sections(page: str, report: Any, sections: Sections, *, optional: Sequence[str]) -> str:
    """The page of the template `page`, which extends layout.html: a title and the sections of `report`.

    A section of `optional` that is not in the report is left out.
    """
    views = []
    for title, key, template, prepare in sections:
        section = getattr(report, key)
        if key in optional and section == Missing():
            continue
        if isinstance(section, Missing):
            views.append(PageSection(title, key, template, section.reason, {}))
        else:
            views.append(PageSection(title, key, template, None, prepare(section, report)))
    return templates().get_template(page).render(report=report, sections=views)


@cache
def templates() -> Environment:
    """The templates of this package, which replace control characters in every text, then escape it."""
    loaded = environment(__package__, finalize=finalize)
    formats = (brief, count, decimals, figure, interval, name, percent, short, signed)
    loaded.filters |= {function.__name__: function for function in formats}
    loaded.tests["number"] = is_number  # replaces Jinja's own, which is true for NaN
    loaded.globals["NO_VALUE"] = NO_VALUE
    return loaded
