"""Trained models that the tests of this folder share."""

from pathlib import Path

import pytest

from mmbert_core.config import Config
from mmbert_core.report import results
from tests.support import tiny


@pytest.fixture(scope="package", autouse=True)
def no_pictures():
    """Pictures of a test have tests of their own and take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_plots", lambda *_, **__: [])
        yield


@pytest.fixture(scope="package")
def tables(tmp_path_factory) -> Path:
    """The folder of the tables and of the model `run`, trained on them with two classes."""
    folder = tmp_path_factory.mktemp("tables")
    tiny.train(Config(**tiny.settings(folder)))
    return folder


@pytest.fixture(scope="package")
def several(tmp_path_factory) -> Path:
    """The same with three classes."""
    folder = tmp_path_factory.mktemp("several")
    tiny.train(Config(**tiny.settings(folder, num_classes=3, max_epochs=1)))
    return folder
