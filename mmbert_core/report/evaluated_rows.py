"""Evaluated rows: their predictions and the model that computed them, from which a report is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmbert_core.data.dataset import Dataset
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.inference.scoring import Task
from mmbert_core.report.report_schema import DataSummary, Training
from mmbert_core.report.typed_json import Missing


@dataclass(frozen=True)
class EvaluatedRows:
    """N rows of a dataset with their predictions, and all else that a report needs. K classes."""

    loaded: LoadedModel
    task: Task
    dataset: Dataset
    preds: np.ndarray  # probabilities: [N] of class 1 (binary), or [N, K]
    ids: Sequence[str] | None
    figures: Mapping[str, Any]  # as in test_metrics.json
    model_path: str
    training: Training | Missing = Missing("the log of the run is not available")
    data: DataSummary | Missing = Missing("the training data are not available")
    warnings: Sequence[str] | Missing = ()
    slice_columns: Sequence[str] = ()

    @property
    def labels(self) -> np.ndarray:
        assert self.dataset.label_index is not None
        return self.dataset.label_index

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.loaded.labels.names

    @property
    def threshold(self) -> float:
        return self.loaded.decision.threshold.value
