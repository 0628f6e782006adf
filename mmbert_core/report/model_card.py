"""What a model is, for whoever gets its folder: summary.json, and README.md, the model card (Mitchell et al. 2019)."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmbert_core
from mmbert_core.data.class_messages import format_share
from mmbert_core.inference.model_files import CARD, SUMMARY, SUMMARY_JSON, is_own_card, read_folder_json, with_card_mark
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder
from mmbert_core.report.results import listed_figures
from mmbert_core.storage.files import write_json, write_text

logger = logging.getLogger(__name__)

SHOWN = ("auroc", "average_precision", "f1_score", "precision", "recall", "accuracy", "log_loss", "ece")

Values = dict[str, Any]


def write_card(
    folder: Path, loaded: LoadedModel, *, data: Values, best: Values, test: Mapping[str, Any] | None
) -> None:
    """Rank 0 only. `data` as the report has it, `best` step and metric, `test` figures as in test_metrics.json."""
    summary = {
        "mmbert_core": mmbert_core.__version__,
        "data": data,
        "best": best,
        "test": listed_figures(test, "test", loaded.config)[0] if test else None,
    }
    if os.path.lexists(folder / CARD) and not is_own_card(folder / CARD):
        logger.warning("%s is there, and not as a run wrote it: it stays, and no model card is written", folder / CARD)
    else:
        write_text(folder / CARD, with_card_mark("\n".join(card(folder.resolve().name, loaded, summary)) + "\n"))
    write_json(folder / SUMMARY, summary)


def describe(folder: Path) -> list[str]:
    """Lines of `mmbert inspect`: what the model needs, what it was trained on, how good it is. Raises `InputError`."""
    loaded = load_model_folder(folder)
    return card(folder.resolve().name, loaded, read_summary(folder))


def read_summary(folder: Path) -> Values:
    """What summary.json says, nothing where there is none. Raises `InputError` for another structure."""
    if not (folder / SUMMARY).is_file():
        return {"data": {}, "best": {}, "test": None}
    return read_folder_json(folder / SUMMARY, SUMMARY_JSON)


def card(name: str, loaded: LoadedModel, summary: Values) -> list[str]:
    """Markdown."""
    return [
        f"# {markdown(name)}",
        "",
        f"A classifier of {', '.join(f'`{markdown(label)}`' for label in loaded.labels.names[:20])}"
        f"{', ...' if len(loaded.labels.names) > 20 else ''} (column `{markdown(loaded.config.label_name)}`), fine-tuned from "
        f"`{markdown(loaded.config.encoder)}` with mmbert_core."
        if loaded.config.text_name
        else f"A classifier of {', '.join(f'`{markdown(label)}`' for label in loaded.labels.names[:20])} from columns alone, made with mmbert_core.",
        "",
        "## Input",
        "",
        *inputs(loaded),
        "",
        "## Training rows",
        "",
        *training(summary),
        "",
        "## How good it is",
        "",
        *figures(loaded, summary.get("test")),
        "",
        "## From probability to class",
        "",
        *decision(loaded, summary["data"]),
        "",
        "## Use",
        "",
        "```sh",
        f"mmbert predict {name} new.csv predictions.tsv",
        "```",
        "",
        "It was measured on the rows above alone; on others, of another time or place, it may do worse. Look at `report.html` of the test for "
        "the parts of the rows where it does.",
    ]


def inputs(loaded: LoadedModel) -> list[str]:
    config, features = loaded.config, loaded.features
    lines = ["| column | as | |", "|---|---|---|"]
    lines += [
        f"| `{markdown(name)}` | text | up to {config.max_chunks} x {config.max_length} tokens |"
        for name in config.text_name
    ]
    ranges = (
        [""] * len(features.number_names)
        if features.minimums is None
        else [
            f"; {low:.6g} to {high:.6g} in the training rows, limited a little beyond"
            for low, high in zip(features.minimums, features.maximums, strict=True)
        ]
    )
    lines += [
        f"| `{markdown(name)}` | number | missing: {median:g}{known} |"
        for name, median, known in zip(features.number_names, features.medians, ranges, strict=True)
    ]
    lines += [
        f"| `{markdown(name)}` | category | {len(values):,} known values |"
        for name, values in zip(features.category_names, features.categories, strict=True)
    ]
    return [*lines, *([f"| `{markdown(config.id_name)}` | id | carried through |"] if config.id_name else [])]


def training(summary: Values) -> list[str]:
    lines = []
    for name, part in summary["data"].items():
        if name != "files":
            classes = ", ".join(
                f"`{markdown(label)}` {count:,}" for label, count in list((part.get("classes") or {}).items())[:20]
            )
            classes += f" and {part['classes_left_out']:,} more classes" if part.get("classes_left_out") else ""
            lines.append(f"* {name}: {part['rows']:,} rows{f' ({classes})' if classes else ''}")
    best = summary["best"]
    if best.get("step"):
        value = (
            ""
            if best.get("value") is None
            else f": {markdown(best.get('metric') or 'val_loss')} {best['value']:.4f} on the validation rows"
        )
        lines.append(f"* best step {best['step']:,}{value}")
    return lines or ["Not recorded in this folder."]


def figures(loaded: LoadedModel, test: Mapping[str, Any] | None) -> list[str]:
    """A table with intervals, the baselines beside it."""
    if not test or "test/accuracy" not in test:
        return ["No labelled test rows were scored."]
    rivals = test.get("baselines", {})
    lines = [
        f"{test.get('test/num_rows') or 0:,} test rows; 95 % bootstrap intervals.",
        "",
        "| metric | model | interval | " + " | ".join(rivals) + " |",
        "|---|---|---|" + "---|" * len(rivals),
    ]
    for name in SHOWN:
        key = f"test/{name}"
        low_high = test.get("intervals", {}).get(key)
        interval = f"{low_high[0]:.4f} - {low_high[1]:.4f}" if low_high else ""
        lines.append(
            f"| {name} | {number(test.get(key))} | {interval} | "
            + " | ".join(number(values.get(key)) for values in rivals.values())
            + " |"
        )
    return lines


def positive_class(loaded: LoadedModel, data: Values) -> str:
    """Which label is class 1 of two, and its share of the training rows where the summary has them."""
    name = loaded.labels.names[1]
    counts = (data.get("train") or {}).get("classes") or {}
    share = f", {format_share(counts[name] / sum(counts.values()))} of the training rows" if counts.get(name) else ""
    return f"Class 1 is `{markdown(name)}`{share}: `prob` is its probability, and F1, precision, recall and the threshold are about it."


def decision(loaded: LoadedModel, data: Values) -> list[str]:
    threshold, calibration = loaded.decision.threshold, loaded.decision.calibration
    lines = ["The class of the largest probability is predicted."]
    if loaded.config.is_binary:
        why = (
            f" ({threshold.reason})"
            if threshold.reason
            else f", by the rule `{threshold.rule}` on {threshold.rows:,} validation rows"
        )
        above = (
            f"A row counts as `{markdown(loaded.labels.names[1])}` when its probability is above {threshold.value:.6g}"
        )
        every = f"Every row counts as `{markdown(loaded.labels.names[1])}`, also those with a probability of exactly 0"
        lines = [positive_class(loaded, data), f"{above if threshold.value >= 0 else every}{why}."]
    if calibration.reason:
        return [*lines, f"Probabilities are not calibrated: {calibration.reason}."]
    return [
        *lines,
        f"`prob_calibrated` divides logits by {calibration.temperature:.4f}{f' ({calibration.method})' if calibration.method else ''}; expected calibration error on the validation rows {number(calibration.ece_before)} before, {number(calibration.ece_after)} after.",
    ]


def number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def markdown(text: str) -> str:
    """A name that stays a name, on one line of a table."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")
