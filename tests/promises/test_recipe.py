"""Promises with everything on: the recommended recipe, dates, a fusion, an average of the weights.

pytest tests/promises/test_recipe.py -m fault
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmbert_core.export import exporter
from mmbert_core.inference.model_folder import load_model_folder
from tests.support import tiny

pytestmark = pytest.mark.fault
RANKS = (1, 2, 3, 4)
# Named, so that they are not the recipe's: what a tiny encoder and a short test need.
NAMED = ("train_path", "val_path", "test_path", "text_name", "label_name", "id_name", "tab_field_list")
NAMED += ("cat_field_list", "encoder", "max_length", "batch_size", "num_threads", "log_every", "microbatches_per_step")
MORE = {"fusion": "gate", "ema_decay": 0.9, "layer_decay": 0.9, "date_field_list": ["ordered"], "max_length": 32}


def with_dates(path: Path) -> None:
    """Add a column of dates to a table; some cells are empty."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for number, row in enumerate(rows):
        row["ordered"] = (
            "" if number % 11 == 0 else f"2024-{1 + number % 12:02d}-{1 + number % 28:02d} {number % 24:02d}:00"
        )
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The same YAML config on 1 to 4 processes, in run1 to run4."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = tiny.settings(folder, num_rows=203)
    for name in ("train", "val", "test"):
        with_dates(folder / f"{name}.csv")
    named = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items() if key in NAMED}
    for num_processes in RANKS:
        config = named | MORE | {"model_path": str(folder / f"run{num_processes}")}
        (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        tiny.mmbert(num_processes, "train", str(folder / "run.yaml"))
    return folder


def probabilities(path: Path) -> list[float]:
    return [float(line.split("\t")[1]) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize("num_processes", RANKS[1:])
def test_any_number_of_processes_trains_the_same(runs, num_processes):
    folders = [runs / "run1", runs / f"run{num_processes}"]
    configs = [json.loads((folder / "config.json").read_text())["config"] for folder in folders]
    assert configs[0]["recipe"] == "recommended" and configs[0]["blend"] == configs[0]["head_first"] == "auto"
    for key in ("train_loss", "val_loss", "lr", "head_train_loss"):
        lines = [
            [line[key] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line]
            for folder in folders
        ]
        assert len(lines[0]) > 0 and lines[0] == pytest.approx(lines[1], rel=1e-4), key
    tested = [probabilities(next(folder.glob("multimodal_bert-*/test_result_0.tsv"))) for folder in folders]
    np.testing.assert_allclose(*tested, atol=1e-3)  # the weights of the blend are rounded by the fit
    blends = [json.loads((folder / "blend.json").read_text())["members"] for folder in folders]
    assert [member["name"] for member in blends[0]] == [member["name"] for member in blends[1]]


def test_predictions_are_the_same_bytes_on_any_number_of_processes(runs):
    for num_processes in (1, 2, 3):
        paths = [str(runs / "run1"), str(runs / "test.csv"), str(runs / f"by{num_processes}.tsv")]
        tiny.mmbert(num_processes, "predict", *paths, "--num_threads", "1")
        assert (runs / f"by{num_processes}.tsv").read_bytes() == (runs / "by1.tsv").read_bytes()
    tested = next((runs / "run1").glob("multimodal_bert-*/test_result_0.tsv"))
    np.testing.assert_allclose(probabilities(tested), probabilities(runs / "by1.tsv"), atol=1e-6)


@pytest.mark.parametrize("format", exporter.MODEL_FILES)
def test_exports_give_the_same_probabilities(runs, format):
    for package in exporter.ONNX_PACKAGES:
        pytest.importorskip(package)
    assert exporter.export_model(load_model_folder(runs / "run1"), runs / format, format=format) < 1e-4
