"""The temperature that fits probabilities best to labels, as a function of arrays alone.

With hard labels, rows that the model separates without an error drive the temperature to 0. Therefore 1 / (N + 1) of
each label is spread evenly over all classes. This is the weight of the Laplace smoothing of Berta et al. (2025, arXiv
2501.19195), applied to the labels instead of the calibrated probabilities, so that small ones stay small. The
class-wise targets of Platt (1999), (n_k + 1) / (n_k + 2), were tried: on simulated rows they made the temperature up to
twice the true one.

N rows, K classes.
"""

import numpy as np

from mmbert_core.evaluation.class_ranking import FEW_CLASSES

MIN_ROWS = 200  # that are used at least
MAX_CELLS = 4_000_000  # rows x classes at most, with more than FEW_CLASSES: the fit takes seconds, not minutes
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
# Half a float32 step from 0 and from 1: the value assumed for a probability that was rounded to 0 or 1.
NEXT_TO_0, NEXT_TO_1 = 2.0**-150, 2.0**-25


def best_temperature(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The temperature with the lowest cross entropy of the smoothed labels; `preds` [N] or [N, K], `labels` [N].

    MIN_TEMPERATURE or MAX_TEMPERATURE where the minimum is not between them. Found by bisection.
    """
    logits = log_odds(preds)
    target = _mean_target_logit(logits, labels, num_classes)
    # Bounds of the inverse temperature, in which the loss is convex: its derivative is increasing.
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if _slope(logits, target, low) >= 0:
        return MAX_TEMPERATURE
    if _slope(logits, target, high) <= 0:
        return MIN_TEMPERATURE
    for _ in range(60):  # to the last bit of float64
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(logits, target, middle) > 0 else (middle, high)
    return 2 / (low + high)


def log_odds(preds: np.ndarray) -> np.ndarray:
    """Logits up to a constant per row, float64: [N] log-odds of class 1, or [N, K]."""
    preds = preds.astype(np.float64)
    if preds.ndim == 1:
        return np.log(np.maximum(preds, NEXT_TO_0)) - np.log(np.maximum(1 - preds, NEXT_TO_1))
    return np.log(np.maximum(preds, NEXT_TO_0))


def scaled(logits: np.ndarray, inverse: float) -> np.ndarray:
    """Probabilities of logits times the inverse temperature, float64; small ones keep their precision."""
    if logits.ndim == 1:
        power = np.exp(-inverse * np.abs(logits))  # probability ratio of the less likely class to the other
        return np.where(logits < 0, power, 1) / (1 + power)
    powers = np.exp(inverse * (logits - logits.max(axis=1, keepdims=True)))
    return powers / powers.sum(axis=1, keepdims=True)


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


def _slope(logits: np.ndarray, target: float, inverse: float) -> float:
    """Derivative of the mean cross entropy by the inverse temperature: the model's mean logit minus `target`."""
    weighted = scaled(logits, inverse) * logits
    return float((weighted if logits.ndim == 1 else weighted.sum(axis=1)).mean()) - target
