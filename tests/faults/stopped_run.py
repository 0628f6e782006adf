"""A run that was stopped before its end, of which copies are started again."""

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from mmbert_core.training.checkpoint import list_steps, step_folder
from tests.faults.inputs import command
from tests.support import tiny
from tests.support.fault_matrix import Figures
from tests.support.jobs import digest

SETTINGS = {
    "max_epochs": 2,
    "save_every": 1,
    "keep_checkpoints": 10,
    "test_path": (),
    "metric_choices": ["accuracy", "f1_score"],
}


class StoppedRun:
    """A run of 27 rows that was stopped after step 5 of 8, its tables, and the digest of the same run at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("encoder", "encoder2"):
            tiny.write_encoder(folder / name)
        for seed, (name, rows) in enumerate([("train", 27), ("val", 23), ("test", 37)]):
            tiny.write_table(folder / f"{name}.csv", rows, seed=seed)
            duplicate_columns(folder / f"{name}.csv")
        for name in ("train", "val"):
            shutil.copy(folder / f"{name}.csv", folder / f"{name}2.csv")
        paths = {"model_path": str(folder / "run"), "val_path": [str(folder / "val.csv")]}
        self.values = tiny.settings(folder) | SETTINGS | paths
        done = command("train", self.write(folder / "run"))
        assert done.code == 0, done.err
        self.expected = digest(folder / "run")
        for step in list_steps(folder / "run/checkpoints"):
            if step > 5:
                shutil.rmtree(step_folder(folder / "run/checkpoints", step))
        for name in ("model.safetensors", "train_results.json"):
            (folder / "run" / name).unlink()
        self.copies = itertools.count()

    def write(self, run: Path, **changes: Any) -> Path:
        """A config file for the run of that folder."""
        path = run.with_suffix(".json")
        path.write_text(json.dumps({**self.values, "model_path": str(run), **changes}))
        return path

    def copy(self) -> Path:
        return Path(shutil.copytree(self.folder / "run", self.folder / f"copy{next(self.copies)}"))


def duplicate_columns(path: Path) -> None:
    """Add a copy of every column, named NAME2."""
    with open(path, newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header + [f"{name}2" for name in header], *(cells + cells for cells in rows)])


def count_resume(
    figures: Figures, case: str, config: Path, run: Path, expected: dict[str, Any], *, same_bits: bool = True
) -> str:
    """Start a run again; it must resume from a checkpoint and end like `expected`. Returns what it printed."""
    done = command("train", config)
    is_resumed = done.code == 0 and "resuming from" in done.err
    if figures.count(is_resumed, f"{case}: exit code {done.code}: {done.err[-1500:]}") and same_bits:
        found = digest(run)
        figures.count(found == expected, f"{case}: {[key for key in found if found[key] != expected[key]]} differ")
    return done.err
