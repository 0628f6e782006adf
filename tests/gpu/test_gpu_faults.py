"""Rows F18-F20 of the matrix, which need a CUDA device: `pytest -m gpu tests/gpu -s`."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mmbert_core.files import read_json
from tests.faults.launch import Job, run_job, steps_saved, write_config
from tests.faults.matrix import Figures, row

pytestmark = [pytest.mark.gpu, pytest.mark.fault]


def state_at(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


@row("F18", "fp16 gradients that overflow in the first steps", "the schedule counts successful steps only; the loss scale survives a resume", marker="gpu")
def test_F18_overflow(tmp_path: Path) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, precision="fp16", save_every=1, keep_checkpoints=100, max_epochs=4, model_path=str(tmp_path / "run"))
    code, output = run_job(0, ["train", str(config)], plants={"loss_scale": 2.0**40})
    last = steps_saved(tmp_path / "run")[-1]
    state = state_at(tmp_path / "run", last)
    figures.count(code == 0, output[-2000:])
    figures.count(state["skipped_steps"] >= 1, "no step overflowed")
    figures.count(state["scheduler"]["last_epoch"] == last - state["skipped_steps"], f"{state['scheduler']['last_epoch']} of {last}")
    again = write_config(tmp_path, precision="fp16", save_every=1, keep_checkpoints=100, max_epochs=4, model_path=str(tmp_path / "again"))
    plants = {"loss_scale": 2.0**40, "die_after_save": 5}
    run_job(0, ["train", str(again)], plants=plants)
    code, output = run_job(0, ["train", str(again)])
    figures.count(code == 0 and state_at(tmp_path / "again", last)["scaler"] == state["scaler"], output[-2000:])
    return figures


@row("F19", "GPU memory for a small micro-batch only", "the micro-batches are cut before step 1, or one line of advice; no hang", marker="gpu")
def test_F19_gpu_memory(tmp_path: Path) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, batch_size=64, microbatches_per_step=1, num_rows=64, max_epochs=1)
    for share, ends in ((0.02, (0, 1)), (1e-5, (1,))):
        started = time.monotonic()
        code, output = run_job(1, ["train", str(config), "--model_path", str(tmp_path / f"run{share}")], plants={"gpu_memory": share})
        figures.seconds.append(time.monotonic() - started)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        figures.count(code in ends and len(lines) == (code != 0), output[-2000:])
        if code == 0:
            resolved = read_json(tmp_path / f"run{share}" / "config.json")["resolved"]
            figures.notes.append(f"{share:.0%} of the memory: {resolved['microbatches_asked']} micro-batches asked, {resolved['microbatches_per_step']} used")
    return figures


@row("F20", "a rank is killed in an NCCL all-reduce", "the others end within the timeout and 30 s", marker="gpu")
def test_F20_nccl(tmp_path: Path) -> Figures:
    figures = Figures()
    num_processes = torch.cuda.device_count()
    config = write_config(tmp_path, max_epochs=200, timeout_seconds=20)
    job = Job(num_processes, ["train", str(config)], plants={"slow_step": 0.02})
    job.wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(job.workers()) == num_processes)
    time.sleep(2)
    started = time.monotonic()
    os.kill(job.workers()[num_processes - 1], signal.SIGKILL)
    code = job.wait(seconds=60)
    figures.seconds.append(time.monotonic() - started)
    figures.count(code not in (0, -999) and not job.left_alive(), job.output()[-2000:])
    figures.notes.append(f"{num_processes} GPUs")
    return figures
