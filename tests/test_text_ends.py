"""A tokenizer that keeps the end of a text does so in training, prediction, explanation and export; pooling: last in
all of them too.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.export import example as export_example
from mmbert_core.export import exporter
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.manifest import MANIFEST
from tests.support import tiny

CPU = DistContext(0, 0, 1, 1, torch.device("cpu"))
FILLER = "ship item " * 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, its results): a text's last word alone decides, far beyond max_length."""
    folder = tmp_path_factory.mktemp("ends")
    settings = tiny.settings(
        folder, max_length=9, max_chunks=2, pooling="last", tab_field_list=("age",), max_epochs=16, lr=3e-3, num_rows=48
    )
    path = folder / "encoder" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left", "padding_side": "left"}))
    for seed, name in enumerate(("train", "val", "test")):
        with open(folder / f"{name}.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["row_id", "text", "age", "kind", "label"])
            for row in range(48):
                writer.writerow(
                    [
                        f"{seed}-{row}",
                        f"{FILLER[: 10 * (row % 9 + 20)]}{'refund' if row % 2 else 'thanks'}",
                        row % 5,
                        "a",
                        row % 2,
                    ]
                )
    results = tiny.train(Config(**settings | {"metric_choices": ("auroc",), "early_stop_metric": "val/auroc"}))
    return folder, results


def test_training_reads_the_end_and_the_folder_keeps_the_setting(trained, caplog):
    folder, results = trained
    assert results.test_metrics["test/auroc"] == 1.0
    assert json.loads((folder / "run" / "encoder" / "tokenizer_config.json").read_text())["truncation_side"] == "left"
    record = json.loads((folder / "run" / "config.json").read_text())
    assert (record["resolved"]["pooling"], record["resolved"]["truncation_side"]) == ("last", "left")
    predictor = Predictor.from_folder(folder / "run", CPU)
    with caplog.at_level("WARNING"):
        rows = [{"text": FILLER + word, "age": 1, "kind": "a"} for word in ("refund", "thanks")]
        high, low = (row["prob"] for row in predictor.predict(rows))
    assert high > low and "were truncated at the beginning: the end is kept" in caplog.text


def test_a_file_whose_cells_are_shortened_while_reading_gives_the_same_rows(trained, tmp_path):
    folder, _ = trained
    predictor = Predictor.from_folder(folder / "run", CPU)
    rows = [
        {"row_id": str(row), "text": FILLER * (20 * row) + word, "age": "1", "kind": "a"}
        for row, word in enumerate(("refund", "thanks", "refund"))
    ]
    with open(tmp_path / "new.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    predictor.predict_file([str(tmp_path / "new.csv")], tmp_path / "out.tsv")
    with open(tmp_path / "out.tsv", newline="") as stream:
        probabilities = [float(row["prob"]) for row in csv.DictReader(stream, delimiter="\t")]
    np.testing.assert_allclose(probabilities, [row["prob"] for row in predictor.predict(rows)], atol=1e-6)


def test_an_explanation_is_of_the_end(trained):
    folder, _ = trained
    text = FILLER + "refund"
    tokens = Predictor.from_folder(folder / "run", CPU).explain({"text": text, "age": 1, "kind": "a"})["tokens"]
    read = "".join(piece for piece, _ in tokens)
    assert text.endswith(read) and len(read) < len(text) and max(tokens, key=lambda item: abs(item[1]))[0] == "refund"


def test_the_last_token_of_a_text_does_not_depend_on_its_neighbours_also_in_8_bits(trained):
    folder, _ = trained
    rows = [{"text": text, "age": 1, "kind": "a"} for text in ("refund", FILLER + "thanks", "now please refund")]
    for precision in ("fp32", "int8"):
        predictor = Predictor.from_folder(folder / "run", CPU, precision=precision)
        together, alone = predictor.predict(rows), [predictor.predict([row])[0] for row in rows]
        np.testing.assert_allclose([row["prob"] for row in together], [row["prob"] for row in alone], atol=1e-5)


def test_folders_of_older_versions_truncate_at_the_end_as_they_were_trained(trained, tmp_path):
    folder, _ = trained
    old = tmp_path / "run"
    shutil.copytree(folder / "run", old, ignore=shutil.ignore_patterns(MANIFEST, "checkpoints", "cache"))
    record = json.loads((old / "config.json").read_text())
    del record["resolved"]["truncation_side"]
    (old / "config.json").write_text(json.dumps(record))
    assert load_model_folder(old).tokenizer.truncation_side == "right"


def test_the_export_reads_the_end_too(trained, tmp_path):
    for package in exporter.ONNX_PACKAGES:
        pytest.importorskip(package)
    folder, _ = trained
    loaded = load_model_folder(folder / "run")
    exporter.export_model(
        loaded, tmp_path / "exported", format="onnx"
    )  # which compares generated texts, most of them longer than is read
    settings, tokenizer = export_example.load_preprocessing(tmp_path / "exported")
    run = export_example.load_model(tmp_path / "exported")
    rows = [{"row_id": "0", "text": FILLER + word, "age": "1", "kind": "a"} for word in ("refund", "thanks")]
    found = export_example.score(rows, settings, tokenizer, run)
    np.testing.assert_allclose(found, [row["prob"] for row in Predictor(loaded, CPU).predict(rows)], atol=1e-4)
    assert found[0] > found[1] + 0.01


def test_a_resume_with_the_other_side_is_refused(trained):
    folder, _ = trained
    path = folder / "encoder" / "tokenizer_config.json"
    before = path.read_text()
    try:
        path.write_text(before.replace('"left"', '"right"'))
        with pytest.raises(InputError, match="tokenizer"):
            tiny.train(load_model_folder(folder / "run").config)
    finally:
        path.write_text(before)
