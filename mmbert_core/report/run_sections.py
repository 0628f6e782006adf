"""Sections of a report about the training run: its curves and its data."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.report.report_schema import DataFile, DataSummary, Split, Training
from mmbert_core.report.typed_json import Missing
from mmbert_core.storage.metrics_log import kept_lines

MAX_STEPS = 500  # of the training curves; from twice as many steps on, every n-th is kept


def training_section(folder: Path, best_step: int | None = None, metric: str | None = None) -> Training | Missing:
    """Curves from `metrics.jsonl`; of a long run, every n-th step."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return Missing("the folder has no metrics.jsonl")
    lines = [json.loads(line) for line in kept_lines(path, sys.maxsize, tested=True)]
    steps = [line for line in lines if "train_loss" in line and "lr" in line]
    steps = steps[:: max(1, len(steps) // MAX_STEPS)]
    validations = [line for line in lines if "val_loss" in line]
    return Training(
        steps=[line["step"] for line in steps],
        train_loss=[line["train_loss"] for line in steps],
        lr=[line["lr"] for line in steps],
        validations=[{key: value for key, value in line.items() if key != "undefined"} for line in validations],
        best_step=best_step,
        metric=metric,
    )


def data_section(data: Data) -> DataSummary:
    """Rows, classes and mean tokens of each split, and the files with their hashes."""
    listed = most_frequent(data.train.label_index, len(data.labels.names))
    splits = {"train": data.train, "val": data.val, "test": data.test}
    summaries = {
        name: rows_section(split, data.labels.names, listed) for name, split in splits.items() if split is not None
    }
    return DataSummary(files={path: DataFile(**about) for path, about in data.fingerprints.items()}, **summaries)


def rows_section(split: Dataset, class_names: Sequence[str], listed: Sequence[int] | None = None) -> Split:
    """Rows, classes and mean tokens of one split. `listed`: the classes to count; None: as `most_frequent`."""
    mean_tokens = float(split.lengths.mean()) if len(split) else None
    if not split.has_labels:
        return Split(rows=len(split), mean_tokens=mean_tokens)
    counts = np.bincount(split.label_index, minlength=len(class_names))
    listed = most_frequent(split.label_index, len(class_names)) if listed is None else listed
    return Split(
        rows=len(split),
        classes={class_names[index]: int(counts[index]) for index in listed},
        mean_tokens=mean_tokens,
        classes_left_out=len(class_names) - len(listed) or None,
        rows_left_out=int(counts.sum() - counts[listed].sum()) if len(listed) < len(class_names) else None,
    )


def most_frequent(labels: np.ndarray, num_classes: int) -> list[int]:
    """The indices, ascending, of the FEW_CLASSES most frequent classes, or of all if there are no more."""
    counts = np.bincount(labels, minlength=num_classes)
    return sorted(np.argsort(-counts, kind="stable")[:FEW_CLASSES].tolist())
