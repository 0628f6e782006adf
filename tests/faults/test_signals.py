"""Signals: the first one stops a run after a checkpoint, in any phase; a second one ends it at once.

pytest tests/faults/test_signals.py -s
"""

import atexit
import ctypes
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.runtime.signals import EXIT_STOPPED
from mmbert_core.storage.files import sha256_of
from mmbert_core.training.checkpoint import step_folder, why_invalid
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, digest, run_job, steps_saved, write_config

pytestmark = pytest.mark.fault
STEPS_PER_EPOCH = 8  # of 2 epochs; every epoch ends with a validation and, if it was the best so far, a checkpoint
SMALL_BATCHES = {"evaluation_rows": 1}  # 23 batches of the validation, 37 of the test
SECONDS_TO_STOP = 25.0  # torchrun kills after 30
SECONDS_TO_LEAVE = 5.0
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
# phase in which the signal comes -> the fault that makes it long enough
DELAYS: dict[str, dict[str, Any]] = {
    "reading": {"slow_data": 60},
    "tokenisation": {"native_data": 60},
    "training": {"slow_step": 0.1},
    "validation": {"slow_eval": 0.1},
    "checkpoint": {"slow_save": 0.5},
    "test": {"slow_eval": 0.1},
}


# ---- a job and its result ----


def config_for(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder, keep_checkpoints=3, timeout_seconds=60, **changes)


def result(run: Path) -> dict[str, Any]:
    """What must be equal, bit for bit, in a run that was stopped and resumed and in a reference run."""
    [test_file] = run.glob("multimodal_bert-*/test_result_0.tsv")
    return {**digest(run), "test": sha256_of(test_file)}


@lru_cache
def reference_result(num_processes: int) -> dict[str, Any]:
    """The result of a run without signals."""
    folder = Path(tempfile.mkdtemp(prefix="mmbert-signals-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    code, output = run_job(num_processes, ["train", str(config_for(folder))], faults=SMALL_BATCHES)
    assert code == 0, output[-4000:]
    return result(folder / "run")


def start(
    num_processes: int,
    config: Path,
    phase: str,
    *,
    ranks: int | None = None,
    step: int = 3,
    slow: dict[str, Any] | None = None,
    **environment: str,
) -> Job:
    """A job that has reached the phase, on `ranks` of its ranks."""
    notes = config.parent / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    faults = {**SMALL_BATCHES, **(DELAYS[phase] if slow is None else slow), "reached": [str(notes), step]}
    job = Job(
        num_processes, ["train", str(config)], faults=faults, exit_code_file=config.parent / "ends.txt", **environment
    )
    expected = 1 if phase == "checkpoint" else max(1, num_processes if ranks is None else ranks)
    job.wait_until(lambda: len(list(notes.glob(f"{'reading' if phase == 'tokenisation' else phase}-*"))) >= expected)
    return job


def last_step(run: Path) -> int:
    """The last step of a run in its log; 0 before the first."""
    lines = tiny.metrics_lines(run) if (run / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines if "train_loss" in line), default=0)


def count_resume(figures: Figures, case: str, num_processes: int, config: Path) -> None:
    """Started again, the run resumes from its newest checkpoint and ends like the reference run; no temporary files."""
    run = config.parent / "run"
    saved = steps_saved(run)
    code, output = run_job(num_processes, ["train", str(config)], faults=SMALL_BATCHES)
    if not figures.count(code == 0, f"{case}: resumed: exit code {code}: {output[-3000:]}"):
        return
    line = f"resuming from {step_folder(run / 'checkpoints', saved[-1])}" if saved else "resuming from"
    figures.count((line in output) == bool(saved), f"{case}: checkpoints {saved}, {line!r} in {output[-3000:]}")
    expected = reference_result(num_processes)
    figures.count(result(run) == expected, f"{case}: resumed: expected {expected}, found {result(run)}")
    figures.count(not [*run.rglob(".tmp-*")], f"{case}: resumed: {[*run.rglob('.tmp-*')]} left")


def count_stop(figures: Figures, case: str, job: Job, run: Path, since: float, *, exit_code: int = 1) -> None:
    """The job stops in time, without error lines: exit code 75 of every process, 1 of torchrun, a valid checkpoint."""
    code = job.wait(seconds=MAX_SECONDS)
    figures.seconds.append(time.monotonic() - since)
    expected = exit_code if job.num_processes else EXIT_STOPPED
    figures.count(code == expected, f"{case}: exit code {code}, expected {expected}: {job.output()[-3000:]}")
    figures.count(figures.seconds[-1] <= SECONDS_TO_STOP, f"{case}: {figures.seconds[-1]:.1f} s until the end")
    codes = job.exit_codes()
    figures.count(
        codes == {rank: EXIT_STOPPED for rank in range(max(1, job.num_processes))},
        f"{case}: exit codes {codes}: {job.output()[-3000:]}",
    )
    figures.count(not job.left_alive(), f"{case}: {job.left_alive()} left alive")
    figures.count("error: " not in own_lines(job), f"{case}: {own_lines(job)[-3000:]}")
    figures.count(not [*run.rglob(".tmp-*")], f"{case}: {[*run.rglob('.tmp-*')]} left")
    saved, step = steps_saved(run), last_step(run)
    is_right = saved[-1:] == ([step] if step else [])
    if step and is_right:
        is_right = why_invalid(step_folder(run / "checkpoints", step)) is None
    figures.count(is_right, f"{case}: checkpoints {saved} after {step} steps")


def own_lines(job: Job) -> str:
    """The job's output without torchrun's lines."""
    lines = job.output().split("\nTraceback (most recent call last):")[0].splitlines()
    return "\n".join(line for line in lines if not (line[:1] in "WE" and "torch/distributed" in line))


# ---- F5: a stop from outside ----


def stop(figures: Figures, folder: Path, num_processes: int, name: str, phase: str) -> None:
    """`name`: a signal to the launcher; "Ctrl-C" is SIGINT to all processes, as a terminal sends it."""
    case = f"{name} in {phase}, {num_processes} processes"
    config = config_for(folder)
    step = {"checkpoint": STEPS_PER_EPOCH}.get(phase, 3)
    # torchrun forwards SIGUSR1 only when this variable, which torchrun.sh sets, names it
    job = start(num_processes, config, phase, step=step, PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    number = signal.SIGINT if name == "Ctrl-C" else signal.Signals[name]
    since = job.send(number)
    if name == "Ctrl-C":
        os.kill(job.process.pid, number)  # workers get it twice, once forwarded, which counts as one request
        for pid in job.workers().values():
            os.kill(pid, number)
    count_stop(figures, case, job, folder / "run", since)
    figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s, step {last_step(folder / 'run')}")
    run = folder / "run"
    if phase == "validation":
        state = json.loads((step_folder(run / "checkpoints", STEPS_PER_EPOCH) / "state.json").read_text())
        figures.count(state["validation_pending"], f"{case}: the validation was not interrupted")
    if phase == "test":
        figures.count(
            (run / "model.safetensors").exists() and not [*run.glob("multimodal_bert-*")], f"{case}: {os.listdir(run)}"
        )
    count_resume(figures, case, num_processes, config)


@row(
    "F5",
    "SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 or Ctrl-C to torchrun, or to a single process, in reading, "
    "tokenisation, training, validation, test, writing a checkpoint",
    "ended within 25 s; every worker exits 75; the step reached is in a checkpoint; started again it ends bit-equal to "
    "a run without signals",
    full={
        "cases": (
            *product((2,), ("SIGTERM",), DELAYS),
            *product((0, 3), ("SIGTERM",), ("training", "validation", "checkpoint")),
            *product((2,), ("SIGINT", "SIGUSR1", "Ctrl-C"), ("training", "test")),
            (2, "SIGHUP", "training"),
            (2, "SIGQUIT", "checkpoint"),
            (0, "SIGHUP", "training"),
        )
    },
)
def test_F5_a_signal_stops_and_nothing_is_lost(
    tmp_path: Path,
    cases: tuple[tuple[int, str, str], ...] = (
        (0, "SIGHUP", "tokenisation"),
        (2, "SIGUSR1", "training"),
        (2, "Ctrl-C", "test"),
    ),
) -> Figures:
    """`cases`: processes (0: without torchrun), signal, phase. SIGTERM is F6's and F7's."""
    figures = Figures()
    for num_processes, name, phase in cases:
        stop(figures, tmp_path / f"{num_processes}-{name}-{phase}", num_processes, name, phase)
    return figures


# ---- F6: a signal that only some processes get ----


@row(
    "F6",
    "SIGTERM to one worker, in training and in validation",
    "all ranks stop after the same step, with one checkpoint more; every worker exits 75; a resume loses nothing",
    full={
        "cases": tuple(
            (count, rank, phase)
            for count, rank in ((2, 0), (2, 1), (3, 2))
            for phase in ("training", "validation", "test")
        )
    },
)
def test_F6_a_signal_to_one_rank_stops_all(
    tmp_path: Path, cases: tuple[tuple[int, int, str], ...] = ((2, 1, "validation"),)
) -> Figures:
    """`cases`: processes, the rank that gets the signal, phase."""
    figures = Figures()
    for num_processes, rank, phase in cases:
        case = f"SIGTERM to rank {rank} of {num_processes} in {phase}"
        folder = tmp_path / f"{num_processes}-{rank}-{phase}"
        config, rows = config_for(folder), folder / "rows"
        rows.mkdir()
        job = start(num_processes, config, phase, slow={**DELAYS[phase], "rows": str(rows)})
        before = steps_saved(folder / "run")
        count_stop(figures, case, job, folder / "run", job.send(signal.SIGTERM, rank))
        last = {path.name: json.loads(path.read_text().splitlines()[-1])["step"] for path in rows.glob("rows-*.jsonl")}
        figures.count(
            len(last) == num_processes and set(last.values()) == {last_step(folder / "run")},
            f"{case}: last steps {last}",
        )
        more = 0 if phase == "test" else 1
        figures.count(
            len(steps_saved(folder / "run")) == len(before) + more,
            f"{case}: checkpoints {before}, then {steps_saved(folder / 'run')}",
        )
        figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s, all after step {last_step(folder / 'run')}")
        count_resume(figures, case, num_processes, config)
    return figures


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """Workers whose launcher has ended become children of this process, which can then wait for their exit codes."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@row(
    "F6",
    "SIGKILL to torchrun; SIGTERM to torchrun and, while the checkpoint is written, SIGKILL",
    "the workers notice, write a checkpoint and exit 75; a resume loses nothing",
    full={
        "cases": (
            (1, "training"),
            *product((2,), ("reading", "training", "validation", "checkpoint", "test", "asked before")),
        )
    },
)
def test_F6_workers_stop_when_their_launcher_is_killed(
    tmp_path: Path, cases: tuple[tuple[int, str], ...] = ((2, "training"), (2, "asked before"))
) -> Figures:
    """`cases`: processes, phase; `asked before`: SIGTERM in training, SIGKILL 2 s later, during its checkpoint."""
    figures = Figures()
    for num_processes, phase in cases:
        case, folder = f"torchrun of {num_processes} killed in {phase}", tmp_path / f"{num_processes}-{phase}"
        config = config_for(folder)
        with adopt_orphans():
            if phase == "asked before":
                job = start(num_processes, config, "training", slow={"slow_step": 0.1, "slow_save": 1.5})
            else:
                job = start(num_processes, config, phase, step=STEPS_PER_EPOCH if phase == "checkpoint" else 3)
            workers = job.workers()
            if phase == "asked before":
                job.send(signal.SIGTERM)
                time.sleep(2.0)
            since = job.send(signal.SIGKILL)
            figures.count(job.wait(seconds=MAX_SECONDS) == -signal.SIGKILL, f"{case}: {job.output()[-3000:]}")
            figures.seconds.append(time.monotonic() - since)
            codes = {rank: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for rank, pid in workers.items()}
        figures.count(
            codes == dict.fromkeys(range(num_processes), EXIT_STOPPED),
            f"{case}: exit codes {codes}: {job.output()[-3000:]}",
        )
        saved, step = steps_saved(folder / "run"), last_step(folder / "run")
        figures.count(saved[-1:] == ([step] if step else []), f"{case}: checkpoints {saved} after {step} steps")
        figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s, step {step}")
        count_resume(figures, case, num_processes, config)
    return figures


# ---- F7: a second signal ----


def send_twice(job: Job, target: str, number: int, gap: float) -> float:
    """The signal twice, `gap` seconds apart, to all workers or to torchrun; returns the time of the second."""

    def send() -> float:
        if target == "torchrun" or not job.num_processes:
            return job.send(number)
        return [job.send(number, rank) for rank in range(job.num_processes)][-1]

    send()
    time.sleep(gap)
    return send()


@row(
    "F7",
    "SIGTERM or SIGINT twice, 1.5 s apart, to the workers or to torchrun, in a step and in a checkpoint's writing",
    "ended within 5 s of the second; every worker exits with 128 + signal; the checkpoint before it is complete, and a "
    "resume loses only what came after it",
    full={
        "cases": tuple(
            product((0, 2), ("workers", "torchrun"), ("SIGTERM", "SIGINT"), ("training", "validation", "checkpoint"))
        )
    },
)
def test_F7_a_second_signal_ends_it_at_once(
    tmp_path: Path,
    cases: tuple[tuple[int, str, str, str], ...] = (
        (2, "workers", "SIGTERM", "checkpoint"),
        (2, "torchrun", "SIGINT", "training"),
    ),
) -> Figures:
    """`cases`: processes, target of the signals, signal, phase."""
    figures = Figures()
    slow: dict[str, dict[str, Any]] = {
        "training": {"slow_step": [30, 4]},
        "validation": {"slow_eval": 2},
        "checkpoint": {"slow_save": [30, 4]},
    }
    for num_processes, target, name, phase in cases:
        if not num_processes and target == "torchrun":
            continue
        case, number = f"two {name} to {target} of {num_processes} in {phase}", signal.Signals[name]
        folder = tmp_path / f"{num_processes}-{target}-{name}-{phase}"
        config, run = config_for(folder, save_every=1), folder / "run"
        job = start(num_processes, config, phase, step=4, slow=slow[phase])
        job.workers()
        before = steps_saved(run)
        since = send_twice(job, target, number, 1.5)
        code = job.wait(seconds=MAX_SECONDS)
        figures.seconds.append(time.monotonic() - since)
        figures.count(
            code == (1 if num_processes else 128 + number), f"{case}: exit code {code}: {job.output()[-3000:]}"
        )
        figures.count(figures.seconds[-1] <= SECONDS_TO_LEAVE, f"{case}: {figures.seconds[-1]:.1f} s until the end")
        codes = job.exit_codes()
        last_signal = (
            signal.SIGTERM if target == "torchrun" else number
        )  # torchrun always sends SIGTERM the second time
        figures.count(
            codes == {rank: 128 + last_signal for rank in range(max(1, num_processes))},
            f"{case}: exit codes {codes}: {job.output()[-3000:]}",
        )
        figures.count(not job.left_alive(), f"{case}: {job.left_alive()} left alive")
        invalid = [step for step in before if why_invalid(step_folder(run / "checkpoints", step))]
        figures.count(
            steps_saved(run) == before and len(before) == 3 and not invalid,
            f"{case}: checkpoints {before}, then {steps_saved(run)}, invalid {invalid}",
        )
        figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s")
        count_resume(figures, case, num_processes, config)
    return figures
