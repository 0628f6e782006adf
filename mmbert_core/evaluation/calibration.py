"""Probabilities that mean what they say: one temperature, fitted on validation rows (Guo et al. 2017).

With hard labels, rows that the model tells apart without an error drive the temperature to 0. So 1 / (N + 1) of each
label is spread evenly over all classes: the weight of the Laplace smoothing of Berta et al. (2025, arXiv 2501.19195), on
the labels rather than on the calibrated probabilities, so that small ones stay small. The class-wise targets of Platt
(1999), (n_k + 1) / (n_k + 2), made the temperature of simulated rows up to twice the true one.
N rows, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.storage.schema import nullable, number, record, text, whole

MIN_ROWS, MIN_OF_A_CLASS = 200, 10
MAX_CELLS = 4_000_000  # rows x classes that a temperature of more than FEW_CLASSES is fitted on: seconds, not minutes
LOWEST, HIGHEST = 0.05, 20.0  # of the temperature
# Half a step of float32 next to 0 and next to 1: what a probability that was rounded to 0 or 1 is taken for.
NEXT_TO_0, NEXT_TO_1 = 2.0**-150, 2.0**-25
SMALLEST, LARGEST = np.float32(2.0**-149), np.float32(1 - 2.0**-24)  # strictly between 0 and 1
METHOD = "one temperature, fitted to labels of which 1 / (rows + 1) is spread over all classes"
CALIBRATION_JSON = record(
    {"temperature": number(LOWEST / 2, 2 * HIGHEST)},
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
    """Logits are divided by `temperature`; 1 leaves them, with the reason. Expected calibration errors are those of the rows it was fitted on."""

    temperature: float = 1.0
    rows: int = 0
    ece_before: float | None = None
    ece_after: float | None = None
    reason: str | None = None
    method: str | None = None  # how it was fitted; None where it was not, and in older folders

    def apply(self, preds: np.ndarray) -> np.ndarray:
        """[N] (binary: probability of class 1) or [N, K] -> the same shape, float32, in the same order.

        With a temperature other than 1 never exactly 0 or 1.
        """
        if self.temperature == 1.0:
            return preds
        return np.clip(_scaled(_log_odds(preds), 1 / self.temperature).astype(np.float32), SMALLEST, LARGEST)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Raises `ValueError` for a temperature that is none."""
        if not (isinstance(values["temperature"], (int, float)) and 0 < values["temperature"] < float("inf")):
            raise ValueError(f"expected a temperature above 0, found {values['temperature']!r}")
        return cls(**values)


def fit_temperature(preds: np.ndarray, labels: np.ndarray, *, num_classes: int) -> Calibration:
    """The temperature at which the smoothed labels of the validation rows are likeliest.

    Skipped, with a reason, where the rows are too few, and where no temperature between LOWEST and HIGHEST is the likeliest.
    """
    preds, labels = np.asarray(preds), np.asarray(labels)
    counts = np.bincount(labels, minlength=num_classes)
    if len(labels) < MIN_ROWS:
        return Calibration(rows=len(labels), reason=f"{len(labels)} validation rows, at least {MIN_ROWS} are needed")
    if counts.min() < MIN_OF_A_CLASS:
        return Calibration(
            rows=len(labels),
            reason=f"a class with {counts.min()} validation rows, at least {MIN_OF_A_CLASS} are needed",
        )
    rows = rows_to_fit(len(labels), num_classes)
    preds, labels = preds[rows], labels[rows]
    logits = _log_odds(preds)
    wanted = _mean_target_logit(logits, labels, num_classes)
    low, high = 1 / HIGHEST, 1 / LOWEST  # of the inverse temperature: the loss is convex in it, and its slope rises
    if _slope(logits, wanted, low) >= 0:
        why = f"the validation rows ask for a temperature above {HIGHEST:g}: their probabilities say next to nothing of their labels"
        return Calibration(rows=len(labels), reason=why)
    if _slope(logits, wanted, high) <= 0:
        why = f"the validation rows ask for a temperature below {LOWEST:g}: their probabilities hardly differ, their labels do"
        return Calibration(rows=len(labels), reason=why)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(logits, wanted, middle) > 0 else (middle, high)
    fitted = Calibration(2 / (low + high), len(labels), method=METHOD)
    return replace(
        fitted, ece_before=_ece(preds, labels, num_classes), ece_after=_ece(fitted.apply(preds), labels, num_classes)
    )


def rows_to_fit(num_rows: int, num_classes: int) -> np.ndarray:
    """Positions of all rows, or, of more than FEW_CLASSES, of as many as MAX_CELLS allow, evenly spread."""
    num_fitted = min(num_rows, max(MIN_ROWS, MAX_CELLS // num_classes)) if num_classes > FEW_CLASSES else num_rows
    return np.linspace(0, num_rows - 1, num_fitted).round().astype(np.int64)


def _mean_target_logit(logits: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The mean over rows of the logits weighted by the smoothed labels; `logits` [N] or [N, K]."""
    spread = 1 / (len(labels) + 1)
    if logits.ndim == 1:
        return float((((1 - spread) * labels + spread / num_classes) * logits).mean())
    of_label = logits[np.arange(len(labels)), labels]
    return float(((1 - spread) * of_label + spread * logits.mean(axis=1)).mean())


def _log_odds(preds: np.ndarray) -> np.ndarray:
    """Logits up to a constant, float64: [N] of class 1 over class 0, or [N, K]."""
    preds = preds.astype(np.float64)
    if preds.ndim == 1:
        return np.log(np.maximum(preds, NEXT_TO_0)) - np.log(np.maximum(1 - preds, NEXT_TO_1))
    return np.log(np.maximum(preds, NEXT_TO_0))


def _scaled(logits: np.ndarray, inverse: float) -> np.ndarray:
    """Probabilities of logits times the inverse temperature, float64; small ones keep all their digits."""
    if logits.ndim == 1:
        power = np.exp(-inverse * np.abs(logits))  # of the less likely class over the other
        return np.where(logits < 0, power, 1) / (1 + power)
    powers = np.exp(inverse * (logits - logits.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True)


def _slope(logits: np.ndarray, wanted: float, inverse: float) -> float:
    """Of the mean cross entropy by the inverse temperature: the mean logit of the model's probabilities less the `wanted` one."""
    weighted = _scaled(logits, inverse) * logits
    return float((weighted if logits.ndim == 1 else weighted.sum(axis=1)).mean()) - wanted


def _ece(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> float | None:
    return compute_metrics(
        preds, labels, ["ece"], "binary" if preds.ndim == 1 else "multiclass", num_classes, "val"
    ).values["val/ece"]
