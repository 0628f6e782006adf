"""Dropout from 16-bit draws: the right share, the right mean, every element for itself."""

import numpy as np
import pytest
import torch
from torch import nn

from mmbert_core.model import dropout
from mmbert_core.model.dropout import Dropout, draw_keep_mask, replace_dropouts, rounded_rate

COUNT = 4_000_003  # no multiple of four


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_share_that_is_dropped(rate: float) -> None:
    torch.manual_seed(0)
    kept = draw_keep_mask((COUNT,), rate)
    assert kept.dtype == torch.int8 and kept.shape == (COUNT,)
    share = 1 - kept.double().mean().item()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / COUNT) ** 0.5 + 1 / dropout.LEVELS


def test_each_of_the_four_draws_of_an_integer_has_the_right_share() -> None:
    """A sign bit that is always zero, as `random_()` without bounds leaves it, would show in every fourth element."""
    torch.manual_seed(0)
    kept = draw_keep_mask((4_000_000,), 0.1).view(-1, 4).double().mean(0)
    assert (kept - 0.9).abs().max() < 5 * (0.09 / 1_000_000) ** 0.5


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = draw_keep_mask((4_000_000,), 0.5).double().numpy() - 0.5
    for distance in (1, 2, 3, 4, 8, 384):
        assert abs(np.mean(kept[:-distance] * kept[distance:])) < 5 * 0.25 / len(kept) ** 0.5


def test_survivors_are_scaled_by_the_rounded_rate() -> None:
    dropped, scale = rounded_rate(0.1)
    assert dropped == 6554 and scale == 65536 / (65536 - 6554)
    torch.manual_seed(0)
    layer = Dropout(0.1)
    values = torch.full((COUNT,), 2.0, requires_grad=True)
    output = layer(values)
    assert set(output.unique().tolist()) == {0.0, torch.tensor(2 * scale).item()}
    output.sum().backward()
    assert torch.equal(values.grad, output.detach() / 2)  # the same mask


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_none_and_all(rate: float, expected: float) -> None:
    assert torch.equal(Dropout(rate)(torch.ones(10)), torch.full((10,), expected))


def test_evaluation_drops_nothing() -> None:
    values = torch.randn(10)
    assert Dropout(0.5).eval()(values) is values


def test_the_seed_repeats_it() -> None:
    layer, values = Dropout(0.5), torch.ones(100)
    torch.manual_seed(1)
    first = layer(values)
    torch.manual_seed(1)
    assert torch.equal(layer(values), first) and not torch.equal(layer(values), first)


def test_replacing_keeps_rates_modes_and_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.4))).eval()
    names = list(module.state_dict())
    replace_dropouts(module)
    assert [(type(layer), layer.p, layer.training) for layer in (module[1], module[2][0])] == [
        (Dropout, 0.3, False),
        (Dropout, 0.4, False),
    ]
    assert list(module.state_dict()) == names
