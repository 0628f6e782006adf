"""Attributions: the spans are the text, the values are integrated derivatives, and a planted word is found."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmbert_core.config import Config
from mmbert_core.data.tokens import token_spans, tokenise
from mmbert_core.inference.attributions import (
    HIGHLIGHT_LEVELS,
    STEPS,
    _ScaledEmbeddings,
    _span_attributions,
    explain_rows,
    highlight_level,
    largest_attributions,
    token_attributions,
)
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
    """A model so confident of the planted word that the gradient at the text itself has the wrong sign."""
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
    """Three classes, two text columns, up to three chunks a text; hardly trained."""
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
    predictor.loaded.model.text_subnetwork.linear.weight.data *= 50  # with the initial weights words hardly matter
    return predictor


def row_of(text: str) -> dict[str, object]:
    return {"row_id": "r", "text": text, "age": 30, "amount": 1.5, "kind": "a"}


def test_the_planted_word_has_the_largest_attribution(trained, tmp_path):
    with open(write_signal(tmp_path / "new.csv", 24, 7)) as stream:
        rows = [row for row in csv.DictReader(stream) if row["label"] == "1"]
    for row in rows:
        explained = trained.explain(row)
        assert explained["prediction"] == trained.predict(row)
        assert explained["prediction"]["pred"] == "1" and all(-1 <= value <= 1 for _, value in explained["tokens"])
        assert max(explained["tokens"], key=lambda token: token[1]) == ["refund", 1.0]


@pytest.mark.parametrize("text", TEXTS)
def test_the_spans_are_the_text_as_far_as_it_was_read(trained, several, text):
    for predictor, whole in ((trained, text), (several, f"{text} a" if text else "a")):
        config = predictor.loaded.config
        sizes = dict(max_length=config.max_length, max_chunks=config.max_chunks)
        joined = "".join(span for span, _ in predictor.explain(row_of(text))["tokens"])
        if tokenise(predictor.loaded.tokenizer, [whole], **sizes).num_truncated:
            ids = [tokenise(predictor.loaded.tokenizer, [each], **sizes).ids.tolist() for each in (whole, joined)]
            assert len(joined) < len(whole) and whole.startswith(joined) and ids[0] == ids[1]
        else:
            assert joined == whole


def test_gaps_and_what_has_no_gradient_have_no_attribution(trained):
    tokens = trained.explain(row_of("refund  my \u200b money"))["tokens"]
    assert all(value == 0 for span, value in tokens if not span.strip(" \u200b"))
    assert all(value for span, value in tokens if span.isalpha())
    assert trained.explain(row_of(" \n"))["tokens"] == [[" \n", 0.0]] and trained.explain(row_of(""))["tokens"] == []


def test_tokens_that_share_a_character_are_one_span():
    backend = Tokenizer(
        models.BPE(
            vocab={letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    spans, read = token_spans(tokenizer, "a😀 b", max_length=64, max_chunks=1)
    assert spans == [(0, 1), *[(1, 2)] * 4, (2, 3), (3, 4)] and read == "a😀 b"
    assert _span_attributions(read, spans, [1, 1, 2, 3, 4, 5, 6]) == [("a", 1), ("😀", 10), (" ", 5), ("b", 6)]


def batch_of(predictor: Predictor, texts: list[str]):
    dataset = predictor._encode(
        records_to_chunk([row_of(text) for text in texts], Roles.from_config(predictor.loaded.config).inputs())
    )
    return dataset, dataset.batch(range(len(texts)))


@pytest.mark.parametrize("name", ["trained", "several"])
def test_an_attribution_is_the_integrated_derivative_by_the_size_of_its_embedding(request, name):
    predictor = request.getfixturevalue(name)
    model = predictor.loaded.model
    _, batch = batch_of(
        predictor, ["refund my money", "hello where is my order please now thanks never again wrong size"]
    )
    predicted = 1 if name == "trained" else 2
    values = token_attributions(model, batch, torch.full((2,), predicted), task=predictor.task)
    index, nudge = 1, 5e-3
    factors = torch.ones(batch.attention_mask.sum())

    def score(others: float, factor: float) -> float:
        """Of the first row, its token number `index` times `factor`, all others times `others`."""
        scaled = others * factors
        scaled[index] = factor
        handle = model.text_subnetwork.encoder.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: output * scaled.to(output)[:, None]
        )
        with torch.no_grad():
            logits = model(batch.input_ids, batch.attention_mask, batch.numbers, batch.categories)[0].double()
        handle.remove()
        return float(logits[predicted] - logits[torch.arange(len(logits)) != predicted].mean())

    points = [(step + 0.5) / STEPS for step in range(STEPS)]
    derivatives = [(score(point, point + nudge) - score(point, point - nudge)) / (2 * nudge) for point in points]
    assert values.shape == factors.shape and abs(float(values[index])) > 1e-3
    assert float(values[index]) == pytest.approx(np.mean(derivatives), rel=0.02)


def test_the_threshold_decides_which_class_is_explained(trained):
    """The same row under two thresholds: another class, and every sign turned around."""
    row = row_of("refund my money")
    low, high = (
        Predictor(trained.loaded, trained.context, threshold=threshold).explain(row) for threshold in (0.0, 1.0)
    )
    assert (low["prediction"]["pred"], high["prediction"]["pred"]) == ("1", "0")
    assert any(value for _, value in low["tokens"])
    assert [span for span, _ in low["tokens"]] == [span for span, _ in high["tokens"]]
    np.testing.assert_allclose(
        [value for _, value in low["tokens"]], [-value for _, value in high["tokens"]], atol=1e-6
    )


@pytest.mark.parametrize("name", ["trained", "several"])
def test_packed_is_padded(request, name, monkeypatch):
    predictor = request.getfixturevalue(name)
    loaded, text_encoder = predictor.loaded, predictor.loaded.model.text_subnetwork
    texts = [text if name == "trained" else f"{text} a".strip() if text else "a" for text in TEXTS]
    dataset, _ = batch_of(predictor, TEXTS)
    assert text_encoder.is_packed
    packed = explain_rows(
        loaded, dataset, range(len(TEXTS)), predicted=[0] * len(TEXTS), texts=texts, task=predictor.task
    )
    attention = text_encoder.encoder.config._attn_implementation
    monkeypatch.setattr(text_encoder, "is_packed", False)
    text_encoder.encoder.set_attn_implementation("eager")
    padded = explain_rows(
        loaded, dataset, range(len(TEXTS)), predicted=[0] * len(TEXTS), texts=texts, task=predictor.task
    )
    text_encoder.encoder.set_attn_implementation(attention)
    assert [[span for span, _ in spans] for spans in packed] == [[span for span, _ in spans] for spans in padded]
    for some, others in zip(packed, padded, strict=True):
        np.testing.assert_allclose([value for _, value in some], [value for _, value in others], atol=1e-4)


def test_the_model_is_left_as_it_was(trained):
    model = trained.loaded.model
    trained.explain(row_of("refund my money"))
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not model.text_subnetwork.encoder.get_input_embeddings()._forward_hooks
    with pytest.raises(RuntimeError, match="inside"), _ScaledEmbeddings(model.text_subnetwork.encoder, 0.5):
        raise RuntimeError("inside")
    assert not model.text_subnetwork.encoder.get_input_embeddings()._forward_hooks


def test_a_columns_only_model_has_no_spans(tmp_path):
    tiny.train(Config(**tiny.settings(tmp_path, text_name=(), max_epochs=1)))
    predictor = Predictor.from_folder(tmp_path / "run")
    row = {name: cell for name, cell in row_of("").items() if name != "text"}
    assert predictor.explain(row) == {"prediction": predictor.predict(row), "tokens": []}


def test_the_level_of_a_highlight_grows_with_the_attribution():
    assert [highlight_level(value) for value in (0.0, 0.09, *HIGHLIGHT_LEVELS, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert [highlight_level(-value) for value in (0.09, *HIGHLIGHT_LEVELS)] == [0, -1, -2, -3]


def test_the_largest_attributions_are_those_of_highlighted_words():
    spans = [(" good", 0.2), (" ", 0.9), ("bad ", -0.4), ("so", 0.09), ("best", 1.0), ("fine", 0.2)]
    assert largest_attributions(spans) == ([("best", 1.0), ("good", 0.2), ("fine", 0.2)], [("bad", -0.4)])
    assert largest_attributions(spans, 1) == ([("best", 1.0)], [("bad", -0.4)])
    assert largest_attributions([]) == ([], [])
