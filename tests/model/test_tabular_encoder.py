"""Columns to a vector: standardised, embedded, finite.   pytest tests/model/test_tabular_encoder.py"""

from types import SimpleNamespace

import pytest
import torch

from mmbert_core.model.tabular_encoder import TabAE, embedding_dim


def tab(num_numbers=2, cardinalities=(5, 3), **options):
    torch.manual_seed(0)
    options = {"hidden_common_dim": 7, "means": [10.0, -3.0][:num_numbers], "stds": [2.0, 0.5][:num_numbers]} | options
    return TabAE(num_numbers, cardinalities, **options)


def test_reads_standardised_numbers_and_embeddings():
    model = tab()
    numbers = torch.tensor([[12.0, -3.0], [10.0, -2.5]])
    categories = torch.tensor([[2, 2], [4, 0]])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    inputs = torch.cat([z, model.embeddings[0](categories[:, 0]), model.embeddings[1](categories[:, 1])], dim=1)
    torch.testing.assert_close(model(numbers, categories), torch.relu(model.linear(inputs)))
    assert model.output_tab_dim == 7
    assert model.linear.in_features == 2 + embedding_dim(5) + embedding_dim(3)


def test_a_row_does_not_depend_on_its_neighbours_in_train_mode():
    model = tab().train()
    numbers, categories = torch.randn(6, 2), torch.randint(0, 3, (6, 2))
    torch.testing.assert_close(model(numbers, categories)[:1], model(numbers[:1], categories[:1]))


def test_statistics_are_saved_buffers_not_parameters():
    model = tab()
    assert {"mean", "std"} <= set(model.state_dict()) and model.mean.dtype == model.std.dtype == torch.float32
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}
    other = tab(means=[0.0, 0.0], stds=[1.0, 1.0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.mean, torch.tensor([10.0, -3.0]))


def test_unseen_category_is_a_zero_vector_without_gradient():
    model = tab(num_numbers=0, cardinalities=[6])
    unseen, missing = torch.tensor([[1]]), torch.tensor([[0]])
    assert not model.embeddings[0](unseen).any() and not model.embeddings[0](missing).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for index in (unseen, missing):
        model.linear.bias.data.fill_(1.0)  # ReLU open
        model(torch.zeros(1, 0), index).sum().backward()
    gradient = model.embeddings[0].weight.grad
    assert not gradient[1].any() and gradient[0].any()
    optimizer.step()
    assert not model.embeddings[0].weight[1].any() and model.embeddings[0].weight[0].any()


@pytest.mark.parametrize("stds", [[1e-30, 1e30], [0.0, 1e-60], [3.4e38, 1.0]])
def test_finite_outputs_and_gradients_for_any_float32(stds):
    model = tab(cardinalities=(), means=[-3.4e38, 3.4e38], stds=stds)
    numbers = torch.tensor([[3.4e38, -3.4e38], [-3.4e38, 3.4e38], [0.0, 1e-45]])
    output = model(numbers)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_parts_may_be_absent():
    assert tab(cardinalities=())(torch.randn(3, 2)).shape == (3, 7)
    assert tab(num_numbers=0)(torch.zeros(3, 0), torch.zeros(3, 2, dtype=torch.long)).shape == (3, 7)


def test_our_own_mistakes_are_value_errors():
    with pytest.raises(ValueError, match="at least one"):
        tab(num_numbers=0, cardinalities=())
    with pytest.raises(ValueError, match="2 means and stds, found 1 and 2"):
        tab(means=[1.0])
    with pytest.raises(ValueError, match="cardinalities of 2"):
        tab(cardinalities=[1])
    with pytest.raises(ValueError, match="2 categorical columns, found none"):
        tab()(torch.randn(3, 2))
    with pytest.raises(ValueError, match="2 categorical columns, found 1"):
        tab()(torch.randn(3, 2), torch.zeros(3, 1, dtype=torch.long))


def test_combine_tab_data_is_float32():
    numbers = TabAE.combine_tab_data(SimpleNamespace(numbers=torch.ones(2, 3, dtype=torch.float64)))
    assert numbers.dtype == torch.float32 and numbers.shape == (2, 3)


def test_embedding_dim_rule():
    assert [embedding_dim(n) for n in (2, 3, 10, 100, 10**6)] == [2, 3, 6, 21, 50]


def test_a_shared_row_of_rare_and_unseen_categories_is_learned_from_zero():
    model = tab(num_numbers=0, cardinalities=[6], learns_unseen=True)
    embedding = model.embeddings[0]
    assert not embedding.weight[:2].any()
    model.linear.bias.data.fill_(1.0)  # ReLU open
    model(torch.zeros(1, 0), torch.tensor([[1]])).sum().backward()
    assert embedding.weight.grad[1].any() and not embedding.weight.grad[2:].any()
