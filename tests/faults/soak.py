"""`python -m tests.faults.soak --kills 200 --seed 0 [--folder FOLDER] [--json FILE]`: short runs of 1 to 4 processes, killed again and again.

Every job runs under torchrun with restarts. A random rank gets a SIGKILL at a random instant of a life of the run (the time
between two starts), the next life another one, and so on; then the job may end. It must exit with 0, bit-equal to a run that
nobody disturbed. Exit code 1 if anything was otherwise. Every wait has a limit.
"""

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.faults.launch import Job, digest, rows_of_steps, run_job
from tests.support import tiny

NUM_ROWS, BATCH_SIZE, EPOCHS = 45, 8, 4  # 6 steps an epoch, the last of 5 rows
STEPS = 24
RUN = {
    "batch_size": BATCH_SIZE,
    "max_epochs": EPOCHS,
    "val_check_interval": 0.5,
    "gradient_clip_val": 1.0,
    "weight_decay": 0.01,
    "head_lr": 3e-3,
    "save_every": 2,
}
BATCHES = {"evaluation_rows": 5}  # several batches of validation and test for each rank
SLOW = {
    "slow_step": 0.05,
    "slow_forward": 0.02,
    "slow_save": 0.01,
    "slow_eval": 0.02,
}  # room for instants; no bit depends on it
PHASES = {
    "imports": 3.0,
    "data": 1.5,
    "start": 0.4,
    "step": 0.15,
    "validation": 0.15,
    "save": 0.1,
    "finish": 0.3,
}  # within so many seconds of its beginning
WEIGHTS = {
    "imports": 4,
    "data": 4,
    "start": 2,
    "step": 8,
    "validation": 4,
    "save": 4,
    "finish": 3,
}  # how often a kill aims at it
WAIT_SECONDS = 120.0  # for a phase; longer is a hang
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}  # bits are promised on the CPU
PLACES = {
    "imports": "before step 1",
    "data": "before step 1",
    "start": "before step 1",
    "finish": "after the last step",
}


# ---- runs ----


@lru_cache
def inputs(num_rows: int = NUM_ROWS) -> Path:
    """Encoder and tables, made once in a process; the test rows have no labels, so that no pictures are drawn."""
    folder = Path(tempfile.mkdtemp(prefix="mmbert-kills-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny.settings(folder, num_rows=num_rows)
    tiny.write_table(folder / "test.csv", 37, seed=2, labels=False)
    return folder


def write_run(folder: Path, *, num_rows: int = NUM_ROWS, **changes: Any) -> Path:
    """`folder/run.json`: a config whose run is `folder/run` with a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    values = tiny.settings(inputs(num_rows), **RUN | {"model_path": str(folder / "run"), "cache_path": None} | changes)
    (folder / "run.json").write_text(json.dumps(values))
    return folder / "run.json"


def plants_of(folder: Path, **more: Any) -> dict[str, Any]:
    """What every job here has planted; slow ones come first."""
    return {**BATCHES, **more, "rows": str(folder), "phases": str(folder)}


@lru_cache
def straight(num_processes: int, *, num_rows: int = NUM_ROWS, **changes: Any) -> Path:
    """The folder of an undisturbed job, made once in a process. Its checkpoints are all there."""
    folder = inputs(num_rows) / "-".join(
        ["straight", str(num_processes), *(f"{key}={value}" for key, value in changes.items())]
    )
    config = write_run(folder, num_rows=num_rows, **{"save_every": 1, "keep_checkpoints": 1000} | changes)
    code, output = run_job(num_processes, ["train", str(config)], plants=plants_of(folder), **ENVIRONMENT)
    assert code == 0, f"the undisturbed run ended with {code}:\n{output[-4000:]}"
    return folder


def count_rows(folder: Path, *, num_rows: int = NUM_ROWS, epochs: int = EPOCHS) -> tuple[int, int]:
    """Rows lost and repeated, over all epochs, among the steps as they were finally taken."""
    steps, per_epoch = rows_of_steps(folder), -(-num_rows // BATCH_SIZE)
    lost = repeated = 0
    for epoch in range(epochs):
        seen = Counter(
            row for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1) for row in steps.get(step, [])
        )
        lost += sum(row not in seen for row in range(num_rows))
        repeated += sum(count - 1 for count in seen.values())
    return lost, repeated


def predictions(run: Path) -> bytes:
    """The file of the test stage that the run's results name."""
    return (
        Path(json.loads((run / "train_results.json").read_text())["test_folder"]) / "test_result_0.tsv"
    ).read_bytes()


def differences(folder: Path, expected: Path) -> list[str]:
    """What differs between a finished run and the undisturbed one; nothing does when both have the same bits."""
    found, wanted = digest(folder / "run"), digest(expected / "run")
    problems = [f"{key} differ" for key in wanted if found[key] != wanted[key]]
    if "losses differ" in problems:
        pairs = zip(found["losses"], wanted["losses"])
        problems.append(
            f"losses differ by {max((abs(a - b) / abs(b) for (_, a, _), (_, b, _) in pairs), default=1.0):.1e} relative at most"
        )
    if predictions(folder / "run") != predictions(expected / "run"):
        problems.append("predictions differ")
    if rows_of_steps(folder) != rows_of_steps(expected):
        problems.append("steps took other rows")
    if left := [str(path) for path in (folder / "run").rglob(".tmp-*")]:
        problems.append(f"left behind: {left}")
    return problems


# ---- kills ----


@dataclass(frozen=True)
class Strike:
    """A SIGKILL of `rank`, `delay` seconds after a life of the run has begun a phase for the `nth` time, at `step` or later."""

    phase: str
    delay: float
    rank: int
    nth: int = 1
    step: int = 0


@dataclass
class Kill:
    """A SIGKILL that was sent: what the rank was doing, and the seconds until the next life's processes were there."""

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
    """Something took longer than anything may."""


def random_strikes(generator: random.Random, count: int, num_processes: int) -> list[Strike]:
    """Ranks and instants over the whole life of a run; those in training come after at least one whole step of that life, those at the end last."""
    strikes = []
    for phase in generator.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count):
        nth = generator.randint(2, 5) if phase == "step" else 1
        strikes.append(Strike(phase, generator.uniform(0.0, PHASES[phase]), generator.randrange(num_processes), nth))
    return sorted(
        strikes, key=lambda strike: strike.phase == "finish"
    )  # else the lives after it would have no step left


def until(condition: Callable[[], Any], job: Job, *, seconds: float = WAIT_SECONDS) -> Any:
    """The first true value of `condition()`, None when the job ends before; raises `Hang` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if job.process.poll() is not None:
            return None
        if time.monotonic() > deadline:
            job.kill_all()
            raise Hang(f"waited {seconds:.0f} s in vain:\n{job.output()[-4000:]}")
        time.sleep(0.01)
    return value


def ranks_of(job: Job, life: int) -> dict[int, int] | None:
    """Rank -> pid once all processes of that start are there; None when the job ends before."""

    def all_there() -> dict[int, int] | None:
        found = job.workers(restart=life)
        return found if len(found) == job.num_processes else None

    return until(all_there, job)


def notes_of(folder: Path, life: int, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank has noted in one life (plant `phases`)."""
    path = folder / f"phases-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    notes = [json.loads(line) for line in lines if line.endswith("\n")]
    return [note for note in notes if note["restart"] == life]


def kill(job: Job, pid: int, folder: Path, life: int, rank: int) -> Kill | None:
    """SIGKILL, and the seconds until torchrun has started the next life or has ended. None when the process had ended."""
    try:
        if (
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        ):  # ended, and torchrun has not looked yet
            return None
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return None
    started = time.monotonic()
    note = [{"phase": "imports", "step": 0}, *notes_of(folder, life, rank)][-1]
    ranks_of(job, life + 1)
    return Kill(rank, note["phase"], note["step"], time.monotonic() - started)


def strike(job: Job, life: int, strike: Strike, folder: Path) -> Kill | None:
    """Wait for the instant and kill. None when the run ends before it comes."""
    pids = ranks_of(job, life)
    if pids is None:
        return None
    pid = pids[strike.rank]

    def is_time() -> bool:
        notes = notes_of(folder, life, strike.rank)
        begun = sum(note["phase"] == strike.phase and note["step"] >= strike.step for note in notes)
        return strike.phase == "imports" or begun >= strike.nth or not Path(f"/proc/{pid}").exists()

    if not until(is_time, job):
        return None
    time.sleep(strike.delay)
    return kill(job, pid, folder, life, strike.rank)


def struck_run(folder: Path, num_processes: int, strikes: list[Strike], **changes: Any) -> Outcome:
    """A job that gets one strike in each of its first lives, as long as it has not ended; then it may end."""
    config = write_run(folder, **changes)
    job = Job(
        num_processes,
        ["train", str(config)],
        plants=plants_of(folder, **SLOW),
        max_restarts=len(strikes),
        **ENVIRONMENT,
    )
    try:
        kills: list[Kill] = []
        for planned in strikes:
            struck = strike(job, len(kills), planned, folder)
            if struck is None:
                break
            kills.append(struck)
        code = job.wait(seconds=2 * WAIT_SECONDS)
        (folder / "output.txt").write_text(job.output())
        return Outcome(
            code,
            job.output(),
            kills,
            max(
                (
                    note["restart"]
                    for path in folder.glob("phases-*")
                    for note in map(json.loads, path.read_text().splitlines())
                ),
                default=0,
            ),
        )
    finally:
        job.kill_all()


def problems_of(outcome: Outcome, folder: Path, num_processes: int) -> list[str]:
    """What is wrong with a struck run; nothing when it ended as if nobody had struck."""
    if outcome.code != 0:
        return [f"exit code {outcome.code}:\n{outcome.output[-6000:]}"]
    problems = differences(folder, straight(num_processes))
    if outcome.restarts != len(outcome.kills):
        problems.append(f"{outcome.restarts} restarts after {len(outcome.kills)} kills")
    return problems


# ---- many of them ----


@dataclass
class Soak:
    """What many jobs came to."""

    kills: int = 0
    jobs: int = 0
    recovered: int = 0  # kills in jobs that ended as if nobody had struck
    rows_lost: int = 0
    rows_repeated: int = 0
    bit_equal: int = 0  # jobs
    seconds: float = 0.0
    phases: Counter = field(default_factory=Counter)  # kills by what the rank was doing
    places: Counter = field(default_factory=Counter)
    per_processes: dict[int, dict[str, int]] = field(default_factory=dict)
    restart_seconds: list[float] = field(default_factory=list)  # from a kill until the next life's processes were there
    problems: list[str] = field(default_factory=list)

    def add(self, num_processes: int, kills: list[Kill], problems: list[str], lost: int, repeated: int) -> None:
        self.jobs += 1
        self.kills += len(kills)
        self.recovered += 0 if problems else len(kills)
        self.bit_equal += not problems
        self.rows_lost += lost
        self.rows_repeated += repeated
        self.phases.update(kill.phase for kill in kills)
        self.places.update(PLACES.get(kill.phase, "in training") for kill in kills)
        self.restart_seconds += [kill.seconds for kill in kills]
        part = self.per_processes.setdefault(num_processes, {"jobs": 0, "kills": 0, "bit_equal": 0})
        part["jobs"] += 1
        part["kills"] += len(kills)
        part["bit_equal"] += not problems
        self.problems += [
            f"{num_processes} processes, {', '.join(f'{kill.phase} {kill.step} of rank {kill.rank}' for kill in kills)}: {problem}"
            for problem in problems
        ]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        values = {name.removeprefix("rows_"): value for name, value in vars(self).items() if name != "restart_seconds"}
        return {
            **values,
            "seconds": round(self.seconds, 1),
            "slowest_restart": round(max(self.restart_seconds, default=0.0), 1),
        }


def soak(
    folder: Path,
    num_kills: int,
    seed: int,
    *,
    processes: tuple[int, ...] = (1, 2, 3, 4),
    most_in_a_job: int = 10,
    say: Callable[[str], None] = lambda line: None,
) -> Soak:
    """Jobs of these numbers of processes in turn, in an order from the seed, until so many kills were sent."""
    generator, total, started = random.Random(seed), Soak(), time.monotonic()
    turns: list[int] = []
    in_vain = 0  # jobs in a row that ended before the first strike
    while total.kills < num_kills and in_vain < 3:
        turns = turns or generator.sample(processes, len(processes))
        num_processes = turns.pop()
        place = folder / f"job-{total.jobs:03d}"
        count = min(generator.randint(most_in_a_job // 2, most_in_a_job), num_kills - total.kills)
        begun = time.monotonic()
        try:
            outcome = struck_run(place, num_processes, random_strikes(generator, count, num_processes))
            kills, problems = outcome.kills, problems_of(outcome, place, num_processes)
        except Hang as hang:
            kills, problems = [], [f"hang: {hang}"]
        lost, repeated = count_rows(place) if not problems else (0, 0)
        total.add(num_processes, kills, problems, lost, repeated)
        in_vain = 0 if kills else in_vain + 1
        total.seconds = time.monotonic() - started
        where = ", ".join(f"{kill.phase} {kill.step or ''}".strip() for kill in kills)
        say(
            f"{total.kills}/{num_kills}  {num_processes} processes, {len(kills)} kills ({where}): {'bit-equal' if not problems else problems}  {time.monotonic() - begun:.0f} s"
        )
        if not problems:
            shutil.rmtree(place)
    if total.kills < num_kills:
        total.problems.append(f"{total.kills} kills sent instead of {num_kills}: jobs ended before their first strike")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the jobs; those in which something was wrong stay there")
    parser.add_argument("--json", type=Path, help="file for the summary, which is printed too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no job is left behind
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mmbert-soak-"))
    total = soak(folder, arguments.kills, arguments.seed, say=lambda line: print(line, flush=True))
    text = json.dumps(total.summary())
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    failed = bool(total.problems or total.rows_lost or total.rows_repeated)
    if not failed and not arguments.folder:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
