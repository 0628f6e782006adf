"""Temperature scaling of probabilities, fitted on validation rows (Guo et al. 2017).

With hard labels, validation rows that the model separates without an error drive the temperature to 0. Therefore
1 / (N + 1) of each label is spread evenly over all classes. This is the weight of the Laplace smoothing of Berta et al.
(2025, arXiv 2501.19195), applied to the labels instead of the calibrated probabilities, so that small ones stay small.
The class-wise targets of Platt (1999), (n_k + 1) / (n_k + 2), were tried: on simulated rows they made the temperature
up to twice the true one.

N rows, K classes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.storage.schema import nullable, number, record, text, whole

MIN_ROWS, MIN_CLASS_ROWS = 200, 10  # validation rows that a temperature needs: in all, of each class
MAX_CELLS = 4_000_000  # rows x classes at most, with more than FEW_CLASSES: the fit takes seconds, not minutes
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
# Half a float32 step from 0 and from 1: the value assumed for a probability that was rounded to 0 or 1.
NEXT_TO_0, NEXT_TO_1 = 2.0**-150, 2.0**-25
MIN_PROBABILITY, MAX_PROBABILITY = np.float32(2.0**-149), np.float32(1 - 2.0**-24)  # the float32 next to 0 and to 1
METHOD = "one temperature, fitted to labels of which 1 / (rows + 1) is spread over all classes"
CALIBRATION_JSON = record(
    {"temperature": number(MIN_TEMPERATURE / 2, 2 * MAX_TEMPERATURE)},
    {
        "rows": whole(0),
        "ece_before": nullable(number(0, 1)),
        "ece_after": nullable(number(0, 1)),
        "reason": nullable(text()),
        "method": nullable(text()),  # older folders have none
    },
)


@dataclass(frozen=True)
class Calibration:
    """Logits are divided by `temperature`. The calibration errors are those of the rows that it was fitted on."""

    temperature: float = 1.0  # 1 changes nothing
    rows: int = 0  # that it was fitted on
    ece_before: float | None = None
    ece_after: float | None = None
    reason: str | None = None  # why no temperature was fitted
    method: str | None = None  # how it was fitted; None where it was not, and in older model folders

    def apply(self, preds: np.ndarray) -> np.ndarray:
        """Calibrated probabilities: `preds` [N] (binary: of class 1) or [N, K] -> float32 of the same shape.

        No result is exactly 0 or 1. At temperature 1, `preds` itself is returned.
        """
        if self.temperature == 1.0:
            return preds
        return np.clip(
            _scaled(_log_odds(preds), 1 / self.temperature).astype(np.float32), MIN_PROBABILITY, MAX_PROBABILITY
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Calibration":
        """Raises `ValueError` for a temperature that is not a number above 0."""
        if not (isinstance(values["temperature"], (int, float)) and 0 < values["temperature"] < float("inf")):
            raise ValueError(f"expected a temperature above 0, found {values['temperature']!r}")
        return cls(**values)


def fit_temperature(preds: np.ndarray, labels: np.ndarray, *, num_classes: int) -> Calibration:
    """The temperature with the lowest cross entropy of the smoothed labels; `preds` [N] or [N, K], `labels` [N].

    Temperature 1 with a reason where there are too few rows, and where the minimum is not between MIN_TEMPERATURE and
    MAX_TEMPERATURE. Found by bisection.
    """
    preds, labels = np.asarray(preds), np.asarray(labels)
    counts = np.bincount(labels, minlength=num_classes)
    if len(labels) < MIN_ROWS:
        return Calibration(rows=len(labels), reason=f"{len(labels)} validation rows, at least {MIN_ROWS} are needed")
    if counts.min() < MIN_CLASS_ROWS:
        reason = f"a class with {counts.min()} validation rows, at least {MIN_CLASS_ROWS} are needed"
        return Calibration(rows=len(labels), reason=reason)
    rows = rows_to_fit(len(labels), num_classes)
    preds, labels = preds[rows], labels[rows]
    logits = _log_odds(preds)
    target = _mean_target_logit(logits, labels, num_classes)
    # Bounds of the inverse temperature, in which the loss is convex: its derivative is increasing.
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if _slope(logits, target, low) >= 0:
        reason = (
            f"the best temperature for the validation rows is above {MAX_TEMPERATURE:g}: "
            "their probabilities are almost unrelated to their labels"
        )
        return Calibration(rows=len(labels), reason=reason)
    if _slope(logits, target, high) <= 0:
        reason = (
            f"the best temperature for the validation rows is below {MIN_TEMPERATURE:g}: "
            "their probabilities hardly differ, their labels do"
        )
        return Calibration(rows=len(labels), reason=reason)
    for _ in range(60):  # to the last bit of float64
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(logits, target, middle) > 0 else (middle, high)
    fitted = Calibration(2 / (low + high), len(labels), method=METHOD)
    return replace(
        fitted, ece_before=_ece(preds, labels, num_classes), ece_after=_ece(fitted.apply(preds), labels, num_classes)
    )


def rows_to_fit(num_rows: int, num_classes: int) -> np.ndarray:
    """Indices of all rows, or, with more than FEW_CLASSES, of as many as MAX_CELLS allow, evenly spread."""
    num_fitted = min(num_rows, max(MIN_ROWS, MAX_CELLS // num_classes)) if num_classes > FEW_CLASSES else num_rows
    return np.linspace(0, num_rows - 1, num_fitted).round().astype(np.int64)


def _mean_target_logit(logits: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean over rows of the logits weighted by the smoothed labels; `logits` [N] or [N, K]."""
    spread = 1 / (len(labels) + 1)
    if logits.ndim == 1:
        return float((((1 - spread) * labels + spread / num_classes) * logits).mean())
    of_label = logits[np.arange(len(labels)), labels]
    return float(((1 - spread) * of_label + spread * logits.mean(axis=1)).mean())


def _log_odds(preds: np.ndarray) -> np.ndarray:
    """Logits up to a constant per row, float64: [N] log-odds of class 1, or [N, K]."""
    preds = preds.astype(np.float64)
    if preds.ndim == 1:
        return np.log(np.maximum(preds, NEXT_TO_0)) - np.log(np.maximum(1 - preds, NEXT_TO_1))
    return np.log(np.maximum(preds, NEXT_TO_0))


def _scaled(logits: np.ndarray, inverse: float) -> np.ndarray:
    """Probabilities of logits times the inverse temperature, float64; small ones keep their precision."""
    if logits.ndim == 1:
        power = np.exp(-inverse * np.abs(logits))  # probability ratio of the less likely class to the other
        return np.where(logits < 0, power, 1) / (1 + power)
    powers = np.exp(inverse * (logits - logits.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True)


def _slope(logits: np.ndarray, target: float, inverse: float) -> float:
    """Derivative of the mean cross entropy by the inverse temperature: the model's mean logit minus `target`."""
    weighted = _scaled(logits, inverse) * logits
    return float((weighted if logits.ndim == 1 else weighted.sum(axis=1)).mean()) - target


def _ece(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> float | None:
    """Expected calibration error."""
    task = "binary" if preds.ndim == 1 else "multiclass"
    return compute_metrics(preds, labels, ["ece"], task, num_classes, "val").values["val/ece"]
