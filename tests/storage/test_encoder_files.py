"""Encoder folders that are placeholders, truncated or contradictory: one line, before anything is allocated."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbert_core.config import Config
from mmbert_core.data.tokens import load_tokenizer
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.model.pretrained import build_encoder, load_pretrained_encoder
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.encoder_files import encoder_shapes
from tests.support import tiny

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90888945\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("files") / "encoder")


@pytest.fixture
def folder(encoder, tmp_path) -> Path:
    """A copy to be spoiled."""
    for path in encoder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refusal(call, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        call(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def shard(folder: Path) -> dict:
    """Split the weights into two files with an index, as large encoders have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{index + 1}-of-00002.safetensors": names[index::2] for index in range(2)}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, own in files.items() for name in own},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


# ---- files that are not themselves ----


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [POINTER, ""], ids=["pointer", "empty"])
def test_a_pointer_or_an_empty_file_is_said_to_be_that(folder, name, content):
    (folder / name).write_text(content)
    expected = "is a Git LFS pointer" if content else "is empty (0 bytes)"
    for call in (load_tokenizer, load_pretrained_encoder):
        message = refusal(call, folder)
        assert name in message and expected in message
        assert not content or "git lfs pull" in message


def test_a_pointer_in_a_model_folder_is_said_to_be_that(tmp_path):
    tiny.train(Config(**tiny.settings(tmp_path, max_epochs=1)))
    for name in ("model.safetensors", "encoder/tokenizer.json", "config.json"):
        path = tmp_path / "run" / name
        content = path.read_bytes()
        path.write_text(POINTER)
        assert f"{name}: is a Git LFS pointer" in refusal(load_model_folder, tmp_path / "run")
        path.write_bytes(content)
    load_model_folder(tmp_path / "run")


def test_pointers_next_to_what_is_read_harm_nobody(folder):
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "vocab.txt").write_text(POINTER)  # tokenizer.json has the vocabulary
    assert len(load_tokenizer(str(folder))) == 81
    assert load_pretrained_encoder(str(folder))[1]


def test_without_tokenizer_json_the_vocabulary_counts(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(POINTER)
    assert "vocab.txt: is a Git LFS pointer" in refusal(load_tokenizer, folder)


@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_weights_of_another_length_than_their_header_says(folder, change):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100] if change == "shorter" else content + b"x")
    found = len(content) - 100 if change == "shorter" else len(content) + 1
    expected = f"expected {len(content)} bytes, as its header says, found {found}"
    assert expected in refusal(load_pretrained_encoder, folder)


def test_shards_load_and_every_contradiction_is_found(folder):
    index = shard(folder)
    path = folder / "model.safetensors.index.json"
    assert load_pretrained_encoder(str(folder))[1] and len(encoder_shapes(folder)) == 39
    file = sorted(set(index["weight_map"].values()))[0]
    name = next(name for name, of in index["weight_map"].items() if of == file)
    for mapped, expected in (
        ("../model.safetensors", "of its own folder"),
        ("/etc/passwd", "of its own folder"),
        ("a/../../x", "of its own folder"),
        ("gone.safetensors", "1 of them are missing"),
    ):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: mapped}}))
        assert expected in refusal(load_pretrained_encoder, folder)
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"another.weight": file}}))
    assert "lacks the tensor 'another.weight'" in refusal(load_pretrained_encoder, folder)
    path.write_text(json.dumps(index | {"metadata": {"total_size": 10**6}}))
    assert "expected weight files with 1000000 bytes" in refusal(load_pretrained_encoder, folder)
    path.write_text(json.dumps({"weight_map": []}))
    assert "weight_map: expected an object" in refusal(load_pretrained_encoder, folder)
    path.write_text(json.dumps(index))
    (folder / file).write_text(POINTER)
    assert f"{file}: is a Git LFS pointer, not the weights itself" in refusal(load_pretrained_encoder, folder)


# ---- a config that asks for more than the weights have ----

HOSTILE = [
    {"num_hidden_layers": 100_000},
    {"num_hidden_layers": 20},
    {"num_labels": 10**9},
    {"vocab_size": 10**9},
    {"hidden_size": 2**20},
    {"intermediate_size": 10**9},
    {"max_position_embeddings": 10**9},
    {"type_vocab_size": 10**9},
    {"num_hidden_layers": 1e9},
    {"model_type": "albert", "num_hidden_layers": 10**6},
    {"model_type": "albert", "num_hidden_groups": 10**6},
    {"model_type": "distilbert", "n_layers": 10**6},
    {"model_type": "distilbert", "sinusoidal_pos_embds": True, "max_position_embeddings": 10**9},
    {"model_type": "gpt2", "n_positions": 10**6},
    {"model_type": "mixtral", "num_local_experts": 10**9},
    {"model_type": "funnel", "block_sizes": [10**9]},
    {"encoder": {"num_hidden_layers": 10**9}},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: "-".join(changes))
def test_counts_and_sizes_are_bounded_by_the_weights(folder, changes):
    edit_config(folder, **changes)
    shapes = encoder_shapes(folder)
    for call in (load_pretrained_encoder, lambda name: build_encoder(name, shapes)):
        started = time.perf_counter()
        assert "config.json" in refusal(call, folder)
        assert time.perf_counter() - started < 5


def test_checking_draws_no_random_numbers(folder):
    shapes = encoder_shapes(folder)
    states = []
    for own in (None, shapes):
        torch.manual_seed(0)
        build_encoder(str(folder), own)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
