"""Promises of the blend: ranks, resume, folder, export, int8, explanation.   pytest tests/promises/test_blend.py"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.export import exporter
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from mmbert_core.training import blend_fit
from tests.support import tiny

KINDS = {  # what a model may have and lack
    "three classes in chunks": {"num_classes": 3, "max_chunks": 3, "max_length": 9},
    "with all else": {"fusion": "cross_attention", "head_first": "auto", "aux_loss_weight": 0.2, "ema_decay": 0.9},
    "text only": {"tab_field_list": (), "cat_field_list": ()},
    "columns only": {"text_name": ()},
}


def probabilities(path: Path) -> list[float]:
    return [float(line.split("\t")[1]) for line in path.read_text().splitlines()[1:]]


def members_of(folder: Path) -> dict[str, float]:
    return {member["name"]: member["weight"] for member in json.loads((folder / "blend.json").read_text())["members"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same run on one process and on two, in run1 and run2."""
    folder = tmp_path_factory.mktemp("blend")
    for num_processes in (1, 2):
        path = str(folder / f"run{num_processes}")
        settings = tiny.settings(folder, num_rows=200, model_path=path, blend="auto", max_epochs=1)
        (folder / "config.json").write_text(json.dumps(settings))
        tiny.mmbert(num_processes, "train", str(folder / "config.json"))
    return folder


def test_every_rank_predicts_with_the_blend(runs):
    weights = members_of(runs / "run1")
    assert (
        weights["network"] < 1
        and weights["words"] + weights["words + columns"] > 0
        and sum(weights.values()) == pytest.approx(1)
    )
    tested = [next((runs / name).glob("multimodal_bert-*/test_result_0.tsv")) for name in ("run1", "run2")]
    np.testing.assert_allclose(*map(probabilities, tested), atol=1e-4)
    for num_processes in (1, 2, 3):
        paths = [str(path) for path in (runs / "run1", runs / "test.csv", runs / f"by{num_processes}.tsv")]
        tiny.mmbert(num_processes, "predict", *paths, "--num_threads", "1")
        assert (runs / f"by{num_processes}.tsv").read_bytes() == (runs / "by1.tsv").read_bytes()
    np.testing.assert_allclose(probabilities(tested[0]), probabilities(runs / "by1.tsv"), atol=1e-6)


def test_a_run_killed_while_members_are_fitted_ends_with_the_same_files(runs, monkeypatch):
    saved = json.loads((runs / "run1" / "config.json").read_text())["config"]
    config = config_from_dict(saved | {"model_path": str(runs / "resumed")})
    fit = blend_fit.fit_blend

    def interrupted(*arguments):
        fit(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blend_fit, "fit_blend", interrupted)
        tiny.train(config)
    assert not (runs / "resumed" / "model.safetensors").exists()
    tiny.train(config)
    for name in ("model.safetensors", "blend.json", "thresholds.json"):
        assert (runs / "resumed" / name).read_bytes() == (runs / "run1" / name).read_bytes(), name


@pytest.mark.parametrize("format", exporter.MODEL_FILES)
def test_exports_give_the_blend(runs, format):
    for package in exporter.ONNX_PACKAGES:
        pytest.importorskip(package)
    assert exporter.export_model(load_model_folder(runs / "run1"), runs / format, format=format) < 1e-5


def test_predictions_in_int8_are_close(runs):
    rows = [{"text": "please refund my order", "age": "31", "amount": "1.5", "kind": "a"}]
    found = [Predictor.from_folder(runs / "run1", precision=precision).predict(rows) for precision in ("fp32", "int8")]
    assert found[0][0]["prob"] == pytest.approx(found[1][0]["prob"], abs=0.02)


def test_explanation_and_importance_count_the_words(runs):
    predictor = Predictor.from_folder(runs / "run1")
    words = predictor.loaded.model.blend.words
    token = predictor.loaded.tokenizer.convert_tokens_to_ids("broken")
    with torch.no_grad():
        words.weight[blend_fit.bag_of_words.token_features(token)] = 40.0
    explained = predictor.explain({"text": "where is my broken order", "age": "31", "amount": "1.5", "kind": "a"})
    assert max(explained["tokens"], key=lambda span: span[1])[0] == "broken"
    [report] = (runs / "run1").glob("multimodal_bert-*/report.json")
    drops = {item["name"]: item["drop"] for item in json.loads(report.read_text())["importance"]["items"]}
    assert set(drops) == {"text", "age", "amount", "kind"}


def test_report_card_and_inspect_show_the_members(runs):
    [report] = (runs / "run1").glob("multimodal_bert-*/report.json")
    section = json.loads(report.read_text())["blend"]
    weights = members_of(runs / "run1")
    assert {row["name"]: row.get("weight") for row in section["rows"]} == {"the blend": None, **weights}
    predictor = Predictor.from_folder(runs / "run1")
    with open(runs / "test.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    blended = log_loss_of(predictor, rows)
    predictor.loaded.model.blend = None
    alone = {row["name"]: row["metrics"]["log_loss"]["value"] for row in section["rows"] if row["metrics"]}
    assert alone["the blend"] == pytest.approx(blended, abs=1e-5)
    assert alone["network"] == pytest.approx(log_loss_of(predictor, rows), abs=1e-4)  # at temperature 1
    assert "The blend and each member alone" in (report.parent / "report.html").read_text()
    assert "`prob` is a weighted mean of the probabilities of network" in (runs / "run1" / "README.md").read_text()


def log_loss_of(predictor: Predictor, rows: list[dict[str, str]]) -> float:
    of_class_1 = np.array([row["prob"] for row in predictor.predict(rows)])
    is_class_1 = np.array([row["label"] == "1" for row in rows])
    return float(-np.log(np.where(is_class_1, of_class_1, 1 - of_class_1)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_a_blend(tmp_path, kind):
    config = Config(**tiny.settings(tmp_path, num_rows=200, blend="auto", max_epochs=1, **KINDS[kind]))
    tiny.train(config)
    names = {
        "text only": ["network", "words"],
        "columns only": ["network", "columns"],
    }.get(kind, ["network", "words", "words + columns", "columns"])
    assert list(members_of(Path(config.model_path))) == names
    loaded = load_model_folder(config.model_path)
    stored = load_file(Path(config.model_path) / "model.safetensors")
    assert set(stored) == set(loaded.model.state_dict()) and any(name.startswith("blend.") for name in stored)
    assert exporter.export_model(loaded, tmp_path / "exported", format="torch_export") < 1e-5


def test_without_validation_rows_there_is_no_blend(tmp_path, caplog):
    changes = {"val_path": (), "val_fraction": 0.0, "test_path": ()}
    config = Config(**tiny.settings(tmp_path, blend="auto", max_epochs=1, **changes))
    with caplog.at_level("INFO"):
        tiny.train(config)
    assert "blend: none, because its weights need validation rows" in caplog.text
    assert not (tmp_path / "run" / "blend.json").exists()
    assert load_model_folder(tmp_path / "run").model.blend is None


def test_a_changed_blend_is_refused(runs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(runs / "run1", folder)
    (folder / "blend.json").write_text((folder / "blend.json").read_text().replace("0.", "0.1", 1))
    with pytest.raises(InputError, match=r"blend\.json: is not as it was written"):
        load_model_folder(folder)
    tiny.without_manifest(folder)
    with pytest.raises(InputError, match="weights that sum to 1"):
        load_model_folder(folder)
    shutil.copy(runs / "run1" / "blend.json", folder / "blend.json")
    tensors = load_file(folder / "model.safetensors")
    tensors["blend.words.weight"][5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"blend\.words\.weight: expected finite float32"):
        load_model_folder(folder)
    (folder / "blend.json").unlink()
    with pytest.raises(InputError, match="does not fit"):
        load_model_folder(folder)
