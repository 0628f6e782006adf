"""Helpers for the security tests: a run to manipulate, the outcome of a command, and a listing of all files."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mmbert_core.cli import main
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import CHECKPOINT_FILES
from tests.support import tiny
from tests.support.fault_matrix import Figures


class Outcome:
    """A command of mmbert, run in this process, in which an unpickled payload could import everything."""

    def __init__(self, *arguments: str | Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                self.code = main([str(word) for word in arguments])
            except Exception as error:  # in a process it would be a traceback and exit code 1
                self.code = 1
                print(f"Traceback: {type(error).__name__}: {error}", file=err)
        self.text = out.getvalue() + err.getvalue()

    @property
    def refused(self) -> bool:
        """Exit code 2 and one line that says why."""
        lines = self.text.splitlines()
        return (
            self.code == 2 and sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in self.text
        )

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.text.strip()[-600:]}"


def write_config(folder: Path, **changes: Any) -> Path:
    """The config of a run of 8 steps in `folder/run`, with its cache in it."""
    values = tiny.settings(folder, num_rows=32, cache_path=None, save_every=1, keep_checkpoints=100, **changes)
    path = folder / "run.json"
    path.write_text(json.dumps(values))
    return path


def trained(folder: Path, **changes: Any) -> Path:
    """A finished run, in `folder/run`."""
    outcome = Outcome("train", write_config(folder, **changes))
    assert outcome.code == 0, outcome
    return folder / "run"


def keep_first_half(run: Path) -> None:
    """Change a finished run into one that was stopped after step 4."""
    for path in sorted((run / "checkpoints").glob("step-*"))[4:]:
        shutil.rmtree(path)
    for path in (run / "model.safetensors", run / "train_results.json", *run.glob("multimodal_bert-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_manifest(checkpoint: Path, **changes: Any) -> None:
    """A manifest that fits the current files, so that only their content can be refused."""
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
        for name in CHECKPOINT_FILES
        if (checkpoint / name).is_file()
    }
    version = (
        json.loads((checkpoint / "state.json").read_text())["format_version"]
        if is_json(checkpoint / "state.json")
        else 2
    )
    (checkpoint / MANIFEST).write_text(json.dumps({"format_version": version, "files": files} | changes))


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, OSError):
        return False
    return True


def listing(folder: Path, *, without: Sequence[Path] = ()) -> dict[str, str]:
    """Every file, folder and link in `folder` with content and time, except in `without`. Links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in without]
        for name in (*folders, *files):
            path = Path(parent, name)
            if path in without:
                continue
            if path.is_symlink():
                found[str(path)] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                found[str(path)] = "folder"
            else:
                found[str(path)] = f"{sha256_of(path)} of {path.stat().st_mtime_ns}"
    return found


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


def check_outcome(figures: Figures, outcome: Outcome, canary: Path, case: str, *, must_refuse: bool) -> None:
    figures.count(not canary.exists(), f"{case}: THE PAYLOAD RAN; {outcome}")
    canary.unlink(missing_ok=True)
    if must_refuse:
        figures.refused(outcome.refused, f"{case}: expected a refusal in one line, found {outcome}")
    else:
        figures.count(outcome.code == 0, f"{case}: {outcome}")
