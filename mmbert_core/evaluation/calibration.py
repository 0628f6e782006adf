"""Probabilities that mean what they say: one temperature, fitted on validation rows (Guo et al. 2017). Floor 1; imports metrics.

N rows, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmbert_core.evaluation.metrics import compute_metrics

FEWEST_ROWS, FEWEST_OF_A_CLASS = 200, 10
LOWEST, HIGHEST = 0.05, 20.0  # of the temperature
SMALLEST = float(np.finfo(np.float32).tiny)
NEAREST = 2.0**-25  # to 1, half a step of float32: a probability that was rounded to 1 is as sure as the one below it, about


@dataclass(frozen=True)
class Calibration:
    """Logits are divided by `temperature`; 1 leaves them, with the reason. Expected calibration errors are those of the rows it was fitted on."""

    temperature: float = 1.0
    rows: int = 0
    ece_before: float | None = None
    ece_after: float | None = None
    reason: str | None = None

    def apply(self, preds: np.ndarray) -> np.ndarray:
        """[N] (binary: probability of class 1) or [N, K] -> the same shape, float32."""
        return preds if self.temperature == 1.0 else _scaled(_log_odds(preds), 1 / self.temperature).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Raises `ValueError` for a temperature that is none."""
        if not (isinstance(values["temperature"], (int, float)) and 0 < values["temperature"] < float("inf")):
            raise ValueError(f"expected a temperature above 0, found {values['temperature']!r}")
        return cls(**values)


def fit_temperature(preds: np.ndarray, labels: np.ndarray, *, num_classes: int) -> Calibration:
    """The temperature at which the validation rows are likeliest. Skipped, with a reason, where they are too few."""
    preds, labels = np.asarray(preds), np.asarray(labels)
    counts = np.bincount(labels, minlength=num_classes)
    if len(labels) < FEWEST_ROWS:
        return Calibration(rows=len(labels), reason=f"{len(labels)} validation rows, at least {FEWEST_ROWS} are needed")
    if counts.min() < FEWEST_OF_A_CLASS:
        return Calibration(rows=len(labels), reason=f"a class with {counts.min()} validation rows, at least {FEWEST_OF_A_CLASS} are needed")
    logits = _log_odds(preds)
    low, high = 1 / HIGHEST, 1 / LOWEST  # of the inverse temperature: the loss is convex in it, and its slope rises
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(logits, labels, middle) > 0 else (middle, high)
    made = Calibration(1 / ((low + high) / 2), len(labels))
    return Calibration(made.temperature, len(labels), _ece(preds, labels, num_classes), _ece(made.apply(preds), labels, num_classes))


def _log_odds(preds: np.ndarray) -> np.ndarray:
    """Logits up to a constant, float64: [N] of class 1 over class 0, or [N, K]."""
    preds = preds.astype(np.float64)
    if preds.ndim == 1:
        return np.log(np.maximum(preds, SMALLEST)) - np.log(np.maximum(1 - preds, NEAREST))
    return np.log(np.maximum(preds, SMALLEST))


def _scaled(logits: np.ndarray, inverse: float) -> np.ndarray:
    """Probabilities of logits times the inverse temperature."""
    if logits.ndim == 1:
        return 0.5 * (1 + np.tanh(0.5 * inverse * logits))
    powers = np.exp(inverse * (logits - logits.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True)


def _slope(logits: np.ndarray, labels: np.ndarray, inverse: float) -> float:
    """Of the mean log loss by the inverse temperature."""
    made = _scaled(logits, inverse)
    if logits.ndim == 1:
        return float(((made - labels) * logits).mean())
    return float(((made * logits).sum(axis=1) - logits[np.arange(len(labels)), labels]).mean())


def _ece(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> float | None:
    return compute_metrics(preds, labels, ["ece"], "binary" if preds.ndim == 1 else "multiclass", num_classes, "val").values["val/ece"]
