"""The temperature brings back probabilities that were sharpened, and never the order of rows."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmbert_core.evaluation import temperature
from mmbert_core.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, Calibration, fit_temperature
from mmbert_core.export import example as export_example


def sharpened(
    num_classes: int, temperature: float, seed: int = 0, num_rows: int = 20_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a model that is too sure by `temperature`, the true ones, and labels drawn from these."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(num_rows, num_classes))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (rng.random((num_rows, 1)) > true.cumsum(axis=1)).sum(axis=1)
    sure = np.exp(temperature * logits) / np.exp(temperature * logits).sum(axis=1, keepdims=True)
    return tuple(
        array[:, 1].astype(np.float32) if num_classes == 2 and array.ndim == 2 else array
        for array in (sure.astype(np.float32), true, labels)
    )


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_known_temperature_is_found(num_classes: int, temperature: float) -> None:
    sure, true, labels = sharpened(num_classes, temperature)
    calibration = fit_temperature(sure, labels, num_classes=num_classes)
    assert calibration.temperature == pytest.approx(temperature, rel=0.05)
    assert calibration.ece_after < 0.5 * calibration.ece_before and np.abs(calibration.apply(sure) - true).max() < 0.02
    assert calibration.reason is None and Calibration.from_json(calibration.to_json()) == calibration


def test_the_order_of_rows_stays() -> None:
    sure, _, labels = sharpened(2, 3.0)
    calibrated = fit_temperature(sure, labels, num_classes=2).apply(sure)
    assert calibrated.dtype == np.float32 and np.all(np.diff(calibrated[np.argsort(sure, kind="stable")]) >= 0)


def test_certainties_stay_finite() -> None:
    preds, labels = np.tile(np.array([0.0, 1.0, 0.3, 0.8], np.float32), 100), np.tile([0, 1, 1, 0], 100)
    calibration = fit_temperature(preds, labels, num_classes=2)
    assert np.isfinite(calibration.apply(preds)).all() and np.isfinite(calibration.temperature)


@pytest.mark.parametrize(
    ("num_rows", "positives", "reason"), [(100, 50, "100 validation rows"), (1000, 3, "a class with 3 validation rows")]
)
def test_too_few_rows_are_left_alone(num_rows: int, positives: int, reason: str) -> None:
    preds, labels = np.full(num_rows, 0.7, np.float32), np.zeros(num_rows, int)
    labels[:positives] = 1
    calibration = fit_temperature(preds, labels, num_classes=2)
    assert calibration.temperature == 1.0 and reason in calibration.reason and calibration.apply(preds) is preds


def test_a_probability_that_was_rounded_to_one_is_about_as_sure_as_its_neighbour() -> None:
    """One sure and wrong row must not decide the temperature because float32 rounded it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    preds = np.clip(0.5 + 0.3 * (2 * labels - 1) + 0.1 * rng.normal(size=500), 0.01, 0.99).astype(np.float32)
    labels[0] = 0
    calibrations = []
    for sure in (np.float32(1), np.nextafter(np.float32(1), np.float32(0))):
        preds[0] = sure
        calibrations.append(fit_temperature(preds, labels, num_classes=2))
    assert calibrations[0].temperature == pytest.approx(calibrations[1].temperature, rel=0.05)
    assert Calibration(4.0).apply(np.float32([1.0]))[0] == pytest.approx(
        Calibration(4.0).apply(np.nextafter(np.float32([1]), np.float32(0)))[0], abs=0.01
    )


# ---- rows that are separated without an error ----


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])  # of the logits: with 60 most probabilities are exactly 0 or 1
def test_rows_separated_without_an_error_do_not_drive_the_temperature_to_its_bound(
    num_classes: int, scale: float
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % num_classes
    logits = scale * (np.eye(num_classes)[labels] * (2 + 0.3 * rng.random((300, 1))))
    preds = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    preds = preds[:, 1] if num_classes == 2 else preds
    calibration = fit_temperature(preds, labels, num_classes=num_classes)
    calibrated = calibration.apply(preds)
    assert (
        2 * MIN_TEMPERATURE < calibration.temperature < 0.8 * MAX_TEMPERATURE
        and calibration.reason is None
        and "1 / (rows + 1)" in calibration.method
    )
    assert calibrated.min() > 0 and calibrated.max() < 1
    of_label = (
        np.where(labels == 1, calibrated, 1 - calibrated) if num_classes == 2 else calibrated[np.arange(300), labels]
    )
    assert 1 - 10 / 300 < of_label.mean() < 1 - 0.1 / 300  # 300 rows without an error allow no more


@pytest.mark.parametrize(
    ("preds", "reason"),
    [
        ([0.4999, 0.5001], "below 0.05: their probabilities hardly differ, their labels do"),
        ([0.7, 0.3], "above 20: their probabilities are almost unrelated to their labels"),
        ([0.5, 0.5], "above 20"),
    ],
)
def test_a_temperature_at_its_bound_is_left_out_with_the_reason(preds: list[float], reason: str) -> None:
    labels = np.arange(300) % 2
    calibration = fit_temperature(np.array(preds, np.float32)[labels], labels, num_classes=2)
    assert (
        calibration.temperature == 1.0
        and reason in calibration.reason
        and calibration.method is None
        and calibration.ece_after is None
    )


def test_a_temperature_of_an_older_folder_stays() -> None:
    values = {"temperature": 0.05, "rows": 220, "ece_before": 0.1, "ece_after": 0.0, "reason": None}
    assert Calibration.from_json(values).temperature == 0.05 and Calibration.from_json(values).method is None


# ---- every digit of small probabilities ----

PROBABILITIES = [0.0, 1e-45, 1e-40, 2e-18, 1e-7, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1.0]


def exactly(probability: float, temperature: float) -> float:
    """Through math.expm1 and log1p on one number."""
    odds = (math.log(probability) - math.log1p(-probability)) / temperature
    return 1 / (1 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1 + math.exp(odds))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=10), st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE))
@example([], MIN_TEMPERATURE)
@example([], 0.9)
@example([], MAX_TEMPERATURE)
def test_calibrated_probabilities_are_exact_in_order_and_inside(drawn: list[float], temperature: float) -> None:
    preds = np.array(sorted([*drawn, *PROBABILITIES]), np.float32)
    calibrated = Calibration(temperature).apply(preds)
    assert calibrated.dtype == np.float32 and (np.diff(calibrated) >= 0).all()
    inside = (preds > 0) & (preds < 1)
    assert (calibrated[inside] > 0).all() and (calibrated[inside] < 1).all()
    for probability, found in zip(preds[inside].tolist(), calibrated[inside].tolist(), strict=True):
        exact = exactly(probability, temperature)
        assert found == pytest.approx(exact, rel=2e-6, abs=2e-45) or (exact > 1 - 2.0**-24 and found == 1 - 2.0**-24)
    by_class = np.stack([1 - preds, preds / 2, preds / 2], axis=1)
    for values, expected in ((preds, calibrated), (by_class, Calibration(temperature).apply(by_class))):
        exported = export_example.calibrated(values, temperature)
        assert np.array_equal(
            exported[:, 1] if values.ndim == 1 else exported, expected
        )  # example.py gives the same bits


def test_two_in_ten_to_the_eighteen_stays_that() -> None:
    """The hyperbolic tangent near -1 has no digits left for it."""
    probability = np.float32(3e-9)
    [calibrated] = Calibration(1 / 2.0663).apply(np.array([probability]))
    assert (
        float(calibrated) == pytest.approx(exactly(float(probability), 1 / 2.0663), rel=1e-6)
        and 1e-18 < calibrated < 3e-18
    )


def test_of_many_classes_a_share_of_the_rows_gives_the_temperature_and_of_few_classes_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preds, _, labels = sharpened(40, 2.0, num_rows=3_000)
    whole = fit_temperature(preds, labels, num_classes=40)
    monkeypatch.setattr(temperature, "MAX_CELLS", 40 * 1_500)
    share = fit_temperature(preds, labels, num_classes=40)
    assert (whole.rows, share.rows) == (3_000, 1_500) and share.temperature == pytest.approx(
        whole.temperature, rel=0.05
    )
    assert temperature.rows_to_fit(100_000, 30).tolist() == list(range(100_000))
    assert len(temperature.rows_to_fit(50_000, 10_000)) == 200
