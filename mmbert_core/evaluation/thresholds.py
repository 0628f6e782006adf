"""Decision thresholds: the probability above which a row is predicted as class 1, chosen on validation rows by a rule.

N rows, K classes, D distinct probabilities.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import nullable, number, record, text, whole

BINARY_THRESHOLD = 0.5
EVERY_ROW = -1.0  # a threshold below a probability of exactly 0: every row is predicted as class 1
HALF = "half"
RULES = {
    HALF: "one half, independent of the validation rows",
    "best_f1": "where F1 of class 1 is highest",
    "recall_at_precision": "the highest recall where precision is at least X",
    "precision_at_recall": "the highest precision where recall is at least X",
    "alerts_per_1000": "so that at most X of 1,000 rows are class 1",
}
RULES_WITHOUT_NUMBER = (HALF, "best_f1")

SHARE = nullable(number(0, 1))
THRESHOLD_JSON = record(
    {"value": number(EVERY_ROW, 1), "rule": text()},
    {
        **dict.fromkeys(("precision", "recall", "f1"), SHARE),
        "alerts_per_1000": nullable(number(0, 1000)),
        "rows": whole(0),
        "reason": nullable(text()),
    },
)


def predicted_classes(preds: np.ndarray, *, threshold: float = BINARY_THRESHOLD) -> np.ndarray:
    """Class index [N] int64: for [N] probabilities of class 1, 1 above the threshold; for [N, K], the first largest."""
    if preds.ndim == 2:
        return preds.argmax(axis=1)
    # In float64: rounded to float32, a threshold between two neighbouring float32 would equal one of them.
    return (preds > np.float64(threshold)).astype(np.int64)


@dataclass(frozen=True)
class Threshold:
    """A row is class 1 when its probability is above `value`; the metrics are those of the rows it was chosen on.

    `value` is 0 to 1, or EVERY_ROW.
    """

    value: float
    rule: str
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    alerts_per_1000: float | None = None
    rows: int = 0
    reason: str | None = None  # why the rule could not be followed and the threshold is one half instead

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Threshold":
        """Raises `ValueError` for a value that is neither a probability nor EVERY_ROW."""
        value = values["value"]
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and (0 <= value <= 1 or value == EVERY_ROW)):
            raise ValueError(
                f"expected a threshold from 0 to 1 (or {EVERY_ROW:g}: every row is class 1), found {value!r}"
            )
        return cls(**values)


@dataclass(frozen=True)
class ThresholdCurve:
    """Counts at one threshold for each possible set of rows above it, from no row to all rows."""

    thresholds: np.ndarray  # [D + 1] descending: one above all probabilities, those between neighbours, one below all
    predicted_positives: np.ndarray  # [D + 1] rows above the threshold
    true_positives: np.ndarray  # [D + 1] rows of class 1 above the threshold
    num_rows: int

    @property
    def precision(self) -> np.ndarray:
        """[D + 1]; 0 where no row is above the threshold, as with scikit-learn's zero_division=0."""
        predicted = self.predicted_positives
        return np.divide(self.true_positives, predicted, out=np.zeros(len(predicted)), where=predicted > 0)

    @property
    def recall(self) -> np.ndarray:
        """[D + 1], of class 1."""
        return self.true_positives / self.true_positives[-1]

    @property
    def f1(self) -> np.ndarray:
        """[D + 1], of class 1."""
        return 2 * self.true_positives / (self.predicted_positives + self.true_positives[-1])


def threshold_curve(preds: np.ndarray, labels: np.ndarray) -> ThresholdCurve:
    """`preds` [N] probabilities of class 1, `labels` [N] 0 or 1, at least one of them 1.

    The counts are exact: those of the rows with `preds > threshold`, for every dtype and however close two
    probabilities are.
    """
    order = np.argsort(-preds, kind="stable")
    scores = preds[order].astype(np.float64)
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # last row of each distinct probability
    distinct = scores[ends]
    upper, lower = distinct[:-1], distinct[1:]
    halfway = (upper + lower) / 2
    # Adjacent float64 have no value between them: the lower one separates them too, because it is not above itself.
    between = np.where(halfway < upper, halfway, lower)
    lowest = distinct[-1] / 2 if distinct[-1] > 0 else EVERY_ROW
    thresholds = np.concatenate([[(1 + distinct[0]) / 2], between, [lowest]])
    true_positives = np.cumsum(labels[order] == 1)[ends]
    return ThresholdCurve(thresholds, np.append(0, ends + 1), np.append(0, true_positives), len(preds))


def parse_rule(text: str) -> tuple[str, float | None]:
    """Name and number of `best_f1`, `recall_at_precision=0.9`, `alerts_per_1000=20`, ... Raises `InputError`."""
    name, _, number = text.partition("=")
    forms = (rule if rule in RULES_WITHOUT_NUMBER else f"{rule}=X" for rule in RULES)
    expected = f"expected one of {', '.join(forms)}"
    if name not in RULES or (name in RULES_WITHOUT_NUMBER) != (number == ""):
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
    """The threshold of a rule (see `parse_rule`) on validation rows; one half, with the reason, where the rule fails.

    `preds` [N] probabilities of class 1, `labels` [N]. Of thresholds that are equally good, the highest is taken.
    """
    name, number = parse_rule(rule)
    preds, labels = np.asarray(preds), np.asarray(labels)
    if not (labels == 1).any():
        return Threshold(BINARY_THRESHOLD, rule, rows=len(labels), reason="no validation row of class 1")
    if name == HALF:
        return metrics_at_threshold(preds, labels, BINARY_THRESHOLD, rule)
    curve = threshold_curve(preds, labels)
    objective, is_allowed = _OBJECTIVES[name](curve, number)
    if is_allowed.any():
        best = np.where(is_allowed, objective, -np.inf).argmax()
        return metrics_at_threshold(preds, labels, float(curve.thresholds[best]), rule)
    if name == "alerts_per_1000":
        reason = f"the rows with the highest probability alone are more than {number:g} of 1,000"
    else:
        highest = curve.precision.max() if name == "recall_at_precision" else curve.recall.max()
        reason = f"no threshold reaches {number:g}; the best is {highest:.4f}"
    return Threshold(BINARY_THRESHOLD, rule, rows=len(labels), reason=reason)


def metrics_at_threshold(preds: np.ndarray, labels: np.ndarray, value: float, rule: str) -> Threshold:
    """Precision, recall, F1 and alert rate of a threshold on these rows; `preds` [N], `labels` [N]."""
    is_above, is_positive = preds.astype(np.float64) > value, labels == 1
    num_above, num_positive = int(is_above.sum()), int(is_positive.sum())
    num_true = int((is_above & is_positive).sum())
    return Threshold(
        value=value,
        rule=rule,
        precision=num_true / num_above if num_above else 0.0,
        recall=num_true / num_positive if num_positive else None,
        f1=2 * num_true / (num_above + num_positive) if num_above or num_positive else None,
        alerts_per_1000=1000 * num_above / len(labels),
        rows=len(labels),
    )


# rule -> what to maximise [D + 1], and which thresholds are allowed [D + 1]
_OBJECTIVES: dict[str, Callable[[ThresholdCurve, Any], tuple[np.ndarray, np.ndarray]]] = {
    "best_f1": lambda curve, _: (curve.f1, curve.predicted_positives > 0),
    "recall_at_precision": lambda curve, minimum: (
        curve.recall,
        (curve.precision >= minimum) & (curve.predicted_positives > 0),
    ),
    "precision_at_recall": lambda curve, minimum: (curve.precision, curve.recall >= minimum),
    "alerts_per_1000": lambda curve, maximum: (
        curve.predicted_positives,
        (1000 * curve.predicted_positives / curve.num_rows <= maximum) & (curve.predicted_positives > 0),
    ),
}
