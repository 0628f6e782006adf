"""The description of a model for its users: README.md, the model card (Mitchell et al. 2019), and summary.json."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

import mmbert_core
from mmbert_core.data.class_messages import format_share
from mmbert_core.inference.model_files import CARD, SUMMARY, SUMMARY_JSON, is_own_card, read_folder_json, with_card_mark
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder
from mmbert_core.report.formatting import BEFORE_FINE_TUNING
from mmbert_core.report.results import listed_figures
from mmbert_core.runtime.templates import environment
from mmbert_core.storage.files import write_json, write_text

logger = logging.getLogger(__name__)

CARD_METRICS = ("auroc", "average_precision", "f1_score", "precision", "recall", "accuracy", "log_loss", "ece")
MAX_CLASSES = 20  # listed in a line of the card

Values = dict[str, Any]


def markdown(value: object) -> Markup:
    """A value on one line, without characters that end a code span or a table cell; `Markup` is not changed."""
    if isinstance(value, Markup):
        return value
    return Markup(" ".join(str(value).split()).replace("`", "'").replace("|", "\\|"))


def decimals(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


# `finalize` escapes every value for Markdown and returns `Markup`, so that Jinja does not escape it for HTML.
TEMPLATES = environment(__package__, finalize=markdown)
TEMPLATES.filters |= {"thousands": "{:,}".format, "decimals": decimals}


def write_card(
    folder: Path, loaded: LoadedModel, *, data: Values, best: Values, test: Mapping[str, Any] | None
) -> None:
    """Rank 0 only. Write README.md and summary.json. A README.md that no run has written is kept, with a warning.

    `data` as in report.json, `best` step and metric, `test` metrics as in test_metrics.json.
    """
    summary = {
        "mmbert_core": mmbert_core.__version__,
        "data": data,
        "best": best,
        "test": listed_figures(test, "test", loaded.config)[0] if test else None,
    }
    if os.path.lexists(folder / CARD) and not is_own_card(folder / CARD):
        logger.warning("%s is there, and not as a run wrote it: it stays, and no model card is written", folder / CARD)
    else:
        write_text(folder / CARD, with_card_mark(render_card(folder.resolve().name, loaded, summary)))
    write_json(folder / SUMMARY, summary)


def describe(folder: Path) -> list[str]:
    """The lines that `mmbert inspect` prints: those of the model card. Raises `InputError`."""
    loaded = load_model_folder(folder)
    return render_card(folder.resolve().name, loaded, read_summary(folder)).removesuffix("\n").split("\n")


def read_summary(folder: Path) -> Values:
    """The values of summary.json; empty sections if there is none. Raises `InputError` for another structure."""
    if not (folder / SUMMARY).is_file():
        return {"data": {}, "best": {}, "test": None}
    return read_folder_json(folder / SUMMARY, SUMMARY_JSON)


def render_card(name: str, loaded: LoadedModel, summary: Values) -> str:
    """The model card as Markdown. `name` is that of the model folder."""
    config, labels, best = loaded.config, loaded.labels.names, summary["best"]
    train_classes = (summary["data"].get("train") or {}).get("classes") or {}
    return TEMPLATES.get_template("model_card.md").render(
        name=name,
        labels=labels[:MAX_CLASSES],
        has_more_labels=len(labels) > MAX_CLASSES,
        label_name=config.label_name,
        encoder=config.encoder if config.text_name else None,
        columns=_columns(loaded),
        splits=[_split(name, values) for name, values in summary["data"].items() if name != "files"],
        best_step=best.get("step"),
        before_fine_tuning=BEFORE_FINE_TUNING if best.get("step") == 0 else None,
        best_metric=best.get("metric") or "val_loss",
        best_value=best.get("value"),
        test=_test(summary.get("test")),
        positive_label=labels[1] if config.is_binary else None,
        positive_share=_positive_share(labels[1], train_classes),
        threshold=loaded.decision.threshold,
        members=[] if loaded.blend is None else [member for member in loaded.blend.members if member.weight],
        calibration=loaded.decision.calibration,
    )


def _columns(loaded: LoadedModel) -> list[dict[str, str]]:
    """Name, kind and a note of each input column."""
    config, features = loaded.config, loaded.features
    tokens = f"up to {config.max_chunks} x {config.max_length} tokens"
    rows = [(name, "text", tokens) for name in config.text_name]
    ranges = [""] * len(features.number_names)
    if features.minimums is not None:
        pairs = zip(features.minimums, features.maximums, strict=True)
        ranges = [f"; {low:.6g} to {high:.6g} in the training rows, limited a little beyond" for low, high in pairs]
    rows += [
        (name, "number", f"missing: {median:g}{known_range}")
        # not strict: the units of dates follow
        for name, median, known_range in zip(features.plain_number_names, features.medians, ranges, strict=False)
    ]
    if (dates := features.dates) is not None:
        rows += [
            (
                name,
                "date",
                f"read as {', '.join(units)}; newest in the training rows: {newest.removesuffix('T00:00:00')}",
            )
            for name, newest, units in zip(dates.names, dates.newest, dates.units, strict=True)
        ]
    pooled = [""] * len(features.category_names)
    if features.pooled is not None:
        pooled = [f", and {len(rare):,} rare ones that share a weight" for rare in features.pooled]
    rows += [
        (name, "category", f"{len(values):,} known values{rare}")
        for name, values, rare in zip(features.category_names, features.categories, pooled, strict=True)
    ]
    if config.id_name:
        rows.append((config.id_name, "id", "carried through"))
    return [dict(zip(("name", "kind", "note"), row, strict=True)) for row in rows]


def _split(name: str, values: Values) -> Values:
    """Rows of the training, validation or test split, and of each of its first MAX_CLASSES classes."""
    classes = list((values.get("classes") or {}).items())[:MAX_CLASSES]
    return {
        "name": name,
        "rows": values["rows"],
        "classes": classes,
        "more_classes": values.get("classes_left_out") or 0,
    }


def _test(metrics: Mapping[str, Any] | None) -> Values | None:
    """The table of test metrics with intervals and the same metrics of the baselines; None without labelled rows."""
    if not metrics or "test/accuracy" not in metrics:
        return None
    baselines = metrics.get("baselines", {})
    table = []
    for name in CARD_METRICS:
        key = f"test/{name}"
        low_high = metrics.get("intervals", {}).get(key)
        table.append(
            {
                "metric": name,
                "value": metrics.get(key),
                "interval": f"{low_high[0]:.4f} - {low_high[1]:.4f}" if low_high else "",
                "baselines": [values.get(key) for values in baselines.values()],
            }
        )
    return {"rows": metrics.get("test/num_rows") or 0, "baselines": list(baselines), "table": table}


def _positive_share(label: str, train_classes: Mapping[str, int]) -> str | None:
    """Share of class 1 among the training rows; None where the summary does not have it."""
    if not train_classes.get(label):
        return None
    return format_share(train_classes[label] / sum(train_classes.values()))
