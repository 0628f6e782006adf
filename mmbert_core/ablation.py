"""Ablation of the inputs: text only, columns only and both, with the same settings and seeds."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbert_core.config import Config
from mmbert_core.config_checks import COLUMN_KEYS, FUSIONS_OF_BOTH
from mmbert_core.data.prepare import prepare
from mmbert_core.runtime import distributed
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import write_json
from mmbert_core.training.train import run_training

logger = logging.getLogger(__name__)

RESULTS = "ablation.json"
METRICS = ("auroc", "average_precision", "f1_score", "accuracy")


def variants_of(config: Config) -> dict[str, dict[str, Any]]:
    """Name -> the settings that remove an input. Raises `InputError` when the config has only one kind of input."""
    if not config.text_name or not config.has_columns:
        raise InputError("ablate: expected a config with text and columns, found one kind of input only")
    alone = {"fusion": "concat"} if config.fusion in FUSIONS_OF_BOTH else {}
    return {
        "text only": {**dict.fromkeys(COLUMN_KEYS, ()), **alone},
        "columns only": {"text_name": (), **alone},
        "both": {},
    }


def run_ablation(config: Config, seeds: Sequence[int], context: DistContext) -> dict[str, Any]:
    """Collective. Train every variant with every seed into `model_path`/<variant>-seed-<n>.

    Returns what ablation.json holds. The same call continues after an interruption. Raises `InputError` when there are
    no labelled test rows.
    """
    if not config.test_path:
        raise InputError("ablate: expected a test_path, found none")
    folder = Path(config.model_path)
    cache = config.cache_path or str(folder / "cache")
    runs = []
    for variant, changes in variants_of(config).items():
        for seed in dict.fromkeys(seeds):
            model_path = str(folder / f"{variant.replace(' ', '-')}-seed-{seed}")
            runs.append((variant, replace(config, **changes, seed=seed, model_path=model_path, cache_path=cache)))
    data = prepare(runs[-1][1])  # of `both`: raises for a column that cannot be read before anything is trained
    if data.test is None or not data.test.has_labels:
        raise InputError("ablate: expected labels in test_path, found none")
    figures: dict[str, list[dict[str, Any]]] = {variant: [] for variant, _ in runs}
    for variant, run_config in runs:
        logger.info("---- %s, seed %d ----", variant, run_config.seed)
        metrics = run_training(run_config, context).metrics
        figures[variant].append({"seed": run_config.seed, **{name: metrics[name] for name in METRICS}})
    results = {"parts": figures, "summary": {variant: summary_of(rows) for variant, rows in figures.items()}}
    distributed.on_main(lambda: write_json(folder / RESULTS, results))
    return results


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and sample standard deviation over the seeds; None when the metric is undefined for a seed.

    The standard deviation of a single seed is None too.
    """
    summary = {}
    for name in METRICS:
        values = [row[name] for row in rows]
        is_defined = None not in values
        mean = statistics.fmean(values) if is_defined else None
        spread = statistics.stdev(values) if is_defined and len(values) > 1 else None
        summary[name] = {"mean": mean, "spread": spread}
    return summary


def table(results: dict[str, Any]) -> str:
    """A printable table: one line a variant, mean and standard deviation of each metric."""
    lines = [f"{'':<14}" + "".join(f"{name:>24}" for name in METRICS)]
    for variant, summary in results["summary"].items():
        lines.append(f"{variant:<14}" + "".join(f"{format_spread(summary[name]):>24}" for name in METRICS))
    return "\n".join(lines)


def format_spread(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "undefined"
    return f"{value['mean']:.4f}" + (f" +- {value['spread']:.4f}" if value["spread"] is not None else "")
