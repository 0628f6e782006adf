"""Above which probability a row counts as class 1, chosen on validation rows by a stated rule.

N rows, D distinct probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import nullable, number, record, text, whole

HALF = "half"
EVERY_ROW = -1.0  # the threshold below a probability of exactly 0, which no threshold of 0 to 1 is
RULES = {
    HALF: "one half, whatever the validation rows say",
    "best_f1": "where F1 of class 1 is highest",
    "recall_at_precision": "the highest recall where precision is at least X",
    "precision_at_recall": "the highest precision where recall is at least X",
    "alerts_per_1000": "so that at most X of 1,000 rows are class 1",
}

SHARE = nullable(number(0, 1))
THRESHOLD_JSON = record(
    {"value": number(EVERY_ROW, 1), "rule": text()},
    {
        "precision": SHARE,
        "recall": SHARE,
        "f1": SHARE,
        "alerts_per_1000": nullable(number(0, 1000)),
        "rows": whole(0),
        "reason": nullable(text()),
    },
)


@dataclass(frozen=True)
class Threshold:
    """A row is class 1 when its probability is above `value`; the figures are those of the rows that it was chosen on.

    `value` is 0 to 1, or EVERY_ROW where also rows with a probability of exactly 0 are class 1.
    """

    value: float
    rule: str
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    alerts_per_1000: float | None = None
    rows: int = 0
    reason: str | None = None  # why the rule could not be followed, and one half stands in its place

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Threshold:
        """Raises `ValueError` for a value that is neither a probability nor EVERY_ROW."""
        value = values["value"]
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and (0 <= value <= 1 or value == EVERY_ROW)):
            raise ValueError(
                f"expected a threshold from 0 to 1 (or {EVERY_ROW:g}: every row is class 1), found {value!r}"
            )
        return cls(**values)


@dataclass(frozen=True)
class ThresholdCurve:
    """Every way to cut the rows in two by their probability, from none above [D + 1] to all."""

    values: np.ndarray  # [D + 1] thresholds: between neighbours, above the highest, below the lowest
    found: np.ndarray  # [D + 1] rows above
    true: np.ndarray  # [D + 1] rows of class 1 above
    rows: int

    @property
    def precision(self) -> np.ndarray:
        """Of no rows it is 0, as with scikit-learn's zero_division."""
        return np.divide(self.true, self.found, out=np.zeros(len(self.found)), where=self.found > 0)

    @property
    def recall(self) -> np.ndarray:
        return self.true / self.true[-1]

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.true / (self.found + self.true[-1])


def threshold_curve(preds: np.ndarray, labels: np.ndarray) -> ThresholdCurve:
    """`preds` [N] probabilities of class 1, `labels` [N] 0 or 1, a 1 among them.

    `found` and `true` are those of the rows with `preds > values`, for every dtype and however near the probabilities are.
    """
    order = np.argsort(-preds, kind="stable")
    scores = preds[order].astype(np.float64)
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    distinct = scores[ends]
    above, below = distinct[:-1], distinct[1:]
    halfway = (above + below) / 2
    between = np.where(
        halfway < above, halfway, below
    )  # float64 has nothing between neighbours: the lower one is not above itself
    lowest = distinct[-1] / 2 if distinct[-1] > 0 else EVERY_ROW
    values = np.concatenate([[(1 + distinct[0]) / 2], between, [lowest]])
    true = np.cumsum(labels[order] == 1)[ends]
    return ThresholdCurve(values, np.append(0, ends + 1), np.append(0, true), len(preds))


def parse_rule(text: str) -> tuple[str, float | None]:
    """`best_f1`, `recall_at_precision=0.9`, `alerts_per_1000=20`. Raises `InputError` for what is none."""
    name, _, number = text.partition("=")
    expected = f"expected one of {', '.join(rule if rule in (HALF, 'best_f1') else f'{rule}=X' for rule in RULES)}"
    if name not in RULES or (name in (HALF, "best_f1")) != (number == ""):
        raise InputError(f"threshold_rule: {expected}, found {text!r}")
    if not number:
        return name, None
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"threshold_rule: {expected}, found {text!r}") from None
    highest = 1000 if name == "alerts_per_1000" else 1
    if not 0 < value <= highest:
        raise InputError(f"threshold_rule: expected X above 0 and at most {highest} in {name}=X, found {number}")
    return name, value


def choose_threshold(preds: np.ndarray, labels: np.ndarray, rule: str) -> Threshold:
    """The threshold of a rule of `parse_rule` on validation rows; one half, with the reason, where they cannot tell.

    Of several cuts that are equally good the one with the fewest rows above is taken.
    """
    name, number = parse_rule(rule)
    preds, labels = np.asarray(preds), np.asarray(labels)
    if not (labels == 1).any():
        return Threshold(0.5, rule, rows=len(labels), reason="no validation row of class 1")
    cuts = threshold_curve(preds, labels)
    if name == HALF:
        return metrics_at_threshold(preds, labels, 0.5, rule)
    score, allowed = _CHOICES[name](cuts, number)
    if not allowed.any() and name == "alerts_per_1000":
        return Threshold(0.5, rule, rows=len(labels), reason=f"the surest rows alone are more than {number:g} of 1,000")
    if not allowed.any():
        best = cuts.precision.max() if name == "recall_at_precision" else cuts.recall.max()
        return Threshold(0.5, rule, rows=len(labels), reason=f"no threshold reaches {number:g}; the best is {best:.4f}")
    return metrics_at_threshold(preds, labels, float(cuts.values[np.where(allowed, score, -np.inf).argmax()]), rule)


def metrics_at_threshold(preds: np.ndarray, labels: np.ndarray, value: float, rule: str) -> Threshold:
    """The figures of a threshold on these rows."""
    found = preds.astype(np.float64) > value
    true, positives = int((found & (labels == 1)).sum()), int((labels == 1).sum())
    return Threshold(
        value=value,
        rule=rule,
        precision=true / int(found.sum()) if found.any() else 0.0,
        recall=true / positives if positives else None,
        f1=2 * true / (int(found.sum()) + positives) if found.any() or positives else None,
        alerts_per_1000=1000 * int(found.sum()) / len(labels),
        rows=len(labels),
    )


# rule -> what is to be highest [D + 1], and which cuts are allowed [D + 1]
_CHOICES: dict[str, Callable[[ThresholdCurve, Any], tuple[np.ndarray, np.ndarray]]] = {
    "best_f1": lambda cuts, _: (cuts.f1, cuts.found > 0),
    "recall_at_precision": lambda cuts, least: (cuts.recall, (cuts.precision >= least) & (cuts.found > 0)),
    "precision_at_recall": lambda cuts, least: (cuts.precision, cuts.recall >= least),
    "alerts_per_1000": lambda cuts, most: (cuts.found, (1000 * cuts.found / cuts.rows <= most) & (cuts.found > 0)),
}
