"""The figures of an evaluation, and where its page is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbert_core.config import Config
from mmbert_core.report.build import PAGE
from mmbert_core.report.results import figures_table, figures_without_stage


@dataclass(frozen=True)
class Evaluation:
    """The figures of labelled rows, by the metric's own name: what test_metrics.json in `folder` holds.

    `metrics["auroc"]` is None where it is undefined, with the reason in `undefined`. `print` shows them as a table.
    """

    folder: Path  # of the page, the predictions and the figures
    page: Path | None  # report.html; None where it could not be written
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]  # 95 %, by bootstrap
    undefined: dict[str, str]
    baselines: dict[str, dict[str, float | None]]  # metrics of simple models on the same rows, by baseline
    num_rows: int
    table: str = field(repr=False)

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any], folder: Path, config: Config) -> "Evaluation":
        values = figures_without_stage(figures)
        page = folder / PAGE
        return cls(
            folder=folder,
            page=page if page.is_file() else None,
            num_rows=values["metrics"].pop("num_rows"),
            table="\n".join(figures_table(figures, config)),
            **values,
        )

    def __str__(self) -> str:
        return self.table
