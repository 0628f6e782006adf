"""The temperature brings back probabilities that were sharpened, and never the order of rows."""

import numpy as np
import pytest

from mmbert_core.evaluation.calibration import Calibration, fit_temperature


def sharpened(num_classes: int, temperature: float, seed: int = 0, num_rows: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a model that is too sure by `temperature`, the true ones, and labels drawn from these."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(num_rows, num_classes))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((num_rows, 1)) > true.cumsum(axis=1)).sum(axis=1)
    sure = np.exp(temperature * logits) / np.exp(temperature * logits).sum(axis=1, keepdims=True)
    return tuple(part[:, 1].astype(np.float32) if num_classes == 2 and part.ndim == 2 else part for part in (sure.astype(np.float32), true, labels))


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_known_temperature_is_found(num_classes: int, temperature: float) -> None:
    sure, true, labels = sharpened(num_classes, temperature)
    made = fit_temperature(sure, labels, num_classes=num_classes)
    assert made.temperature == pytest.approx(temperature, rel=0.05)
    assert made.ece_after < 0.5 * made.ece_before and np.abs(made.apply(sure) - true).max() < 0.02
    assert made.reason is None and Calibration.from_json(made.to_json()) == made


def test_the_order_of_rows_stays() -> None:
    sure, _, labels = sharpened(2, 3.0)
    made = fit_temperature(sure, labels, num_classes=2).apply(sure)
    assert made.dtype == np.float32 and np.all(np.diff(made[np.argsort(sure, kind="stable")]) >= 0)


def test_certainties_stay_finite() -> None:
    preds, labels = np.tile(np.array([0.0, 1.0, 0.3, 0.8], np.float32), 100), np.tile([0, 1, 1, 0], 100)
    made = fit_temperature(preds, labels, num_classes=2)
    assert np.isfinite(made.apply(preds)).all() and np.isfinite(made.temperature)


@pytest.mark.parametrize(("num_rows", "positives", "reason"), [(100, 50, "100 validation rows"), (1000, 3, "a class with 3 validation rows")])
def test_too_few_rows_are_left_alone(num_rows: int, positives: int, reason: str) -> None:
    preds, labels = np.full(num_rows, 0.7, np.float32), np.zeros(num_rows, int)
    labels[:positives] = 1
    made = fit_temperature(preds, labels, num_classes=2)
    assert made.temperature == 1.0 and reason in made.reason and made.apply(preds) is preds


def test_a_probability_that_was_rounded_to_one_is_about_as_sure_as_its_neighbour() -> None:
    """One sure and wrong row must not decide the temperature because float32 had no room left for it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    preds = np.clip(0.5 + 0.3 * (2 * labels - 1) + 0.1 * rng.normal(size=500), 0.01, 0.99).astype(np.float32)
    labels[0] = 0
    made = []
    for sure in (np.float32(1), np.nextafter(np.float32(1), np.float32(0))):
        preds[0] = sure
        made.append(fit_temperature(preds, labels, num_classes=2))
    assert made[0].temperature == pytest.approx(made[1].temperature, rel=0.05)
    assert Calibration(4.0).apply(np.float32([1.0]))[0] == pytest.approx(Calibration(4.0).apply(np.nextafter(np.float32([1]), np.float32(0)))[0], abs=0.01)
