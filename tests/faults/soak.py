"""Short runs of 1 to 4 processes, killed again and again.

    python -m tests.faults.soak --kills 200 --seed 0 [--folder FOLDER] [--json FILE]

Every job runs under torchrun with restarts. In each attempt a random rank gets a SIGKILL at a random instant, until the
planned kills are sent; then the job may end. It must exit with 0, bit-equal to a run without kills. Exit code 1 if
anything was otherwise. Every wait has a limit.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.kills import Hang, Kill, problems_of, random_kills, run_with_kills
from tests.faults.runs import count_rows

STAGES = {  # of phases; all others are "in training"
    "imports": "before step 1",
    "data": "before step 1",
    "start": "before step 1",
    "finish": "after the last step",
}


@dataclass
class Soak:
    """The sums over many jobs."""

    kills: int = 0
    jobs: int = 0
    recovered: int = 0  # kills in jobs that ended like the reference run
    rows_lost: int = 0
    rows_repeated: int = 0
    bit_equal: int = 0  # jobs
    seconds: float = 0.0
    phases: Counter = field(default_factory=Counter)  # kills by the rank's phase
    stages: Counter = field(default_factory=Counter)
    per_processes: dict[int, dict[str, int]] = field(default_factory=dict)
    restart_seconds: list[float] = field(default_factory=list)  # from a kill until the next attempt's processes existed
    problems: list[str] = field(default_factory=list)

    def add(self, num_processes: int, kills: list[Kill], problems: list[str], lost: int, repeated: int) -> None:
        self.jobs += 1
        self.kills += len(kills)
        self.recovered += 0 if problems else len(kills)
        self.bit_equal += not problems
        self.rows_lost += lost
        self.rows_repeated += repeated
        self.phases.update(kill.phase for kill in kills)
        self.stages.update(STAGES.get(kill.phase, "in training") for kill in kills)
        self.restart_seconds += [kill.seconds for kill in kills]
        counts = self.per_processes.setdefault(num_processes, {"jobs": 0, "kills": 0, "bit_equal": 0})
        counts["jobs"] += 1
        counts["kills"] += len(kills)
        counts["bit_equal"] += not problems
        killed_in = ", ".join(f"{kill.phase} {kill.step} of rank {kill.rank}" for kill in kills)
        self.problems += [f"{num_processes} processes, {killed_in}: {problem}" for problem in problems]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        values = {name.removeprefix("rows_"): value for name, value in vars(self).items() if name != "restart_seconds"}
        slowest = round(max(self.restart_seconds, default=0.0), 1)
        return {**values, "seconds": round(self.seconds, 1), "slowest_restart": slowest}


def soak(
    folder: Path,
    num_kills: int,
    seed: int,
    *,
    processes: tuple[int, ...] = (1, 2, 3, 4),
    max_kills_of_job: int = 10,
    report: Callable[[str], None] = lambda line: None,
) -> Soak:
    """Jobs of these numbers of processes in turn, in an order from the seed, until so many kills were sent."""
    generator, total, started = random.Random(seed), Soak(), time.monotonic()
    turns: list[int] = []
    jobs_without_kill = 0  # in a row
    while total.kills < num_kills and jobs_without_kill < 3:
        turns = turns or generator.sample(processes, len(processes))
        num_processes = turns.pop()
        job_folder = folder / f"job-{total.jobs:03d}"
        count = min(generator.randint(max_kills_of_job // 2, max_kills_of_job), num_kills - total.kills)
        begun = time.monotonic()
        try:
            outcome = run_with_kills(job_folder, num_processes, random_kills(generator, count, num_processes))
            kills, problems = outcome.kills, problems_of(outcome, job_folder, num_processes)
        except Hang as hang:
            kills, problems = [], [f"hang: {hang}"]
        lost, repeated = count_rows(job_folder) if not problems else (0, 0)
        total.add(num_processes, kills, problems, lost, repeated)
        jobs_without_kill = 0 if kills else jobs_without_kill + 1
        total.seconds = time.monotonic() - started
        phases = ", ".join(f"{kill.phase} {kill.step or ''}".strip() for kill in kills)
        report(
            f"{total.kills}/{num_kills}  {num_processes} processes, {len(kills)} kills ({phases}): "
            f"{'bit-equal' if not problems else problems}  {time.monotonic() - begun:.0f} s"
        )
        if not problems:
            shutil.rmtree(job_folder)
    if total.kills < num_kills:
        total.problems.append(f"{total.kills} kills sent instead of {num_kills}: jobs ended before their first kill")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the jobs; those that had a problem are kept there")
    parser.add_argument("--json", type=Path, help="file for the summary, which is printed too")
    arguments = parser.parse_args()
    # exits through atexit and finally, so that no job is left running
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mmbert-soak-"))
    total = soak(folder, arguments.kills, arguments.seed, report=lambda line: print(line, flush=True))
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
