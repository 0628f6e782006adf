"""Temperature scaling of probabilities, fitted on validation rows (Guo et al. 2017).

N rows, K classes.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.evaluation.temperature import (
    MAX_TEMPERATURE,
    MIN_ROWS,
    MIN_TEMPERATURE,
    best_temperature,
    log_odds,
    rows_to_fit,
    scaled,
)
from mmbert_core.storage.schema import nullable, number, record, text, whole

MIN_CLASS_ROWS = 10  # validation rows of each class that a temperature needs, and MIN_ROWS in all
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
            scaled(log_odds(preds), 1 / self.temperature).astype(np.float32), MIN_PROBABILITY, MAX_PROBABILITY
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
    MAX_TEMPERATURE.
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
    temperature = best_temperature(preds, labels, num_classes)
    if temperature == MAX_TEMPERATURE:
        reason = (
            f"the best temperature for the validation rows is above {MAX_TEMPERATURE:g}: "
            "their probabilities are almost unrelated to their labels"
        )
        return Calibration(rows=len(labels), reason=reason)
    if temperature == MIN_TEMPERATURE:
        reason = (
            f"the best temperature for the validation rows is below {MIN_TEMPERATURE:g}: "
            "their probabilities hardly differ, their labels do"
        )
        return Calibration(rows=len(labels), reason=reason)
    fitted = Calibration(temperature, len(labels), method=METHOD)
    return replace(
        fitted, ece_before=_ece(preds, labels, num_classes), ece_after=_ece(fitted.apply(preds), labels, num_classes)
    )


def _ece(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> float | None:
    """Expected calibration error."""
    task = "binary" if preds.ndim == 1 else "multiclass"
    return compute_metrics(preds, labels, ["ece"], task, num_classes, "val").values["val/ece"]
