"""8-bit linear layers: close to the full ones, and no row depends on its neighbours."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from mmbert_core.config import Config
from mmbert_core.model.int8 import Int8Linear
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import read_context
from tests.support import tiny


@pytest.mark.parametrize("bias", [True, False])
def test_close_to_the_full_layer_whatever_the_size_of_weights_and_inputs(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(384, 200, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-3, 3, 200)[:, None]  # a scale for each output
    inputs = torch.randn(3, 17, 384) * torch.logspace(-4, 4, 17)[:, None]  # and for each token
    wanted, found = linear(inputs), Int8Linear(linear)(inputs)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    deviation = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert 0 < deviation.max() < (0.02 if torch.cpu._is_vnni_supported() else 0.04)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    layer, inputs = Int8Linear(nn.Linear(64, 48)), torch.randn(40, 64)
    inputs[20:] *= 1000
    together = layer(inputs)
    assert all(torch.equal(layer(inputs[row : row + 1])[0], together[row]) for row in range(40))


def test_an_empty_token_gives_the_bias() -> None:
    linear = nn.Linear(8, 4)
    assert torch.equal(Int8Linear(linear)(torch.zeros(2, 8)), linear.bias.detach().expand(2, 4))


def test_predictions_in_int8_are_near_those_in_fp32(tmp_path: Path) -> None:
    config = Config(**tiny.settings(tmp_path, max_epochs=1))
    tiny.train(config)
    rows = pd.read_csv(config.train_path[0], dtype=str, keep_default_na=False).to_dict("records")
    full = Predictor.from_folder(config.model_path).predict(rows)
    small = Predictor.from_folder(config.model_path, precision="int8").predict(rows)
    differences = [abs(one["prob"] - other["prob"]) for one, other in zip(full, small, strict=True)]
    assert 0 < max(differences) < 0.05


def test_refused_on_a_gpu(tmp_path: Path) -> None:
    config = Config(**tiny.settings(tmp_path, max_epochs=1))
    tiny.train(config)
    with pytest.raises(InputError, match="precision int8: expected to predict on the CPU, found a GPU"):
        Predictor.from_folder(
            config.model_path, replace(read_context(), device=torch.device("cuda", 0)), precision="int8"
        )


def test_an_explanation_goes_through_the_full_weights(tmp_path: Path) -> None:
    config = Config(**tiny.settings(tmp_path, max_epochs=1))
    tiny.train(config)
    row = pd.read_csv(config.train_path[0], dtype=str, keep_default_na=False).to_dict("records")[0]
    full, small = (
        Predictor.from_folder(config.model_path, precision=precision).explain(row)["tokens"]
        for precision in (None, "int8")
    )
    assert [piece for piece, _ in small] == [piece for piece, _ in full] and any(weight for _, weight in small)
    assert max(abs(one - other) for (_, one), (_, other) in zip(full, small, strict=True)) < 0.2
