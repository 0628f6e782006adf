"""Explanations: the pieces are the text, the weights are integrated derivatives, and a planted word is found."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmbert_core.config import Config
from mmbert_core.data.tokens import token_spans, tokenise
from mmbert_core.inference.attributions import STEPS, _pieces, _Scaled, explain_rows, token_weights
from mmbert_core.predictor import Predictor
from mmbert_core.tables.table import Roles, records_to_chunk
from tests.support import tiny

TEXTS = [
    "refund",
    "please refund my money, now!",
    "  two  spaces\n\tand lines \n",
    "Ünïcödé ÉCOLE naïve",
    "日本 is 日本 😀😀 \u200b\u202e end",
    "e\u0301 combined",
    "[SEP] in [CLS] words",
    "",
    " \t\n ",
    "x" * 150,
    "never again " * 40,
    "a\x01b\x07c",
]


def write_signal(path: Path, num_rows: int, seed: int) -> Path:
    """Six words a row; class 1 where one of them is "refund"."""
    rng = np.random.default_rng(seed)
    others = [word for word in tiny.WORDS if word != "refund"]
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row_id", "text", "age", "amount", "kind", "label"])
        for row in range(num_rows):
            words = rng.choice(others, size=6).tolist()
            if row % 2:
                words[rng.integers(0, 6)] = "refund"
            writer.writerow([row, " ".join(words), rng.integers(0, 100), 1.5, "a", row % 2])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Predictor:
    """A model that has learned the planted word, and is so sure of it that the gradient at the text itself points the other way."""
    folder = tmp_path_factory.mktemp("signal")
    tiny.write_encoder(folder / "encoder")
    paths = {
        f"{name}_path": (str(write_signal(folder / f"{name}.csv", rows, seed)),)
        for seed, (name, rows) in enumerate([("train", 256), ("val", 32)])
    }
    settings = tiny.settings(
        folder,
        **paths,
        test_path=(),
        lr=1e-2,
        max_epochs=4,
        batch_size=16,
        pooling="mean",
        early_stop_metric="val_loss",
    )
    settings |= {"tab_field_list": (), "cat_field_list": ()}
    tiny.train(Config(**settings))
    return Predictor.from_folder(folder / "run")


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Predictor:
    """Three classes, two text columns, up to three chunks a text; it has learned nothing to speak of."""
    folder = tmp_path_factory.mktemp("several")
    tiny.train(
        Config(
            **tiny.settings(
                folder,
                num_classes=3,
                max_epochs=1,
                max_length=12,
                max_chunks=3,
                text_name=("text", "kind"),
                cat_field_list=(),
            )
        )
    )
    predictor = Predictor.from_folder(folder / "run")
    predictor.loaded.model.text_subnetwork.linear.weight.data *= 50  # as drawn, words hardly matter
    return predictor


def row_of(text: str) -> dict[str, object]:
    return {"row_id": "r", "text": text, "age": 30, "amount": 1.5, "kind": "a"}


def test_the_planted_word_weighs_most(trained, tmp_path):
    with open(write_signal(tmp_path / "new.csv", 24, 7)) as stream:
        rows = [row for row in csv.DictReader(stream) if row["label"] == "1"]
    for row in rows:
        made = trained.explain(row)
        assert made["prediction"] == trained.predict(row)
        assert made["prediction"]["pred"] == "1" and all(-1 <= weight <= 1 for _, weight in made["tokens"])
        assert max(made["tokens"], key=lambda token: token[1]) == ["refund", 1.0]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_as_far_as_it_was_read(trained, several, text):
    for predictor, whole in ((trained, text), (several, f"{text} a" if text else "a")):
        config = predictor.loaded.config
        sizes = dict(max_length=config.max_length, max_chunks=config.max_chunks)
        joined = "".join(piece for piece, _ in predictor.explain(row_of(text))["tokens"])
        if tokenise(predictor.loaded.tokenizer, [whole], **sizes).num_truncated:
            ids = [tokenise(predictor.loaded.tokenizer, [part], **sizes).ids.tolist() for part in (whole, joined)]
            assert len(joined) < len(whole) and whole.startswith(joined) and ids[0] == ids[1]
        else:
            assert joined == whole


def test_gaps_and_what_has_no_gradient_weigh_nothing(trained):
    tokens = trained.explain(row_of("refund  my \u200b money"))["tokens"]
    assert all(weight == 0 for piece, weight in tokens if not piece.strip(" \u200b")) and all(
        weight for piece, weight in tokens if piece.isalpha()
    )
    assert trained.explain(row_of(" \n"))["tokens"] == [[" \n", 0.0]] and trained.explain(row_of(""))["tokens"] == []


def test_tokens_that_share_a_character_are_one_piece():
    backend = Tokenizer(
        models.BPE(
            vocab={letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    spans, read = token_spans(tokenizer, "a😀 b", max_length=64, max_chunks=1)
    assert spans == [(0, 1), *[(1, 2)] * 4, (2, 3), (3, 4)] and read == "a😀 b"
    assert _pieces(read, spans, [1, 1, 2, 3, 4, 5, 6]) == [("a", 1), ("😀", 10), (" ", 5), ("b", 6)]


def batch_of(predictor: Predictor, texts: list[str]):
    dataset = predictor._encode(
        records_to_chunk([row_of(text) for text in texts], Roles.from_config(predictor.loaded.config).inputs())
    )
    return dataset, dataset.batch(range(len(texts)))


@pytest.mark.parametrize("name", ["trained", "several"])
def test_a_weight_is_the_integrated_derivative_by_the_size_of_its_embedding(request, name):
    predictor = request.getfixturevalue(name)
    model = predictor.loaded.model
    _, batch = batch_of(
        predictor, ["refund my money", "hello where is my order please now thanks never again wrong size"]
    )
    predicted = 1 if name == "trained" else 2
    weights = token_weights(model, batch, torch.full((2,), predicted), task=predictor.task)
    place, nudge = 1, 5e-3
    factors = torch.ones(batch.attention_mask.sum())

    def score(others: float, factor: float) -> float:
        """Of the first row, its token number `place` times `factor`, all others times `others`."""
        scaled = others * factors
        scaled[place] = factor
        handle = model.text_subnetwork.encoder.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: output * scaled.to(output)[:, None]
        )
        with torch.no_grad():
            logits = model(batch.input_ids, batch.attention_mask, batch.numbers, batch.categories)[0].double()
        handle.remove()
        return float(logits[predicted] - logits[torch.arange(len(logits)) != predicted].mean())

    points = [(step + 0.5) / STEPS for step in range(STEPS)]
    derivatives = [(score(point, point + nudge) - score(point, point - nudge)) / (2 * nudge) for point in points]
    assert weights.shape == factors.shape and abs(float(weights[place])) > 1e-3
    assert float(weights[place]) == pytest.approx(np.mean(derivatives), rel=0.02)


def test_the_threshold_decides_which_class_words_speak_for(trained):
    """The same row under two thresholds: another class, and every sign turned around."""
    row = row_of("refund my money")
    low, high = (
        Predictor(trained.loaded, trained.context, threshold=threshold).explain(row) for threshold in (0.0, 1.0)
    )
    assert (low["prediction"]["pred"], high["prediction"]["pred"]) == ("1", "0") and any(
        weight for _, weight in low["tokens"]
    )
    assert [piece for piece, _ in low["tokens"]] == [piece for piece, _ in high["tokens"]]
    np.testing.assert_allclose(
        [weight for _, weight in low["tokens"]], [-weight for _, weight in high["tokens"]], atol=1e-6
    )


@pytest.mark.parametrize("name", ["trained", "several"])
def test_packed_is_padded(request, name, monkeypatch):
    predictor = request.getfixturevalue(name)
    loaded, part = predictor.loaded, predictor.loaded.model.text_subnetwork
    texts = [text if name == "trained" else f"{text} a".strip() if text else "a" for text in TEXTS]
    dataset, _ = batch_of(predictor, TEXTS)
    assert part.is_packed
    packed = explain_rows(
        loaded, dataset, range(len(TEXTS)), predicted=[0] * len(TEXTS), texts=texts, task=predictor.task
    )
    attention = part.encoder.config._attn_implementation
    monkeypatch.setattr(part, "is_packed", False)
    part.encoder.set_attn_implementation("eager")
    padded = explain_rows(
        loaded, dataset, range(len(TEXTS)), predicted=[0] * len(TEXTS), texts=texts, task=predictor.task
    )
    part.encoder.set_attn_implementation(attention)
    assert [[piece for piece, _ in pieces] for pieces in packed] == [
        [piece for piece, _ in pieces] for pieces in padded
    ]
    for some, others in zip(packed, padded, strict=True):
        np.testing.assert_allclose([weight for _, weight in some], [weight for _, weight in others], atol=1e-4)


def test_the_model_is_left_as_it_was(trained):
    model = trained.loaded.model
    trained.explain(row_of("refund my money"))
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not model.text_subnetwork.encoder.get_input_embeddings()._forward_hooks
    with pytest.raises(RuntimeError, match="inside"), _Scaled(model.text_subnetwork.encoder, 0.5):
        raise RuntimeError("inside")
    assert not model.text_subnetwork.encoder.get_input_embeddings()._forward_hooks


def test_a_columns_only_model_has_no_pieces(tmp_path):
    tiny.train(Config(**tiny.settings(tmp_path, text_name=(), max_epochs=1)))
    predictor = Predictor.from_folder(tmp_path / "run")
    row = {name: cell for name, cell in row_of("").items() if name != "text"}
    assert predictor.explain(row) == {"prediction": predictor.predict(row), "tokens": []}
