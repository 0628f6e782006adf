"""Short training jobs for the fault tests: config, reference runs without faults, and the comparison with them."""

import atexit
import json
import shutil
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support import tiny
from tests.support.jobs import digest, rows_of_steps, run_job

NUM_ROWS, BATCH_SIZE, EPOCHS = 45, 8, 4  # 6 steps an epoch, the last of 5 rows
STEPS = 24
SETTINGS = {
    "batch_size": BATCH_SIZE,
    "max_epochs": EPOCHS,
    "val_check_interval": 0.5,
    "gradient_clip_val": 1.0,
    "weight_decay": 0.01,
    "head_lr": 3e-3,
    "save_every": 2,
}
SMALL_EVALUATION_BATCHES = {"evaluation_rows": 5}  # several batches of validation and test for each rank
# delays leave time to kill a process in a given phase; they change no result
SLOW = {"slow_step": 0.05, "slow_forward": 0.02, "slow_save": 0.01, "slow_eval": 0.02}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}  # bit-equal runs are promised for the CPU


@lru_cache
def input_folder(num_rows: int = NUM_ROWS) -> Path:
    """Encoder and tables, written once in a process; the test rows have no labels, so that no plots are drawn."""
    folder = Path(tempfile.mkdtemp(prefix="mmbert-kills-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny.settings(folder, num_rows=num_rows)
    tiny.write_table(folder / "test.csv", 37, seed=2, labels=False)
    return folder


def write_run_config(folder: Path, *, num_rows: int = NUM_ROWS, **changes: Any) -> Path:
    """`folder/run.json`: a config whose run is `folder/run`, with a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"model_path": str(folder / "run"), "cache_path": None}
    (folder / "run.json").write_text(json.dumps(tiny.settings(input_folder(num_rows), **SETTINGS | own | changes)))
    return folder / "run.json"


def noted_faults(folder: Path, **more: Any) -> dict[str, Any]:
    """Small evaluation batches, `more`, and notes of rows and phases in `folder`; notes come after delays."""
    return {**SMALL_EVALUATION_BATCHES, **more, "rows": str(folder), "phases": str(folder)}


@lru_cache
def reference_run(num_processes: int, *, num_rows: int = NUM_ROWS, **changes: Any) -> Path:
    """The folder of a job without kills, run once in a process, with all of its checkpoints."""
    name = "-".join(["reference", str(num_processes), *(f"{key}={value}" for key, value in changes.items())])
    folder = input_folder(num_rows) / name
    config = write_run_config(folder, num_rows=num_rows, **{"save_every": 1, "keep_checkpoints": 1000} | changes)
    code, output = run_job(num_processes, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    assert code == 0, f"the reference run ended with {code}:\n{output[-4000:]}"
    return folder


def notes_of(folder: Path, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
    """The phases that a rank has noted (fault `phases`) in one attempt: 0 is the first start, 1 the first restart."""
    path = folder / f"phases-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    notes = [json.loads(line) for line in lines if line.endswith("\n")]
    return [note for note in notes if note["restart"] == attempt]


# ---- comparison ----


def count_rows(folder: Path, *, num_rows: int = NUM_ROWS, epochs: int = EPOCHS) -> tuple[int, int]:
    """Rows lost and rows repeated, over all epochs, in the last attempt of each step."""
    steps, per_epoch = rows_of_steps(folder), -(-num_rows // BATCH_SIZE)
    lost = repeated = 0
    for epoch in range(epochs):
        epoch_steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        seen = Counter(row for step in epoch_steps for row in steps.get(step, []))
        lost += sum(row not in seen for row in range(num_rows))
        repeated += sum(count - 1 for count in seen.values())
    return lost, repeated


def predictions(run: Path) -> bytes:
    """The prediction file of the run's test stage."""
    results = json.loads((run / "train_results.json").read_text())
    return (Path(results["test_folder"]) / "test_result_0.tsv").read_bytes()


def largest_difference(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> float:
    """The largest relative difference of two lists of (step, loss, learning rate)."""
    return max((abs(a - b) / abs(b) for (_, a, _), (_, b, _) in zip(found, expected)), default=1.0)


def differences(folder: Path, expected: Path) -> list[str]:
    """What differs between a finished run and the reference; empty when both are equal bit for bit."""
    found, wanted = digest(folder / "run"), digest(expected / "run")
    problems = [f"{key} differ" for key in wanted if found[key] != wanted[key]]
    if "losses differ" in problems:
        largest = largest_difference(found["losses"], wanted["losses"])
        problems.append(f"losses differ by {largest:.1e} relative at most")
    if predictions(folder / "run") != predictions(expected / "run"):
        problems.append("predictions differ")
    if rows_of_steps(folder) != rows_of_steps(expected):
        problems.append("steps took other rows")
    if left := [str(path) for path in (folder / "run").rglob(".tmp-*")]:
        problems.append(f"temporary files left: {left}")
    return problems
