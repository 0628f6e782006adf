"""A run killed before its n-th file operation, and resumed.

    `python -m tests.faults.file_operations FOLDER [--every K]`.

Every change of the disk by Python code raises an audit event, so kills before each of them cover every state of the
disk between two operations. The runs are forked from a process that has imported everything.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.report import results
from mmbert_core.runtime.ranks import read_context
from mmbert_core.storage.files import sha256_of
from tests.support import tiny

KILLED = 137
CHANGES = frozenset(
    "shutil.rmtree os.rename os.remove os.mkdir os.rmdir os.truncate os.link os.symlink os.chmod".split()
)
# files whose bytes depend on the time that steps took
TIMED = ("metrics.jsonl", "train_results.json", "state.json", "MANIFEST.json", "report.json", "report.html")


@dataclass
class Sweep:
    """The results of all kills."""

    operations: int = 0  # of a run without kills
    kills: dict[int, list[str]] = field(default_factory=dict)  # number of the operation -> differences of the folder


def is_change(event: str, arguments: Sequence[Any], folder: str) -> bool:
    """Whether an audit event is a change inside `folder`; relative paths, of calls with `dir_fd`, count too."""
    if not isinstance(arguments[0], (str, os.PathLike)):
        return False
    path = os.fspath(arguments[0])
    if "tensorboard" in path:  # a thread of its own writes these at any time
        return False
    if event == "open":
        return path.startswith(folder) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return path.startswith(folder) or not os.path.isabs(path)


def watch(folder: Path, action: Callable[[int], None]) -> list[int]:
    """Call `action(n)` before the n-th operation, from 1, that changes `folder`; returns a list with their number."""
    number = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in CHANGES or event == "open") and is_change(event, arguments, str(folder)):
            number[0] += 1
            action(number[0])

    sys.addaudithook(hook)
    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        hook("os.remove", (str(folder),))  # counted like a removal
        plain_fsync(descriptor)

    os.fsync = fsync
    return number


def in_child(run: Callable[[], Any]) -> int:
    """Exit code of a forked process that calls `run`. Its output goes to the file that FILE_OPERATIONS_LOG names."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave_after(run)


def leave_after(run: Callable[[], Any]) -> NoReturn:
    log = os.open(os.environ.get("FILE_OPERATIONS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run()
        os._exit(0)
    except BaseException:  # the parent sees the exit code
        traceback.print_exc()
        os._exit(1)


def listing(run: Path) -> dict[str, str]:
    """Path -> digest of a run's files without TensorBoard's, to which every start adds one.

    Folders of the test stage are numbered instead of named after their times; the digest of files in TIMED is "".
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if name.startswith("tensorboard"):
            continue
        if name.startswith(hooks.MODEL_CLASS):
            test, _, rest = name.partition("/")
            names = sorted(other.name for other in run.glob(f"{hooks.MODEL_CLASS}-*"))
            name = f"test {names.index(test)}/{rest}"
        is_timed = path.name in TIMED or path.is_dir() or path.suffix == ".lock"
        found[name] = "" if is_timed else sha256_of(path)
    return found


def compare(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    more, fewer = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    return [
        *(f"more: {name}" for name in more),
        *(f"fewer: {name}" for name in fewer),
        *(f"other bytes: {name}" for name in expected if found.get(name, expected[name]) != expected[name]),
    ]


def sweep(
    folder: Path, *, every: int = 1, first: int = 1, progress: Callable[[str], None] = lambda line: None, **changes: Any
) -> Sweep:
    """Kill a tiny run before each `every`-th operation and resume it; compare with a run without kills."""
    torch.set_num_threads(1)  # no thread before a fork
    results.write_plots = lambda *_, **__: []  # plots take longer than the run
    settings = {
        "num_rows": 24,
        "max_epochs": 2,
        "save_every": 2,
        "keep_checkpoints": 1,
        "val_check_interval": 2,
        "cache_path": str(folder / "run/cache"),
        **changes,
    }
    config = Config(**tiny.settings(folder, **settings))
    run = Path(config.model_path)
    context = read_context()
    note = folder / "operations.json"

    def train(kill_before: int | None = None) -> None:
        def action(number: int) -> None:
            if number == kill_before:
                os._exit(KILLED)

        counted = watch(run, action)
        tiny.train(config, context)
        note.write_text(json.dumps(counted[0]))

    def start_anew() -> None:
        shutil.rmtree(run, ignore_errors=True)

    start_anew()
    assert in_child(train) == 0, "the run without kills failed"
    total, expected = json.loads(note.read_text()), listing(run)
    result = Sweep(operations=total)
    for number in range(first, total + 1, every):
        start_anew()
        if (code := in_child(lambda number=number: train(number))) != KILLED:
            problems = [f"expected to be killed, exit code {code}"]
        elif (code := in_child(train)) != 0:
            problems = [f"the resume ended with {code}"]
        else:
            problems = compare(expected, listing(run))
        result.kills[number] = problems
        progress(f"{number}/{total}: {problems or 'equal'}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    arguments = parser.parse_args()
    result = sweep(
        arguments.folder, every=arguments.every, first=arguments.first, progress=lambda line: print(line, flush=True)
    )
    different = sum(map(bool, result.kills.values()))
    print(
        json.dumps(asdict(result))
        if arguments.json
        else f"{result.operations} operations, {len(result.kills)} kills, {different} changed the resumed run's files"
    )


if __name__ == "__main__":
    main()
