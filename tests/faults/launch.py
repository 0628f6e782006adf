"""Real jobs to do harm to: torchrun in the background, its worker processes by rank, signals, the end of all of them."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmbert_core.storage.files import sha256_of
from mmbert_core.training.checkpoint import list_steps
from tests.support import tiny

WORKER = str(tiny.ROOT / "tests/faults/worker.py")
LAUNCHER = str(tiny.ROOT / "tests/faults/launcher.py")


def write_config(folder: Path, **changes: Any) -> Path:
    """A config file over the tiny tables and encoder of `folder` (made once); its run is `folder/run` unless changed."""
    values = tiny.settings(folder, **changes)
    path = Path(folder) / f"{Path(values['model_path']).name}.json"
    path.write_text(
        json.dumps({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})
    )
    return path


class Job:
    """`torchrun` (or, with `num_processes=0`, plain Python) on the worker with planted faults, running in the background."""

    def __init__(
        self,
        num_processes: int,
        arguments: list[str],
        *,
        plants: dict[str, Any] | None = None,
        max_restarts: int = 0,
        ends: Path | None = None,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """`ends`: a file for `exit_codes`. `prefix`: words before the command, such as those of `nsenter`."""
        self.num_processes, self._ends = num_processes, ends
        if ends:
            ends.unlink(missing_ok=True)
        launcher = [
            *([LAUNCHER, str(ends)] if ends else ["-m"]),
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
            f"--max_restarts={max_restarts}",
        ]
        # tests that nohup or a shell's & started would hand on that these are to be ignored
        command = [
            *prefix,
            "env",
            "--default-signal=HUP,INT,QUIT",
            sys.executable,
            *(launcher if num_processes else []),
            WORKER,
            json.dumps(plants or {}),
            *arguments,
        ]
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        variables = {k: v for k, v in os.environ.items() if k not in hidden} | {
            "PYTHONPATH": str(tiny.ROOT),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.process = subprocess.Popen(
            command,
            cwd=tiny.ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(
            target=self._read, daemon=True
        )  # a pipe that nobody reads would fill and stop a job of many lives
        self._reader.start()
        self._seen: set[int] = set()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.append(line)

    def workers(self, restart: int | None = None) -> dict[int, int]:
        """Rank -> pid of the worker processes that are there now; of that restart alone (0: the first start)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if (
                    WORKER.encode() not in words
                    or b"torch.distributed.run" in words
                    or int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) not in self._parents()
                ):
                    continue
                variables = dict(
                    item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if b"=" in item
                )
                if restart in (None, int(variables.get(b"TORCHELASTIC_RESTART_COUNT", b"0"))):
                    found[int(variables.get(b"RANK", b"0"))] = int(entry.name)
            except (OSError, ValueError, IndexError):
                continue
        self._seen |= set(found.values())
        return found

    def _parents(self) -> set[int]:
        return {self.process.pid, os.getpid() if "run" not in self.process.args else self.process.pid}

    def wait_until(self, condition: Callable[[], Any], *, seconds: float = 90) -> Any:
        """The first true value of `condition()`. Raises when the job ends or time passes before that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the job ended with {self.process.returncode} before its time:\n{self.output()[-4000:]}"
                )
            time.sleep(0.02)
        self.kill_all()
        raise AssertionError(f"waited {seconds} s in vain:\n{self.output()[-4000:]}")

    def send(self, signal_number: int, rank: int | None = None) -> float:
        """A signal to the launcher (`rank` None) or to one worker; returns the time of it."""
        pid = self.process.pid if rank is None else self.workers()[rank]
        self.workers()
        os.kill(pid, signal_number)
        return time.monotonic()

    def wait(self, *, seconds: float = 120) -> int:
        """The launcher's exit code once all who could print are gone; kills everything and returns -999 when it hangs."""
        self._reader.join(seconds)
        try:
            return self.process.wait(timeout=0 if self._reader.is_alive() else 10)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return -999

    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code of its process, as the system told torchrun (asked for by `ends`); minus a signal's number when that killed it."""
        if not self.num_processes:
            return {0: self.process.returncode}
        pairs = (
            (line.split() for line in self._ends.read_text().splitlines()) if self._ends and self._ends.exists() else ()
        )
        return {int(rank): int(code) for rank, code in sorted(pairs)}

    def output(self) -> str:
        """All that launcher and workers printed; waits for the end."""
        self._reader.join()
        self.process.wait()
        return "".join(self._lines)

    def left_alive(self) -> list[int]:
        """Workers that `workers` or `send` has seen and that are still there."""
        return [pid for pid in self._seen if Path(f"/proc/{pid}").exists()]

    def kill_all(self) -> None:
        for pid in {self.process.pid, *self.workers().values(), *self._seen}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def run_job(num_processes: int, arguments: list[str], *, seconds: float = 180, **options: Any) -> tuple[int, str]:
    """Exit code and output of a job that nobody disturbs from outside."""
    job = Job(num_processes, arguments, **options)
    return job.wait(seconds=seconds), job.output()


def error_lines(output: str) -> list[str]:
    """What a job printed to say why it ended."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


@contextmanager
def logged() -> Iterator[list[str]]:
    """The warnings and errors that the package logs inside."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mmbert_core").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("mmbert_core").removeHandler(handler)


# ---- what a run left ----


def steps_saved(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending."""
    return sorted(list_steps(run / "checkpoints"))


def digest(run: Path, step: int | None = None) -> dict[str, Any]:
    """What must be equal between a straight and a disturbed run: weights, moments, schedule, best, losses to the last bit."""
    folder = run / "checkpoints" / f"step-{step if step is not None else steps_saved(run)[-1]:08d}"
    state = json.loads((folder / "state.json").read_text())
    return {
        "weights": sha256_of(folder / "model.safetensors"),
        "moments": sha256_of(folder / "optimizer.safetensors"),
        "step": state["step"],
        "scheduler": state["scheduler"],
        "best": [state["best_step"], state["best_value"]],
        "model": sha256_of(run / "model.safetensors") if (run / "model.safetensors").exists() else None,
        "losses": [
            (line["step"], line["train_loss"], line["lr"]) for line in tiny.metrics_lines(run) if "train_loss" in line
        ],
        "validations": [(line["step"], line["val_loss"]) for line in tiny.metrics_lines(run) if "val_loss" in line],
    }


def rows_of_steps(folder: Path) -> dict[int, list[int]]:
    """Step -> its rows over all ranks, as the last life (launcher, restart) that took the step noted them (plant `rows`), sorted."""
    notes = [json.loads(line) for path in Path(folder).glob("rows-*.jsonl") for line in path.read_text().splitlines()]
    last: dict[int, tuple[float, list[int]]] = {}  # step -> time and life of its last note
    for note in notes:
        last[note["step"]] = max(last.get(note["step"], (0.0, [])), (note["time"], note["life"]))
    steps: dict[int, list[int]] = {step: [] for step in sorted(last)}
    for note in notes:
        if note["life"] == last[note["step"]][1]:
            steps[note["step"]].extend(note["rows"])
    return {step: sorted(rows) for step, rows in steps.items()}


def prediction_ids(path: Path, column: str = "row_id") -> list[str]:
    with open(path, newline="", encoding="utf-8") as stream:
        return [row[column] for row in csv.DictReader(stream, delimiter="\t")]
