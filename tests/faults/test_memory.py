"""Too little memory: found before step 1 where that is possible, else reported in one line.

pytest tests/faults/test_memory.py -s
"""

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, digest, error_lines, run_job, steps_saved, write_config

pytestmark = pytest.mark.fault
WARNING = "warning: microbatches_per_step {} does not fit into memory: {} are used for this run"


def config_for(folder: Path, **changes: Any) -> Path:
    """Two steps of 256 rows, about 4,400 tokens, in one micro-batch, which takes more than 130 MB."""
    values = {"num_rows": 512, "batch_size": 256, "microbatches_per_step": 1, "max_epochs": 1, "save_every": 1}
    config = write_config(folder, **(values | {"timeout_seconds": 120} | changes))
    tiny.write_encoder(folder / "encoder", hidden=192, layers=3)
    return config


def warning_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if "does not fit into memory" in line]


def resolved_micro_batches(run: Path) -> tuple[int, int]:
    """Micro-batches of a step as asked and as used, in config.json and in the newest checkpoint."""
    states = [run / "config.json", run / f"checkpoints/step-{steps_saved(run)[-1]:08d}/state.json"]
    [pair] = {
        (resolved["microbatches_asked"], resolved["microbatches_per_step"])
        for resolved in (json.loads(path.read_text())["resolved"] for path in states)
    }
    return pair


def numbers_in(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().splitlines()]


def count_too_little_for_one_row(
    figures: Figures, case: str, config: Path, num_processes: int, folder: Path
) -> list[list[float]]:
    """A limit of 1 MB is refused. Returns for each rank the MB of 1, 2, 4, ... 256 micro-batches."""
    words = ["train", str(config), "--model_path", str(folder / "none"), "--memory_limit_mb", "1"]
    job = Job(num_processes, words, faults={"trials": str(folder)}, exit_code_file=folder / "ends.txt")
    code, lines = job.wait(), error_lines(job.output())
    figures.count(
        code == 1 and 0 not in job.exit_codes().values(), f"{case}: one row: exit codes {code}, {job.exit_codes()}"
    )
    rank = "rank 0: " if num_processes > 1 else ""
    expected = f"error: {rank}not even one row (32 tokens) at a time fits into memory ("
    figures.count(
        len(lines) == 1 and lines[0].startswith(expected), f"{case}: one row: {lines}: {job.output()[-3000:]}"
    )
    figures.count(
        not (folder / "none/config.json").exists() and not steps_saved(folder / "none"),
        f"{case}: one row: something was written",
    )
    trials = [numbers_in(folder / f"trials-{rank}.txt") for rank in range(max(1, num_processes))]
    figures.count(all(len(trial) == 9 for trial in trials), f"{case}: trials {trials}")
    return trials


@row(
    "F19",
    "memory_limit_mb below what a step's micro-batch takes; below what one row takes",
    "micro-batches are doubled on all ranks before step 1, one line says so, config.json keeps both numbers, a resume "
    "uses them, the run equals that with the larger number, bit for bit; for one row: one line, nothing written",
    full={"counts": (0, 2, 3)},
)
def test_F19_a_step_that_does_not_fit_gets_more_micro_batches(
    tmp_path: Path, counts: tuple[int, ...] = (2,)
) -> Figures:
    figures = Figures()
    config = config_for(tmp_path)
    for num_processes in counts:
        case, folder = f"{num_processes} processes", tmp_path / str(num_processes)
        folder.mkdir()
        trials = count_too_little_for_one_row(figures, case, config, num_processes, folder)
        # between what 2 and 4 micro-batches take
        low, high = max(trial[2] for trial in trials), min(trial[1] for trial in trials)
        limit, run = int((low + high) / 2), folder / "run"
        words = ["train", str(config), "--model_path", str(run)]
        code, output = run_job(num_processes, [*words, "--memory_limit_mb", str(limit)], faults={"die_after_save": 1})
        figures.count(
            warning_lines(output) == [WARNING.format(1, 4)],
            f"{case}: limit {limit} of trials {trials}: {output[-3000:]}",
        )
        figures.count(
            steps_saved(run) == [1] and resolved_micro_batches(run) == (1, 4),
            f"{case}: checkpoints {steps_saved(run)}: {output[-3000:]}",
        )
        # a resume keeps the number of micro-batches and ignores a new limit
        code, output = run_job(num_processes, [*words, "--memory_limit_mb", "1"], faults={"trials": str(folder)})
        figures.count(code == 0 and not warning_lines(output), f"{case}: resumed: exit code {code}: {output[-3000:]}")
        words = ["train", str(config), "--model_path", str(folder / "four"), "--microbatches_per_step", "4"]
        code, output = run_job(num_processes, words)
        figures.count(
            code == 0 and not warning_lines(output), f"{case}: four micro-batches: exit code {code}: {output[-3000:]}"
        )
        figures.count(
            resolved_micro_batches(run) == (1, 4) and digest(run) == digest(folder / "four"),
            f"{case}: other bits than with four micro-batches",
        )
        steps = [numbers_in(path)[-1] for path in folder.glob("steps-*.txt")]
        figures.notes.append(
            f"{case}: trials of 1, 2, 4, 8 micro-batches {[round(value) for value in trials[0][:4]]} MB, "
            f"limit {limit}: 4, whose steps took {round(max(steps))} MB"
        )
    return figures


@row(
    "F19",
    "an allocation fails (RLIMIT_AS) on one rank: in the trial before step 1; in the middle of training",
    "before step 1 all ranks double their micro-batches and the run ends; later: exit other than 0 on all ranks within "
    "60 s, one line with advice",
    full={"cases": tuple(product((0, 2, 3), ("first", "last"), (0, 2)))},
)
def test_F19_an_allocation_fails(
    tmp_path: Path, cases: tuple[tuple[int, str, int], ...] = ((2, "last", 0), (2, "last", 2))
) -> Figures:
    """`cases`: processes, the rank with little memory, the step (0: the trial)."""
    figures = Figures()
    config = config_for(tmp_path)
    for num_processes, which, step in cases:
        rank = max(0, num_processes - 1) if which == "last" else 0
        case = f"rank {rank} of {num_processes} in {f'step {step}' if step else 'the trial'}"
        folder = tmp_path / f"{num_processes}-{which}-{step}"
        folder.mkdir()
        words = ["train", str(config), "--model_path", str(folder / "run")]
        if step:
            words += ["--microbatches_per_step", str(max(1, num_processes))]  # one for each rank
        # the limit is on address space: with this threshold the C library unmaps freed memory, and with one arena it
        # does not reserve 64 MB for each thread
        job = Job(
            num_processes,
            words,
            faults={"memory": [rank, step, 40 if step else 130]},
            exit_code_file=folder / "ends.txt",
            MALLOC_MMAP_THRESHOLD_="131072",
            MALLOC_ARENA_MAX="1",
        )
        started = time.monotonic()
        code, lines = job.wait(seconds=MAX_SECONDS + 60), error_lines(job.output())
        codes = job.exit_codes()
        if step:
            where = f"rank {rank}, " if num_processes > 1 else ""
            holds = (
                len(lines) == 1
                and lines[0].startswith(f"error: {where}the ")
                and f"pass of step {step}: out of memory (" in lines[0]
                and "raise microbatches_per_step" in lines[0]
            )
            figures.count(holds, f"{case}: expected one line with advice, found {lines}: {job.output()[-4000:]}")
            figures.count(
                code == 1 and len(codes) == max(1, num_processes) and 0 not in codes.values(),
                f"{case}: exit codes {code}, {codes}",
            )
            figures.count(
                steps_saved(folder / "run") == [1] and not [*(folder / "run").rglob(".tmp-*")],
                f"{case}: checkpoints {steps_saved(folder / 'run')}",
            )
            figures.notes.append(
                f"{case}: {lines[0] if lines else ''}; {time.monotonic() - started:.0f} s with the start"
            )
        else:
            figures.count(code == 0 and not lines, f"{case}: exit codes {code}, {codes}: {job.output()[-4000:]}")
            asked, used = resolved_micro_batches(folder / "run") if code == 0 else (0, 0)
            figures.count(
                asked == 1 < used and warning_lines(job.output()) == [WARNING.format(1, used)],
                f"{case}: {asked} asked, {used} used: {job.output()[-3000:]}",
            )
            figures.notes.append(f"{case}: {used} micro-batches")
    return figures
