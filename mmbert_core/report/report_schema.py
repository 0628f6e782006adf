"""The declared structure of report.json, for pages that are rendered again from a file.

K classes. Keys that a page does not use are passed over, and a section that is missing or has only a reason is one:
reports of other versions have fewer or more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmbert_core.storage.schema import (
    Check,
    Mismatch,
    anything,
    array,
    constant,
    describe,
    either,
    mapping,
    nullable,
    number,
    record,
    text,
    whole,
)

FORMAT_VERSION = 1
LARGEST = 1e39  # beyond float32, whose numbers these are: charts divide ranges of numbers, which must not overflow

NUMBER = number(-LARGEST, LARGEST)
VALUE, COUNT, WORDS = nullable(NUMBER), whole(0), nullable(text())
INTERVAL = nullable(array(VALUE, length=2))
CELL = nullable(record({}, {"value": VALUE, "interval": INTERVAL, "reason": WORDS}, others=True))


def section(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A section of the report: these keys, or nothing but a reason, or null."""
    full = record(required, optional, others=True)
    empty = record({"reason": text()})

    def check(value: Any) -> None:
        (empty if isinstance(value, dict) and set(value) == {"reason"} else full)(value)

    return nullable(check)


# ---- sections ----

BASELINE = record({"name": text(), "metrics": mapping(CELL)}, {"how": WORDS}, others=True)
RATES = dict.fromkeys(("precision", "recall", "f1", "alerts_per_1000"), VALUE)
THRESHOLD_ROW = record({}, {**RATES, "threshold": VALUE, "false_alerts_per_1000": VALUE}, others=True)
THRESHOLD = {**RATES, **dict.fromkeys(("rule", "chosen_on", "reason"), WORDS)}
THRESHOLD |= {"value": VALUE, "table": nullable(array(THRESHOLD_ROW))}
BIN = record({"rows": COUNT, "mean": VALUE, "share": VALUE}, {"low": VALUE, "high": VALUE}, others=True)
CALIBRATION = {"bins": nullable(array(BIN)), "calibrated_bins": nullable(array(BIN)), "reason": WORDS}
CALIBRATION |= dict.fromkeys(("temperature", "ece_before", "ece_after", "rows"), VALUE)
CURVE = record({"x": array(VALUE), "y": array(VALUE)}, {"area": VALUE, "share": VALUE}, others=True)
SLICE = record(
    {"column": text(), "value": text(), "rows": COUNT, "metrics": mapping(VALUE)},
    {
        "intervals": nullable(mapping(INTERVAL)),
        "undefined": nullable(mapping(WORDS)),
        "share_of_classes": nullable(array(VALUE)),
        "largest_classes": anything,
    },
    others=True,
)
COLUMN = record({"name": text(), "drop": VALUE}, {"spread": VALUE, "kind": WORDS}, others=True)
ERROR = record(
    {"label": text(), "pred": text()},
    {
        "place": WORDS,
        "id": anything,
        "prob": VALUE,
        "columns": nullable(mapping(anything)),
        "method": WORDS,
        "tokens": nullable(array(array(anything, length=2))),
    },
    others=True,
)
FILE = record({}, {"bytes": VALUE, "sha256": WORDS}, others=True)
SPLIT = section(
    {},
    {
        "rows": COUNT,
        "classes": nullable(mapping(COUNT)),
        "mean_tokens": VALUE,
        "rows_left_out": COUNT,
        "classes_left_out": COUNT,
    },
)
TRAINING = dict.fromkeys(("steps", "train_loss", "lr"), nullable(array(VALUE)))
TRAINING |= {"validations": nullable(array(mapping(anything))), "best_step": VALUE, "metric": WORDS}

SECTIONS: dict[str, Check] = {
    "metrics": section({"names": array(text()), "model": mapping(CELL)}, {"classes_left_out": COUNT}),
    "warnings": either(array(text()), section({})),
    "baselines": section({"rows": array(BASELINE)}, {"verdict": WORDS}),
    "threshold": section({}, THRESHOLD),
    "calibration": section({}, CALIBRATION),
    "roc": section({"curves": mapping(CURVE)}),
    "precision_recall": section({"curves": mapping(CURVE)}),
    "scores": section({"edges": array(NUMBER, min_length=2), "counts": mapping(array(COUNT))}),
    "training": section({}, TRAINING),
    "slices": section({"metric": text(), "rows": array(SLICE)}),
    "importance": section({"metric": text(), "items": array(COLUMN)}, {"rows": VALUE, "repeats": VALUE}),
    "errors": section({"rows": array(ERROR)}),
    "config": nullable(mapping(anything)),
    "data": section({}, {"files": nullable(mapping(FILE)), "train": SPLIT, "val": SPLIT, "test": SPLIT}),
    "versions": nullable(mapping(anything)),
}
FACTS = dict.fromkeys(("created", "model_path", "task", "label_name"), WORDS)
FACTS |= {"input": nullable(array(text())), "num_rows": VALUE}
ALWAYS = {"format_version": constant(FORMAT_VERSION), "title": text(), "class_names": array(text())}
REPORT = record(ALWAYS, {**FACTS, **SECTIONS}, others=True)


# ---- the whole ----


def check_report(value: Any) -> None:
    """A check for `schema.check_structure`: the sections, and that what is counted by class fits the classes."""
    REPORT(value)
    num_classes = len(value["class_names"])
    slice_rows = array(record({}, {"largest_classes": array(_share_of(num_classes))}, others=True))
    by_class = {"confusion": _confusion_of(num_classes), "slices": section({"rows": slice_rows})}
    record({}, by_class, others=True)(value)


def _share_of(num_classes: int) -> Check:
    """A pair of class index and share."""

    def check(value: Any) -> None:
        array(NUMBER, length=2)(value)
        whole(0, num_classes - 1)(value[0])

    return check


def _confusion_of(num_classes: int) -> Check:
    """Counts [K, K], or, of many classes, three counts of each and the most frequent mistakes."""
    grid = section({"counts": array(array(COUNT, length=num_classes), length=num_classes)})
    of_class = array(COUNT, length=num_classes)

    def check(value: Any) -> None:
        if not isinstance(value, dict) or "counts" in value or set(value) == {"reason"}:
            return grid(value)
        record({"right": of_class, "labelled": of_class, "predicted": of_class}, others=True)(value)
        record({"mistakes": array(_mistake_among(value["labelled"]))}, others=True)(value)

    return check


def _mistake_among(labelled: list[int]) -> Check:
    def check(value: Any) -> None:
        array(COUNT, length=3)(value)
        for index in value[:2]:
            whole(0, len(labelled) - 1)(index)
        if labelled[value[0]] == 0:
            raise Mismatch("a label that has rows", describe(value[0]))

    return check
