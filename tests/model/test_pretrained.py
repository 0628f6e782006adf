"""What is loaded, what is refused, and how quietly.   pytest tests/model/test_pretrained.py"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, T5Config, T5Model
from transformers.utils import logging as transformers_logging

from mmbert_core.model.pretrained import build_encoder, load_pretrained_encoder, sentence_pooling
from mmbert_core.runtime import hub
from mmbert_core.runtime.errors import InputError


def change_config(folder: str, **changes) -> None:
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: str) -> str:
    with pytest.raises(InputError) as caught:
        load_pretrained_encoder(folder)
    assert "\n" not in str(caught.value)
    assert repr(str(folder)) in str(caught.value)
    return str(caught.value)


def test_weights_come_back_bit_equal_in_float32_and_eval_mode(saved_encoder, make_encoder):
    encoder, has_stored_pooler = load_pretrained_encoder(saved_encoder("Bert"))
    expected = make_encoder("Bert").state_dict()
    assert has_stored_pooler and not encoder.training
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


def test_half_precision_weights_are_loaded_as_float32(tmp_path, make_encoder):
    make_encoder("DistilBert").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    encoder, has_stored_pooler = load_pretrained_encoder(str(tmp_path))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not has_stored_pooler
    assert {parameter.dtype for parameter in build_encoder(str(tmp_path)).parameters()} == {torch.float32}


def test_masked_lm_checkpoint_has_no_stored_pooler_and_one_clean_line(tmp_path, caplog, capfd):
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)  # unused head, missing pooler
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        encoder, has_stored_pooler = load_pretrained_encoder(str(tmp_path))
    assert encoder.pooler is not None and not has_stored_pooler
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records] == ["mmbert_core.model.pretrained"]
    assert "no stored pooler" in caplog.text
    assert (verbosity, bars) == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())


def test_build_encoder_has_the_structure_without_the_weights(saved_encoder):
    folder = saved_encoder("Roberta")
    loaded, _ = load_pretrained_encoder(folder)
    os.remove(Path(folder, "model.safetensors"))
    built = build_encoder(folder)
    assert {n: p.shape for n, p in built.state_dict().items()} == {n: p.shape for n, p in loaded.state_dict().items()}
    assert not built.training
    built.load_state_dict(loaded.state_dict())


# ---- refusals, each one line ----


def test_only_pickled_weights(saved_encoder):
    folder = saved_encoder("Bert")
    os.remove(Path(folder, "model.safetensors"))
    torch.save({}, Path(folder, "pytorch_model.bin"))
    assert "only pickled weights (pytorch_model.bin), which are never loaded" in refusal(folder)


@pytest.mark.parametrize("config", [{"model_type": "bert"}, {"model_type": "no_such_type"}])
def test_code_of_its_own_is_refused_and_never_run(saved_encoder, config):
    folder = saved_encoder("Bert")
    change_config(folder, auto_map={"AutoModel": "modeling_own.OwnModel"}, **config)
    Path(folder, "modeling_own.py").write_text(f"open({str(Path(folder, 'ran'))!r}, 'w')\nclass OwnModel: pass\n")
    assert "auto_map" in refusal(folder)
    with pytest.raises(InputError, match="auto_map"):
        build_encoder(folder)
    assert not Path(folder, "ran").exists()


def test_other_refusals(saved_encoder, tmp_path):
    folder = saved_encoder("Bert")
    for key, value, words in [
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantised"),
        ("transformers_weights", "adapter_model.bin", "weight file of its own"),
        ("model_type", None, "names no model_type"),
        ("model_type", "no_such_type", "cannot be loaded"),
    ]:
        before = Path(folder, "config.json").read_text()
        change_config(folder, **{key: value})
        assert words in refusal(folder)
        Path(folder, "config.json").write_text(before)
    Path(folder, "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(folder)
    os.remove(Path(folder, "adapter_config.json"))
    Path(folder, "config.json").write_text("{broken")
    assert "JSON" in refusal(folder)
    os.remove(Path(folder, "config.json"))
    assert "no config.json" in refusal(folder)


def test_weight_file_of_another_model(saved_encoder):
    folder = saved_encoder("Bert")
    weights = load_file(Path(folder, "model.safetensors"))
    renamed = {f"other.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, Path(folder, "model.safetensors"), {"format": "pt"})
    assert "weight file lacks" in refusal(folder)
    change_config(folder, hidden_size=16)
    save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})
    assert "of shape [60, 16], the weight file has [60, 32]" in refusal(folder)
    Path(folder, "model.safetensors").write_bytes(b"not safetensors")
    assert "cannot be loaded" in refusal(folder)


def test_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(tmp_path)
    assert "with a decoder" in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "two words", "", __file__])
def test_a_folder_that_does_not_exist(name):
    assert "found no such folder" in refusal(name)


def test_hub_unreachable_is_one_line_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.monotonic()
    assert "the hub cannot be reached" in refusal("nobody/no-such-encoder")
    assert time.monotonic() - start < 5


def test_hub_is_not_asked_in_offline_mode(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    assert "the hub cannot be reached" in refusal("nobody/no-such-encoder")


def test_name_in_the_local_cache_needs_no_network(saved_encoder, tmp_path):
    cache = tmp_path / "home" / "hub" / "models--someone--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    os.rename(saved_encoder("Bert"), snapshot)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    code = (
        "from mmbert_core.model.pretrained import *; "
        "print(load_pretrained_encoder('someone/tiny')[1], sentence_pooling('someone/tiny'))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True mean\n", done.stderr
    assert done.stderr == ""
    AutoModel.from_pretrained(snapshot)


OLD = {
    f"pooling_mode_{mode}": False
    for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
}
NEW = {"embedding_dimension": 32, "include_prompt": True}


def write_pooling(folder: Path, written, **files) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(written if isinstance(written, str) else json.dumps(written))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("written", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        (OLD | {"pooling_mode_mean_tokens": True}, "mean"),
        (OLD | {"pooling_mode_cls_token": True}, "cls"),
        (OLD | {"pooling_mode_lasttoken": True}, "last"),
        (NEW | {"pooling_mode": "mean"}, "mean"),
        (NEW | {"pooling_mode": "cls"}, "cls"),
        (NEW | {"pooling_mode": "lasttoken"}, "last"),
        (NEW | {"pooling_mode": ["mean"]}, "mean"),
        (NEW | {"pooling_mode": "mean", "include_prompt": False}, "mean"),
    ],
)
def test_how_a_sentence_encoder_was_trained_is_read_from_its_folder(saved_encoder, written, pooling):
    folder = Path(saved_encoder("Bert"))
    write_pooling(folder, written)
    assert sentence_pooling(folder) == pooling


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (OLD | {"pooling_mode_max_tokens": True}, "found 'max'"),
        (NEW | {"pooling_mode": "max"}, "found 'max'"),
        (OLD | {"pooling_mode_weightedmean_tokens": True}, "'weightedmean'"),
        (NEW | {"pooling_mode": "weightedmean"}, "'weightedmean'"),
        (OLD | {"pooling_mode_mean_sqrt_len_tokens": True}, "'mean_sqrt_len'"),
        (NEW | {"pooling_mode": "mean_sqrt_len_tokens"}, "'mean_sqrt_len"),
        (OLD | {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "'cls', 'mean'"),
        (NEW | {"pooling_mode": ["mean", "max"]}, "'mean', 'max'"),
        (NEW | {"pooling_mode": 3}, "'3'"),
        ({"pooling_mode_mean_tokens": "yes"}, "yes"),
        (OLD, "found none"),
        ({}, "found none"),
        ([], "expected an object"),
        ("no JSON", "not a JSON file"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_poolings_that_cannot_be_followed_are_not_taken_for_others(saved_encoder, written, found):
    folder = Path(saved_encoder("Bert"))
    write_pooling(folder, written)
    with pytest.raises(InputError) as caught:
        sentence_pooling(folder)
    message = str(caught.value)
    assert (
        message.startswith("pooling: auto cannot follow ")
        and found in message
        and "set pooling to mean, cls, last or pooler" in message
        and "\n" not in message
    )


def test_vectors_without_their_prompt_are_refused_where_there_is_one(saved_encoder):
    folder = Path(saved_encoder("Bert"))
    write_pooling(
        folder,
        NEW | {"pooling_mode": "mean", "include_prompt": False},
        config_sentence_transformers={"prompts": {"query": "query: "}},
    )
    with pytest.raises(InputError, match="include_prompt: false"):
        sentence_pooling(folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": ""}}))
    assert sentence_pooling(folder) == "mean"


def test_modules_json_says_where_the_pooling_is(saved_encoder):
    folder = Path(saved_encoder("Bert"))
    kind = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    write_pooling(
        folder,
        NEW | {"pooling_mode": "cls"},
        modules=[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "2_Pooling", "type": kind}],
    )
    assert sentence_pooling(folder) is None
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    assert sentence_pooling(folder) == "cls"
    (folder / "modules.json").write_text(json.dumps([{"path": "../x", "type": kind}, 3]))
    assert sentence_pooling(folder) is None


def test_other_encoders_say_nothing(saved_encoder):
    assert sentence_pooling(saved_encoder("Bert")) is None
