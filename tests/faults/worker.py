"""A training or prediction with faults planted: `worker.py PLANTS COMMAND...`, PLANTS a JSON object; the command line is mmbert's.

    {"rows": FOLDER}                 every rank notes the rows of each step in FOLDER/rows-<rank>.jsonl
    {"fail": [rank, phase, step]}    raise on that rank: data, forward, backward, eval, save, load, predict (step: where it has one)
    {"die_after_save": step}         every rank kills itself right after that step's checkpoint
    {"slow_save": seconds}           so long between the files of a checkpoint
    {"slow_step": seconds}           so long before each step
    {"slow_eval": seconds}           so long before each evaluated batch
    {"slow_data": seconds}           so long before data are read
    {"poison": [rank, step, kind]}   loss (nan) or gradient (inf) of one micro-batch
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmbert_core import cli, distributed, predictor
from mmbert_core.training import checkpoint, hooks, loop, setup

RANK = int(os.environ.get("RANK", "0"))


class Planted(Exception):
    """What a failing rank raises."""


def before(module: Any, name: str, action: Callable[..., None]) -> None:
    """`action` gets the arguments of every call of `module.name`, before it runs."""
    plain = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return plain(*arguments, **options)

    setattr(module, name, wrapped)


def after(module: Any, name: str, action: Callable[..., Any]) -> None:
    """`action` gets the result and the arguments of every call, and returns the result to give."""
    plain = getattr(module, name)
    setattr(module, name, lambda *arguments, **options: action(plain(*arguments, **options), *arguments, **options))


current: list[Any] = []  # the run, once it takes steps


def note_run() -> None:
    before(loop, "train_one_step", lambda run, order: current.__setitem__(slice(None), [run]))


def step_now() -> int:
    """The step under way, from 1."""
    return current[0].state.step + 1 if current else 0


def plant_rows(folder: str) -> None:
    stream = open(Path(folder) / f"rows-{RANK}.jsonl", "a", encoding="utf-8")

    def note(model, batch, batch_idx, *, task, weight_sum=None):
        if current and weight_sum != float("inf"):  # not the row without weight of an idle rank, nor a trial before step 1
            stream.write(json.dumps({"life": [os.getppid(), distributed.restart_count()], "time": time.time(), "step": step_now(), "rows": batch.row_index.tolist()}) + "\n")
            stream.flush()

    before(hooks, "training_step", note)


def plant_fail(rank: int, phase: str, step: int = 1) -> None:
    if rank != RANK:
        return

    def fail(*_: Any, **__: Any) -> None:
        raise Planted(f"planted in {phase}")

    def fail_at_step(*_: Any, **__: Any) -> None:
        if current and step_now() == step:
            fail()

    if phase == "backward":
        plain = torch.Tensor.backward

        def backward(*arguments: Any, **options: Any) -> None:
            fail_at_step()
            plain(*arguments, **options)

        torch.Tensor.backward = backward
    else:
        places = {
            "data": (cli, "prepare", fail), "forward": (hooks, "training_step", fail_at_step), "eval": (hooks, "validation_step", fail),
            "save": (checkpoint, "save_checkpoint", fail), "load": (setup, "restore", fail), "predict": (hooks, "run_epoch", fail),
        }  # fmt: skip
        before(*places[phase])


def plant_die_after_save(step: int) -> None:
    def die(result: None, run: Any) -> None:
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    after(loop, "save", die)


def plant_slow_save(seconds: float) -> None:
    before(checkpoint, "save_tensors", lambda *_: time.sleep(seconds))
    before(checkpoint, "write_json", lambda *_: time.sleep(seconds))


def plant_slow_step(seconds: float) -> None:
    before(loop, "train_one_step", lambda *_: time.sleep(seconds))


def plant_slow_eval(seconds: float) -> None:
    before(hooks, "_evaluate_batch", lambda *_: time.sleep(seconds))


def plant_slow_data(seconds: float) -> None:
    before(cli, "prepare", lambda *_: time.sleep(seconds))


def plant_poison(rank: int, step: int, kind: str) -> None:
    """Once, in the first micro-batch of that step: a loss that is nan, or a finite loss with an infinite gradient."""
    if rank != RANK:
        return
    done: list[int] = []

    def poison(result: dict[str, torch.Tensor], *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        if not current or step_now() != step or done:
            return result
        done.append(step)
        loss = result["loss"]
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return {"loss": loss * float("nan") if kind == "loss" else loss}

    after(hooks, "training_step", poison)


PLANTS: dict[str, Callable[..., None]] = {name.removeprefix("plant_"): value for name, value in list(globals().items()) if name.startswith("plant_")}


def main() -> None:
    note_run()
    for name, value in json.loads(sys.argv[1]).items():
        PLANTS[name](*(value if isinstance(value, list) else [value]))
    assert predictor  # imported so that every module is there to be planted in
    sys.argv[1:] = sys.argv[2:]
    cli.run()


if __name__ == "__main__":
    main()
