"""The figures of an evaluation: metrics with their intervals next to the baselines, and what to conclude from them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbert_core.config import Config
from mmbert_core.data.dataset import Dataset
from mmbert_core.evaluation import baselines
from mmbert_core.evaluation.baselines import TEXT_ONLY, Baselines
from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.intervals import bootstrap_intervals
from mmbert_core.evaluation.metrics import CLASS_PREFIX, ONE_SIDED, compute_metrics, lower_is_better, metric_names
from mmbert_core.inference.output_file import Columns, prediction_columns, table_line, table_rows
from mmbert_core.inference.scoring import EpochResult, non_finite_rows
from mmbert_core.report.plots import write_plots
from mmbert_core.runtime.progress import slow_step
from mmbert_core.storage.files import write_json, write_text

logger = logging.getLogger(__name__)


MAX_LISTED = 10  # of more than FEW_CLASSES, those that pages and prints list


NOT_BETTER = "The model does not beat its baselines"


TRY = "Try a higher lr (small encoders need 2e-4 rather than 2e-5), a head_lr of 1e-3, more epochs, or more training rows."


CHUNK_ROWS = 8_192  # whose sparse features are in memory at a time


def baseline_features(name: str, dataset: Dataset, positions: np.ndarray) -> torch.Tensor:
    """Sparse [N, F] of rows, for the baseline of that name."""
    if name == TEXT_ONLY:
        return baselines.word_features(*dataset.token_ids(positions))
    features, (numbers, categories) = dataset.features, dataset.columns(positions)
    standardised = (numbers - np.array(features.means)) / np.array(features.stds)
    return baselines.column_features(np.clip(standardised, -10, 10), categories, features.cardinalities)


def figures_of(
    preds: np.ndarray,
    labels: np.ndarray,
    dataset: Dataset,
    *,
    stage: str,
    config: Config,
    class_names: Sequence[str],
    decision: Decision,
) -> dict[str, Any]:
    """`<stage>/<metric>` of the model; under `intervals`, `undefined` and `baselines` the same names, `preds` [N] or [N, K], `labels` [N]."""
    names, threshold = metric_names(class_names), decision.threshold.value
    with slow_step("metrics"):
        metrics = compute_metrics(
            preds, labels, names, config.task, config.num_classes, stage, class_names=class_names, threshold=threshold
        )
    defined = [name for name in names if metrics.values[f"{stage}/{name}"] is not None]
    with slow_step("bootstrap intervals of the metrics"):
        intervals = bootstrap_intervals(
            preds, labels, defined, class_names=class_names, threshold=threshold, seed=config.seed
        )
    if len(class_names) > FEW_CLASSES:
        intervals = {name: around(pair, metrics.values[f"{stage}/{name}"]) for name, pair in intervals.items()}
    figures = {
        **metrics.values,
        "undefined": metrics.undefined,
        "intervals": {f"{stage}/{name}": pair and list(pair) for name, pair in intervals.items()},
        "threshold": threshold if config.is_binary else None,
        "baselines": {},
        "no_baselines": {} if decision.baselines is None else dict(decision.baselines.reasons),
    }
    if decision.baselines is not None:
        with slow_step("metrics of the baselines"):
            for name, scores in baseline_predictions(decision.baselines, dataset).items():
                scores = scores[:, 1] if config.is_binary else scores
                cut = decision.baselines.thresholds.get(name, 0.5)
                made = compute_metrics(
                    scores,
                    labels,
                    names,
                    config.task,
                    config.num_classes,
                    stage,
                    class_names=class_names,
                    threshold=cut,
                )
                figures["baselines"][name] = made.values
    return figures


def around(interval: tuple[float, float] | None, value: float | None) -> tuple[float, float] | None:
    """The interval where it contains the value, else None.

    The average precision of a class of few rows is higher in most resamples, which have some of these rows several
    times: its mean over many such classes lies below its own interval.
    """
    return interval if interval is not None and value is not None and interval[0] <= value <= interval[1] else None


def listed_figures(figures: Mapping[str, Any], stage: str, config: Config) -> tuple[dict[str, Any], int]:
    """The figures for people to read, and the number of classes that they leave out.

    Of more than FEW_CLASSES, those are kept that the config names, and the MAX_LISTED whose average precision is lowest;
    test_metrics.json has all.
    """
    of_classes = [key for key in figures if key.startswith(f"{stage}/{CLASS_PREFIX}")]
    if len(of_classes) <= FEW_CLASSES:
        return dict(figures), 0
    lowest = sorted((key for key in of_classes if figures[key] is not None), key=lambda key: figures[key])[:MAX_LISTED]
    named = {f"{stage}/{name}" for name in (*config.metric_choices, config.early_stop_metric.removeprefix("val/"))}
    left_out = set(of_classes) - set(lowest) - named

    def listed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in left_out}

    inner = {key: listed(figures[key]) for key in ("undefined", "intervals") if key in figures}
    return listed(figures) | inner | {
        "baselines": {name: listed(values) for name, values in figures.get("baselines", {}).items()}
    }, len(left_out)


def baseline_predictions(models: Baselines, dataset: Dataset) -> dict[str, np.ndarray]:
    """Baseline -> probabilities [N, K] of all rows."""
    parts = []
    for start in range(0, len(dataset), CHUNK_ROWS):
        positions = np.arange(start, min(start + CHUNK_ROWS, len(dataset)))
        parts.append(
            models.probabilities(
                len(positions), {name: baseline_features(name, dataset, positions) for name in models.models}
            )
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def main_metric(config: Config) -> str:
    """The metric that parts of the rows, columns and rivals are compared by: the one that chose the best step, if more of it is better."""
    name = config.early_stop_metric
    return "auroc" if lower_is_better(name) else name.removeprefix("val/")


def defined_metric(figures: Mapping[str, Any], stage: str, config: Config) -> str:
    """The main one, or, where it compares no models or a class has no row, one that does."""
    main = main_metric(config)
    first = (
        "auroc" if main in (*ONE_SIDED, "f1_score") else main
    )  # F1 too: where class 1 is rare, class 1 for every row beats the most frequent class
    return next((name for name in (first, "f1_macro", "accuracy") if figures.get(f"{stage}/{name}") is not None), main)


def verdict(figures: Mapping[str, Any], stage: str, config: Config) -> str:
    """Whether the model is above its baselines: the same words in the test of a run and in `evaluate`. `TRY` is for who trains alone."""
    metric = defined_metric(figures, stage, config)
    key = f"{stage}/{metric}"
    missing = "".join(
        f" No baseline {name!r}: {reason}."
        for name, reason in figures["no_baselines"].items()
        if not reason.startswith("the model has no")
    )
    rivals = {name: values[key] for name, values in figures["baselines"].items() if values.get(key) is not None}
    value = figures[key]
    if value is None or not rivals:
        return f"No comparison with baselines: {figures['undefined'].get(key, 'there are none')}." + missing
    best = max(rivals, key=lambda name: rivals[name])
    interval = figures["intervals"].get(key)
    beside = f"{metric} {value:.4f} beside {rivals[best]:.4f} ({best})"
    if f"{value:.4f}" == f"{rivals[best]:.4f}" == "1.0000":
        return (
            f"The model ties with the best of its baselines: {metric} 1.0000 for both ({best}), and more is not possible."
            + missing
        )
    if value > rivals[best]:
        doubt = ""
        if interval is None:
            doubt = ", but no interval says by how much it may be chance"
        elif interval[0] <= rivals[best]:
            doubt = ", but by less than its interval is wide"
        return f"The model is above all baselines{doubt}: {beside}." + missing
    return f"{NOT_BETTER}: {beside}." + missing


def columns_of(
    result: EpochResult, dataset: Dataset, *, config: Config, class_names: Sequence[str], decision: Decision
) -> Columns:
    """EvaluatedRows rows as a prediction file has them; without an id column where the rows came without ids."""
    return prediction_columns(
        result.preds,
        class_names,
        is_binary=config.is_binary,
        id_name=None if result.ids is None else config.id_name,
        ids=result.ids,
        labels=dataset.label_strings(range(len(dataset))) if dataset.has_labels else None,
        calibrated=decision.calibration.apply(result.preds),
        threshold=decision.threshold.value,
    )


def write_results(
    result: EpochResult,
    dataset: Dataset,
    folder: Path,
    *,
    config: Config,
    class_names: Sequence[str],
    decision: Decision,
) -> dict[str, Any]:
    """Rank 0 only. EvaluatedRows rows as a prediction file, figures and pictures in `folder`; returns the figures."""
    figures: dict[str, Any] = {"test/num_rows": len(dataset)}
    broken = non_finite_rows(result.preds)
    if len(broken):
        logger.warning(
            "probabilities that are no numbers: %d of %d rows, first %s: their pred says nothing",
            len(broken),
            len(dataset),
            dataset.row_location(broken[0]),
        )
    if dataset.has_labels:
        if result.labels is not None:  # else rows of a prediction, which has no loss
            figures["test_loss"] = result.loss
        figures |= figures_of(
            result.preds,
            dataset.label_index,
            dataset,
            stage="test",
            config=config,
            class_names=class_names,
            decision=decision,
        )
    with slow_step("test_result_0.tsv"):
        columns = columns_of(result, dataset, config=config, class_names=class_names, decision=decision)
        write_text(folder / "test_result_0.tsv", "".join([table_line(columns), *table_rows(columns)]))
    write_json(folder / "test_metrics.json", figures)
    if dataset.has_labels:
        with slow_step("pictures of the test"):
            draw(result.preds, dataset.label_index, folder / "plots", class_names, decision.threshold.value)
    return figures


def draw(preds: np.ndarray, labels: np.ndarray, folder: Path, class_names: Sequence[str], threshold: float) -> None:
    """Rank 0 only. Pictures are an extra: whatever goes wrong with them, the figures are written."""
    try:
        if not write_plots(preds, labels, folder, class_names=class_names, threshold=threshold):
            logger.info(
                "no pictures of the test: they need matplotlib (extra `plots`) and labelled rows of several classes"
            )
    except Exception as error:  # noqa: BLE001 - matplotlib, fonts, disks
        logger.warning("no pictures of the test: %s: %s", type(error).__name__, error)
