"""From probabilities to decisions: threshold and calibration from validation rows, and the baselines to compare with.

N rows, K classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmbert_core.evaluation.baselines import Baselines
from mmbert_core.evaluation.calibration import Calibration, fit_temperature
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, HALF, Threshold, choose_threshold, parse_rule

MIN_CLASS_ROWS = 20  # validation rows of each class that a threshold needs
NOT_FINITE = "probabilities of validation rows that are not finite"


@dataclass(frozen=True)
class Decision:
    """Stored with a model: how its probabilities become classes, their calibration, and its baselines.

    With several classes, the largest probability decides instead of the threshold.
    """

    threshold: Threshold = Threshold(BINARY_THRESHOLD, HALF, reason="the model folder has none")
    calibration: Calibration = Calibration(reason="the model folder has none")
    baselines: Baselines | None = None

    def to_json(self) -> dict[str, Any]:
        """The contents of thresholds.json, without the baselines, which have files of their own."""
        return {"threshold": self.threshold.to_json(), "calibration": self.calibration.to_json()}


def fit_threshold_and_calibration(
    preds: np.ndarray | None, labels: np.ndarray | None, *, rule: str, num_classes: int, baselines: Baselines | None
) -> Decision:
    """From the validation rows' `preds` [N] (binary) or [N, K] and `labels` [N]; None: no validation rows."""
    threshold = fit_threshold(preds, labels, rule)
    if preds is None or labels is None:
        return Decision(threshold, Calibration(reason="no validation rows"), baselines)
    if not np.isfinite(preds).all():
        return Decision(threshold, Calibration(rows=len(labels), reason=NOT_FINITE), baselines)
    return Decision(threshold, fit_temperature(preds, labels, num_classes=num_classes), baselines)


def fit_threshold(preds: np.ndarray | None, labels: np.ndarray | None, rule: str) -> Threshold:
    """The threshold of the rule, or one half with the reason why the rows do not allow it."""
    if preds is None or labels is None:
        return Threshold(BINARY_THRESHOLD, rule, reason="no validation rows")
    if preds.ndim == 2:
        return Threshold(
            BINARY_THRESHOLD, HALF, rows=len(labels), reason="several classes: the largest probability decides"
        )
    if not np.isfinite(preds).all():
        return Threshold(BINARY_THRESHOLD, rule, rows=len(labels), reason=NOT_FINITE)
    fewest = int(np.bincount(labels, minlength=2).min())
    if parse_rule(rule)[0] != HALF and fewest < MIN_CLASS_ROWS:
        reason = f"a class with {fewest} validation rows, at least {MIN_CLASS_ROWS} are needed"
        return Threshold(BINARY_THRESHOLD, rule, rows=len(labels), reason=reason)
    return choose_threshold(preds, labels, rule)
