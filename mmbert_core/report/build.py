"""The report of evaluated rows, as report.json and report.html.

N rows, K classes.
Everything runs on rank 0 alone, and what cannot be shown is a section with its reason: a report never ends a run.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.encoding import max_cell_characters, number_of
from mmbert_core.data.prepare import Data
from mmbert_core.data.tokens import join_texts, keeps_end
from mmbert_core.evaluation.baselines import DESCRIPTIONS
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.metrics import EPS, METRICS
from mmbert_core.evaluation.slices import MIN_ROWS, slices_of
from mmbert_core.evaluation.thresholds import predicted_classes
from mmbert_core.inference.attributions import Attributions, explain_rows
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.inference.permutation_importance import permutation_importance
from mmbert_core.inference.scoring import Task
from mmbert_core.report import curves
from mmbert_core.report.page import render
from mmbert_core.report.report_schema import FORMAT_VERSION, check_report
from mmbert_core.report.results import listed_figures, main_metric, verdict
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.progress import slow_step
from mmbert_core.runtime.versions import VERSIONS
from mmbert_core.storage.files import read_json, write_json, write_text
from mmbert_core.storage.metrics_log import kept_lines
from mmbert_core.tables.cells import BOOLEANS
from mmbert_core.tables.table import Roles, read_chunks

logger = logging.getLogger(__name__)

REPORT, PAGE = "report.json", "report.html"
HEADLINE = ("auroc", "average_precision", "f1_score", "precision", "recall", "accuracy")
SLICE_METRICS = ("f1_score", "accuracy")  # beside the main one
MAX_ERRORS, MAX_SLICES, MAX_STEPS = 20, 400, 500
# An explanation costs as much as scoring 48 rows (16 steps, backward passes count double): all of them a quarter of the scoring.
MIN_EXPLAINED, ROWS_PER_EXPLANATION = 3, 200

Section = dict[str, Any]


@dataclass(frozen=True)
class EvaluatedRows:
    """Evaluated rows and what they were scored with."""

    loaded: LoadedModel
    task: Task
    dataset: Dataset
    preds: np.ndarray  # [N] or [N, K]
    ids: Sequence[str] | None
    figures: Mapping[str, Any]  # as in test_metrics.json
    model_path: str
    training: Section = field(default_factory=lambda: {"reason": "the log of the run is not at hand"})
    data: Section = field(default_factory=lambda: {"reason": "the training data are not at hand"})
    warnings: Sequence[str] | Section = ()
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


def write_report(make: Callable[[], EvaluatedRows], folder: Path) -> bool:
    """report.json and report.html of what `make` gives, in `folder`; whether they are there. Raises `OSError` alone: a full disk."""
    try:
        report = build_report(make())
        with slow_step(PAGE):
            write_json(folder / REPORT, report)
            write_text(folder / PAGE, render(report))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - the figures are written
        logger.warning("no %s: %s: %s", PAGE, type(error).__name__, error)
        return False
    return True


def render_again(folder: Path) -> Path:
    """report.html of the report.json in `folder`. Raises `InputError` when there is none."""
    try:
        report = read_json(folder / REPORT, check_report)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: expected the folder of a test or of `mmbert evaluate`, found no {REPORT}"
        ) from None
    try:
        page = render(report)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{folder / REPORT}: expected a report that can be drawn, found one that cannot ({what})"
        ) from None
    write_text(folder / PAGE, page)
    return folder / PAGE


def build_report(scored: EvaluatedRows) -> Section:
    """All sections, each with its figures or its reason."""
    config, dataset, preds, names = scored.loaded.config, scored.dataset, scored.preds, scored.class_names
    paths = dataset.encoded.paths
    decision = scored.loaded.decision

    def of_labels(key: str, make: Callable[[], Section]) -> Section:
        if not dataset.has_labels or len(dataset) == 0:
            return {"reason": "no labelled rows"}
        if not np.isfinite(preds).all():
            return {"reason": "predictions that are no numbers"}
        try:
            with slow_step(f"report, {key}"):
                return make()
        except Exception as error:  # noqa: BLE001 - one section less, never a run
            logger.warning("a section of the report is missing: %s: %s", type(error).__name__, error)
            return {"reason": f"{type(error).__name__}: {error}"}

    return {
        "format_version": FORMAT_VERSION,
        "title": f"{Path(scored.model_path).resolve().name}: {len(dataset):,} rows of {', '.join(Path(path).name for path in paths)}",
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "model_path": scored.model_path,
        "input": list(paths),
        "num_rows": len(dataset),
        "has_labels": dataset.has_labels,
        "task": config.task,
        "class_names": list(names),
        "label_name": config.label_name,
        "warnings": scored.warnings if isinstance(scored.warnings, Mapping) else list(scored.warnings),
        "metrics": of_labels("metrics", lambda: metrics_section(scored)),
        "baselines": of_labels("baselines", lambda: baselines_section(scored)),
        "threshold": of_labels("threshold", lambda: curves.threshold_section(preds, scored.labels, decision)),
        "calibration": of_labels("calibration", lambda: curves.calibration_section(preds, scored.labels, decision)),
        "roc": of_labels("roc", lambda: curves.roc_section(preds, scored.labels, names)),
        "precision_recall": of_labels(
            "precision_recall", lambda: curves.precision_recall_section(preds, scored.labels, names)
        ),
        "confusion": of_labels(
            "confusion", lambda: curves.confusion_section(preds, scored.labels, len(names), scored.threshold)
        ),
        "scores": of_labels("scores", lambda: curves.scores_section(preds, scored.labels, names)),
        "training": scored.training,
        "slices": of_labels("slices", lambda: slices_section(scored)),
        "importance": of_labels("importance", lambda: importance_section(scored)),
        "errors": of_labels("errors", lambda: errors_section(scored)),
        "config": config.to_dict(),
        "resolved": dict(scored.loaded.resolved),
        "data": scored.data,
        "versions": {**VERSIONS, "python": platform.python_version()},
    }


# ---- what a run knows ----


def training_section(folder: Path, best_step: int | None = None, metric: str | None = None) -> Section:
    """Curves of `metrics.jsonl`, thinned."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {"reason": "the folder has no metrics.jsonl"}
    lines = [json.loads(line) for line in kept_lines(path, sys.maxsize, tested=True)]
    steps = [line for line in lines if "train_loss" in line and "lr" in line]
    steps = steps[:: max(1, len(steps) // MAX_STEPS)]
    validations = [
        {name: value for name, value in line.items() if name != "undefined"} for line in lines if "val_loss" in line
    ]
    curves = {
        "steps": [line["step"] for line in steps],
        "train_loss": [line["train_loss"] for line in steps],
        "lr": [line["lr"] for line in steps],
    }
    return {**curves, "validations": validations, "best_step": best_step, "metric": metric}


def data_section(data: Data) -> Section:
    """Rows, classes and lengths of each part, and the files with their hashes."""
    splits = (("train", data.train), ("val", data.val), ("test", data.test))
    listed = most_frequent(data.train.label_index, len(data.labels.names))
    return {
        "files": data.fingerprints,
        **{name: rows_section(split, data.labels.names, listed) for name, split in splits if split is not None},
    }


def rows_section(split: Dataset, class_names: Sequence[str], listed: Sequence[int] | None = None) -> Section:
    """Rows, classes and lengths of one split. Of more than FEW_CLASSES those `listed`, by default its most frequent ones."""
    section: Section = {
        "rows": len(split),
        "classes": None,
        "mean_tokens": float(split.lengths.mean()) if len(split) else None,
    }
    if split.has_labels:
        counts = np.bincount(split.label_index, minlength=len(class_names))
        listed = most_frequent(split.label_index, len(class_names)) if listed is None else listed
        section["classes"] = {class_names[index]: int(counts[index]) for index in listed}
        if len(listed) < len(class_names):
            section |= {
                "classes_left_out": len(class_names) - len(listed),
                "rows_left_out": int(counts.sum() - counts[listed].sum()),
            }
    return section


def most_frequent(labels: np.ndarray, num_classes: int) -> list[int]:
    """All classes, or the FEW_CLASSES most frequent ones, in their order."""
    counts = np.bincount(labels, minlength=num_classes)
    return sorted(np.argsort(-counts, kind="stable")[:FEW_CLASSES].tolist())


# ---- sections ----


def cell(figures: Mapping[str, Any], key: str) -> Section:
    interval = figures.get("intervals", {}).get(key)
    return {
        "value": figures.get(key),
        "interval": None if interval is None else list(interval),
        "reason": figures.get("undefined", {}).get(key),
    }


def metrics_section(scored: EvaluatedRows) -> Section:
    figures, num_left_out = listed_figures(scored.figures, "test", scored.loaded.config)
    names = [*HEADLINE, *(name for name in METRICS if name not in HEADLINE)]
    names += [key.removeprefix("test/") for key in figures if key.startswith("test/average_precision_class_")]
    left_out = {"classes_left_out": num_left_out} if num_left_out else {}
    return {"names": names, "model": {name: cell(figures, f"test/{name}") for name in names}, **left_out}


def baselines_section(scored: EvaluatedRows) -> Section:
    figures, _ = listed_figures(scored.figures, "test", scored.loaded.config)
    rows = [
        {
            "name": name,
            "how": DESCRIPTIONS[name],
            "metrics": {
                key.removeprefix("test/"): {"value": value, "interval": None, "reason": None}
                for key, value in values.items()
            },
        }
        for name, values in figures["baselines"].items()
    ]
    if not rows:
        return {"reason": "the model folder has none"}
    return {"rows": rows, "verdict": verdict(scored.figures, "test", scored.loaded.config)}


def slices_section(scored: EvaluatedRows) -> Section:
    metric = slice_metric(scored.loaded.config)
    columns = scored.dataset.cells(np.arange(len(scored.dataset)))
    if scored.slice_columns:
        columns = named_columns(scored, columns)
    if not columns:
        return {"reason": "the model has no columns, and none were named"}
    names = tuple(dict.fromkeys([metric, *SLICE_METRICS]))
    made = slices_of(
        scored.preds, scored.labels, columns, names, class_names=scored.class_names, threshold=scored.threshold
    )
    if not made:
        return {"reason": f"no value and no quarter of a column has {MIN_ROWS} rows"}
    return {"metric": metric, "rows": [part.to_json() for part in made[:MAX_SLICES]]}


def slice_metric(config: Config) -> str:
    """The main metric; of several classes one that a slice without some of them has too."""
    metric = main_metric(config)
    return "accuracy" if not config.is_binary and metric.startswith(("auroc", "average_precision")) else metric


def named_columns(scored: EvaluatedRows, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The named columns: those of the model, and others as texts from the file; of numbers alone: as numbers."""
    wanted = list(dict.fromkeys(scored.slice_columns))
    others = [name for name in wanted if name not in columns]
    cells: dict[str, list[str]] = {name: [] for name in others}
    if others:
        for chunk in read_chunks(scored.dataset.encoded.paths, others, tsv_quoting=scored.dataset.encoded.tsv_quoting):
            for name in others:
                cells[name] += chunk.cells[name]
    rows = scored.dataset.rows
    picked: dict[str, Any] = {name: [values[row] for row in rows] for name, values in cells.items()}
    for name, values in picked.items():
        if not BOOLEANS.keys() & set(values):  # true and false are two values rather than 1 and 0
            with suppress(ValueError):
                picked[name] = np.array([number_of(value) for value in values])
    return {name: columns[name] if name in columns else picked[name] for name in wanted}


def importance_section(scored: EvaluatedRows) -> Section:
    config = scored.loaded.config
    return permutation_importance(
        scored.loaded.model,
        scored.dataset,
        task=scored.task,
        metric=main_metric(config),
        class_names=scored.class_names,
        threshold=scored.threshold,
        text_name=", ".join(config.text_name),
        seed=config.seed,
    )


def errors_section(scored: EvaluatedRows) -> Section:
    """The wrong rows that the model was surest of, with the words that spoke for its answer."""
    preds, labels, dataset = scored.preds, scored.labels, scored.dataset
    chosen = predicted_classes(preds, threshold=scored.threshold)
    of_chosen = np.where(chosen == 1, preds, 1 - preds) if preds.ndim == 1 else preds[np.arange(len(preds)), chosen]
    sureness = of_chosen if preds.ndim == 2 else distance_to(scored.threshold, preds)
    wrong = np.flatnonzero(chosen != labels)
    if len(wrong) == 0:
        return {"reason": "no row was predicted wrong"}
    worst = wrong[np.argsort(-sureness[wrong], kind="stable")[:MAX_ERRORS]]
    texts, num_explained = texts_of(scored, worst), max(MIN_EXPLAINED, len(preds) // ROWS_PER_EXPLANATION)
    attributions: list[Attributions] = []  # row by row: all of them at once could take more memory than training did
    for row, text in zip(worst[:num_explained], texts):
        attributions += explain_rows(
            scored.loaded, dataset, [row], predicted=[chosen[row]], texts=[text], task=scored.task
        )
    attributions += [[(text, 0.0)] if text else [] for text in texts[num_explained:]]
    columns = dataset.cells(worst)
    return {
        "rows": [
            {
                "place": dataset.row_location(int(row)),
                "id": scored.ids[row] if scored.ids else None,
                "label": scored.class_names[labels[row]],
                "pred": scored.class_names[chosen[row]],
                "prob": float(of_chosen[row]),
                "columns": {name: str(values[place]) for name, values in columns.items()},
                "tokens": [list(span) for span in attributions[place]],
                "method": "integrated gradients" if place < num_explained else None,
            }
            for place, row in enumerate(worst)
        ]
    }


def distance_to(threshold: float, preds: np.ndarray) -> np.ndarray:
    """0 for a probability [N] at the threshold, 1 for one at the end of its side: so misses and false alarms compare."""
    preds, threshold = preds.astype(np.float64), max(threshold, 0.0)
    return np.where(
        preds > threshold, (preds - threshold) / max(1 - threshold, EPS), (threshold - preds) / max(threshold, EPS)
    )


def texts_of(scored: EvaluatedRows, positions: np.ndarray) -> list[str]:
    """The texts of some rows, read once more: what is kept of them is token ids."""
    config, encoded = scored.loaded.config, scored.dataset.encoded
    columns = config.text_name
    if not columns:
        return [""] * len(positions)
    max_characters = max_cell_characters(
        Roles.from_config(config), max_length=config.max_length, max_chunks=config.max_chunks
    )
    wanted = {int(row): place for place, row in enumerate(scored.dataset.rows[positions])}
    texts, first = [""] * len(positions), 0
    for chunk in read_chunks(
        encoded.paths,
        list(columns),
        max_characters=max_characters,
        keep_end=keeps_end(scored.loaded.tokenizer),
        tsv_quoting=encoded.tsv_quoting,
    ):
        if first > max(wanted):
            break
        for row in [row for row in wanted if first <= row < first + len(chunk)]:
            cells = {name: [chunk.cells[name][row - first]] for name in columns}
            [texts[wanted[row]]] = join_texts(cells, columns)
        first += len(chunk)
    return texts
