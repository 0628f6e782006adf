"""Runs that are killed: after every step, at any instant, in the middle of a write, with and without restarts. Real processes, real SIGKILLs."""

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
from tests.faults.launch import Job, logged, run_job, steps_saved
from tests.faults.matrix import LONGEST_SECONDS, Figures, row
from tests.faults.soak import (
    ENVIRONMENT,
    SLOW,
    STEPS,
    Outcome,
    Strike,
    count_rows,
    differences,
    kill,
    notes_of,
    plants_of,
    problems_of,
    ranks_of,
    soak,
    straight,
    strike,
    struck_run,
    until,
    write_run,
)
from tests.faults.writer import BEST_EVERY, best_of, tensors_of
from tests.support import tiny

pytestmark = pytest.mark.fault
SHORT = {"num_rows": 27, "max_epochs": 2}  # 2 epochs of 4 steps, the last of 3 rows


# ---- F1: after every step ----


def count_deaths(figures: Figures, folder: Path, num_processes: int, steps: tuple[int, ...]) -> None:
    """One job in which all ranks die right after the checkpoint of each of `steps`; compared with one that nobody disturbed."""
    config = write_run(folder, save_every=1, keep_checkpoints=2, **SHORT)
    plants = plants_of(folder, die_after_save=list(steps))
    code, output = run_job(
        num_processes,
        ["train", str(config)],
        plants=plants,
        max_restarts=len(steps),
        seconds=60 + 60 * len(steps),
        **ENVIRONMENT,
    )
    where = f"{num_processes} processes killed after {', '.join(map(str, steps))}"
    if code != 0:
        figures.count(False, f"{where}: exit code {code}:\n{output[-3000:]}")
        return
    problems = differences(folder, straight(num_processes, **SHORT))
    lost, repeated = count_rows(folder, num_rows=SHORT["num_rows"], epochs=SHORT["max_epochs"])
    figures.rows_lost += lost
    figures.rows_repeated += repeated
    for life, step in enumerate(steps):
        last = notes_of(folder, life)[-1]
        figures.count(
            not problems and (last["phase"], last["step"]) == ("save", step),
            f"{where}: life {life} ended in {last}; {problems}",
        )


@row(
    "F1",
    "SIGKILL of all ranks right after the checkpoint of every step",
    "the same weights, moments, step, schedule and losses as without, bit for bit",
    full={"chains": dict.fromkeys((1, 2, 3, 4), 8)},
)
def test_F1_death_after_any_step_leaves_no_trace(tmp_path: Path, chains: dict[int, int] | None = None) -> Figures:
    """`chains`: processes -> in one job, death after so many of the 8 steps, the last among them."""
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
    """Each kill of a job is a try; all hold when the job ended as if nobody had struck."""
    problems = problems_of(outcome, folder, num_processes)
    lost, repeated = count_rows(folder) if not problems else (0, 0)
    figures.rows_lost += lost
    figures.rows_repeated += repeated
    for done in outcome.kills:
        figures.count(not problems, f"{num_processes} processes, {outcome.kills}: {problems}")
        figures.seconds.append(done.seconds)


@row(
    "F2",
    "SIGKILL of a random rank at random instants, with restarts",
    "exit 0; bit-equal to an undisturbed run; every row once an epoch",
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
    figures.notes.append(
        f"{total.jobs} jobs; kills by what the rank was doing: {', '.join(f'{phase} {count}' for phase, count in sorted(total.phases.items()))}"
    )
    return figures


@row("F4", "three SIGKILLs in one epoch", "as F2", full={"processes": (1, 2, 3, 4)})
def test_F4_three_kills_in_one_epoch(tmp_path: Path, processes: tuple[int, ...] = (2,)) -> Figures:
    """The second epoch is steps 7 to 12; a checkpoint every second step and after a better validation."""
    figures = Figures()
    for num_processes in processes:
        generator, folder = random.Random(num_processes), tmp_path / f"by{num_processes}"
        strikes = [
            Strike("step", generator.uniform(0.0, 0.1), generator.randrange(num_processes), step=step)
            for step in (8, 9, 11)
        ]
        outcome = struck_run(folder, num_processes, strikes)
        steps = [done.step for done in outcome.kills]
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
    "exit code not 0; the other ranks gone within 60 s; the newest checkpoint is whole",
    full={"processes": (2, 3, 4), "phases": ("start", "step", "validation", "save", "finish")},
)
def test_F3_no_restarts(
    tmp_path: Path, processes: tuple[int, ...] = (2,), phases: tuple[str, ...] = ("step",)
) -> Figures:
    figures = Figures()
    for num_processes in processes:
        for index, phase in enumerate(phases):
            folder, where = tmp_path / f"{num_processes}-{phase}", f"{num_processes} processes, killed in {phase}"
            config = write_run(folder)
            job = Job(num_processes, ["train", str(config)], plants=plants_of(folder, **SLOW), **ENVIRONMENT)
            done = strike(job, 0, Strike(phase, 0.05, index % num_processes, step=7 if phase != "start" else 0), folder)
            started = time.monotonic()
            code = job.wait(seconds=LONGEST_SECONDS)
            figures.seconds.append(time.monotonic() - started + (done.seconds if done else 0.0))
            figures.count(
                done is not None and code not in (0, -999),
                f"{where}: {done}, exit code {code}:\n{job.output()[-2000:]}",
            )
            figures.count(not job.left_alive(), f"{where}: {job.left_alive()} are still there")
            steps = steps_saved(folder / "run")
            if phase != "start":
                reason = why_invalid(step_folder(folder / "run/checkpoints", steps[-1])) if steps else "there is none"
                figures.count(reason is None and steps[-1] >= 6, f"{where}: newest checkpoint of {steps}: {reason}")
            job.kill_all()
    return figures


# ---- F8: in the middle of a write ----


class Writer:
    """Processes that write checkpoints into `folder`, one at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.writer", str(folder)],
            cwd=tiny.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_while_it_writes(self, generator: random.Random, **what: int) -> bool:
        """Start one, SIGKILL it a random time after its first write has begun. Whether a temporary folder was left."""
        self.process.stdin.write(json.dumps({**what, "seconds": 0.01, "seed": generator.randrange(2**31)}) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        deadline = time.monotonic() + LONGEST_SECONDS
        while not self.temporaries(pid) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert self.process.stdout.readline() == "gone\n"
        return bool(self.temporaries(pid))

    def temporaries(self, pid: int) -> list[Path]:
        return list(self.folder.glob(f".tmp-step-*-{pid}"))

    def written(self) -> tuple[int, int]:
        """Step and version of the last checkpoint that was said to be written."""
        path = self.folder.parent / "written.txt"
        lines = (
            [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )
        return tuple(map(int, lines[-1].split())) if lines else (0, 0)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def count_start_after_kill(figures: Figures, writer: Writer, before: tuple[int, int], replace: bool) -> tuple[int, int]:
    """What the next start finds: step and version of the newest whole checkpoint. Counts whether all is as it must be."""
    step, version = max(writer.written(), before)
    torn = [path.name for path in writer.folder.glob("step-*") if why_invalid(path)]
    with logged() as warnings:
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
    place = found.state["step"], found.state["version"]
    allowed = [(step, version), (step, version + 1)] if replace else [(step, version), (step + 1, 0)]
    is_right = all(torch.equal(found.weights[name], value) for name, value in tensors_of(*place).items())
    is_right &= all(torch.equal(found.moments[name], value) for name, value in tensors_of(*place[::-1]).items())
    best = best_of(place[0])
    has_best = best is None or why_invalid(step_folder(writer.folder, best)) is None
    left = [path.name for path in writer.folder.glob(".tmp-*")]
    holds = place in allowed and is_right and has_best and not left and not warnings
    figures.count(
        holds,
        f"written {step, version}, found {place}, torn before {torn}, whole tensors {is_right}, best {best} there {has_best}, left {left}, warned {warnings}",
    )
    return place


def kill_writers(figures: Figures, folder: Path, instants: int, seed: int) -> None:
    """Processes that only write checkpoints. Every second one replaces the newest checkpoint again and again."""
    generator, writer = random.Random(seed), Writer(folder)
    tries = in_writes = in_removals = 0
    place = (0, 0)
    try:
        while in_writes < instants and tries < 3 * instants:
            tries += 1
            replace = tries % 2 == 0 and place[0] > 0
            step, version = (place[0], place[1] + 1) if replace else (place[0] + 1, 0)
            in_writes += writer.kill_while_it_writes(generator, step=step, version=version, replace=replace)
            in_removals += replace and why_invalid(step_folder(folder, step)) is not None
            place = count_start_after_kill(figures, writer, place, replace)
    finally:
        writer.close()
    figures.count(in_writes == instants, f"only {in_writes} of {tries} kills came while a temporary folder was there")
    figures.notes.append(
        f"{in_writes} kills of a process that only writes checkpoints, {in_removals} of them between removing an old folder and renaming the new one"
    )


def strike_write(figures: Figures, job: Job, folder: Path, life: int, generator: random.Random) -> bool:
    """SIGKILL of rank 0 while its temporary folder is there, then what the next life makes of it. False when the run has ended."""
    pids, checkpoints = ranks_of(job, life), folder / "run/checkpoints"
    if pids is None:
        return False
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        if not until(lambda: list(checkpoints.glob(f".tmp-step-*-{pids[0]}")), job):
            return False
        time.sleep(generator.uniform(0.0, 0.2))
        if list(checkpoints.glob(f".tmp-step-*-{pids[0]}")):
            break
    done = kill(job, pids[0], folder, life, 0)
    left = list(checkpoints.glob(f".tmp-step-*-{pids[0]}"))
    if done is None or not left:
        return done is not None
    figures.seconds.append(done.seconds)
    # the next life is still at its imports
    whole = [step_of(path) for path in checkpoints.glob("step-*") if why_invalid(path) is None]
    whole += [
        step_of(Path(path.name.removeprefix(".tmp-").rpartition("-")[0])) for path in left if why_invalid(path) is None
    ]
    expected = max(whole, default=0)

    def first_note() -> dict | None:
        return next((note for note in notes_of(folder, life + 1) if note["phase"] in ("step", "finish")), None)

    note = until(first_note, job) or first_note()
    first = (note or {"step": -1})["step"] - (note or {"phase": "step"})["phase"].startswith("step")
    still = [path.name for path in left if path.exists()]
    figures.count(
        first == expected and not still,
        f"life {life}, killed in {done}: went on from {first}, expected {expected}; still there: {still}",
    )
    return True


def kill_jobs_in_writes(figures: Figures, folder: Path, count: int, seed: int) -> None:
    """Real runs that save after every step, slowly."""
    generator, tried, start = random.Random(seed), 0, figures.tried
    for index in range(2 * count):
        left, num_processes, place = count - tried, 1 + index % 2, folder / f"job{index}"
        if left <= 0:
            break
        config = write_run(place, save_every=1, keep_checkpoints=2)
        plants = plants_of(place, slow_save=0.04)
        job = Job(num_processes, ["train", str(config)], plants=plants, max_restarts=min(left, 5), **ENVIRONMENT)
        lives = 0
        while lives < min(left, 5) and strike_write(figures, job, place, lives, generator):
            lives += 1
        code = job.wait(seconds=240)
        tried = figures.tried - start
        problems = (
            differences(place, straight(num_processes)) if code == 0 else [f"exit code {code}:\n{job.output()[-3000:]}"]
        )
        problems += [line for line in job.output().splitlines() if "damaged" in line]
        lost, repeated = count_rows(place) if code == 0 else (0, 0)
        figures.rows_lost += lost
        figures.rows_repeated += repeated
        if problems:
            figures.problems.append(f"{num_processes} processes, {lives} kills in a write: {problems}")
    figures.notes.append(f"{tried} kills of rank 0 of a real run while it wrote a checkpoint")


@row(
    "F8",
    "SIGKILL while a checkpoint is written",
    "the next start goes on from the last whole one; nothing cannot be read; what was left is gone; bit-equal in the end",
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
