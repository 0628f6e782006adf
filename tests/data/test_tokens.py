"""Token ids equal the tokenizer's own call; texts of any kind and size give a chunk."""

import json
import time

import numpy as np
import pytest
from transformers import BertConfig

from mmbert_core.data.tokens import (
    characters_read,
    join_texts,
    keeps_end,
    load_tokenizer,
    token_spans,
    tokenise,
    tokenizer_fingerprint,
)
from mmbert_core.runtime.errors import InputError
from tests.support.table_fixtures import WORDS


def chunks_of(tokens, row):
    return [
        tokens.ids[tokens.chunk_offsets[chunk] : tokens.chunk_offsets[chunk + 1]].tolist()
        for chunk in range(tokens.row_chunks[row], tokens.row_chunks[row + 1])
    ]


@pytest.mark.parametrize("max_chunks", [1, 3])
def test_equals_the_tokenizers_own_call(tokenizer, max_chunks):
    generator = np.random.default_rng(0)
    texts = [
        " ".join(generator.choice(WORDS, size=generator.integers(0, 60))) for _ in range(1500)
    ]  # more than one Rust call
    tokens = tokenise(tokenizer, texts, max_length=12, max_chunks=max_chunks)
    own = tokenizer(texts, truncation=True, max_length=12, return_overflowing_tokens=True)
    expected = [[] for _ in texts]
    for row, ids in zip(own["overflow_to_sample_mapping"], own["input_ids"], strict=True):
        expected[row].append(ids)
    assert [chunks_of(tokens, row) for row in range(len(texts))] == [chunks[:max_chunks] for chunks in expected]
    assert tokens.num_truncated == sum(len(chunks) > max_chunks for chunks in expected) > 0
    assert tokens.ids.dtype == np.int32 and tokens.chunk_offsets.dtype == tokens.row_chunks.dtype == np.int64


def test_an_empty_text_is_its_special_tokens(tokenizer):
    tokens = tokenise(tokenizer, ["", "item"], max_length=8, max_chunks=2)
    assert chunks_of(tokens, 0) == [[tokenizer.cls_token_id, tokenizer.sep_token_id]]
    assert tokens.num_truncated == 0
    nothing = tokenise(tokenizer, [], max_length=8, max_chunks=2)
    assert len(nothing.ids) == 0 and nothing.chunk_offsets.tolist() == nothing.row_chunks.tolist() == [0]


@pytest.mark.parametrize(
    "text",
    [
        " " * 50,
        "\u200b\u200f",
        "🙂" * 20,
        "שלום",
        "zzz qqq",
        "item [SEP] item",
        "a" * 1_000_000,
        "a " * 500_000,
        "漢" * 1_000_000,
        "\x01\x7f",
    ],
    ids=[
        "spaces",
        "zero-width",
        "emoji",
        "rtl",
        "unknown",
        "special",
        "million",
        "million-words",
        "million-han",
        "control",
    ],
)
def test_every_text_gives_bounded_chunks_quickly(tokenizer, text):
    started = time.perf_counter()
    tokens = tokenise(tokenizer, [text], max_length=16, max_chunks=2)
    assert time.perf_counter() - started < 1
    chunks = chunks_of(tokens, 0)
    assert 1 <= len(chunks) <= 2 and all(2 <= len(chunk) <= 16 for chunk in chunks)
    assert tokens.num_truncated == (len(text) > 10_000)


def test_texts_are_joined_by_one_space_without_empty_cells():
    cells = {"a": ["x", "", ""], "b": ["y", "z", ""]}
    assert join_texts(cells, ["a", "b"]) == ["x y", "z", ""]
    assert join_texts(cells, ["b", "a"]) == ["y x", "z", ""]
    assert join_texts(cells, ["a"]) == ["x", "", ""]


def test_fingerprint_knows_the_vocabulary_and_not_the_last_call(tokenizer, encoder_folder, tmp_path):
    before = tokenizer_fingerprint(tokenizer)
    state = tokenizer.backend_tokenizer.to_str()
    tokenise(tokenizer, ["item"], max_length=8, max_chunks=1)
    assert tokenizer.backend_tokenizer.to_str() == state  # it is saved with the model
    tokenizer(["item", "item item"], padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(load_tokenizer(encoder_folder))
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["vocab"]["another"] = len(stored["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) != before


def test_tokenizers_that_cannot_be_loaded(tmp_path):
    BertConfig().save_pretrained(tmp_path)  # a folder without vocabulary loads as a tokenizer without words
    for name in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(InputError, match="^encoder") as caught:
            load_tokenizer(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_max_length_of_only_the_special_tokens(tokenizer):
    with pytest.raises(InputError, match=r"max_length: expected more than 2 \(the special tokens\), found 2"):
        tokenise(tokenizer, ["item"], max_length=2, max_chunks=1)


# ---- tokenizers that keep the end of a text ----


@pytest.fixture
def left(encoder_folder):
    """The tokenizer of a folder whose tokenizer_config.json says truncation_side: left."""
    tokenizer = load_tokenizer(encoder_folder)
    tokenizer.truncation_side = "left"
    return tokenizer


@pytest.mark.parametrize("max_chunks", [1, 3])
def test_the_end_is_kept_where_the_tokenizer_asks_for_it(left, tokenizer, max_chunks):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(0, 60))) for _ in range(1100)]
    tokens = tokenise(left, texts, max_length=12, max_chunks=max_chunks)
    own = left(texts, truncation=True, max_length=12, return_overflowing_tokens=True)
    expected = [[] for _ in texts]
    for row, ids in zip(own["overflow_to_sample_mapping"], own["input_ids"], strict=True):
        expected[row].append(ids)  # from the end on
    assert [chunks_of(tokens, row) for row in range(len(texts))] == [chunks[:max_chunks][::-1] for chunks in expected]
    assert tokens.num_truncated == tokenise(tokenizer, texts, max_length=12, max_chunks=max_chunks).num_truncated > 0


def test_the_last_characters_of_a_huge_text_are_those_that_are_read(left):
    most = characters_read(8, 2)
    text = "refund " * most + "money back"
    tokens = tokenise(left, [text, text[-most:], text[-most - 1 :]], max_length=8, max_chunks=2)
    assert chunks_of(tokens, 0) == chunks_of(tokens, 1) == chunks_of(tokens, 2)
    assert left.convert_ids_to_tokens(chunks_of(tokens, 0)[-1])[-3:] == ["money", "back", "[SEP]"]
    assert tokens.num_truncated == 3


@pytest.mark.parametrize("max_chunks", [1, 2, 5])
@pytest.mark.parametrize(
    "text", ["", "item", "the item b!  seller, never arrived", "a seller " * 9 + "refund", "x" * 3000 + " money back"]
)
def test_spans_are_those_of_the_end_that_is_read(left, text, max_chunks):
    spans, read = token_spans(left, text, max_length=8, max_chunks=max_chunks)
    ids = tokenise(left, [text], max_length=8, max_chunks=max_chunks).ids
    assert len(spans) == len(ids) and text.endswith(read)
    ends = [end for start, end in spans if start < end]
    assert ends == sorted(ends) and all(0 <= start <= end <= len(read) for start, end in spans)
    pieces = [
        (read[start:end], token)
        for (start, end), token in zip(spans, left.convert_ids_to_tokens(ids.tolist()), strict=True)
        if start < end
    ]
    assert all(piece == token.removeprefix("##") or token == "[UNK]" for piece, token in pieces)
    if not text or tokenise(left, [text], max_length=8, max_chunks=max_chunks).num_truncated == 0:
        assert read == text


def test_the_side_is_part_of_the_fingerprint_and_the_right_one_changes_nothing(left, tokenizer, tmp_path):
    assert tokenizer_fingerprint(left) != tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    loaded = load_tokenizer(str(tmp_path))
    assert keeps_end(loaded) and tokenizer_fingerprint(loaded) == tokenizer_fingerprint(left)
    loaded.save_pretrained(tmp_path / "again")
    assert keeps_end(load_tokenizer(str(tmp_path / "again")))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "truncation_side"})
    )
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))  # only in the Rust tokenizer's settings
    assert keeps_end(load_tokenizer(str(tmp_path)))
