"""Pooling, chunks and re-initialisation over seven families.   pytest tests/model/test_text_encoder.py"""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from mmbert_core.model.pretrained import load_pretrained_encoder
from mmbert_core.model.text_encoder import TextBertBase, reinitialise, resolve_pooling
from mmbert_core.runtime.errors import InputError

WITH_POOLER = ["Bert", "Roberta", "Albert", "MPNet", "Longformer"]
WITHOUT_POOLER = ["Electra", "DistilBert", "ModernBert", "DebertaV2"]
LAYERED = ["Bert", "Roberta", "Electra", "DistilBert", "ModernBert", "DebertaV2", "MPNet"]


def tokens(*lengths: int, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [len(lengths), width] of rows with so many real tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, 60, mask.shape, generator=generator) * mask, mask


def text_model(encoder, pooling="cls", **options):
    torch.manual_seed(1)
    return TextBertBase(encoder, pooling=pooling, hidden_common_dim=5, **options).eval()


# ---- pooling ----


def test_resolve_pooling(make_encoder, caplog):
    bert, electra = make_encoder("Bert"), make_encoder("Electra")
    with caplog.at_level(logging.INFO):
        assert resolve_pooling("auto", bert, True) == "pooler"
        assert resolve_pooling("auto", bert, False) == "cls"
        assert resolve_pooling("auto", electra, False) == "cls"
        assert resolve_pooling("auto", bert, True, "mean") == "mean"  # a sentence encoder's own way
    assert len(caplog.records) == 4
    assert resolve_pooling("pooler", bert, True, "mean") == "pooler"
    for asked in ("pooler", "cls", "mean", "last"):
        assert resolve_pooling(asked, bert, True) == asked
    caplog.clear()
    assert resolve_pooling("pooler", bert, False) == "pooler"
    assert "random" in caplog.text
    with pytest.raises(InputError, match="ElectraModel without"):
        resolve_pooling("pooler", electra, False)
    with pytest.raises(InputError, match="pooling: expected one of .* found 'max'"):
        resolve_pooling("max", bert, True)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "last"])
@pytest.mark.parametrize("family", WITH_POOLER + WITHOUT_POOLER)
def test_every_parameter_gets_a_gradient_and_padding_changes_nothing(make_encoder, family, pooling):
    if pooling == "pooler" and family in WITHOUT_POOLER:
        with pytest.raises(ValueError, match="no pooler"):
            text_model(make_encoder(family), pooling)
        return
    model = text_model(make_encoder(family), pooling)
    ids, mask = tokens(12, 7, 3)
    vectors = model(ids, mask)
    assert vectors.shape == (3, model.output_text_dim) == (3, 5)
    torch.testing.assert_close(vectors[1:2], model(ids[1:2, :7], mask[1:2, :7]), atol=1e-5, rtol=1e-5)
    vectors.sum().backward()
    # DDP without find_unused_parameters stops at the second step otherwise.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_auto_is_the_last_token_of_an_encoder_that_reads_forward_only(caplog):
    encoder = GPT2Model(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    with caplog.at_level(logging.INFO):
        assert resolve_pooling("auto", encoder, False) == "last"
    assert "pooling: last (GPT2Model reads forward only" in caplog.text
    assert resolve_pooling("auto", encoder, False, "mean") == "mean"


@pytest.mark.parametrize("family", ["Bert", "Albert", "Longformer", "ModernBert"])
def test_last_pooling_is_the_last_real_token(make_encoder, family):
    encoder = make_encoder(family)
    model = text_model(encoder, "last")
    ids, mask = tokens(12, 7, 1)
    pooled = model.pool(ids, mask)
    for row, length in enumerate((12, 7, 1)):
        options = (
            {"global_attention_mask": (torch.arange(length) % (length - 1 or 1) == 0).long()[None]}
            if family == "Longformer"
            else {}
        )
        hidden = encoder(
            input_ids=ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length], **options
        ).last_hidden_state
        torch.testing.assert_close(pooled[row], hidden[0, length - 1], atol=1e-5, rtol=1e-5)
    chunked, chunk_mask = torch.stack([ids[:2], ids[1:]]), torch.stack([mask[:2], mask[1:]])  # [2, 2, 12]
    expected = model.linear(torch.stack([pooled[:2].mean(0), pooled[1:].mean(0)]))
    torch.testing.assert_close(model(chunked, chunk_mask), expected, atol=1e-5, rtol=1e-5)


def test_mean_pooling_is_the_mean_of_real_tokens(make_encoder):
    encoder = make_encoder("DistilBert")
    model = text_model(encoder, "mean")
    ids, mask = tokens(12, 5)
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = model.linear(torch.stack([hidden[0].mean(dim=0), hidden[1, :5].mean(dim=0)]))
    torch.testing.assert_close(model(ids, mask), expected, atol=1e-6, rtol=1e-6)


def test_constructor_keeps_the_mode_it_finds(make_encoder):
    encoder = make_encoder("Bert")
    model = TextBertBase(encoder, pooling="cls", hidden_common_dim=5)
    assert not encoder.training
    ids, mask = tokens(12)
    model.train()
    assert encoder.training and not torch.equal(model(ids, mask), model(ids, mask))  # dropout of encoder and head
    model.eval()
    assert torch.equal(model(ids, mask), model(ids, mask))


# ---- chunks ----


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_mean_over_real_chunks_alone_and_next_to_longer_rows(make_encoder, pooling):
    model = text_model(make_encoder("Bert"), pooling)
    ids = torch.zeros(3, 4, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, lengths in enumerate([(8,), (12, 12, 12, 5), (12, 4)]):
        ids[row, : len(lengths)], mask[row, : len(lengths)] = tokens(*lengths)
    vectors = model(ids, mask)
    torch.testing.assert_close(vectors[:1], model(ids[:1, 0], mask[:1, 0]), atol=1e-6, rtol=0)  # [B, T]
    torch.testing.assert_close(vectors[:1], model(ids[:1, :1], mask[:1, :1]), atol=1e-6, rtol=0)  # [B, 1, T]
    for row, count in enumerate([1, 4, 2]):
        each = model(ids[row, :count], mask[row, :count])  # the linear layer commutes with the mean
        torch.testing.assert_close(vectors[row], each.mean(dim=0), atol=1e-6, rtol=0)


def test_padding_chunks_are_not_encoded(make_encoder):
    model = text_model(make_encoder("Bert"))
    seen = []
    model.encoder.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ids, mask = tokens(12, 0, 0, 0, 12, 9, 0, 0)
    model(ids.view(2, 4, 12), mask.view(2, 4, 12))
    assert seen == [(1, 12 + 12 + 9)]  # real tokens end to end


def test_longformer_reads_the_first_token_globally(make_encoder):
    model = text_model(make_encoder("Longformer", num_hidden_layers=1, max_position_embeddings=120))
    ids, mask = tokens(64, width=64)
    other = ids.clone()
    other[0, 60] = (other[0, 60] + 1) % 50 + 3  # outside the first token's window of 8
    assert not torch.equal(model(ids, mask), model(other, mask))


# ---- reinitialise ----


def changed(before: dict[str, torch.Tensor], encoder) -> set[str]:
    return {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(encoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def names_of_layers(encoder, indices) -> set[str]:
    """Names with the layer's number as a part of their own: independent of how the code finds the layers."""
    wanted = {str(index) for index in indices}
    return {name for name in encoder.state_dict() if next((p for p in name.split(".") if p.isdigit()), None) in wanted}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", LAYERED)
def test_exactly_the_last_layers_change(saved_encoder, family, layers):
    encoder, _ = load_pretrained_encoder(saved_encoder(family))
    before = snapshot(encoder)
    expected = names_of_layers(encoder, range(3 - layers, 3))
    assert expected and expected != set(before)
    reinitialise(encoder, pooler=False, layers=layers)
    assert changed(before, encoder) == expected


@pytest.mark.parametrize("family", WITH_POOLER)
def test_exactly_the_pooler_changes(saved_encoder, family):
    encoder, _ = load_pretrained_encoder(saved_encoder(family))
    before = snapshot(encoder)
    reinitialise(encoder, pooler=True, layers=0)
    assert changed(before, encoder) == {name for name in before if name.startswith("pooler.")} != set()


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_draws_are_the_initialisers_own(saved_encoder, family):
    encoder, _ = load_pretrained_encoder(saved_encoder(family, hidden_size=64, intermediate_size=256))
    reinitialise(encoder, pooler=family == "Bert", layers=1)
    prefix = {"Bert": "encoder.layer.2.", "ModernBert": "layers.2."}[family]
    for name, tensor in encoder.state_dict().items():
        if name.startswith(prefix) and tensor.ndim == 2:
            assert abs(tensor.mean()) < 0.005 and 0.005 < tensor.std() < 0.03, name  # initializer_range 0.02
        elif name.startswith(prefix):
            expected = torch.ones_like(tensor) if "norm.weight" in name.lower() else torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), name


def test_same_seed_same_draws_and_nothing_asked_changes_nothing(saved_encoder):
    folder = saved_encoder("Bert")
    states = []
    for _ in range(2):
        encoder, _ = load_pretrained_encoder(folder)
        before = snapshot(encoder)
        reinitialise(encoder, pooler=False, layers=0)
        assert changed(before, encoder) == set()
        torch.manual_seed(3)
        reinitialise(encoder, pooler=True, layers=3)
        states.append(snapshot(encoder))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_pooler_is_one_warning(make_encoder, caplog):
    for encoder in (make_encoder("Electra"), text_model(make_encoder("Bert"), "cls").encoder):
        caplog.clear()
        before = snapshot(encoder)
        reinitialise(encoder, pooler=True, layers=0)
        assert len(caplog.records) == 1 and "no pooler" in caplog.text
        assert changed(before, encoder) == set()


def test_too_many_or_shared_layers(make_encoder):
    for layers in (4, -1):
        with pytest.raises(InputError, match=f"expected 0 to 3 .*found {layers}"):
            reinitialise(make_encoder("Bert"), pooler=False, layers=layers)
    with pytest.raises(InputError, match="shares weights between layers"):
        reinitialise(make_encoder("Albert"), pooler=False, layers=1)


def test_silent_skipping_is_noticed(make_encoder, monkeypatch):
    encoder = make_encoder("Bert")
    monkeypatch.setattr(encoder, "_init_weights", lambda module: None)
    with pytest.raises(RuntimeError, match="layer 2 was not re-drawn"):
        reinitialise(encoder, pooler=False, layers=1)
