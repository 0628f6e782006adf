"""A run killed before one of its file operations and resumed has the files of a run without kills.

This is a sample of the operations; `python -m tests.faults.file_operations` tries all of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


@row(
    "F25",
    "SIGKILL right before a file operation of a run: opening, renaming, removing, creating, syncing",
    "the resumed run's folder has the files of a run without kills, with the same bytes: one test folder, the same "
    "checkpoints",
    full={"every": 1},
)
def test_F25_kills_before_file_operations(tmp_path: Path, every: int = 23) -> Figures:
    """In a process of its own, because it forks."""
    arguments = [str(tmp_path / "sweep"), "--every", str(every), "--json"]
    command = [sys.executable, "-m", "tests.faults.file_operations", *arguments]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=7200)
    figures = Figures()
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for number, problems in result["kills"].items():
        figures.count(not problems, f"operation {number}: {problems}")
    figures.notes.append(f"{len(result['kills'])} kills at {result['operations']} file operations")
    return figures
