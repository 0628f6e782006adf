"""Encoders that do not fit their tokenizer, length or pooling are refused before step 1; others are unchanged."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertModel, PreTrainedTokenizerFast

from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.data.tokens import load_tokenizer, sample_tokens, tokenise
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.model import probe
from mmbert_core.model.probe import ProbeTokens, check_text_encoder
from mmbert_core.model.text_encoder import TextBertBase, is_causal
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.start import prepare_model
from tests.support import tiny

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = {"num_key_value_heads": 2, **SPECIAL}
BIDIRECTIONAL = {  # -> whether positions start after the padding's
    "Bert": ({}, False),
    "Roberta": ({}, True),
    "XLMRoberta": ({}, True),
    "Camembert": ({}, True),
    "DistilBert": ({}, False),
    "Electra": ({}, False),
    "Albert": ({"embedding_size": 16}, False),
    "MPNet": ({}, True),
    "Esm": ({"mask_token_id": 3}, True),
    "DebertaV2": ({"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}, False),
    "ModernBert": ({**SPECIAL, "cls_token_id": 1, "sep_token_id": 2}, False),
    "Longformer": ({"attention_window": 8}, True),
    "XLNet": (None, False),
    "BigBird": ({}, False),
    "MobileBert": ({"embedding_size": 16, "intra_bottleneck_size": 16}, False),
    "RoFormer": ({"embedding_size": 32}, False),
}
CAUSAL = {
    "GPT2": {"n_inner": 48, **SPECIAL},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Llama": DECODER,
    "Qwen2": DECODER,
    "Qwen3": {**DECODER, "head_dim": 16},
    "Bert": {"is_decoder": True},
}
TOKENS = ProbeTokens((5,), tuple(range(7, 59)), (6,), 1, 59)


def encoder_of(family: str, options: dict | None):
    config = getattr(transformers, f"{family}Config")
    config = (
        config(vocab_size=60, d_model=32, n_layer=2, n_head=2, d_inner=48, pad_token_id=1)
        if options is None
        else config(**{**SIZES, **options})
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=torch.float32).eval()


def check(encoder, pooling: str, *, max_length: int = 40, tokens: ProbeTokens = TOKENS) -> None:
    text = TextBertBase(copy.deepcopy(encoder), pooling=pooling, hidden_common_dim=4)
    check_text_encoder(text, tokens, max_length=max_length, name="it")


def refusal(encoder, pooling: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        check(encoder, pooling, **options)
    assert "\n" not in str(caught.value) and "'it'" in str(caught.value)
    return str(caught.value)


# ---- families ----


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_valid_families_pass_with_every_pooling(family):
    encoder = encoder_of(family, BIDIRECTIONAL[family][0])
    assert not is_causal(encoder)
    for pooling in ("cls", "mean", "last", *(["pooler"] if getattr(encoder, "pooler", None) is not None else [])):
        check(encoder, pooling)


@pytest.mark.parametrize("family", CAUSAL)
def test_decoders_pass_with_last_and_mean_and_their_first_token_is_refused(family):
    encoder = encoder_of(family, CAUSAL[family])
    assert is_causal(encoder)
    check(encoder, "last")
    check(encoder, "mean")
    assert "set pooling to last" in refusal(encoder, "cls")


@pytest.mark.parametrize("family", ["FNet", "ConvBert", "Nystromformer", "Yoso"])
def test_families_that_do_not_heed_the_mask_are_refused(family):
    for layers in (1, 2):
        encoder = encoder_of(
            family, {"num_hidden_layers": layers, **({"num_landmarks": 64} if family == "Nystromformer" else {})}
        )
        for pooling in ("mean", "cls", "last"):
            assert "does not heed the attention mask" in refusal(encoder, pooling)


def test_random_vectors_are_refused():
    encoder = encoder_of("Bert", {})
    encoder.embeddings.register_forward_hook(lambda module, arguments, output: output + torch.rand_like(output))
    assert "draws random numbers" in refusal(encoder, "mean")


@pytest.mark.parametrize("family", [name for name, (_, behind) in BIDIRECTIONAL.items() if behind] + ["Bert", "GPT2"])
def test_the_largest_length_that_works_is_named(family):
    options, is_behind = BIDIRECTIONAL.get(family, (CAUSAL.get(family), False))
    encoder, largest = encoder_of(family, options), 64 if is_behind else 66
    check(encoder, "mean", max_length=largest)
    for max_length in (largest + 1, 1000):
        assert f"expected at most {largest} tokens" in refusal(encoder, "mean", max_length=max_length)


def test_ids_without_an_embedding_and_weights_that_are_not_finite():
    encoder = encoder_of("Bert", {})
    message = refusal(encoder, "cls", tokens=ProbeTokens((5,), (7, 8), (6,), 1, 61))
    assert "ids up to 61" in message and "60 rows" in message and "resize_token_embeddings(62)" in message
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.bias.fill_(torch.nan)
    assert "not finite" in refusal(encoder, "cls")


def test_an_encoder_that_fails_for_padded_texts_alone_is_refused():
    """Without a padding token RoBERTa cannot count positions itself, which packed texts do not need."""
    assert "gives no vector of a text of one word: TypeError" in refusal(
        encoder_of("Roberta", {"pad_token_id": None}), "cls"
    )


def test_rounding_is_distinguished_from_other_rows_in_float64(monkeypatch):
    """A deep encoder's rounding may pass the tolerance in float32; weights come back bit for bit."""
    monkeypatch.setattr(probe, "TOLERANCE", 1e-12)
    text = TextBertBase(encoder_of("Roberta", {}), pooling="mean", hidden_common_dim=4)
    text.is_packed = False
    before = {name: tensor.clone() for name, tensor in text.state_dict().items()}
    short, long = TOKENS.text(3), TOKENS.text(28)
    with torch.no_grad():
        assert probe._difference(probe._vectors(text, [short], 1)[0], probe._vectors(text, [short, long], 1)[0]) > 1e-9
    check_text_encoder(text, TOKENS, max_length=40, name="it")
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in text.state_dict().items()
    )


def test_a_probe_leaves_generators_and_modes_as_they_were():
    text = TextBertBase(encoder_of("Bert", {}), pooling="cls", hidden_common_dim=4)
    text.encoder.train()
    text.dropout.eval()
    before = (
        [module.training for module in text.modules()],
        torch.get_rng_state(),
        {name: tensor.clone() for name, tensor in text.state_dict().items()},
    )
    check_text_encoder(text, TOKENS, max_length=40, name="it")
    assert [module.training for module in text.modules()] == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in text.state_dict().items())
    assert text.is_packed and all(parameter.grad is None for parameter in text.parameters())


# ---- with a tokenizer, as a run begins ----


@pytest.fixture
def settings(tmp_path):
    return tiny.settings(tmp_path)


def prepared(settings):
    config = Config(**settings)
    return prepare_model(config, prepare(config))


def test_sample_tokens_of_a_tokenizer_with_and_without_special_tokens(settings, tmp_path):
    tokenizer = load_tokenizer(settings["encoder"])
    tokenizer.backend_tokenizer.enable_padding(length=32)  # as a tokenizer.json may say
    tokens = sample_tokens(tokenizer)
    assert tokens["prefix"] == (tokenizer.cls_token_id,) and tokens["suffix"] == (tokenizer.sep_token_id,)
    assert tokens["highest"] == len(tokenizer) - 1 and not set(tokens["words"]) & set(tokenizer.all_special_ids)
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "good": 1, "bad": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = sample_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    assert plain == {"prefix": (), "words": (1, 2), "suffix": (), "pad": 0, "highest": 2}


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_a_tokenizer_without_an_unknown_token(model):
    vocabulary = {"good": 0, "bad": 1}
    backend = Tokenizer(model(vocabulary, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert sample_tokens(tokenizer)["words"] == (0, 1)
    assert tokenise(tokenizer, ["good bad"], max_length=4, max_chunks=1).ids.tolist() == [0, 1]
    with pytest.raises(InputError, match="cannot encode a text .* choose an encoder with an unknown token"):
        tokenise(tokenizer, ["good news"], max_length=4, max_chunks=1)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean", "last"])
def test_rounding_of_large_weights_is_no_fault_of_packing(pooling):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 6, "initializer_range": 5.0})
    encoder = BertModel(config).eval()
    check(encoder, pooling)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "added", [["<user>"], {"pad_token": "<padding>"}, {"cls_token": "<start>"}], ids=["token", "pad", "cls"]
)
def test_added_tokens_need_a_resized_embedding(settings, added):
    folder = settings["encoder"]
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(added) if isinstance(added, list) else tokenizer.add_special_tokens(added)
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        InputError, match=r"token ids up to 81, its embedding has 81 rows .* model\.resize_token_embeddings\(82\)"
    ):
        prepared(settings)
    encoder = BertModel.from_pretrained(folder)
    encoder.resize_token_embeddings(82)
    encoder.save_pretrained(folder)
    assert prepared(settings).pooling == "pooler"


def test_check_says_it_in_one_line_and_writes_nothing(settings, tmp_path):
    tokenizer = load_tokenizer(settings["encoder"])
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(settings["encoder"])
    (tmp_path / "run.json").write_text(
        json.dumps({key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()})
    )
    done = tiny.run_command(["train.py", str(tmp_path / "run.json"), "--check"])
    assert done.returncode == 2 and "its embedding has 81 rows" in done.stderr and "Traceback" not in done.stderr
    assert not Path(settings["model_path"], "model.safetensors").exists()


def test_a_folder_trained_before_the_check_scores_texts_without_the_token(settings):
    tiny.train(Config(**settings | {"max_epochs": 1}))
    folder = Path(settings["model_path"])
    (folder / MANIFEST).unlink()  # which folders of before do not have
    tokenizer = load_tokenizer(str(folder / "encoder"))
    tokenizer.add_tokens(["<user>"])
    tokenizer.save_pretrained(folder / "encoder")
    predictor = Predictor(load_model_folder(folder), DistContext(0, 0, 1, 1, torch.device("cpu")))
    rows = [
        {"text": "refund pay", "age": 1, "amount": 2, "kind": "a"},
        {"text": "now <user> pay", "age": 1, "amount": 2, "kind": "a"},
    ]
    assert np.isfinite(predictor.predict(rows[:1])[0]["prob"])
    with pytest.raises(InputError, match="data row 2: its text has the token id 81, the model's embedding has 81 rows"):
        predictor.predict(rows)
    tokenizer.add_special_tokens({"cls_token": "<start>"})
    tokenizer.save_pretrained(folder / "encoder")
    with pytest.raises(InputError, match="its embedding has 81 rows"):
        load_model_folder(folder)


def test_a_length_beyond_the_positions_is_refused_in_a_model_folder(settings):
    tiny.train(Config(**settings | {"max_epochs": 1}))
    path = Path(settings["model_path"], "config.json")
    record = json.loads(path.read_text())
    record["config"]["max_length"] = 65
    path.write_text(json.dumps(record))
    (path.parent / MANIFEST).unlink()
    with pytest.raises(InputError, match="max_length: expected at most 64 tokens"):
        load_model_folder(path.parent)
