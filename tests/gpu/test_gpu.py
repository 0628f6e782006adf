"""On a CUDA device: mixed precision trains, resumes and predicts. `pytest -m gpu tests/gpu -s`"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.inference.precision import resolve_precision
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.ranks import DistContext, read_context
from mmbert_core.training import start
from mmbert_core.training.checkpoint import list_steps, step_folder
from tests.support import tiny
from tests.training.conftest import CONTEXT as CPU
from tests.training.conftest import train

pytestmark = pytest.mark.gpu
STEPS = 10  # 2 epochs of 5 steps of 8 rows


@pytest.fixture(scope="module")
def gpu() -> DistContext:
    assert torch.cuda.is_available(), "expected a CUDA device; `pytest` without -m gpu leaves these tests out"
    return read_context()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.settings(folder, num_rows=40)
    return folder


@pytest.fixture
def config_of(files, tmp_path):
    def make(**changes: Any) -> Config:
        return Config(
            **tiny.settings(files, **({"model_path": str(tmp_path / "run"), "microbatches_per_step": 2} | changes))
        )

    return make


def losses_of(config: Config) -> list[float]:
    return [line["train_loss"] for line in tiny.metrics_lines(config.model_path) if "train_loss" in line]


def state_of(config: Config, step: int) -> dict[str, Any]:
    return json.loads((step_folder(Path(config.model_path) / "checkpoints", step) / "state.json").read_text())


def as_if_killed_after(step: int, config: Config, model_path: Path) -> Config:
    """A copy of a run in its state right after the checkpoint of `step`; every step must have one."""
    shutil.copytree(config.model_path, model_path)
    for newer in list_steps(model_path / "checkpoints"):
        if newer > step:
            shutil.rmtree(step_folder(model_path / "checkpoints", newer))
    (model_path / "train_results.json").unlink()
    (model_path / "model.safetensors").unlink()
    return replace(config, model_path=str(model_path))


# ---- training and predicting ----


@pytest.mark.parametrize("asked", ("fp32", "bf16", "fp16", "auto"))
def test_a_precision_trains_tests_and_predicts(gpu, config_of, asked):
    torch.cuda.reset_peak_memory_stats()
    config = config_of(precision=asked, gradient_clip_val=1.0, class_weights=(1.0, 2.0))
    results, data, model = train(config, context=gpu)
    used = resolve_precision(asked, gpu.device)
    assert results.precision == used and (used == asked or asked in ("auto", "bf16"))
    assert results.steps == STEPS and results.skipped_steps < STEPS
    assert all(math.isfinite(loss) for loss in losses_of(config))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # autocast, never half weights
    assert 0.1 < results.peak_memory_mb <= torch.cuda.max_memory_allocated() / 2**20

    tested = pd.read_csv(results.test_folder / "test_result_0.tsv", sep="\t", dtype={"row_id": str})
    evaluated = Predictor.from_folder(config.model_path, gpu, precision=asked).score(data.test)
    assert evaluated.ids == tested["row_id"].tolist() and np.isfinite(evaluated.preds).all()
    difference = np.abs(evaluated.preds - tested["prob"]).max()
    print(f"{asked}: largest difference, in the run and from the model folder: {difference:.1e}")
    assert difference < 1e-5


def test_fp32_learns_what_the_cpu_learns(gpu, config_of, tmp_path):
    """The same rows in the same steps, up to rounding, with dropout off (its draws differ between devices)."""
    values = {"precision": "fp32", "max_epochs": 1, "test_path": ()}
    configs = [config_of(model_path=str(tmp_path / name), **values) for name in ("cpu", "gpu")]
    for config, context in zip(configs, (CPU, gpu), strict=True):
        train(config, dropout=False, context=context)
    worst = max(abs(a - b) / a for a, b in zip(*map(losses_of, configs), strict=True))
    print(f"largest relative difference of a loss, CPU and GPU: {worst:.1e}")
    assert worst < 1e-3


def test_mixed_precision_predicts_nearly_what_fp32_does(gpu, config_of):
    config = config_of(precision="fp32", lr=3e-3)
    train(config, context=gpu)
    test = prepare(config).test
    preds = {
        name: Predictor.from_folder(config.model_path, gpu, precision=name).score(test).preds
        for name in ("fp32", "bf16", "fp16")
    }
    on_cpu = Predictor.from_folder(config.model_path, CPU).score(test).preds
    differences = {
        "cpu": np.abs(on_cpu - preds["fp32"]).max(),
        **{name: np.abs(preds[name] - preds["fp32"]).max() for name in ("bf16", "fp16")},
    }
    print(
        "largest difference of a probability from fp32 on the GPU:",
        {name: f"{value:.1e}" for name, value in differences.items()},
    )
    assert differences["cpu"] < 1e-4 and 0 < differences["fp16"] < 5e-3 and 0 < differences["bf16"] < 3e-2


# ---- resume ----


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_deterministic_run_resumes_to_the_same_bits(gpu, config_of, tmp_path, precision):
    """On the command line, in processes of their own: cuBLAS reads its environment variable once, at its first call."""
    config = config_of(
        precision=precision, deterministic=True, save_every=1, keep_checkpoints=100, val_check_interval=3
    )
    run(config, tmp_path)
    again = replace(config, model_path=str(tmp_path / "again"))
    run(again, tmp_path)
    resumed = as_if_killed_after(4, config, tmp_path / "resumed")
    run(resumed, tmp_path)
    for other in (again, resumed):
        for step in (5, STEPS):
            for name in ("model.safetensors", "optimizer.safetensors"):
                ours, theirs = (
                    step_folder(Path(each.model_path) / "checkpoints", step) / name for each in (config, other)
                )
                assert ours.read_bytes() == theirs.read_bytes(), f"{other.model_path} step {step} {name}"
        assert (Path(config.model_path) / "model.safetensors").read_bytes() == (
            Path(other.model_path) / "model.safetensors"
        ).read_bytes()
        for key in ("scaler", "scheduler", "best_step", "best_value", "skipped_steps"):
            assert state_of(config, STEPS)[key] == state_of(other, STEPS)[key]
        assert losses_of(other) == losses_of(config)


def run(config: Config, folder: Path, *, num_processes: int = 1) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    start = tiny.run_command if num_processes == 1 else lambda command: tiny.torchrun(num_processes, command)
    done = start([str(tiny.ROOT / "train.py"), str(path)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_every_gpu_of_the_machine_trains(gpu, config_of, tmp_path):
    """With NCCL if there are two GPUs, else the same command with one process."""
    count = min(2, torch.cuda.device_count())
    config = config_of(precision="fp32", test_path=())
    run(config, tmp_path, num_processes=count)
    written = json.loads((Path(config.model_path) / "train_results.json").read_text())
    assert written["world_size"] == count and written["steps"] == STEPS


# ---- loss scaling ----


def test_overflow_skips_optimizer_and_schedule_and_the_scale_survives_a_resume(gpu, config_of, tmp_path, monkeypatch):
    """A loss scale of 2**40 overflows in fp16 until it has come down by steps of 2**12."""
    monkeypatch.setattr(
        start,
        "build_scaler",
        lambda precision, device: torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-12),
    )
    config = config_of(precision="fp16", save_every=1, keep_checkpoints=100, warmup_steps=0, lr=1e-3, test_path=())
    results, _, _ = train(config, context=gpu)
    assert 1 <= results.skipped_steps <= 4 and results.steps == STEPS
    skipped = results.skipped_steps
    lines = [line for line in tiny.metrics_lines(config.model_path) if "train_loss" in line]
    updated = [line["grad_norm"] is not None for line in lines]
    print(
        "steps with an update:",
        updated,
        "scales:",
        [state_of(config, step)["scaler"]["scale"] for step in range(1, STEPS + 1)],
    )
    assert updated == [False] * skipped + [True] * (STEPS - skipped)
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-3 * (1 - sum(updated[: index + 1]) / STEPS) for index in range(STEPS)]
    )
    weights = [
        (step_folder(Path(config.model_path) / "checkpoints", step) / "model.safetensors").read_bytes()
        for step in range(1, STEPS + 1)
    ]
    assert [old != new for old, new in zip(weights, weights[1:])] == updated[1:]

    resumed = as_if_killed_after(skipped, config, tmp_path / "resumed")
    again, _, _ = train(resumed, context=gpu)
    assert again.skipped_steps == skipped  # no new search from 2**40
    scaler = state_of(resumed, STEPS)["scaler"]
    assert (
        scaler["scale"] == state_of(config, skipped)["scaler"]["scale"] < 2.0**40
        and scaler["_growth_tracker"] == STEPS - skipped
    )
    assert [line["lr"] for line in tiny.metrics_lines(resumed.model_path) if "lr" in line] == [
        line["lr"] for line in lines
    ]
