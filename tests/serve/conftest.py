"""One trained model and one server for all tests of `mmbert serve`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmbert_core.config import Config
from mmbert_core.predictor import Predictor
from mmbert_core.serve.server import Server
from tests.support import tiny
from tests.support.serving import serving


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.train(Config(**tiny.settings(folder, max_epochs=1)))
    return folder / "run"


@pytest.fixture(scope="package")
def server(model) -> Iterator[Server]:
    with serving(Predictor.from_folder(model), str(model)) as running:
        yield running
