"""Both halves, either half, neither; equal to the original's forward.   pytest tests/model/test_multimodal_bert.py"""

import pytest
import torch
from torch import nn

from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase
from mmbert_core.model.text_features import TextFeatures

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
NUMBERS = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
CATEGORIES = torch.tensor([[2], [0], [1], [3]])


@pytest.fixture
def halves(make_encoder):
    text = TextBertBase(make_encoder("Bert"), pooling="pooler", hidden_common_dim=6)
    tab = TabAE(2, [4], hidden_common_dim=6, means=[0.0, 1.0], stds=[1.0, 2.0])
    return text.eval(), tab.eval()


def test_logits_are_the_originals_forward(halves):
    text, tab = halves
    model = MultimodalBert(text, tab, 3)
    merged = torch.cat([text(IDS, MASK), tab(NUMBERS, CATEGORIES)], 1)
    assert torch.equal(model(IDS, MASK, NUMBERS, CATEGORIES), model.final_merge_network(merged))
    network = model.final_merge_network
    assert [name for name, _ in network.named_children()] == ["relu_layer_final", "linear_layer_final"]
    assert (network.linear_layer_final.in_features, network.linear_layer_final.out_features) == (12, 3)
    assert isinstance(MultimodalBert.build_merge_subnetwork(4, 2), nn.Sequential)


def test_text_only_and_columns_only(halves):
    text, tab = halves
    assert MultimodalBert(text, None, 2)(IDS, MASK, torch.zeros(4, 0)).shape == (4, 2)
    assert MultimodalBert(text, None, 2)(IDS, MASK).shape == (4, 2)
    empty = torch.zeros(4, 0, dtype=torch.long)
    assert MultimodalBert(None, tab, 2)(empty, empty, NUMBERS, CATEGORIES).shape == (4, 2)
    assert MultimodalBert(None, tab, 2)(None, None, NUMBERS, CATEGORIES).shape == (4, 2)
    with pytest.raises(ValueError, match="found neither"):
        MultimodalBert(None, None, 2)


def test_rows_do_not_depend_on_each_other(halves):
    model = MultimodalBert(*halves, 3)
    torch.testing.assert_close(
        model(IDS, MASK, NUMBERS, CATEGORIES)[2:3], model(IDS[2:3], MASK[2:3], NUMBERS[2:3], CATEGORIES[2:3])
    )


def test_state_dict_round_trip_into_a_new_model(halves, make_encoder):
    model = MultimodalBert(*halves, 3)
    tab = TabAE(2, [4], hidden_common_dim=6, means=[0.0, 0.0], stds=[1.0, 1.0])
    other = MultimodalBert(TextBertBase(make_encoder("Bert"), pooling="pooler", hidden_common_dim=6), tab, 3).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS, MASK, NUMBERS, CATEGORIES), other(IDS, MASK, NUMBERS, CATEGORIES))


def test_outliers_stay_finite_under_half_precision(halves):
    model = MultimodalBert(*halves, 3)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(IDS, MASK, torch.full((4, 2), 3.4e38), CATEGORIES)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    plain = model(IDS, MASK, NUMBERS, CATEGORIES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS, MASK, NUMBERS, CATEGORIES), plain, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_logits_from_pooled_vectors_and_from_reordered_texts(make_encoder, halves, pooling):
    model = MultimodalBert(TextBertBase(make_encoder("Bert"), pooling=pooling, hidden_common_dim=6), halves[1], 3)
    model.eval()
    chunks = torch.stack([IDS, IDS.flip(1)], dim=1)  # [B, C, T]
    mask = torch.ones_like(chunks)
    mask[1, 1] = 0  # the second row has one chunk
    logits = model(chunks, mask, NUMBERS, CATEGORIES)
    pooled = model.text_subnetwork.pool_rows(chunks, mask)
    assert pooled.shape == (4, 32)
    assert torch.equal(model.logits_from_pooled(pooled, NUMBERS, CATEGORIES), logits)
    text, order = model.encode_text(chunks, mask), torch.tensor([2, 0, 3, 1])
    both = TextFeatures.cat([text, text]).select(torch.cat([order, order + 4]))
    merged = model.merge(both, NUMBERS[order].repeat(2, 1), CATEGORIES[order].repeat(2, 1))
    torch.testing.assert_close(merged, logits[order].repeat(2, 1))
