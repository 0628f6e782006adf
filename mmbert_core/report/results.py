"""The figures of an evaluation: metrics with intervals, metrics of the baselines, and a verdict that compares both."""

import logging
from collections.abc import Iterator, Mapping, Sequence
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

STAGE = "test/"  # prefix of the metrics' names in the files
MAX_LISTED = 10  # classes in pages and printed tables, where there are more than FEW_CLASSES
CHUNK_ROWS = 8_192  # rows whose sparse features are in memory at a time
NOT_BETTER = "The model does not beat its baselines"
TRY = (
    "Try a higher lr (small encoders need 2e-4 rather than 2e-5), a head_lr of 1e-3, more epochs, "
    "or more training rows."
)


def baseline_features(name: str, dataset: Dataset, positions: np.ndarray) -> torch.Tensor:
    """Sparse features [N, F] of N rows for the baseline `name`."""
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
    """The figures of test_metrics.json: by `<stage>/<metric>`, also inside `intervals`, `undefined` and `baselines`.

    `preds` [N] (binary: probability of class 1) or [N, K], `labels` [N].
    """
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
    return {
        **metrics.values,
        "undefined": metrics.undefined,
        "intervals": {f"{stage}/{name}": pair and list(pair) for name, pair in intervals.items()},
        "threshold": threshold if config.is_binary else None,
        "baselines": baseline_figures(labels, dataset, stage, config, class_names, decision.baselines),
        "no_baselines": {} if decision.baselines is None else dict(decision.baselines.reasons),
    }


def baseline_figures(
    labels: np.ndarray,
    dataset: Dataset,
    stage: str,
    config: Config,
    class_names: Sequence[str],
    models: Baselines | None,
) -> dict[str, dict[str, float | None]]:
    """Baseline -> `<stage>/<metric>` -> value, each baseline with its own threshold."""
    figures: dict[str, dict[str, float | None]] = {}
    if models is None:
        return figures
    with slow_step("metrics of the baselines"):
        for name, probabilities in baseline_predictions(models, dataset).items():
            figures[name] = compute_metrics(
                probabilities[:, 1] if config.is_binary else probabilities,
                labels,
                metric_names(class_names),
                config.task,
                config.num_classes,
                stage,
                class_names=class_names,
                threshold=models.thresholds.get(name, 0.5),
            ).values
    return figures


def around(interval: tuple[float, float] | None, value: float | None) -> tuple[float, float] | None:
    """The interval if it contains the value, else None.

    Resampling repeats rows, which raises the average precision of a class with few rows: the mean over many such
    classes is often below its own interval.
    """
    return interval if interval is not None and value is not None and interval[0] <= value <= interval[1] else None


def listed_figures(figures: Mapping[str, Any], stage: str, config: Config) -> tuple[dict[str, Any], int]:
    """The figures that pages and printed tables list, and the number of classes whose figures are left out.

    With more than FEW_CLASSES, the classes listed are those that the config's metrics name and the MAX_LISTED ones with
    the lowest average precision. test_metrics.json has all.
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
    inner["baselines"] = {name: listed(values) for name, values in figures.get("baselines", {}).items()}
    return listed(figures) | inner, len(left_out)


def figures_without_stage(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`metrics`, `intervals`, `undefined` and `baselines` of test_metrics.json, with names such as auroc."""
    intervals = _without_stage(figures.get("intervals", {}))
    return {
        "metrics": _without_stage(figures),
        "intervals": {name: pair and tuple(pair) for name, pair in intervals.items()},
        "undefined": _without_stage(figures.get("undefined", {})),
        "baselines": {name: _without_stage(values) for name, values in figures.get("baselines", {}).items()},
    }


def _without_stage(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names begin with `test/`, without that prefix."""
    return {name.removeprefix(STAGE): value for name, value in figures.items() if name.startswith(STAGE)}


def figures_table(figures: Mapping[str, Any], config: Config) -> Iterator[str]:
    """The lines of a table of metrics with intervals and baselines, for a terminal, and the verdict."""
    listed, num_left_out = listed_figures(figures, "test", config)
    baselines = listed.get("baselines", {})
    if baselines:
        yield f"{'':34} {'model':>10}  {'95 % interval':<17}" + "".join(f"{name:>21}" for name in baselines)
    intervals = figures.get("intervals", {})
    for name, value in listed.items():
        if not name.startswith("test"):
            continue
        formatted = "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
        line = f"{name:34} {formatted:>10}  "
        if name in intervals:
            interval = "{:.4f} - {:.4f}".format(*intervals[name]) if intervals[name] else ""
            line += f"{interval:<17}"
            of_baselines = (values.get(name) for values in baselines.values())
            line += "".join(f"{'' if value is None else format(value, '.4f'):>21}" for value in of_baselines)
        yield line.rstrip()
    if num_left_out:
        lowest = "the ones above have the lowest average precision"
        yield f"... {num_left_out:,} more classes in test_metrics.json; {lowest}"
    if baselines:
        yield verdict(figures, "test", config)


def baseline_predictions(models: Baselines, dataset: Dataset) -> dict[str, np.ndarray]:
    """Baseline -> probabilities [N, K] of all rows."""
    chunks = []
    for start in range(0, len(dataset), CHUNK_ROWS):
        positions = np.arange(start, min(start + CHUNK_ROWS, len(dataset)))
        features = {name: baseline_features(name, dataset, positions) for name in models.models}
        chunks.append(models.probabilities(len(positions), features))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def main_metric(config: Config) -> str:
    """The metric for comparing slices, columns and baselines: the one that chose the best step, if higher is better."""
    name = config.early_stop_metric
    return "auroc" if lower_is_better(name) else name.removeprefix("val/")


def defined_metric(figures: Mapping[str, Any], stage: str, config: Config) -> str:
    """The main metric, or another one if the main metric cannot compare models or is undefined on these rows."""
    main = main_metric(config)
    # F1 too: where class 1 is rare, predicting it for every row gives a higher F1 than the most frequent class
    first = "auroc" if main in (*ONE_SIDED, "f1_score") else main
    return next((name for name in (first, "f1_macro", "accuracy") if figures.get(f"{stage}/{name}") is not None), main)


def verdict(figures: Mapping[str, Any], stage: str, config: Config) -> str:
    """Whether the model is better than its baselines, as a sentence, for the test of a run and for `evaluate`."""
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
    comparison = f"{metric} {value:.4f} against {rivals[best]:.4f} ({best})"
    if f"{value:.4f}" == f"{rivals[best]:.4f}" == "1.0000":
        tie = f"{metric} 1.0000 for both ({best}), and more is not possible"
        return f"The model ties with the best of its baselines: {tie}." + missing
    if value > rivals[best]:
        doubt = ""
        if interval is None:
            doubt = ", but no interval says by how much it may be chance"
        elif interval[0] <= rivals[best]:
            doubt = ", but by less than its interval is wide"
        return f"The model is above all baselines{doubt}: {comparison}." + missing
    return f"{NOT_BETTER}: {comparison}." + missing


def columns_of(
    result: EpochResult, dataset: Dataset, *, config: Config, class_names: Sequence[str], decision: Decision
) -> Columns:
    """Evaluated rows as the columns of a prediction file; without an id column if the rows have no ids."""
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
    """Rank 0 only. Write a prediction file, test_metrics.json and pictures of evaluated rows; returns the figures."""
    figures: dict[str, Any] = {"test/num_rows": len(dataset)}
    non_finite = non_finite_rows(result.preds)
    if len(non_finite):
        first = dataset.row_location(non_finite[0])
        message = "probabilities that are not finite: %d of %d rows, first %s: their pred is meaningless"
        logger.warning(message, len(non_finite), len(dataset), first)
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
    """Rank 0 only. Write the pictures. An error of matplotlib, fonts or the disk is a warning only."""
    try:
        if not write_plots(preds, labels, folder, class_names=class_names, threshold=threshold):
            logger.info(
                "no pictures of the test: they need matplotlib (extra `plots`) and labelled rows of several classes"
            )
    except Exception as error:  # noqa: BLE001
        logger.warning("no pictures of the test: %s: %s", type(error).__name__, error)
