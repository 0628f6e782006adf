"""The sample and its small encoder: deterministic, like real messages, and solvable only from text and columns."""

import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mmbert_core.demo import sample
from mmbert_core.demo.sample import draw_sample, sample_table, wordpiece_vocabulary, write_sample, write_small_encoder


@pytest.fixture(scope="module")
def drawn() -> tuple[pd.DataFrame, np.ndarray]:
    return draw_sample(4000, 0)


def numbers_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {name: pd.to_numeric(table[name]).to_numpy(dtype=np.float64) for name in sample.NUMBER_COLUMNS}


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, a tie counting one half; for few distinct scores."""
    positive, negative = score[label == 1], score[label == 0]
    wins = (positive[:, None] > negative[None, :]).mean() + 0.5 * (positive[:, None] == negative[None, :]).mean()
    return float(wins)


def test_table_is_strings_with_missing_cells(drawn):
    table, _ = drawn
    assert list(table.columns) == [
        "message_id",
        "message",
        *sample.NUMBER_COLUMNS,
        *sample.CATEGORY_COLUMNS,
        "is_abuse",
    ]
    assert all(isinstance(cell, str) for column in table for cell in table[column])
    assert table["message_id"].is_unique and table["message_id"][17] == "m000017"
    for name in sample.NUMBER_COLUMNS:
        assert 0.02 < (table[name] == "").mean() < 0.06
    for name in sample.CATEGORY_COLUMNS:
        assert 0.01 < (table[name] == "").mean() < 0.04
    assert not (table["message"] == "").any()


def test_shares_and_message_lengths(drawn):
    table, _ = drawn
    assert set(table["is_abuse"]) == {"0", "1"}
    assert 0.25 < (table["is_abuse"] == "1").mean() < 0.35
    words = table["message"].str.split().str.len()
    assert words.min() >= 8 and words.max() <= 60
    assert table["message"].nunique() > 0.97 * len(table)  # not a handful of templates
    assert table["message"].str.contains("\n").any()  # a row is not a line


def test_label_needs_text_and_columns(drawn):
    table, kinds = drawn
    label = (table["is_abuse"] == "1").to_numpy().astype(int)
    numbers = numbers_of(table)
    spam = numbers["messages_last_day"] >= sample.MANY_MESSAGES
    text_best = auroc(kinds, label)  # benign < request < threat: the best order that text alone allows
    columns_best = auroc(2 * spam + sample.risky_account(numbers), label)
    both = auroc(sample.abuse_rule(kinds, numbers).astype(int), label)
    assert 0.75 < text_best < 0.87 and 0.70 < columns_best < 0.82
    assert both > 0.95


def test_a_sum_of_scores_solves_it():
    """The merge network adds a text score and a column score; the rule is one of those it can express."""
    kinds = np.repeat([sample.BENIGN, sample.REQUEST, sample.THREAT], 8)
    grid = np.array([[age, refunds, messages] for age in (5, 500) for refunds in (0, 6) for messages in (3, 60)] * 3)
    numbers = dict(zip(("account_age_days", "past_refunds", "messages_last_day"), grid.T.astype(float)))
    column_score = np.where(numbers["messages_last_day"] >= sample.MANY_MESSAGES, 2, sample.risky_account(numbers))
    assert np.array_equal(kinds + column_score >= 2, sample.abuse_rule(kinds, numbers))


def test_missing_cells_count_as_harmless():
    numbers = {name: np.array([np.nan]) for name in sample.NUMBER_COLUMNS}
    assert not sample.abuse_rule(np.array([sample.REQUEST]), numbers)[0]
    assert sample.abuse_rule(np.array([sample.THREAT]), numbers)[0]


def test_same_seed_same_bytes(tmp_path: Path):
    first, second = write_sample(tmp_path / "a", num_rows=400), write_sample(tmp_path / "b", num_rows=400)
    other = write_sample(tmp_path / "c", num_rows=400, seed=1)
    assert set(first) == {"train", "val", "test"}
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes()
        assert first[name].read_bytes() != other[name].read_bytes()
    splits = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in first.values()]
    assert [len(split) for split in splits] == [300, 50, 50]
    pd.testing.assert_frame_equal(pd.concat(splits, ignore_index=True), sample_table(400, 0), check_dtype=False)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_tiny_tables(tmp_path: Path, num_rows: int):
    paths = write_sample(tmp_path, num_rows=num_rows)
    assert sum(len(pd.read_csv(path)) for path in paths.values()) == num_rows


def test_vocabulary_order_is_count_then_word():
    vocabulary = wordpiece_vocabulary(["bb aa cc", "Cc, aa bb", "cc once"], max_words=2)
    assert list(vocabulary)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert list(vocabulary)[-2:] == ["cc", "aa"]  # "bb" is as frequent as "aa" but later; "once" is too rare
    assert {"a", "##a", "z", "##z", ","} <= set(vocabulary)
    assert list(vocabulary.values()) == list(range(len(vocabulary)))


def test_encoder_is_deterministic_and_loads_offline(tmp_path: Path, drawn, monkeypatch):
    texts = drawn[0]["message"][:500]
    state = torch.get_rng_state()
    first = write_small_encoder(tmp_path / "a", texts)
    assert torch.equal(state, torch.get_rng_state())
    second, other = write_small_encoder(tmp_path / "b", texts), write_small_encoder(tmp_path / "c", texts, seed=1)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    encoder, tokenizer = AutoModel.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    assert tokenizer.is_fast and len(tokenizer) == encoder.config.vocab_size
    encoded = tokenizer(list(texts[:4]), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
    assert hidden.shape == (*encoded["input_ids"].shape, 64) and hidden.isfinite().all()


def test_tokenizer_knows_words_and_spells_the_rest(tmp_path: Path, drawn):
    tokenizer = AutoTokenizer.from_pretrained(write_small_encoder(tmp_path, drawn[0]["message"]))
    assert tokenizer.tokenize("Please cancel the ORDER zqx") == ["please", "cancel", "the", "order", "z", "##q", "##x"]
    assert tokenizer.tokenize("\u4e2d") == ["[UNK]"]
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
