"""Fitted after training and saved with the model: threshold, calibration, and the baselines to compare with.

N rows, K classes.
"""

import logging

import numpy as np

from mmbert_core.config import Config
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.evaluation import baselines
from mmbert_core.evaluation.baselines import (
    COLUMNS_ONLY,
    MAX_CELLS,
    MAX_CLASSES,
    MAX_ROWS,
    MAX_TOKENS,
    TEXT_ONLY,
    Baselines,
)
from mmbert_core.evaluation.decision import Decision, fit_threshold, fit_threshold_and_calibration
from mmbert_core.report.results import baseline_features
from mmbert_core.runtime.progress import slow_step

logger = logging.getLogger(__name__)


def fit_decision(data: Data, config: Config, val_preds: np.ndarray | None) -> Decision:
    """Rank 0 only. Threshold and calibration from the validation rows, baselines from the training rows; takes seconds.

    `val_preds` [N] or [N, K]; None without validation rows.
    """
    val_labels = None if val_preds is None or data.val is None else data.val.label_index
    try:
        with slow_step("baselines"):
            fitted = fit_baselines(data, config)
    except Exception as error:  # such as too little memory: the model is usable without baselines
        logger.warning("no baselines: %s: %s", type(error).__name__, error)
        fitted = None
    with slow_step("threshold and calibration"):
        decision = fit_threshold_and_calibration(
            val_preds, val_labels, rule=config.threshold_rule, num_classes=config.num_classes, baselines=fitted
        )
    if config.is_binary and decision.threshold.reason:
        message = "threshold_rule %s could not be followed, the threshold is 0.5: %s"
        logger.warning(message, config.threshold_rule, decision.threshold.reason)
    return decision


def fit_baselines(data: Data, config: Config) -> Baselines:
    """Baselines fitted on a seeded sample of the training rows; the validation rows choose penalty and threshold."""
    rows, labels = sample(data.train, config.seed, config.num_classes)
    val_rows, val_labels = (None, None) if data.val is None else sample(data.val, config.seed, config.num_classes)
    models, thresholds, reasons = {}, {}, {}
    has_columns = config.has_columns
    for name, has_input in ((COLUMNS_ONLY, has_columns), (TEXT_ONLY, bool(config.text_name))):
        if not has_input:
            reasons[name] = f"the model has no {'columns' if name == COLUMNS_ONLY else 'text'}"
        elif config.num_classes > MAX_CLASSES[name]:
            reasons[name] = f"more than {MAX_CLASSES[name]} classes"
        else:
            val = None if data.val is None else (baseline_features(name, data.val, val_rows), val_labels)
            fitted = baselines.fit_best((baseline_features(name, data.train, rows), labels), val, config.num_classes)
            if not fitted.is_finite:
                reasons[name] = "its fit did not converge: the weights are not finite"
                continue
            models[name] = fitted
            scores = None if val is None else fitted.probabilities(val[0])  # [N, K]
            if scores is not None and config.is_binary:
                scores = scores[:, 1]
            thresholds[name] = fit_threshold(scores, val_labels, config.threshold_rule).value
    shares = baselines.majority(data.train.label_index, config.num_classes)
    return Baselines(shares, models, thresholds, len(rows), reasons)


def sample(dataset: Dataset, seed: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all rows, or of as many as MAX_ROWS, MAX_CELLS and MAX_TOKENS allow, ascending; and their labels."""
    rows = np.random.default_rng(seed).permutation(len(dataset))
    within_max_tokens = int(np.searchsorted(np.cumsum(dataset.lengths[rows]), MAX_TOKENS, side="right")) + 1
    rows = np.sort(rows[: min(MAX_ROWS, MAX_CELLS // num_classes, within_max_tokens)])
    return rows, dataset.label_index[rows]
