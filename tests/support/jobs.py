"""Real jobs for fault tests: torchrun in the background, its worker processes by rank, signals, exit codes."""

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

WORKER = str(tiny.ROOT / "tests/support/job_worker.py")
LAUNCHER = str(tiny.ROOT / "tests/support/job_launcher.py")


def write_config(folder: Path, **changes: Any) -> Path:
    """A config file for the tiny tables and encoder of `folder` (written once), with `model_path` `folder/run`."""
    values = tiny.settings(folder, **changes)
    path = Path(folder) / f"{Path(values['model_path']).name}.json"
    path.write_text(json.dumps(values))
    return path


class Job:
    """`torchrun` (or, with `num_processes=0`, plain Python) on the worker with injected faults, in the background."""

    def __init__(
        self,
        num_processes: int,
        arguments: list[str],
        *,
        faults: dict[str, Any] | None = None,
        max_restarts: int = 0,
        exit_code_file: Path | None = None,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """`exit_code_file`: for `exit_codes`. `prefix`: put before the command, such as `nsenter ...`."""
        self.num_processes, self._exit_code_file = num_processes, exit_code_file
        if exit_code_file:
            exit_code_file.unlink(missing_ok=True)
        launcher = [
            *([LAUNCHER, str(exit_code_file)] if exit_code_file else ["-m"]),
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_processes}",
            f"--max_restarts={max_restarts}",
        ]
        # a test run that nohup or a shell's & started ignores these signals, and child processes would inherit that
        command = [
            *prefix,
            "env",
            "--default-signal=HUP,INT,QUIT",
            sys.executable,
            *(launcher if num_processes else []),
            WORKER,
            json.dumps(faults or {}),
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
        self._reader = threading.Thread(target=self._read, daemon=True)  # a full pipe would block the job
        self._reader.start()
        self._seen: set[int] = set()  # process ids of workers

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.append(line)

    def workers(self, restart: int | None = None) -> dict[int, int]:
        """Rank -> pid of the worker processes that exist now; `restart`: only of that one (0: the first start)."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if WORKER.encode() not in command or b"torch.distributed.run" in command:
                    continue
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) not in self._parents():
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
        """The first true value of `condition()`. Raises AssertionError when the job or the time ends before that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended with {self.process.returncode}:\n{self.output()[-4000:]}")
            time.sleep(0.02)
        self.kill_all()
        raise AssertionError(f"not reached within {seconds} s:\n{self.output()[-4000:]}")

    def send(self, signal_number: int, rank: int | None = None) -> float:
        """Send a signal to the launcher (`rank` None) or to one worker; returns the time."""
        pid = self.process.pid if rank is None else self.workers()[rank]
        self.workers()
        os.kill(pid, signal_number)
        return time.monotonic()

    def wait(self, *, seconds: float = 120) -> int:
        """The launcher's exit code once all processes have closed their output; on a hang kills them, returns -999."""
        self._reader.join(seconds)
        try:
            return self.process.wait(timeout=0 if self._reader.is_alive() else 10)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return -999

    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code (needs `exit_code_file`); minus the signal's number if a signal ended the process."""
        if not self.num_processes:
            return {0: self.process.returncode}
        if self._exit_code_file is None or not self._exit_code_file.exists():
            return {}
        pairs = (line.split() for line in self._exit_code_file.read_text().splitlines())
        return {int(rank): int(code) for rank, code in sorted(pairs)}

    def output(self) -> str:
        """Everything that launcher and workers printed; waits for the end."""
        self._reader.join()
        self.process.wait()
        return "".join(self._lines)

    def left_alive(self) -> list[int]:
        """Process ids of workers that `workers` or `send` has seen and that still exist."""
        return [pid for pid in self._seen if Path(f"/proc/{pid}").exists()]

    def kill_all(self) -> None:
        for pid in {self.process.pid, *self.workers().values(), *self._seen}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def run_job(num_processes: int, arguments: list[str], *, seconds: float = 180, **options: Any) -> tuple[int, str]:
    """Exit code and output of a job, waited for."""
    job = Job(num_processes, arguments, **options)
    return job.wait(seconds=seconds), job.output()


def error_lines(output: str) -> list[str]:
    """The lines in which a job printed why it ended."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """The warnings and errors that the package logs inside the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mmbert_core").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("mmbert_core").removeHandler(handler)


# ---- files of a run ----


def steps_saved(run: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending."""
    return sorted(list_steps(run / "checkpoints"))


def digest(run: Path, step: int | None = None) -> dict[str, Any]:
    """What must be equal, bit for bit, in an interrupted run and a reference run: weights, moments, losses etc."""
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
    """Step -> its sorted rows over all ranks, as noted (fault `rows`) by the last attempt that took the step.

    An attempt is a pair of launcher and restart.
    """
    notes = [json.loads(line) for path in Path(folder).glob("rows-*.jsonl") for line in path.read_text().splitlines()]
    last: dict[int, tuple[float, list[int]]] = {}  # step -> time and attempt of its last note
    for note in notes:
        last[note["step"]] = max(last.get(note["step"], (0.0, [])), (note["time"], note["attempt"]))
    steps: dict[int, list[int]] = {step: [] for step in sorted(last)}
    for note in notes:
        if note["attempt"] == last[note["step"]][1]:
            steps[note["step"]].extend(note["rows"])
    return {step: sorted(rows) for step, rows in steps.items()}
