"""A report as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmbert_core.report import page_details, page_quality
from mmbert_core.report.formatting import count, name, reason, text
from mmbert_core.report.page_style import style_sheet
from mmbert_core.report.report_schema import FORMAT_VERSION
from mmbert_core.runtime.errors import InputError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Name of the section, the report's key, what makes it.
SECTIONS: tuple[tuple[str, str, Callable[[Any, Mapping[str, Any]], str]], ...] = (
    ("Headline", "metrics", page_quality.headline),
    ("Warnings", "warnings", page_quality.warnings),
    ("Baselines", "baselines", page_quality.baselines),
    ("Threshold", "threshold", page_quality.threshold),
    ("Calibration", "calibration", page_quality.calibration),
    ("ROC", "roc", page_quality.roc),
    ("Precision and recall", "precision_recall", page_quality.precision_recall),
    ("Confusion", "confusion", page_quality.confusion),
    ("Scores", "scores", page_quality.scores),
    ("Training", "training", page_details.training),
    ("Slices", "slices", page_details.slices),
    ("Importance", "importance", page_details.importance),
    ("Errors", "errors", page_details.errors),
    ("Config", "config", page_details.config),
    ("Data", "data", page_details.data),
    ("Versions", "versions", page_details.versions),
)


def render(report: Mapping[str, Any]) -> str:
    """The page of a report of format 1: every section under its name, with its reason where there is nothing to show.

    The same report makes the same page. Raises InputError for a report of another format.
    """
    if report.get("format_version") != FORMAT_VERSION:
        raise InputError(f"report: expected format_version {FORMAT_VERSION}, found {report.get('format_version')!r}")
    sections, links = [], []
    for title, key, make in SECTIONS:
        why, anchor = why_empty(report.get(key)), title.lower().replace(" ", "-")
        inside = reason(why) if why is not None else make(report[key], report)
        sections.append(
            f'<section id="{anchor}" aria-labelledby="{anchor}-name"><h2 id="{anchor}-name">{title}</h2>{inside}</section>'
        )
        links.append(f'<li><a href="#{anchor}" class="{"" if why is None else "empty"}">{title}</a></li>')
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            f"<title>{text(report['title'])}</title>\n<style>{style_sheet()}</style>\n</head>\n<body>",
            '<a class="skip" href="#content">Skip to the figures</a>',
            f"<header><h1>{name(report['title'])}</h1>{_facts(report)}</header>",
            f'<div class="frame"><nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>',
            '<main id="content" tabindex="-1">',
            *sections,
            f"<footer>Made {text(report.get('created') or '')} by mmbert_core. This page is one file: no script, no network.</footer>",
            "</main></div>\n</body>\n</html>\n",
        ]
    )


def why_empty(part: Any) -> str | None:
    """The reason of a part that has nothing but a reason; None for a part that can be shown."""
    if part is None:
        return "not in this report"
    if isinstance(part, Mapping) and set(part) == {"reason"}:
        return str(part["reason"])
    return None


def _facts(report: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    files = ", ".join(name(path) for path in report.get("input") or [])
    facts = {
        "model": name(report.get("model_path") or ""),
        "rows": count(report.get("num_rows")) + (f" of {files}" if files else ""),
        "label": name(report.get("label_name") or "") if report.get("has_labels") else "none in these rows",
        "task": f"{text(report.get('task') or '')}, {count(len(report.get('class_names') or []))} classes",
        "made": text(report.get("created") or ""),
    }
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
        + "</dl>"
    )
