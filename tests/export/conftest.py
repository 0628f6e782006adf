"""Models and their ONNX exports, made once for all tests of `mmbert export`."""

from pathlib import Path

import pytest

from mmbert_core.export import exporter
from mmbert_core.inference.model_folder import LoadedModel
from tests.support.exports import CASES, build


@pytest.fixture(scope="package", params=CASES)
def case(request, tmp_path_factory) -> tuple[Path, LoadedModel]:
    """A folder with tables, the model `run` and its ONNX export `exported`."""
    folder = tmp_path_factory.mktemp("export")
    loaded = build(folder, **CASES[request.param])
    exporter.export_model(loaded, folder / "exported", format="onnx")
    return folder, loaded


@pytest.fixture(scope="package")
def plain(tmp_path_factory) -> tuple[Path, LoadedModel]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, build(folder)
