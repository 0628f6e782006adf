"""Processes that only write checkpoints, to be killed: `python -m tests.faults.checkpoint_writer FOLDER`.

Each JSON line on stdin holds the arguments of `write_until_killed` for one process. It is forked from this one, which
has imported everything, so that a start takes a fraction of a second. Prints its pid, and `gone` when it has ended.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from mmbert_core.training import checkpoint

KEEP = 2
BEST_EVERY = 5  # such steps are the best so far


def best_of(step: int) -> int | None:
    return step - step % BEST_EVERY or None


def tensors_of(step: int, version: int) -> dict[str, torch.Tensor]:
    """Weights or moments with values that depend on step and version."""
    return {"a": torch.full((64, 16), float(step)), "b": torch.full((7,), float(version))}


def slow_down(seconds: float, seed: int) -> None:
    """A pause before every change of the disk; a folder is removed file by file."""
    generator = random.Random(seed)

    def pause() -> None:
        time.sleep(generator.uniform(0.0, seconds))

    def paused(original: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            pause()
            return original(*arguments, **options)

        return wrapped

    def remove(path: Path) -> None:
        if path.is_dir():
            for file in path.iterdir():
                pause()
                file.unlink()
            pause()
            path.rmdir()
            pause()

    for name in ("save_tensors", "write_json", "sync_path", "manifest_of"):
        setattr(checkpoint, name, paused(getattr(checkpoint, name)))
    checkpoint.remove_path = remove


def write_until_killed(folder: Path, *, step: int, version: int, replace: bool, seconds: float, seed: int) -> NoReturn:
    """Checkpoints of the same step again and again (`replace`), or of one step after the other; noted when written."""
    slow_down(seconds, seed)
    with open(folder.parent / "written.txt", "a") as stream:
        while True:
            state = {"step": step, "version": version}
            checkpoint.save_checkpoint(
                folder, weights=tensors_of(step, version), moments=tensors_of(version, step), state=state
            )
            stream.write(f"{step} {version}\n")
            stream.flush()
            checkpoint.rotate(folder, keep=KEEP, newest=step, best_step=best_of(step))
            step, version = (step, version + 1) if replace else (step + 1, 0)


def main() -> None:
    torch.set_num_threads(1)  # no thread before a fork
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            write_until_killed(folder, **json.loads(line))
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
