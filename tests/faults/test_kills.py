"""SIGKILLs of real processes: after every step, at any instant, in the middle of a write, with and without restarts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmbert_core.runtime.errors import InputError
from mmbert_core.training.checkpoint import (
    clean_up,
    find_checkpoint,
    read_checkpoint,
    step_folder,
    step_of,
    why_invalid,
)
from tests.faults.checkpoint_writer import BEST_EVERY, best_of, tensors_of
from tests.faults.kills import (
    Outcome,
    PlannedKill,
    kill,
    kill_as_planned,
    problems_of,
    run_with_kills,
    wait_for_ranks,
    wait_until,
)
from tests.faults.runs import (
    ENVIRONMENT,
    SLOW,
    STEPS,
    count_rows,
    differences,
    noted_faults,
    notes_of,
    reference_run,
    write_run_config,
)
from tests.faults.soak import soak
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, captured_warnings, run_job, steps_saved

pytestmark = pytest.mark.fault
SHORT = {"num_rows": 27, "max_epochs": 2}  # 2 epochs of 4 steps, the last of 3 rows


# ---- F1: after every step ----


def count_deaths(figures: Figures, folder: Path, num_processes: int, steps: tuple[int, ...]) -> None:
    """One job in which all ranks die right after the checkpoint of each of `steps`, compared with the reference run."""
    config = write_run_config(folder, save_every=1, keep_checkpoints=2, **SHORT)
    faults = noted_faults(folder, die_after_save=list(steps))
    code, output = run_job(
        num_processes,
        ["train", str(config)],
        faults=faults,
        max_restarts=len(steps),
        seconds=60 + 60 * len(steps),
        **ENVIRONMENT,
    )
    case = f"{num_processes} processes killed after {', '.join(map(str, steps))}"
    if code != 0:
        figures.count(False, f"{case}: exit code {code}:\n{output[-3000:]}")
        return
    problems = differences(folder, reference_run(num_processes, **SHORT))
    lost, repeated = count_rows(folder, num_rows=SHORT["num_rows"], epochs=SHORT["max_epochs"])
    figures.rows_lost += lost
    figures.rows_repeated += repeated
    for attempt, step in enumerate(steps):
        last = notes_of(folder, attempt)[-1]
        figures.count(
            not problems and (last["phase"], last["step"]) == ("save", step),
            f"{case}: attempt {attempt} ended in {last}; {problems}",
        )


@row(
    "F1",
    "SIGKILL of all ranks right after the checkpoint of every step",
    "the same weights, moments, step, schedule and losses as without, bit for bit",
    full={"chains": dict.fromkeys((1, 2, 3, 4), 8)},
)
def test_F1_a_kill_after_any_step_changes_nothing(tmp_path: Path, chains: dict[int, int] | None = None) -> Figures:
    """`chains`: processes -> in one job, kills after so many of the 8 steps, the last among them."""
    figures = Figures()
    for num_processes, count in (chains or {2: 2, 4: 1}).items():
        steps = tuple(8 * index // count for index in range(1, count + 1))
        count_deaths(figures, tmp_path / f"chain{num_processes}", num_processes, steps)
        figures.notes.append(
            f"{num_processes} processes: one job that died after the steps {', '.join(map(str, steps))}"
        )
    return figures


# ---- F2, F4: at any instant ----


def count_outcome(figures: Figures, outcome: Outcome, folder: Path, num_processes: int) -> None:
    """Each kill of a job is a case; all hold when the job ended like the reference run."""
    problems = problems_of(outcome, folder, num_processes)
    lost, repeated = count_rows(folder) if not problems else (0, 0)
    figures.rows_lost += lost
    figures.rows_repeated += repeated
    for sent in outcome.kills:
        figures.count(not problems, f"{num_processes} processes, {outcome.kills}: {problems}")
        figures.seconds.append(sent.seconds)


@row(
    "F2",
    "SIGKILL of a random rank at random instants, with restarts",
    "exit 0; bit-equal to a run without kills; every row once an epoch",
    full={"kills": 50, "processes": (1, 2, 3, 4)},
)
def test_F2_kills_at_random_instants(
    tmp_path: Path, kills: int = 4, processes: tuple[int, ...] = (2,), seed: int = 0
) -> Figures:
    total = soak(tmp_path, kills, seed, processes=processes)
    figures = Figures(
        tried=total.kills, held=total.recovered, rows_lost=total.rows_lost, rows_repeated=total.rows_repeated
    )
    figures.seconds, figures.problems = total.restart_seconds, total.problems
    by_phase = ", ".join(f"{phase} {count}" for phase, count in sorted(total.phases.items()))
    figures.notes.append(f"{total.jobs} jobs; kills by the rank's phase: {by_phase}")
    return figures


@row("F4", "three SIGKILLs in one epoch", "as F2", full={"processes": (1, 2, 3, 4)})
def test_F4_three_kills_in_one_epoch(tmp_path: Path, processes: tuple[int, ...] = (2,)) -> Figures:
    """The second epoch is steps 7 to 12; a checkpoint every second step and after a better validation."""
    figures = Figures()
    for num_processes in processes:
        generator, folder = random.Random(num_processes), tmp_path / f"by{num_processes}"
        planned = [
            PlannedKill("step", generator.uniform(0.0, 0.1), generator.randrange(num_processes), step=step)
            for step in (8, 9, 11)
        ]
        outcome = run_with_kills(folder, num_processes, planned)
        steps = [sent.step for sent in outcome.kills]
        figures.count(
            len(steps) == 3 and all(7 <= step <= 12 for step in steps),
            f"{num_processes} processes: killed in steps {steps}",
        )
        figures.notes.append(f"{num_processes} processes: killed in the steps {', '.join(map(str, steps))}")
        count_outcome(figures, outcome, folder, num_processes)
    return figures


# ---- F3: without restarts ----


@row(
    "F3",
    "SIGKILL of one rank, no restarts",
    "exit code not 0; the other ranks end within 60 s; the newest checkpoint is complete",
    full={"processes": (2, 3, 4), "phases": ("start", "step", "validation", "save", "finish")},
)
def test_F3_no_restarts(
    tmp_path: Path, processes: tuple[int, ...] = (2,), phases: tuple[str, ...] = ("step",)
) -> Figures:
    figures = Figures()
    for num_processes in processes:
        for index, phase in enumerate(phases):
            folder, case = tmp_path / f"{num_processes}-{phase}", f"{num_processes} processes, killed in {phase}"
            config = write_run_config(folder)
            job = Job(num_processes, ["train", str(config)], faults=noted_faults(folder, **SLOW), **ENVIRONMENT)
            planned = PlannedKill(phase, 0.05, index % num_processes, step=7 if phase != "start" else 0)
            sent = kill_as_planned(job, 0, planned, folder)
            started = time.monotonic()
            code = job.wait(seconds=MAX_SECONDS)
            figures.seconds.append(time.monotonic() - started + (sent.seconds if sent else 0.0))
            figures.count(
                sent is not None and code not in (0, -999),
                f"{case}: {sent}, exit code {code}:\n{job.output()[-2000:]}",
            )
            figures.count(not job.left_alive(), f"{case}: processes {job.left_alive()} still exist")
            steps = steps_saved(folder / "run")
            if phase != "start":
                reason = why_invalid(step_folder(folder / "run/checkpoints", steps[-1])) if steps else "there is none"
                figures.count(reason is None and steps[-1] >= 6, f"{case}: newest checkpoint of {steps}: {reason}")
            job.kill_all()
    return figures


# ---- F8: in the middle of a write ----


class Writer:
    """Processes that write checkpoints into `folder`, one at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.checkpoint_writer", str(folder)],
            cwd=tiny.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_while_it_writes(self, generator: random.Random, **options: int) -> bool:
        """Start one, SIGKILL it a random time after its first write has begun. Whether a temporary folder was left."""
        self.process.stdin.write(json.dumps({**options, "seconds": 0.01, "seed": generator.randrange(2**31)}) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        deadline = time.monotonic() + MAX_SECONDS
        while not self.temporaries(pid) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert self.process.stdout.readline() == "gone\n"
        return bool(self.temporaries(pid))

    def temporaries(self, pid: int) -> list[Path]:
        return list(self.folder.glob(f".tmp-step-*-{pid}"))

    def written(self) -> tuple[int, int]:
        """Step and version of the last checkpoint whose writing had returned."""
        path = self.folder.parent / "written.txt"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]
        return tuple(map(int, lines[-1].split())) if lines else (0, 0)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def count_start_after_kill(figures: Figures, writer: Writer, before: tuple[int, int], replace: bool) -> tuple[int, int]:
    """Step and version of the newest complete checkpoint that the next start finds; counts whether they are right."""
    step, version = max(writer.written(), before)
    torn = [path.name for path in writer.folder.glob("step-*") if why_invalid(path)]
    with captured_warnings() as warnings:
        clean_up(writer.folder)
        try:
            path = find_checkpoint(writer.folder, "auto")
            found = read_checkpoint(path) if path else None
        except (InputError, OSError, ValueError) as error:
            figures.count(False, f"after step {step}, version {version}: {type(error).__name__}: {error}")
            return before
    if found is None:
        figures.count(step == 0, f"no checkpoint was found after step {step}")
        return 0, 0
    newest = found.state["step"], found.state["version"]
    allowed = [(step, version), (step, version + 1)] if replace else [(step, version), (step + 1, 0)]
    is_right = all(torch.equal(found.weights[name], value) for name, value in tensors_of(*newest).items())
    is_right &= all(torch.equal(found.moments[name], value) for name, value in tensors_of(*newest[::-1]).items())
    best = best_of(newest[0])
    has_best = best is None or why_invalid(step_folder(writer.folder, best)) is None
    left = [path.name for path in writer.folder.glob(".tmp-*")]
    figures.count(
        newest in allowed and is_right and has_best and not left and not warnings,
        f"written {step, version}, found {newest}, torn before {torn}, right tensors {is_right}, "
        f"best {best} exists {has_best}, left {left}, warned {warnings}",
    )
    return newest


def kill_writers(figures: Figures, folder: Path, instants: int, seed: int) -> None:
    """Processes that only write checkpoints. Every second one replaces the newest checkpoint again and again."""
    generator, writer = random.Random(seed), Writer(folder)
    tries = in_writes = in_removals = 0
    newest = (0, 0)  # step and version
    try:
        while in_writes < instants and tries < 3 * instants:
            tries += 1
            replace = tries % 2 == 0 and newest[0] > 0
            step, version = (newest[0], newest[1] + 1) if replace else (newest[0] + 1, 0)
            in_writes += writer.kill_while_it_writes(generator, step=step, version=version, replace=replace)
            in_removals += replace and why_invalid(step_folder(folder, step)) is not None
            newest = count_start_after_kill(figures, writer, newest, replace)
    finally:
        writer.close()
    figures.count(in_writes == instants, f"only {in_writes} of {tries} kills came while a temporary folder was there")
    figures.notes.append(
        f"{in_writes} kills of a process that only writes checkpoints, "
        f"{in_removals} of them between removing an old folder and renaming the new one"
    )


def newest_valid_step(checkpoints: Path, temporaries: list[Path]) -> int:
    """The newest step with a valid checkpoint, in its folder or in a temporary one; 0 if there is none."""
    steps = [step_of(path) for path in checkpoints.glob("step-*") if why_invalid(path) is None]
    for path in temporaries:
        if why_invalid(path) is None:
            steps.append(step_of(Path(path.name.removeprefix(".tmp-").rpartition("-")[0])))
    return max(steps, default=0)


def kill_in_write(figures: Figures, job: Job, folder: Path, attempt: int, generator: random.Random) -> bool:
    """SIGKILL of rank 0 while its temporary folder exists; the next attempt's first step. False if the run ended."""
    pids, checkpoints = wait_for_ranks(job, attempt), folder / "run/checkpoints"
    if pids is None:
        return False

    def temporaries() -> list[Path]:
        return list(checkpoints.glob(f".tmp-step-*-{pids[0]}"))

    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        if not wait_until(temporaries, job):
            return False
        time.sleep(generator.uniform(0.0, 0.2))
        if temporaries():
            break
    sent = kill(job, pids[0], folder, attempt, 0)
    left = temporaries()
    if sent is None or not left:
        return sent is not None
    figures.seconds.append(sent.seconds)
    expected = newest_valid_step(checkpoints, left)  # the next attempt still imports modules

    def first_note() -> dict | None:
        return next((note for note in notes_of(folder, attempt + 1) if note["phase"] in ("step", "finish")), None)

    note = wait_until(first_note, job) or first_note() or {"step": -1, "phase": "step"}
    resumed_from = note["step"] - (note["phase"] == "step")
    still = [path.name for path in left if path.exists()]
    figures.count(
        resumed_from == expected and not still,
        f"attempt {attempt}, {sent}: resumed from {resumed_from}, expected {expected}; not removed: {still}",
    )
    return True


def kill_jobs_in_writes(figures: Figures, folder: Path, count: int, seed: int) -> None:
    """Real runs that save after every step, slowly."""
    generator, tried, start = random.Random(seed), 0, figures.tried
    for index in range(2 * count):
        remaining, num_processes, job_folder = count - tried, 1 + index % 2, folder / f"job{index}"
        if remaining <= 0:
            break
        config = write_run_config(job_folder, save_every=1, keep_checkpoints=2)
        faults, max_kills = noted_faults(job_folder, slow_save=0.04), min(remaining, 5)
        job = Job(num_processes, ["train", str(config)], faults=faults, max_restarts=max_kills, **ENVIRONMENT)
        attempt = 0
        while attempt < max_kills and kill_in_write(figures, job, job_folder, attempt, generator):
            attempt += 1
        code = job.wait(seconds=240)
        tried = figures.tried - start
        if code == 0:
            problems = differences(job_folder, reference_run(num_processes))
        else:
            problems = [f"exit code {code}:\n{job.output()[-3000:]}"]
        problems += [line for line in job.output().splitlines() if "damaged" in line]
        lost, repeated = count_rows(job_folder) if code == 0 else (0, 0)
        figures.rows_lost += lost
        figures.rows_repeated += repeated
        if problems:
            figures.problems.append(f"{num_processes} processes, {attempt} kills in a write: {problems}")
    figures.notes.append(f"{tried} kills of rank 0 of a real run while it wrote a checkpoint")


@row(
    "F8",
    "SIGKILL while a checkpoint is written",
    "the next start resumes from the newest complete one; all files can be read; temporary files are removed; "
    "bit-equal in the end",
    full={"instants": 200, "in_jobs": 15},
)
def test_F8_killed_while_a_checkpoint_is_written(
    tmp_path: Path, instants: int = 15, in_jobs: int = 2, seed: int = 0
) -> Figures:
    figures = Figures()
    kill_writers(figures, tmp_path / "writer/checkpoints", instants, seed)
    kill_jobs_in_writes(figures, tmp_path / "jobs", in_jobs, seed)
    return figures


def test_the_writers_reach_best_steps():
    """Else F8 would not see whether the best checkpoint survives."""
    assert best_of(BEST_EVERY - 1) is None and best_of(BEST_EVERY + 1) == BEST_EVERY < STEPS
