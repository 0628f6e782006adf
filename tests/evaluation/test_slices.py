"""Slices: every row in one slice of a column, the worst first."""

import numpy as np

from mmbert_core.evaluation import slices
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.evaluation.slices import MISSING, OTHERS, slices_of

CLASSES = ["0", "1"]


def random_rows(num_rows: int = 2000) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """The model guesses on rows of kind "bad"."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, num_rows)
    kinds = rng.choice(
        ["good", "fair", "bad", "", *(f"rare{i}" for i in range(60))],
        num_rows,
        p=[0.3, 0.3, 0.2, 0.1, *[0.1 / 60] * 60],
    )
    noise = np.where(kinds == "bad", 1e9, 1.0)
    preds = 1 / (1 + np.exp(-np.clip(rng.normal(size=num_rows) * noise + 2 * labels, -30, 30)))
    ages = rng.integers(18, 80, num_rows).astype(float)
    ages[rng.random(num_rows) < 0.1] = np.nan
    return preds.astype(np.float32), labels, {"kind": kinds.tolist(), "age": ages, "flag": np.zeros(num_rows)}


def test_the_worst_slice_comes_first_with_its_own_metric() -> None:
    preds, labels, columns = random_rows()
    found = slices_of(preds, labels, columns, ["auroc", "accuracy"], class_names=CLASSES)
    assert (found[0].column, found[0].value) == ("kind", "bad")
    rows = np.array(columns["kind"]) == "bad"
    expected = compute_metrics(preds[rows], labels[rows], ["auroc"], "binary", 2, "x").values["x/auroc"]
    low, high = found[0].intervals["auroc"]
    assert found[0].metrics["auroc"] == expected and low < expected < high and found[0].rows == rows.sum()
    values = [each.metrics["auroc"] for each in found]
    assert values == sorted(values)


def test_every_row_is_in_one_slice_of_a_column() -> None:
    preds, labels, columns = random_rows()
    found = slices_of(preds, labels, columns, ["accuracy"], class_names=CLASSES)
    for column in ("kind", "age"):
        assert sum(each.rows for each in found if each.column == column) == len(labels)
    assert {each.value for each in found if each.column == "kind"} == {"good", "fair", "bad", MISSING, OTHERS}
    assert len([each for each in found if each.column == "age"]) == 5 and MISSING in {
        each.value for each in found if each.column == "age"
    }
    assert not [each for each in found if each.column == "flag"]  # a constant number has no quartiles


def test_one_class_in_a_slice_is_undefined_with_its_reason_and_last() -> None:
    preds, labels, columns = random_rows()
    kinds = np.array(columns["kind"])
    labels[kinds == "good"] = 1
    found = slices_of(preds, labels, {"kind": columns["kind"]}, ["auroc"], class_names=CLASSES)
    assert (
        found[-1].value == "good"
        and found[-1].metrics["auroc"] is None
        and "only one class" in found[-1].undefined["auroc"]
        and found[-1].intervals["auroc"] is None
    )


def test_many_values_are_the_most_frequent_and_the_rest() -> None:
    rng = np.random.default_rng(0)
    cells = [f"v{index}" for index in rng.integers(0, 40, 4000)]
    found = slices_of(
        rng.random(4000).astype(np.float32), rng.integers(0, 2, 4000), {"c": cells}, ["accuracy"], class_names=CLASSES
    )
    assert len(found) == slices.MAX_VALUES + 1 and sum(each.rows for each in found) == 4000


def test_a_common_number_stands_alone_and_the_rest_is_quartered() -> None:
    """The zeros of a count would swallow the quartiles that they fill."""
    rng = np.random.default_rng(0)
    for common, others in (
        (0, rng.integers(1, 60, 400)),
        (100, rng.integers(1, 100, 400)),
        (30, rng.integers(0, 60, 400)),
    ):
        numbers = rng.permutation(np.append(np.full(800, common), others[others != common])).astype(float)
        found = slices_of(
            rng.random(len(numbers)).astype(np.float32),
            rng.integers(0, 2, len(numbers)),
            {"n": numbers},
            ["accuracy"],
            class_names=CLASSES,
        )
        assert sum(each.rows for each in found) == len(numbers) and len(found) == 5
        assert [each.rows for each in found if each.value == str(common)] == [800]
        assert sum(f"without {common}" in each.value for each in found) == (common == 30)


def test_rare_values_of_a_few_numbers_are_put_together() -> None:
    numbers = np.repeat(np.arange(6.0), [100, 100, 20, 20, 20, 5])
    found = slices_of(
        np.random.default_rng(0).random(265).astype(np.float32),
        np.arange(265) % 2,
        {"n": numbers},
        ["accuracy"],
        class_names=CLASSES,
    )
    assert {each.value: each.rows for each in found} == {"0": 100, "1": 100, OTHERS: 65}


def test_slices_that_would_take_too_long_have_fewer_draws_or_no_intervals(monkeypatch) -> None:
    preds, labels, columns = random_rows()
    plain = slices_of(preds, labels, columns, ["accuracy"], class_names=CLASSES)
    for work, has_intervals in ((len(labels) * 3 * 120, True), (len(labels) * 3 * 90, False)):
        monkeypatch.setattr(slices, "WORK", work)
        found = slices_of(preds, labels, columns, ["accuracy"], class_names=CLASSES)
        assert all((each.intervals["accuracy"] is not None) is has_intervals for each in found)
        assert [each.metrics for each in found] == [each.metrics for each in plain]


def test_of_many_classes_a_slice_has_the_largest_and_its_draws_are_counted_with_its_classes() -> None:
    rng, names = np.random.default_rng(0), [f"c{index}" for index in range(400)]
    labels = np.concatenate([np.zeros(300, np.int64), np.arange(400)])
    preds = rng.random((700, 400)).astype(np.float32)
    [found] = slices_of(preds, labels, {"kind": ["a"] * 700}, ["accuracy"], class_names=names)
    values = found.to_json()
    assert (
        values["largest_classes"][0] == (0, 301 / 700)
        and len(values["largest_classes"]) == 9
        and "share_of_classes" not in values
    )
    assert (
        "largest_classes"
        not in slices_of(*random_rows(60)[:2], {"kind": ["a"] * 60}, ["accuracy"], class_names=CLASSES)[0].to_json()
    )


def test_slices_of_very_many_classes_have_no_intervals_rather_than_minutes_of_them(monkeypatch) -> None:
    monkeypatch.setattr(slices, "bootstrap_intervals", None)
    labels = np.arange(60) % 50
    preds = np.random.default_rng(0).random((60, 50_000)).astype(np.float32)
    columns = {f"kind {index}": ["a"] * 60 for index in range(12)}
    found = slices_of(preds, labels, columns, ["accuracy"], class_names=[str(index) for index in range(50_000)])
    assert len(found) == 12 and all(each.intervals == {"accuracy": None} for each in found)
