"""Weights of a blend, the convex fits, and folds."""

import numpy as np
import pytest
import torch

from mmbert_core.evaluation import blending
from mmbert_core.evaluation.blending import BLEND_JSON, BlendRecord, LabelProbabilities, Member
from mmbert_core.evaluation.convex_fit import LinearModel, assign_folds, fit_cross_fitted, fit_validated
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import check_structure

RECORD = BlendRecord((Member("network", 0.4, 0.6), Member("words + columns", 0.6, 0.5, 3.0)), 1.5, 100, 0.48, True)


def rows(num_rows: int, *strengths: float, seed: int = 0) -> LabelProbabilities:
    """Label probabilities of members of which one, drawn for each row, decides its label; 0: a constant member."""
    rng = np.random.default_rng(seed)
    of_class_1 = 1 / (1 + np.exp(-rng.normal(size=(num_rows, len(strengths))) * strengths))
    useful = np.flatnonzero(strengths)
    labels = rng.random(num_rows) < of_class_1[np.arange(num_rows), rng.choice(useful, num_rows)]
    return LabelProbabilities(np.where(labels[:, None], of_class_1, 1 - of_class_1), np.ones(num_rows))


def test_weights_reach_the_lowest_log_loss():
    data = rows(4000, 3.0, 2.0, 3.0)
    weights = blending.mixture_weights(data)
    assert weights.sum() == pytest.approx(1) and (weights > 0.1).all()
    for other in np.random.default_rng(1).dirichlet(np.ones(3), 200):
        assert data.log_loss(weights) <= data.log_loss(other) + 1e-5


def test_a_member_that_brings_nothing_has_weight_0():
    data = rows(4000, 3.0, 0.0)
    assert blending.fit_weights(data, None).tolist() == [1, 0]
    assert blending.fit_weights(data, data.select(slice(None), [1])).tolist() == [1, 0]
    reversed_order = data.select(slice(None), [1, 0])
    assert blending.fit_weights(reversed_order, reversed_order.select(slice(None), [1])).tolist() == [0, 1]
    three = data.select(slice(None), [0, 1, 0])
    assert np.count_nonzero(blending.fit_weights(three, None)) == 1
    three, simple = rows(4000, 3.0, 2.0, 3.0), rows(4000, 3.0, 3.0, seed=1)
    weights = blending.fit_weights(three, simple)
    assert (weights > 0.1).all() and weights.sum() == pytest.approx(1)
    refitted = blending.refit_weights(three.select(slice(2000)), simple, weights)
    assert refitted == pytest.approx(weights, abs=0.1)


def test_few_validation_rows_give_a_moderate_weight():
    data = rows(6, 3.0, 0.1)
    assert 0.2 < blending.network_share(data, np.ones(1)) < 0.8
    assert blending.network_share(data.select(slice(0)), np.ones(1)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": [Member("network", 0.4, 0.6), Member("network", 0.6, 0.5)]}, "expected some of network"),
        ({"members": [Member("network", 0.4, 0.6), Member("columns", 0.5, 0.5)]}, "weights that sum to 1"),
        ({"members": [Member("columns", 0.4, 0.6), Member("network", 0.6, 0.5)]}, "in this order"),
    ],
)
def test_record_that_does_not_fit_is_refused(changes, message):
    inputs = {"has_text": True, "has_columns": True, "num_classes": 2}
    values = RECORD.to_json()
    check_structure(values, BLEND_JSON, "blend.json")
    assert BlendRecord.from_json(values, **inputs) == RECORD
    changed = {**values, "members": [vars(member) for member in changes["members"]]}
    with pytest.raises(InputError, match=message):
        BlendRecord.from_json(changed, **inputs)
    with pytest.raises(InputError, match="expected some of network, columns,"):
        BlendRecord.from_json(values, **inputs | {"num_classes": 51})


# ---- fits ----


def problem(num_rows: int, num_classes: int) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    features = np.where(rng.random((num_rows, 30)) < 0.3, rng.normal(size=(num_rows, 30)), 0).astype(np.float32)
    logits = features @ rng.normal(size=(30, num_classes)) + rng.gumbel(size=(num_rows, num_classes))
    return torch.from_numpy(features).to_sparse_csr(), logits.argmax(axis=1)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_cross_fitted_rows_are_predicted_by_models_without_them(num_classes):
    features, labels = problem(300, num_classes)
    folds, weights = assign_folds(labels, None, num_folds=5, generator=np.random.default_rng(0)), np.ones(300)
    fit = fit_cross_fitted(features, labels, folds, weights, num_classes)
    dense = features.to_dense()
    for fold in (0, 4):
        kept = torch.from_numpy(np.flatnonzero(folds != fold))
        alone = fit_validated(
            (dense[kept].to_sparse_csr(), labels[kept], weights[kept]), (features, labels, weights), num_classes
        )
        assert alone.model.c >= fit.model.c / 10
        held_out = np.flatnonzero(folds == fold)
        expected = _gradient_descent(dense[kept], labels[kept], num_classes, fit.model.c)
        probabilities = expected.probabilities(dense[held_out].to_sparse_csr())
        np.testing.assert_allclose(fit.probabilities[held_out], probabilities, atol=2e-3)
    expected = _gradient_descent(dense, labels, num_classes, fit.model.c)
    np.testing.assert_allclose(fit.model.probabilities(features), expected.probabilities(features), atol=2e-3)


def _gradient_descent(features: torch.Tensor, labels: np.ndarray, num_classes: int, c: float) -> LinearModel:
    """The same model by autograd on dense features."""
    scores = 1 if num_classes == 2 else num_classes
    weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((30, scores), (scores,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure():
        optimizer.zero_grad()
        logits = features @ weight + bias
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1) if scores == 1 else logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss = loss + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearModel(weight.detach(), bias.detach(), c)


def test_row_weights_count_rows_several_times():
    features, labels = problem(200, 2)
    weights = np.where(np.arange(200) < 50, 2.0, 1.0)
    repeated = np.concatenate([np.arange(200), np.arange(50)])
    dense = features.to_dense()
    twice = (dense[repeated].to_sparse_csr(), labels[repeated], np.ones(250))
    val = (features, labels, np.ones(200))
    weighted, expected = fit_validated((features, labels, weights), val, 2), fit_validated(twice, val, 2)
    assert weighted.model.c == expected.model.c
    np.testing.assert_allclose(weighted.probabilities, expected.probabilities, atol=0.02)  # the penalty counts rows


def test_folds_are_stratified_and_keep_groups():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 3, 500), generator.integers(0, 60, 500)
    for given in (None, groups):
        folds = assign_folds(labels, given, num_folds=5, generator=np.random.default_rng(1))
        counts = np.stack([np.bincount(labels[folds == fold], minlength=3) for fold in range(5)])
        assert np.ptp(counts, axis=0).max() <= (1 if given is None else 10)
    assert all(len(set(folds[groups == group])) == 1 for group in range(60))
    assert assign_folds(labels[:3], np.zeros(3), num_folds=5, generator=generator).tolist() == [0, 0, 0]
