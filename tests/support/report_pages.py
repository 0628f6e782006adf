"""Pages of example reports, and their sections as trees."""

from pathlib import Path
from typing import Any

from mmbert_core.report import page
from mmbert_core.report.page import render
from mmbert_core.report.report_schema import report_of
from tests.support.page_tree import Element, tree_of

CSS = (Path(page.__file__).parent / "templates/report.css").read_text(encoding="utf-8")


def page_of(report: dict[str, Any]) -> str:
    """The page of a report.json, also of one that its check would refuse."""
    return render(report_of(report))


def sections_of(html: str) -> dict[str, Element]:
    return {section.attributes["id"]: section for section in tree_of(html).all("section")}


def section(report: dict, name: str) -> Element:
    return sections_of(page_of(report))[name]


def row_of(table_text: Element, head: str) -> list[str]:
    """The cells of the first row that begins with `head`."""
    return next(
        [cell.text for cell in row.children]
        for row in table_text.all("tr")
        if isinstance(row.children[0], Element) and row.children[0].text == head
    )
