"""SIGKILLs of a rank of a running job, planned by phase and delay, and the job's outcome."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.runs import (
    ENVIRONMENT,
    SLOW,
    differences,
    noted_faults,
    notes_of,
    reference_run,
    write_run_config,
)
from tests.support.jobs import Job

# phase -> (a kill comes within so many seconds of its beginning, how often a random kill is planned for it)
PHASES = {
    "imports": (3.0, 4),
    "data": (1.5, 4),
    "start": (0.4, 2),
    "step": (0.15, 8),
    "validation": (0.15, 4),
    "save": (0.1, 4),
    "finish": (0.3, 3),
}
WAIT_SECONDS = 120.0  # for a phase; longer is a hang


@dataclass(frozen=True)
class PlannedKill:
    """A SIGKILL of `rank`, `delay` seconds after an attempt began a phase for the `nth` time, at `step` or later."""

    phase: str
    delay: float
    rank: int
    nth: int = 1
    step: int = 0


@dataclass
class Kill:
    """A SIGKILL that was sent: the rank's phase, and the seconds until the processes of the next attempt existed."""

    rank: int
    phase: str
    step: int
    seconds: float = 0.0


@dataclass
class Outcome:
    """How a job with kills ended."""

    code: int
    output: str
    kills: list[Kill]
    restarts: int


class Hang(AssertionError):
    """Something took longer than WAIT_SECONDS."""


def random_kills(generator: random.Random, count: int, num_processes: int) -> list[PlannedKill]:
    """Kills in all phases of a run. Those in training come after at least one whole step of the attempt."""
    kills = []
    for phase in generator.choices(list(PHASES), [weight for _, weight in PHASES.values()], k=count):
        nth = generator.randint(2, 5) if phase == "step" else 1
        delay = generator.uniform(0.0, PHASES[phase][0])
        kills.append(PlannedKill(phase, delay, generator.randrange(num_processes), nth))
    # those of the last phase come last: attempts after them would have no step left
    return sorted(kills, key=lambda planned: planned.phase == "finish")


def wait_until(condition: Callable[[], Any], job: Job, *, seconds: float = WAIT_SECONDS) -> Any:
    """The first true value of `condition()`, None when the job ends before; raises `Hang` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if job.process.poll() is not None:
            return None
        if time.monotonic() > deadline:
            job.kill_all()
            raise Hang(f"not reached within {seconds:.0f} s:\n{job.output()[-4000:]}")
        time.sleep(0.01)
    return value


def wait_for_ranks(job: Job, attempt: int) -> dict[int, int] | None:
    """Rank -> pid once all processes of that attempt exist; None when the job ends before."""

    def all_ranks() -> dict[int, int] | None:
        found = job.workers(restart=attempt)
        return found if len(found) == job.num_processes else None

    return wait_until(all_ranks, job)


def is_zombie(pid: int) -> bool:
    """Whether the process has ended and its parent has not collected its exit code yet."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def kill(job: Job, pid: int, folder: Path, attempt: int, rank: int) -> Kill | None:
    """SIGKILL, then wait until torchrun has started the next attempt or has ended. None when the process had ended."""
    try:
        if is_zombie(pid):
            return None
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return None
    started = time.monotonic()
    note = [{"phase": "imports", "step": 0}, *notes_of(folder, attempt, rank)][-1]
    wait_for_ranks(job, attempt + 1)
    return Kill(rank, note["phase"], note["step"], time.monotonic() - started)


def kill_as_planned(job: Job, attempt: int, planned: PlannedKill, folder: Path) -> Kill | None:
    """Wait for the planned phase and kill. None when the run ends before it comes."""
    pids = wait_for_ranks(job, attempt)
    if pids is None:
        return None
    pid = pids[planned.rank]

    def is_time() -> bool:
        notes = notes_of(folder, attempt, planned.rank)
        begun = sum(note["phase"] == planned.phase and note["step"] >= planned.step for note in notes)
        return planned.phase == "imports" or begun >= planned.nth or not Path(f"/proc/{pid}").exists()

    if not wait_until(is_time, job):
        return None
    time.sleep(planned.delay)
    return kill(job, pid, folder, attempt, planned.rank)


def last_restart(folder: Path) -> int:
    """The number of the last attempt that any rank has noted."""
    notes = (json.loads(line) for path in folder.glob("phases-*") for line in path.read_text().splitlines())
    return max((note["restart"] for note in notes), default=0)


def run_with_kills(folder: Path, num_processes: int, planned: list[PlannedKill], **changes: Any) -> Outcome:
    """A job that gets one kill in each of its first attempts, as long as it has not ended; then it may end."""
    config = write_run_config(folder, **changes)
    job = Job(
        num_processes,
        ["train", str(config)],
        faults=noted_faults(folder, **SLOW),
        max_restarts=len(planned),
        **ENVIRONMENT,
    )
    try:
        kills: list[Kill] = []
        for next_kill in planned:
            sent = kill_as_planned(job, len(kills), next_kill, folder)
            if sent is None:
                break
            kills.append(sent)
        code = job.wait(seconds=2 * WAIT_SECONDS)
        (folder / "output.txt").write_text(job.output())
        return Outcome(code, job.output(), kills, last_restart(folder))
    finally:
        job.kill_all()


def problems_of(outcome: Outcome, folder: Path, num_processes: int) -> list[str]:
    """What is wrong with a run after kills; empty when it ended like the reference run."""
    if outcome.code != 0:
        return [f"exit code {outcome.code}:\n{outcome.output[-6000:]}"]
    problems = differences(folder, reference_run(num_processes))
    if outcome.restarts != len(outcome.kills):
        problems.append(f"{outcome.restarts} restarts after {len(outcome.kills)} kills")
    return problems
