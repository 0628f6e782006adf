"""Older model folders without the training range of numbers: it comes from their cache, or nothing is limited."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.number_ranges import recover_number_ranges
from mmbert_core.data.prepare import prepare
from mmbert_core.inference.model_folder import load_model_folder
from tests.support import tiny

CASES: dict[str, dict[str, Any]] = {
    "val_path": {},
    "val_fraction": {"val_path": (), "val_fraction": 0.2},
    "sampled": {"val_path": (), "val_fraction": 0.2, "max_train_rows": 40, "seed": 3},
    "groups": {"val_path": (), "val_fraction": 0.2, "group_name": "kind", "cat_field_list": ()},
}


def older(folder: Path, **changes: Any) -> tuple[Features, Features, Labels, Config]:
    """The features of a run whose cache is in the folder `run`, as an older folder holds them, and whole."""
    settings = tiny.settings(folder, text_name=(), encoder="", cache_path=None, **changes)
    config = Config(**settings)
    data = prepare(config)
    values = {name: value for name, value in data.features.to_json().items() if name not in ("minimums", "maximums")}
    return Features.from_json(values), data.features, data.labels, config


@pytest.mark.parametrize("name", CASES)
def test_the_range_of_the_training_rows_is_found(tmp_path: Path, name: str) -> None:
    features, whole, labels, config = older(tmp_path, **CASES[name])
    found = recover_number_ranges(features, labels, config, Path(config.model_path))
    assert found == whole and found.minimums is not None
    # wherever the folder is now
    shutil.move(config.model_path, tmp_path / "elsewhere")
    assert recover_number_ranges(features, labels, config, tmp_path / "elsewhere") == whole
    assert recover_number_ranges(features, labels, config, Path(config.model_path)) is features


def test_a_cache_of_another_table_is_not_used(tmp_path: Path) -> None:
    features, _, labels, config = older(tmp_path)
    cache = Path(config.model_path) / "cache"
    for path in cache.glob("*/numbers.bin"):
        numbers = np.fromfile(path)
        numbers[0] += 1
        numbers.tofile(path)
    assert recover_number_ranges(features, labels, config, Path(config.model_path)) is features


DAMAGED = [
    "",
    "[]",
    "{}",
    '{"arrays": {}}',
    '{"arrays": 5}',
    '{"arrays": {"numbers": {"dtype": "|O", "shape": [1, 2]}}}',
    '{"arrays": {"numbers": {"dtype": "<f8", "shape": [-1, 99999999999]}}}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_skipped(tmp_path: Path, content: str) -> None:
    features, whole, labels, config = older(tmp_path)
    for meta in (Path(config.model_path) / "cache").glob("*/meta.json"):
        meta.write_text(content)
    assert recover_number_ranges(features, labels, config, Path(config.model_path)) is features
    assert recover_number_ranges(whole, labels, config, Path(config.model_path)) is whole


def test_a_model_folder_without_the_keys_loads_with_them(tmp_path: Path) -> None:
    config = Config(**tiny.settings(tmp_path, text_name=(), encoder="", cache_path=None, test_path=(), max_epochs=1))
    tiny.train(config)
    path = tiny.without_manifest(Path(config.model_path)) / "features.json"
    values = json.loads(path.read_text())
    assert [low < high for low, high in zip(values["minimums"], values["maximums"], strict=True)] == [True, True]
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in ("minimums", "maximums")}))
    assert list(load_model_folder(config.model_path).features.minimums) == values["minimums"]
    shutil.rmtree(Path(config.model_path) / "cache")
    assert load_model_folder(config.model_path).features.minimums is None
