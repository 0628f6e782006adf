"""Tiny files and encoders for the runs of these tests; how to start, stop and read a run."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, LukeConfig

from mmbert_core.config import Config
from mmbert_core.data.prepare import Data
from mmbert_core.report import results
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training import checkpoint, loop
from mmbert_core.training.loop import fit
from mmbert_core.training.results import Results
from mmbert_core.training.train import prepare_training
from tests.model.conftest import build
from tests.support import tiny

CONTEXT = DistContext(0, 0, 1, 1, torch.device("cpu"))
NUM_ROWS = 40
NO_VALIDATION = {"val_path": (), "val_fraction": 0.0}
STEPS = 10  # of a run as `config_of` has it: 2 epochs of 5 steps of 8 rows


@pytest.fixture(autouse=True)
def library_logging(monkeypatch, caplog):
    """The command line, when a test has called it in this process, keeps the package's lines from other handlers."""
    monkeypatch.setattr(logging.getLogger("mmbert_core"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mmbert_core")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the tiny runs, and have tests of their own."""
    monkeypatch.setattr(results, "write_plots", lambda *_, **__: [])


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The number of threads changes bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """An encoder and the three tables; the token cache is made by the first run."""
    folder = tmp_path_factory.mktemp("files")
    tiny.settings(folder, num_rows=NUM_ROWS)
    return folder


@pytest.fixture
def config_of(files, tmp_path) -> Callable[..., Config]:
    """config_of(lr=1e-3) -> a Config over the shared files whose run is `tmp_path/run`; without test rows."""

    def make(**changes: Any) -> Config:
        values = {"model_path": str(tmp_path / "run"), "test_path": (), "microbatches_per_step": 2}
        return Config(**tiny.settings(files, **(values | changes)))

    return make


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(config: Config, *, dropout: bool = True, context: DistContext = CONTEXT) -> tuple[Results, Data, nn.Module]:
    """Prepare and fit in this process: the results, the data, and the model as `fit` leaves it."""
    data, model = prepare_training(config, context)
    if not dropout:
        without_dropout(model)
    return fit(config, data, model, context), data, model


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def save_encoder(family: str, folder: Path, files: Path) -> Path:
    """An encoder of another family with the tokenizer of the shared files."""
    if family == "Luke":  # parts of it are for entities, which texts here have none of
        torch.manual_seed(0)
        encoder = AutoModel.from_config(
            LukeConfig(
                vocab_size=99,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=80,
                entity_vocab_size=7,
                entity_emb_size=8,
                pad_token_id=0,
            )
        )
    else:
        encoder = build(family, vocab_size=99, num_hidden_layers=1)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (files / "encoder" / name).exists():
            folder.mkdir(exist_ok=True)
            shutil.copy(files / "encoder" / name, folder / name)
    encoder.save_pretrained(folder)
    return folder


# ---- reading and stopping a run ----


class Interrupted(BaseException):
    """Stands for a kill."""


def lines_of(config: Config, key: str = "train_loss") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that have `key`."""
    return [line for line in tiny.metrics_lines(config.model_path) if key in line]


def weights_in(config: Config, step: int | None = None) -> bytes:
    """The weight file of the model folder, or of a checkpoint."""
    folder = Path(config.model_path)
    return (
        (folder if step is None else checkpoint.step_folder(folder / "checkpoints", step)) / "model.safetensors"
    ).read_bytes()


def before_each_step(monkeypatch: pytest.MonkeyPatch, action: Callable[..., None]) -> None:
    """Call `action(run, order)` before every optimizer step."""
    plain = loop.train_one_step

    def train_one_step(run, order):
        action(run, order)
        return plain(run, order)

    monkeypatch.setattr(loop, "train_one_step", train_one_step)


def die_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop the run as a kill does, before its optimizer step `step`."""

    def die(run, order):
        if run.state.step + 1 == step:
            raise Interrupted

    before_each_step(monkeypatch, die)
