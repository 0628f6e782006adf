"""The results of a training, as `mmbert_core.train` returns them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbert_core.report.results import figures_without_stage


@dataclass(frozen=True)
class Results:
    """The figures of `train_results.json`; those of the test rows also by the metric's own name.

    `metrics["auroc"]` is `test/auroc` of `test_metrics.json`; None: undefined, with the reason in `undefined`.
    The dicts are empty when there are no test rows with labels.
    """

    folder: Path  # of the run: the trained model, its checkpoints and its log
    test_folder: Path | None  # predictions, figures and report of the test rows
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]  # 95 %, by bootstrap
    undefined: dict[str, str]
    baselines: dict[str, dict[str, float | None]]  # metrics of simple models on the same rows, by baseline
    test_loss: float | None  # mean loss, rows weighted by class weight
    test_rows: int | None

    best_step: int  # its weights are in the model folder; without validation rows the last step
    best_metric: str | None  # the metric that chose it
    best_value: float | None
    steps: int
    epochs: float
    rows: int  # trained on, over all epochs
    train_rows: int  # of the training data
    skipped_steps: int  # left out because loss or gradient was not finite
    train_seconds: float  # of the training steps alone
    train_rows_per_second: float
    peak_memory_mb: float  # of rank 0
    world_size: int  # processes

    pooling: str | None  # None: without text
    precision: str
    microbatches_asked: int
    microbatches_per_step: int

    test_metrics: dict[str, Any] | None = field(repr=False)  # all that test_metrics.json holds

    @classmethod
    def from_record(cls, folder: str | Path, record: Mapping[str, Any]) -> "Results":
        """From what train_results.json holds. Keys that an older version did not write become None."""
        figures = record["test_metrics"] or {}
        same_name = {name: record.get(name) for name in cls.__dataclass_fields__}
        test_folder = record.get("test_folder")
        values = figures_without_stage(figures)
        converted = {
            "folder": Path(folder),
            "test_folder": Path(test_folder) if test_folder else None,
            "test_loss": figures.get("test_loss"),
            "test_rows": values["metrics"].pop("num_rows", None),
            **values,
        }
        return cls(**(same_name | converted))
