"""Packed texts give what padded ones give, in every family that is switched on; gradients too."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from mmbert_core.model import packed_attention, packing
from mmbert_core.model.text_encoder import TextBertBase

LENGTHS = [5, 5, 5, 60, 33, 7, 1]  # neighbours of the same length form a group
SIZES = dict(vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "camembert": CamembertConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=24),
    "distilbert": DistilBertConfig(vocab_size=100, dim=64, n_layers=3, n_heads=4, hidden_dim=96),
    # a window of 16 tokens, shorter than the longest text; every third layer sees all
    "modernbert": ModernBertConfig(
        **SIZES, local_attention=16, pad_token_id=1, eos_token_id=2, bos_token_id=3, cls_token_id=4, sep_token_id=5
    ),
}


def build_text_encoder(family: str, pooling: str, *, packed: bool) -> TextBertBase:
    torch.manual_seed(0)
    encoder = AutoModel.from_config(copy.deepcopy(CONFIGS[family])).eval()
    for module in encoder.modules():
        if isinstance(module, nn.Linear):  # their initial weights are so small that attention hardly matters
            module.weight.data.normal_(0, 0.2)
    text_encoder = TextBertBase(encoder, pooling=pooling, hidden_common_dim=8).eval()
    if not packed:
        text_encoder.is_packed = False
        encoder.set_attn_implementation("eager")
    return text_encoder


def padded_batch(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(6, 100, mask.shape, generator=torch.Generator().manual_seed(1))
    pad = CONFIGS[family].pad_token_id or 0
    ids[3, 5] = pad  # a user may write "<pad>": RoBERTa and its relatives give it the padding's position
    return ids * mask + pad * (1 - mask), mask


def poolings(family: str) -> list[str]:
    return ["cls", "mean", "last", *(["pooler"] if family in ("bert", "roberta", "xlm-roberta", "camembert") else [])]


def test_every_family_is_tried() -> None:
    assert set(CONFIGS) == set(packing.FAMILIES)


@pytest.mark.parametrize(
    ("family", "pooling"), [(family, pooling) for family in CONFIGS for pooling in poolings(family)]
)
def test_packed_is_padded(family: str, pooling: str) -> None:
    packed, padded = (build_text_encoder(family, pooling, packed=packed) for packed in (True, False))
    ids, mask = padded_batch(family)
    torch.testing.assert_close(packed(ids, mask), padded(ids, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_in_bf16_packing_is_as_near_to_fp32_as_padding(family: str, pooling: str) -> None:
    ids, mask = padded_batch(family)
    exact = build_text_encoder(family, pooling, packed=False)(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        near, padded = (
            build_text_encoder(family, pooling, packed=packed)(ids, mask).float() for packed in (True, False)
        )
    assert (near - exact).norm() <= 1.5 * (padded - exact).norm()


@pytest.mark.parametrize("family", list(CONFIGS))
def test_gradients_are_the_padded_ones(family: str) -> None:
    packed, padded = (build_text_encoder(family, "cls", packed=packed) for packed in (True, False))
    ids, mask = padded_batch(family)
    for text_encoder in (packed, padded):
        text_encoder(ids, mask).square().sum().backward()
    whole = torch.stack(
        [parameter.grad.norm() for parameter in padded.parameters() if parameter.grad is not None]
    ).norm()
    for (name, one), other in zip(packed.named_parameters(), padded.parameters(), strict=True):
        if other.grad is not None:  # the exact gradient of a key's bias is zero
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-6 * whole, name


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_last_layer_computes_first_tokens_alone_where_nothing_else_is_read(family: str) -> None:
    sizes = []
    for pooling in ("cls", "mean"):
        text_encoder = build_text_encoder(family, pooling, packed=True)
        text_encoder.encoder.register_forward_hook(
            lambda _, __, outputs: sizes.append(outputs.last_hidden_state.shape[1])
        )
        text_encoder(*padded_batch(family))
    assert sizes == [len(LENGTHS) if family in packed_attention.BERT_LAYERS else sum(LENGTHS), sum(LENGTHS)]


def test_several_chunks_of_a_row() -> None:
    packed, padded = (build_text_encoder("bert", "mean", packed=packed) for packed in (True, False))
    ids, mask = padded_batch("bert")
    ids, mask = (
        torch.cat([tensor, tensor[:1] * 0]).view(4, 2, -1) for tensor in (ids, mask)
    )  # the last row has one chunk
    torch.testing.assert_close(packed(ids, mask), padded(ids, mask), atol=1e-5, rtol=1e-5)


def test_a_plain_padded_call_of_the_encoder_still_uses_its_mask() -> None:
    ids, mask = padded_batch("bert")
    encoder = build_text_encoder("bert", "cls", packed=True).encoder
    expected = (
        build_text_encoder("bert", "cls", packed=False).encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    )
    torch.testing.assert_close(
        encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()],
        expected[mask.bool()],
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_text_without_a_token_has_a_vector() -> None:
    text_encoder = build_text_encoder("bert", "cls", packed=True)
    ids, mask = padded_batch("bert")
    others = text_encoder(ids, mask)
    mask[2] = 0
    vectors = text_encoder(ids, mask)
    assert torch.isfinite(vectors).all()
    keep = torch.arange(len(ids)) != 2
    torch.testing.assert_close(vectors[keep], others[keep])


def test_other_families_are_padded() -> None:
    config = DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=64, position_buckets=16
    )
    text_encoder = TextBertBase(AutoModel.from_config(config).eval(), pooling="cls", hidden_common_dim=8).eval()
    assert not text_encoder.is_packed
    ids, mask = padded_batch("bert")
    alone = torch.cat(
        [text_encoder(ids[[row]][:, :length], mask[[row]][:, :length]) for row, length in enumerate(LENGTHS)]
    )
    torch.testing.assert_close(text_encoder(ids, mask), alone, atol=1e-5, rtol=1e-4)


def test_a_decoder_is_padded() -> None:
    """Packed attention has no causal mask."""
    text_encoder = TextBertBase(
        AutoModel.from_config(BertConfig(**SIZES, is_decoder=True)), pooling="cls", hidden_common_dim=8
    )
    assert not text_encoder.is_packed and text_encoder.encoder.config._attn_implementation != packed_attention.ATTENTION


def test_the_attention_is_not_written_into_the_encoders_config() -> None:
    encoder = build_text_encoder("bert", "cls", packed=True).encoder
    assert packed_attention.ATTENTION not in encoder.config.to_json_string(use_diff=False)


# ---- attention with dropout ----

PACKING = packing.Packing((5, 5, 7, 9), torch.device("cpu"))
SCALING, RATE = 0.3, 0.2


def states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(26, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [None, 4])
def test_the_derived_gradients_are_right(window: int | None) -> None:
    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same masks in every call
        return packed_attention.AttentionWithDropout.apply(*tensors, PACKING, SCALING, RATE, window)

    assert torch.autograd.gradcheck(attend, states())


def test_dropout_averages_out_to_attention_without_it() -> None:
    query, key, value = states()
    with torch.no_grad():
        exact = packed_attention.attend_by_group(query, key, value, PACKING, SCALING, None)
        torch.manual_seed(0)
        draws = torch.stack(
            [
                packed_attention.AttentionWithDropout.apply(query, key, value, PACKING, SCALING, RATE, None)
                for _ in range(4000)
            ]
        )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()
    assert not torch.allclose(draws[0], draws[1])


def test_first_tokens_drop_weights_as_often_as_asked() -> None:
    query, key, value = states()
    first, ones = query[PACKING.offsets[:-1].long()], torch.ones_like(value)
    torch.manual_seed(0)
    sums = torch.stack(
        [packed_attention.attend_first_tokens(first, key, ones, PACKING, SCALING, 0.25) for _ in range(400)]
    )
    exact = packed_attention.attend_first_tokens(first, key, ones, PACKING, SCALING, 0.0)
    torch.testing.assert_close(exact, torch.ones_like(exact))
    assert sums.std() > 0.05 and (sums.mean((0, 2, 3)) - 1).abs().max() < 0.05


def test_training_draws_dropout_and_repeats_it_with_the_seed() -> None:
    text_encoder = build_text_encoder("bert", "cls", packed=True).train()
    ids, mask = padded_batch("bert")
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(text_encoder(ids, mask))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("window", [None, 4])
def test_padded_attention_of_the_gpu_is_that_by_group(window: int | None) -> None:
    query, key, value = states()
    by_group = packed_attention.attend_by_group(query, key, value, PACKING, SCALING, window)
    torch.testing.assert_close(
        packed_attention.attend_padded(query, key, value, PACKING, SCALING, 0.0, window), by_group
    )


def test_a_copy_of_the_model_gives_the_same_vectors() -> None:
    text_encoder = build_text_encoder("bert", "cls", packed=True)
    ids, mask = padded_batch("bert")
    assert torch.equal(copy.deepcopy(text_encoder)(ids, mask), text_encoder(ids, mask))
