"""Columns as linear features, in a model and as a matrix: the same.   pytest tests/model/test_column_features.py"""

import numpy as np
import pytest
import torch

from mmbert_core.model.column_features import LinearColumnFeatures, NumberFeatures
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.wide_columns import WideColumns

MAX = float(np.finfo(np.float32).max)


def three_columns() -> NumberFeatures:
    """One with edges and an indicator, one without either, one constant."""
    return NumberFeatures(
        centers=[10.0, -3.0, 5.0],
        scales=[0.5, 2.0, 0.0],
        has_indicator=[True, False, False],
        edges=[[0.0, 10.0, 14.0], [], []],
    )


def test_of_each_column_the_scaled_number_its_bins_and_its_indicator():
    features = three_columns()
    numbers = torch.tensor(
        [[12, -3, 5, 0], [10, 7, 5, 1], [-1, -3, 5, 0], [5, -3, 5, 0], [99, -3, 5, 0]], dtype=torch.float64
    )
    found = features(numbers)
    assert features.num_features == found.shape[1] == 6 and found.dtype == torch.float32
    assert features.widths == [4, 1, 1]

    def clipped(x: float) -> float:
        return x / (1 + (x / 3) ** 2) ** 0.5

    expected = [
        [clipped(1), 1, 0.5, 0, 0, 0],
        [0, 0, 0, 1, clipped(20), 0],  # missing: no bin, although the median 10 was imputed
        [clipped(-5.5), 0, 0, 0, 0, 0],
        [clipped(-2.5), 0.5, 0, 0, 0, 0],
        [clipped(44.5), 1, 1, 0, 0, 0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found.abs().max() < 3.0001
    assert {"center", "scale", "bin_start", "bin_width"} == set(features.state_dict())


def test_product_and_design_matrix_agree():
    linear = LinearColumnFeatures(three_columns(), [4, 3])
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(5, 9, (50, 3)), rng.integers(0, 2, (50, 1))], axis=1).astype(np.float32)
    categories = np.stack([rng.integers(0, 4, 50), rng.integers(0, 3, 50)], axis=1)
    weight = torch.randn(linear.num_features, 3, requires_grad=True)
    logits = linear(torch.from_numpy(numbers), torch.from_numpy(categories), weight)
    matrix = linear.design_matrix(numbers, categories)
    assert matrix.layout == torch.sparse_csr and matrix.shape == (50, 13) and matrix.dtype == torch.float32
    torch.testing.assert_close(matrix @ weight.detach(), logits.detach())
    logits.sum().backward()
    assert weight.grad.isfinite().all()
    assert linear.design_matrix(numbers[:0], categories[:0]).shape == (0, 13)


@pytest.mark.parametrize("has_numbers", [True, False])
def test_numbers_or_categories_may_be_absent(has_numbers):
    numbers = three_columns() if has_numbers else NumberFeatures(centers=[], scales=[], has_indicator=[])
    linear = LinearColumnFeatures(numbers, [] if has_numbers else [5])
    raw = np.ones((2, 4 if has_numbers else 0), dtype=np.float32)
    categories = np.zeros((2, 0 if has_numbers else 1), dtype=np.int64)
    weight = torch.randn(linear.num_features, 2)
    logits = linear(torch.from_numpy(raw), torch.from_numpy(categories), weight)
    torch.testing.assert_close(linear.design_matrix(raw, categories) @ weight, logits)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e38])
def test_finite_for_any_float32(scale):
    features = NumberFeatures(
        centers=[-MAX], scales=[scale], has_indicator=[False], edges=[[-MAX / 2, -1e-38, 0.0, MAX / 2]]
    )
    assert features(torch.tensor([[MAX], [-MAX], [0.0], [1e-45]])).isfinite().all()


def test_our_own_mistakes_are_value_errors():
    with pytest.raises(ValueError, match="ascending edges that differ in float32"):
        NumberFeatures(centers=[0.0], scales=[1.0], has_indicator=[False], edges=[[1.0, 1.0]])
    with pytest.raises(ValueError, match="expected 1 of each"):
        NumberFeatures(centers=[0.0], scales=[1.0], has_indicator=[False], edges=[[], []])


def test_the_tabular_encoder_reads_them_with_small_embeddings():
    numbers = three_columns()
    torch.manual_seed(0)
    model = TabAE(4, [300], hidden_common_dim=7, means=[0.0] * 4, stds=[1.0] * 4, number_features=numbers)
    embedding = model.embeddings[0]
    assert model.linear.in_features == 6 + embedding.embedding_dim and embedding.embedding_dim <= 16
    assert 0.02 < embedding.weight[2:].std().item() < 0.03 and not embedding.weight[:2].any()
    raw, categories = torch.tensor([[12.0, -3, 5, 0]]), torch.tensor([[7]])
    inputs = torch.cat([numbers(raw), embedding(categories[:, 0])], dim=1)
    torch.testing.assert_close(model(raw, categories), torch.relu(model.linear(inputs)))


def test_the_wide_path_starts_at_zero_and_adds_nothing_for_an_unseen_category():
    wide = WideColumns(LinearColumnFeatures(three_columns(), [4]), 2)
    raw, categories = torch.tensor([[12.0, -3, 5, 0]] * 2), torch.tensor([[1], [3]])
    assert not wide(raw, categories).any()
    wide(raw[:1], categories[1:]).square().sum().backward()  # no gradient at 0
    (wide(raw[:1], categories[1:]) * torch.tensor([1.0, -1.0])).sum().backward()
    assert not wide.weight.grad[7].any() and wide.weight.grad[9].tolist() == [1, -1]  # rows of the indices 1 and 3
    assert [name for name, _ in wide.named_parameters()] == ["weight"]
