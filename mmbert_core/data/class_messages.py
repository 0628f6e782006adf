"""Messages about the classes: which one is class 1, and which have few training rows.

`prob`, F1, precision, recall, the threshold and the alerts refer to class 1: the second label in order, or
`positive_label`.
"""

import re
from collections.abc import Sequence

from mmbert_core.config_file import yaml_scalar
from mmbert_core.runtime.errors import format_for_message

FEW_ROWS = 50  # training rows of a class, below which metrics and the best step vary much by chance
# Pairs of labels (negative, positive) in lower case; sorted by code point, as labels are, the positive one is second.
ORDERED_PAIRS = {
    ("false", "true"),
    ("f", "t"),
    ("no", "yes"),
    ("n", "y"),
    ("off", "on"),
    ("negative", "positive"),
    ("neg", "pos"),
    ("absent", "present"),
}


def positive_class_line(class_names: Sequence[str], share: float | None) -> str:
    """Class 1 of two classes and its share of the training rows, where that is known."""
    of_rows = "" if share is None else f", {format_share(share)} of the training rows"
    return f"class 1 (prob, F1, threshold): {format_for_message(class_names[1])}{of_rows}"


def format_share(share: float) -> str:
    return f"{100 * share:.1f} %"


def positive_class_warning(class_names: Sequence[str], counts: Sequence[int], positive_label: str | None) -> list[str]:
    """A line if class 1, the second label in order, is the more frequent one: the class of interest is usually rare."""
    if positive_label is not None or len(class_names) != 2 or counts[1] <= counts[0] or is_ordered(class_names):
        return []
    first, second = class_names
    share = format_share(counts[1] / sum(counts))
    choice = f"class 1 is {format_for_message(second)} ({share} of the training rows), as the second in order"
    return [
        f"{choice}; if {format_for_message(first)} is the class of interest, add: positive_label: {yaml_scalar(first)}"
    ]


def is_ordered(class_names: Sequence[str]) -> bool:
    """Whether the order of two labels has a meaning: numbers, a number at the end (class_0, class_1), no and yes."""
    first, second = class_names
    if (first.strip().lower(), second.strip().lower()) in ORDERED_PAIRS:
        return True
    try:
        float(first), float(second)
    except ValueError:
        stems = [re.fullmatch(r"(.*?)[0-9]+", name, re.DOTALL) for name in class_names]
        return all(stems) and stems[0][1] == stems[1][1]
    return True


def few_rows_warning(class_names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A line about classes with few training rows."""
    few = [index for index, count in enumerate(counts) if count < FEW_ROWS]
    if not few:
        return []
    fewest = min(few, key=lambda index: counts[index])
    name = format_for_message(class_names[fewest])
    if len(few) == 1:
        few_rows = f"class {name} has {counts[fewest]} training rows"
        return [f"{few_rows}; with fewer than {FEW_ROWS}, the best step and the metrics vary much by chance"]
    few_rows = f"{len(few)} of {len(class_names)} classes have fewer than {FEW_ROWS} training rows"
    return [f"{few_rows}, the fewest {name} with {counts[fewest]}: metrics vary much by chance"]
