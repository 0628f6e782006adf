"""Which class is class 1, and which classes have few rows, in words.

Class 1 is what `prob`, F1, precision, recall, the threshold and the alerts are about: the second label in order, or `positive_label`.
"""

import json
import re
from collections.abc import Sequence

from mmbert_core.runtime.errors import format_for_message

FEW_ROWS = 50  # of a class in training, below which figures and the best step are chance
# Label pairs whose order says which one is looked for, in lower case and in the order of their code points.
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
PLAIN_IN_YAML = re.compile(r"[A-Za-z_][\w -]*\w|[A-Za-z_]", re.ASCII)
YAML_WORDS = frozenset(
    "yes no on off true false y n null none".split()
)  # that YAML reads as something else than a text


def positive_class_line(class_names: Sequence[str], share: float | None) -> str:
    """Class 1 of two classes and its share of the training rows, where that is known."""
    of_rows = "" if share is None else f", {format_share(share)} of the training rows"
    return f"class 1 (prob, F1, threshold): {format_for_message(class_names[1])}{of_rows}"


def format_share(share: float) -> str:
    return f"{100 * share:.1f} %"


def positive_class_warning(class_names: Sequence[str], counts: Sequence[int], positive_label: str | None) -> list[str]:
    """A line where the order of two text labels made the more frequent one class 1: as a rule the rare one is looked for."""
    if positive_label is not None or len(class_names) != 2 or counts[1] <= counts[0] or is_ordered(class_names):
        return []
    other = class_names[0]
    value = (
        other
        if PLAIN_IN_YAML.fullmatch(other) and other.lower() not in YAML_WORDS
        else json.dumps(other, ensure_ascii=False)
    )
    share = format_share(counts[1] / sum(counts))
    return [
        f"class 1 is {format_for_message(class_names[1])} ({share} of the training rows), as the second in order; if {format_for_message(other)} is looked for, add: positive_label: {value}"
    ]


def is_ordered(class_names: Sequence[str]) -> bool:
    """Whether the order of two labels is their meaning: numbers, a number at the end (class_0, class_1), yes and no."""
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
        return [
            f"class {name} has {counts[fewest]} training rows; with fewer than {FEW_ROWS}, the best step and the figures depend much on chance"
        ]
    return [
        f"{len(few)} of {len(class_names)} classes have fewer than {FEW_ROWS} training rows, the fewest {name} with {counts[fewest]}: figures depend much on chance"
    ]
