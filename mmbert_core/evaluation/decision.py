"""What validation and training rows say of a model, kept with it: threshold, calibration, baselines.

N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmbert_core.evaluation.baselines import Baselines
from mmbert_core.evaluation.calibration import Calibration, fit_temperature
from mmbert_core.evaluation.thresholds import HALF, Threshold, choose_threshold, parse_rule

MIN_OF_A_CLASS = 20  # validation rows from which a threshold is chosen
NOT_FINITE = "probabilities of validation rows that are no numbers"


@dataclass(frozen=True)
class Decision:
    """How probabilities become classes and what they are worth. Several classes: the largest probability decides."""

    threshold: Threshold = Threshold(0.5, HALF, reason="the model folder has none")
    calibration: Calibration = Calibration(reason="the model folder has none")
    baselines: Baselines | None = None

    def to_json(self) -> dict[str, Any]:
        """thresholds.json; the baselines are kept beside it."""
        return {"threshold": self.threshold.to_json(), "calibration": self.calibration.to_json()}


def fit_threshold_and_calibration(
    preds: np.ndarray | None, labels: np.ndarray | None, *, rule: str, num_classes: int, baselines: Baselines | None
) -> Decision:
    """From the validation rows' `preds` [N] (binary) or [N, K] and `labels` [N]; None: there were none."""
    threshold = fit_threshold(preds, labels, rule)
    if preds is None or labels is None:
        return Decision(threshold, Calibration(reason="no validation rows"), baselines)
    if not np.isfinite(preds).all():
        return Decision(threshold, Calibration(rows=len(labels), reason=NOT_FINITE), baselines)
    return Decision(threshold, fit_temperature(preds, labels, num_classes=num_classes), baselines)


def fit_threshold(preds: np.ndarray | None, labels: np.ndarray | None, rule: str) -> Threshold:
    """By the rule, or one half with the reason why the rows cannot tell."""
    if preds is None or labels is None:
        return Threshold(0.5, rule, reason="no validation rows")
    if preds.ndim == 2:
        return Threshold(0.5, HALF, rows=len(labels), reason="several classes: the largest probability decides")
    if not np.isfinite(preds).all():
        return Threshold(0.5, rule, rows=len(labels), reason=NOT_FINITE)
    fewest = int(np.bincount(labels, minlength=2).min())
    if parse_rule(rule)[0] != HALF and fewest < MIN_OF_A_CLASS:
        return Threshold(
            0.5,
            rule,
            rows=len(labels),
            reason=f"a class with {fewest} validation rows, at least {MIN_OF_A_CLASS} are needed",
        )
    return choose_threshold(preds, labels, rule)
