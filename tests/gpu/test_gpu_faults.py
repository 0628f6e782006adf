"""Faults on a GPU: overflows of fp16, too little memory, a killed rank under NCCL. `pytest -m gpu tests/gpu -s`"""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbert_core.training.checkpoint import step_folder, why_invalid
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, digest, error_lines, run_job, steps_saved, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.fault]
STEPS = 16  # 2 epochs
EVERY_STEP = {"save_every": 1, "keep_checkpoints": 100, "deterministic": True}


def num_gpus(at_most: int = 2) -> int:
    """Processes that can have a GPU each."""
    assert torch.cuda.is_available(), "expected a CUDA device; `pytest` without -m gpu leaves these tests out"
    return min(at_most, torch.cuda.device_count())


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((step_folder(run / "checkpoints", step) / "state.json").read_text())


@row(
    "F18",
    "the loss scale of fp16 begins at 2**52: overflows in steps 1 to 3; killed after each of them",
    marker="gpu",
    required="neither optimizer nor schedule advances in an overflowed step; a resume restores the scale and the count "
    "of such steps, and ends with the same bits",
    full={"deaths": (1, 2, 3, 4)},
)
def test_F18_overflows(tmp_path: Path, deaths: tuple[int, ...] = (2,)) -> Figures:
    """`deaths`: the steps after which a run is killed, one run for each."""
    figures = Figures()
    num_gpus()
    config = write_config(tmp_path, precision="fp16", warmup_steps=0, test_path=(), **EVERY_STEP)
    faults = {"loss_scale": [2.0**52, 2.0**-12]}
    reference = tmp_path / "reference"
    code, output = run_job(0, ["train", str(config), "--model_path", str(reference)], faults=faults)
    if not figures.count(code == 0, f"reference: exit code {code}: {output[-3000:]}"):
        return figures
    lines = [line for line in tiny.metrics_lines(reference) if "train_loss" in line]
    updated = [line["grad_norm"] is not None for line in lines]
    skipped = updated.index(True)
    figures.count(
        3 <= skipped <= 4 and updated == [False] * skipped + [True] * (STEPS - skipped),
        f"steps with an update: {updated}",
    )
    steps_of_schedule = [state_of(reference, step)["scheduler"]["last_epoch"] for step in range(1, STEPS + 1)]
    figures.count(
        steps_of_schedule == [sum(updated[:step]) for step in range(1, STEPS + 1)],
        f"steps of the schedule: {steps_of_schedule}",
    )
    # `lr` of a line is the rate that its step used, or would have used
    figures.count(
        len({line["lr"] for line in lines[: skipped + 1]}) == 1 and lines[skipped + 1]["lr"] < lines[skipped]["lr"],
        f"rates {[line['lr'] for line in lines]}",
    )
    scales = [state_of(reference, step)["scaler"]["scale"] for step in range(1, 6)]
    figures.notes.append(f"overflows in the first {skipped} steps; scales {scales}")
    for death in deaths:
        case, run = f"killed after step {death}", tmp_path / f"killed{death}"
        words = ["train", str(config), "--model_path", str(run)]
        run_job(0, words, faults={**faults, "die_after_save": death})
        figures.count(steps_saved(run) == list(range(1, death + 1)), f"{case}: checkpoints {steps_saved(run)}")
        code, output = run_job(0, words, faults=faults)
        if figures.count(code == 0, f"{case}: resumed: exit code {code}: {output[-3000:]}"):
            figures.count(digest(run) == digest(reference), f"{case}: other bits than the reference run")
            kept = ("scaler", "skipped_steps")
            figures.count(
                [state_of(run, STEPS)[key] for key in kept] == [state_of(reference, STEPS)[key] for key in kept],
                f"{case}: scale or count of skipped steps lost",
            )
    return figures


@row(
    "F19",
    "the GPU's memory runs out on one rank: in the trial before step 1; in the middle of training",
    marker="gpu",
    required="before step 1 all ranks double their micro-batches and the run ends; later: exit other than 0 on all "
    "ranks within 60 s, one line with advice",
    full={"steps": (0, 1, 2)},
)
def test_F19_gpu_memory_runs_out(tmp_path: Path, steps: tuple[int, ...] = (0, 2)) -> Figures:
    """`steps`: when it runs out; 0: in the trial."""
    figures = Figures()
    num_processes = num_gpus()
    values = {"num_rows": 512, "batch_size": 256, "max_epochs": 1, "save_every": 1, "precision": "fp32"}
    config = write_config(tmp_path, **values, timeout_seconds=30)
    tiny.write_encoder(tmp_path / "encoder", hidden=256, layers=4)  # hundreds of MB for 256 rows of 32 tokens
    rank = num_processes - 1
    for step in steps:
        case = f"rank {rank} of {num_processes} in {f'step {step}' if step else 'the trial'}"
        folder = tmp_path / str(step)
        folder.mkdir()
        micro_batches = num_processes if step else 1  # in training one for each rank
        words = ["train", str(config), "--model_path", str(folder / "run")]
        words += ["--microbatches_per_step", str(micro_batches)]
        faults = {"gpu_memory": [rank, step, 20 if step else 200]}
        job = Job(num_processes, words, faults=faults, exit_code_file=folder / "ends.txt")
        code, lines = job.wait(seconds=MAX_SECONDS + 120), error_lines(job.output())
        if step == 0:
            resolved = json.loads((folder / "run/config.json").read_text())["resolved"] if code == 0 else {}
            holds = code == 0 and not lines and resolved["microbatches_asked"] == 1 < resolved["microbatches_per_step"]
            figures.count(holds, f"{case}: exit code {code}, {resolved}: {job.output()[-4000:]}")
            warnings = [line for line in job.output().splitlines() if "does not fit into memory" in line]
            figures.count(len(warnings) == 1, f"{case}: expected one line, found {warnings}")
            figures.notes.append(f"{case}: {warnings}")
            continue
        codes = job.exit_codes()
        figures.count(
            code == 1 and len(codes) == num_processes and 0 not in codes.values(),
            f"{case}: exit codes {code}, {codes}: {job.output()[-4000:]}",
        )
        where = f"rank {rank}, " if num_processes > 1 else ""
        holds = (
            len(lines) == 1
            and lines[0].startswith(f"error: {where}the ")
            and f"pass of step {step}: out of memory (" in lines[0]
            and "raise microbatches_per_step" in lines[0]
        )
        figures.count(holds, f"{case}: expected one line with advice, found {lines}: {job.output()[-4000:]}")
        saved = steps_saved(folder / "run")
        figures.count(saved == list(range(1, step)), f"{case}: checkpoints {saved}")
        figures.notes.append(f"{case}: {lines}")
    return figures


@row(
    "F20",
    "SIGKILL of a rank while the others wait for it in NCCL's all-reduce; with one GPU: of the only rank",
    marker="gpu",
    required="all end within timeout_seconds + 30 s; the newest checkpoint is complete; a resume ends with the bits of "
    "a run without kill",
    full={"kills": 3},
)
def test_F20_a_rank_is_killed_under_nccl(tmp_path: Path, kills: int = 1) -> Figures:
    """`kills`: runs, each killed some steps later than the one before."""
    figures = Figures()
    num_processes, timeout_seconds = num_gpus(), 20
    config = write_config(tmp_path, precision="fp32", timeout_seconds=timeout_seconds, **EVERY_STEP)
    reference = tmp_path / "reference"
    code, output = run_job(num_processes, ["train", str(config), "--model_path", str(reference)])
    if not figures.count(code == 0, f"reference: exit code {code}: {output[-3000:]}"):
        return figures
    for index in range(kills):
        step, rank = 2 + 4 * index, num_processes - 1
        case, folder = f"rank {rank} of {num_processes} killed after step {step}", tmp_path / f"killed{step}"
        run, words = folder / "run", ["train", str(config), "--model_path", str(folder / "run")]
        folder.mkdir()
        job = Job(num_processes, words, faults={"slow_step": 0.3}, exit_code_file=folder / "ends.txt")
        job.wait_until(lambda: len(steps_saved(run)) >= step)
        job.send(signal.SIGSTOP, rank)
        time.sleep(1.0)  # the others reach the all-reduce
        since = job.send(signal.SIGKILL, rank)
        code = job.wait(seconds=MAX_SECONDS)
        figures.seconds.append(time.monotonic() - since)
        codes = job.exit_codes()
        figures.count(
            code == 1 and codes.get(rank) == -signal.SIGKILL and 0 not in codes.values(),
            f"{case}: exit codes {code}, {codes}: {job.output()[-4000:]}",
        )
        figures.count(
            figures.seconds[-1] <= timeout_seconds + 30 and not job.left_alive(),
            f"{case}: {figures.seconds[-1]:.0f} s, {job.left_alive()} left alive",
        )
        newest = steps_saved(run)[-1]
        figures.count(
            why_invalid(step_folder(run / "checkpoints", newest)) is None,
            f"{case}: the checkpoint of step {newest} is damaged",
        )
        code, output = run_job(num_processes, words)
        if figures.count(code == 0, f"{case}: resumed: exit code {code}: {output[-3000:]}"):
            figures.count(digest(run) == digest(reference), f"{case}: other bits than the reference run")
        figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s; exit codes {codes}")
        shutil.rmtree(folder)
    return figures
