"""What the text and the columns each bring: text only, columns only and both, under the same settings and seeds."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.runtime import distributed
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import write_json
from mmbert_core.training.train import run_training

logger = logging.getLogger(__name__)

RESULTS = "ablation.json"
SHOWN = ("auroc", "average_precision", "f1_score", "accuracy")


def parts_of(config: Config) -> dict[str, dict[str, Any]]:
    """Name -> the settings that take an input away. Raises `InputError` where there is only one kind."""
    if not config.text_name or not (config.tab_field_list or config.cat_field_list):
        raise InputError("ablate: expected a config with text and columns, found one kind of input only")
    return {"text only": {"tab_field_list": (), "cat_field_list": ()}, "columns only": {"text_name": ()}, "both": {}}


def run_ablation(config: Config, seeds: Sequence[int], context: DistContext) -> dict[str, Any]:
    """Collective. Train every part with every seed into `model_path`/<part>-seed-<n>; returns what ablation.json holds.

    Stopped, it goes on where it was with the same command. Raises `InputError` without labelled test rows.
    """
    if not config.test_path:
        raise InputError("ablate: expected a test_path, found none")
    folder = Path(config.model_path)
    cache = config.cache_path or str(folder / "cache")
    runs = [
        (
            part,
            replace(
                config,
                **changes,
                seed=seed,
                model_path=str(folder / f"{part.replace(' ', '-')}-seed-{seed}"),
                cache_path=cache,
            ),
        )
        for part, changes in parts_of(config).items()
        for seed in dict.fromkeys(seeds)
    ]
    data = prepare(runs[-1][1])  # both: a column that cannot be read is found before anything is trained
    if data.test is None or not data.test.has_labels:
        raise InputError("ablate: expected labels in test_path, found none")
    figures: dict[str, list[dict[str, Any]]] = {part: [] for part, _ in runs}
    for part, own in runs:
        logger.info("---- %s, seed %d ----", part, own.seed)
        metrics = run_training(own, context).metrics
        figures[part].append({"seed": own.seed, **{name: metrics[name] for name in SHOWN}})
    results = {"parts": figures, "summary": {part: summary_of(rows) for part, rows in figures.items()}}
    distributed.on_main(lambda: write_json(folder / RESULTS, results))
    return results


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean and standard deviation (of a sample) over the seeds; None where a seed has none."""
    made = {}
    for name in SHOWN:
        values = [row[name] for row in rows]
        if None in values:
            made[name] = {"mean": None, "spread": None}
        else:
            made[name] = {
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
            }
    return made


def table(results: dict[str, Any]) -> str:
    """Mean and spread of each part, for people."""
    lines = [f"{'':<14}" + "".join(f"{name:>24}" for name in SHOWN)]
    for part, summary in results["summary"].items():
        lines.append(f"{part:<14}" + "".join(f"{shown(summary[name]):>24}" for name in SHOWN))
    return "\n".join(lines)


def shown(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "undefined"
    return f"{value['mean']:.4f}" + (f" +- {value['spread']:.4f}" if value["spread"] is not None else "")
