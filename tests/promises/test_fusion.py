"""Promises of each fusion: interactions, ranks, resume, folder, export.   pytest tests/promises/test_fusion.py"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mmbert_core.ablation import variants_of
from mmbert_core.config import Config
from mmbert_core.config_checks import FUSIONS_OF_BOTH
from mmbert_core.config_reader import config_from_dict
from mmbert_core.export import exporter
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from tests.support import tiny

FUSIONS = ("gate", "cross_attention", "moe", "tabm")
CHUNKS = {"max_length": 12, "max_chunks": 3, "pooling": "mean"}
COLUMNS = {"column_encoding": "piecewise_linear", "wide_columns": True}


def write_exclusive_or(path: Path, num_rows: int, seed: int) -> tuple[str]:
    """Label: either the text has the word refund or the number is 1, not both. Neither alone tells anything."""
    rng = np.random.default_rng(seed)
    words = [word for word in tiny.WORDS if word != "refund"]
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "flag", "kind", "label"])
        for _ in range(num_rows):
            has_word, flag = rng.integers(2), rng.integers(2)
            text = list(rng.choice(words, 6))
            text[rng.integers(6)] = "refund" if has_word else "thanks"
            writer.writerow([" ".join(text), flag, rng.choice(list("abc")), has_word ^ flag])
    return (str(path),)


@pytest.mark.parametrize("fusion", ["concat", *FUSIONS])
def test_the_exclusive_or_of_a_word_and_a_number_is_learned_by_all_but_concat(tmp_path, fusion):
    tiny.write_encoder(tmp_path / "encoder", layers=1)
    paths = {
        f"{name}_path": write_exclusive_or(tmp_path / f"{name}.csv", rows, seed)
        for seed, (name, rows) in enumerate([("train", 800), ("val", 200), ("test", 300)])
    }
    columns = {"id_name": None, "tab_field_list": ("flag",), "cat_field_list": ("kind",)}
    recipe = {"batch_size": 16, "lr": 3e-3, "max_epochs": 6, "pooling": "mean", "early_stop_metric": "val/auroc"}
    results = tiny.train(Config(**tiny.settings(tmp_path, **paths, **columns, **recipe, fusion=fusion)))
    auroc = results.test_metrics["test/auroc"]
    assert auroc < 0.75 if fusion == "concat" else auroc > 0.99


# ---- one run of each fusion ----


@pytest.fixture(scope="module", params=FUSIONS)
def run(request, tmp_path_factory) -> Path:
    """A run on one process, in `run`; texts have up to three chunks."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.train(Config(**tiny.settings(folder, num_rows=90, fusion=request.param, **CHUNKS, **COLUMNS)))
    return folder


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in tiny.metrics_lines(folder) if "train_loss" in line]


def saved_settings(run: Path) -> dict:
    return json.loads((run / "run" / "config.json").read_text())["config"]


@pytest.mark.slow
def test_losses_are_the_same_on_three_processes(run):
    settings = saved_settings(run) | {"model_path": str(run / "run3"), "test_path": []}
    (run / "config.json").write_text(json.dumps(settings))
    done = tiny.torchrun(3, ["-m", "mmbert_core", "train", str(run / "config.json")], timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    np.testing.assert_allclose(losses(run / "run3"), losses(run / "run"), rtol=1e-5)
    assert len(losses(run / "run")) == 24


def test_a_killed_run_resumes_to_the_same_bits(run, monkeypatch):
    config = config_from_dict(saved_settings(run) | {"model_path": str(run / "resumed"), "save_every": 1})
    tiny.train_in_two_starts(config, monkeypatch, step=15)
    assert losses(run / "resumed") == losses(run / "run")
    assert (run / "resumed" / "model.safetensors").read_bytes() == (run / "run" / "model.safetensors").read_bytes()


def test_the_folder_predicts_as_the_run_tested_and_in_int8(run):
    [tested] = (run / "run").glob("multimodal_bert-*/test_result_0.tsv")
    with open(run / "test.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = [float(line.split("\t")[1]) for line in tested.read_text().splitlines()[1:]]
    found = [row["prob"] for row in Predictor.from_folder(run / "run").predict(rows)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    int8 = [row["prob"] for row in Predictor.from_folder(run / "run", precision="int8").predict(rows)]
    assert 0 < np.abs(np.subtract(int8, found)).max() < 0.02


@pytest.mark.parametrize("format", exporter.MODEL_FILES)
def test_exports_give_the_same_probabilities(run, format):
    for package in exporter.ONNX_PACKAGES:
        pytest.importorskip(package)
    loaded = Predictor.from_folder(run / "run").loaded
    assert exporter.export_model(loaded, run / format, format=format) < 1e-5


def test_explanation_and_importance_name_words_and_columns(run):
    row = {"text": "refund pay", "age": "31", "amount": "1.5", "kind": "a"}
    explained = Predictor.from_folder(run / "run").explain(row)
    assert [span for span, _ in explained["tokens"]] == ["refund", " ", "pay"]
    assert any(value for _, value in explained["tokens"])
    [report] = (run / "run").glob("multimodal_bert-*/report.json")
    importance = json.loads(report.read_text())["importance"]
    assert {item["name"] for item in importance["items"]} == {"text", "age", "amount", "kind"}


# ---- models of one kind of input ----


@pytest.mark.parametrize("missing", [{"text_name": ()}, {"tab_field_list": (), "cat_field_list": ()}])
def test_tabm_works_with_one_kind_of_input_and_fusions_of_both_are_refused(tmp_path, missing):
    tiny.train(Config(**tiny.settings(tmp_path, **missing, fusion="tabm", max_epochs=1)))
    row = {"text": "pay", "age": 3, "amount": 1, "kind": "a"}
    assert 0 < Predictor.from_folder(tmp_path / "run").predict(row)["prob"] < 1
    for fusion in FUSIONS_OF_BOTH:
        with pytest.raises(InputError, match=f"fusion: {fusion} joins text and columns, found .* only: set fusion to"):
            Config(**tiny.settings(tmp_path, **missing, fusion=fusion))


def test_an_ablation_of_a_fusion_of_both_uses_concat_for_one_kind_of_input(tmp_path):
    variants = variants_of(Config(**tiny.settings(tmp_path, fusion="gate")))
    assert [variant.get("fusion") for variant in variants.values()] == ["concat", "concat", None]
    variants = variants_of(Config(**tiny.settings(tmp_path, fusion="tabm")))
    assert not any("fusion" in variant for variant in variants.values())
