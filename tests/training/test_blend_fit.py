"""The fit of a blend on generated tables with the predictions of an invented network; no training."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.evaluation.convex_fit import log_loss
from mmbert_core.inference.column_modules import build_blend
from mmbert_core.training import blend_fit
from tests.support import tiny

ROWS = {"train": 1500, "val": 1500}


def write(path: Path, num_rows: int, deciding: str, *, seed: int) -> None:
    """A table whose label depends on a word, on a number or on both, with noise; 5 rows of each customer."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row_id", "text", "age", "amount", "kind", "customer", "label"])
        for row in range(num_rows):
            words, age = rng.choice(tiny.WORDS, size=8), int(rng.integers(0, 100))
            score = 3 * ("refund" in words) - 1 if deciding != "columns" else 0.0
            score += 0.0 if deciding == "text" else 3 * (30 < age < 60) - 1
            label = int(rng.random() < 1 / (1 + np.exp(-score)))
            customer = f"{seed} {row // 5}"
            writer.writerow([row, " ".join(words), age, 1.5, rng.choice(["a", "b"]), customer, label])


def settings(folder: Path, deciding: str = "both", **changes) -> Config:
    for seed, (name, num_rows) in enumerate(ROWS.items()):
        write(folder / f"{name}.csv", num_rows, deciding, seed=seed)
    tiny.write_encoder(folder / "encoder")
    return Config(**tiny.settings(folder, blend="auto", test_path=(), **changes))


def network_of(data: Data, strength: float) -> np.ndarray:
    """Predictions [V] that are right to a degree."""
    rng = np.random.default_rng(0)
    logits = strength * (2 * data.val.label_index - 1) + rng.normal(size=len(data.val))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


@pytest.mark.parametrize("deciding", ["columns", "text", "both"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_blend_is_as_good_as_its_best_member(tmp_path, deciding, strength):
    config = settings(tmp_path, deciding)
    data = prepare(config)
    fitted = blend_fit.fit_blend(data, config, network_of(data, strength), np.ones(2))
    record = fitted.record
    best = min(member.val_log_loss for member in record.members)
    in_sample = _val_log_loss(fitted, config, data, strength)
    assert in_sample <= best + (1e-3 if strength else 2e-3)  # rows of chance give a weight of 0.02
    assert record.val_log_loss <= best + 2e-3
    if strength == 0:
        assert record.weight("network") < 0.2
        name = "columns" if deciding == "columns" else "words + columns"
        assert record.weight(name) + (record.weight("words") if deciding == "text" else 0) > 0.4
    for name in ("words", "words + columns", "columns"):
        stored = f"linear.{name.replace(' + ', '_and_')}.bias" in fitted.tensors
        assert stored == (record.weight(name) > 0)


def _val_log_loss(fitted: blend_fit.FittedBlend, config: Config, data: Data, strength: float) -> float:
    """Of the blend as a model has it, computed from padded batches."""
    blend = build_blend(config, data.features, fitted.record)
    blend.load_state_dict(fitted.tensors)
    batch = data.val.batch(np.arange(len(data.val)))
    of_class_1 = torch.from_numpy(network_of(data, strength))
    logits = torch.stack([torch.zeros_like(of_class_1), torch.logit(of_class_1)], dim=1)
    words = blend.words(batch.input_ids, batch.attention_mask) if blend.words is not None else None
    log_probabilities = blend(logits, words, batch.numbers, batch.categories).double().numpy()
    return log_loss(np.exp(log_probabilities), data.val.label_index, np.ones(len(data.val)))


def test_modules_of_the_members_are_the_fitted_models(tmp_path):
    config = settings(tmp_path, max_chunks=2, max_length=8)
    data = prepare(config)
    simple = blend_fit.SimpleMembers(data, config, ["words", "words + columns", "columns"], np.ones(2))
    record = blend_fit.fit_blend(data, config, network_of(data, 0.5), np.ones(2)).record
    members = [replace(member, weight=1 / 4) for member in record.members]
    blend = build_blend(config, data.features, replace(record, members=tuple(members)))
    blend.load_state_dict(simple.tensors(blend))
    for size in (1, 7, 1500):
        batch = data.val.batch(np.arange(size))
        words = blend.words(batch.input_ids, batch.attention_mask)
        found = blend.member_log_probabilities(torch.zeros(size, 2), words, batch.numbers, batch.categories)
        for log_probabilities, expected in zip(found[1:], simple.val, strict=True):
            np.testing.assert_allclose(log_probabilities.exp().numpy(), expected[:size], atol=1e-6)


def test_rows_of_a_group_are_in_one_fold(tmp_path, monkeypatch):
    config = settings(tmp_path, group_name="customer")
    data, seen = prepare(config), []
    fit = blend_fit.fit_cross_fitted

    def noting(features, labels, folds, *rest):
        seen.append(folds)
        return fit(features, labels, folds, *rest)

    monkeypatch.setattr(blend_fit, "fit_cross_fitted", noting)
    blend_fit.fit_blend(data, config, network_of(data, 0.5), np.ones(2))
    assert seen and all(len(set(folds[start : start + 5])) == 1 for folds in seen for start in range(0, 1500, 5))
    assert set(seen[0]) == set(range(5))


def test_many_training_rows_leave_all_weights_to_the_validation_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(blend_fit, "MAX_CROSS_FITTED_ROWS", 100)
    config = settings(tmp_path)
    data = prepare(config)
    fitted = blend_fit.fit_blend(data, config, network_of(data, 0.7), np.ones(2))
    assert not fitted.record.is_cross_fitted
    best = min(member.val_log_loss for member in fitted.record.members)
    assert _val_log_loss(fitted, config, data, 0.7) <= best + 1e-3


def test_a_perfect_network_stays_alone(tmp_path):
    config = settings(tmp_path)
    data = prepare(config)
    assert blend_fit.fit_blend(data, config, network_of(data, 9.0), np.ones(2)) is None


def test_class_weights_count_in_all_members(tmp_path):
    config = settings(tmp_path)
    data = prepare(config)
    means = []
    for weights in (np.ones(2), np.array([1.0, 4.0])):
        means.append(blend_fit.SimpleMembers(data, config, ["columns"], weights).val[0][:, 1].mean())
    assert means[1] > means[0] + 0.15
