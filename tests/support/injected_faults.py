"""Faults injected into a training or prediction, and notes for the test, by replacing functions of the package.

`inject({NAME: ARGUMENTS, ...})` calls `inject_NAME(*ARGUMENTS)` for each, in this order; one argument needs no list.
A function is replaced in the module that looks it up, not in the one that defines it.
"""

import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmbert_core import hooks
from mmbert_core.inference import scoring
from mmbert_core.runtime import ranks
from mmbert_core.training import checkpoint, finish, loop, memory, start, train

RANK = int(os.environ.get("RANK", "0"))
FILLER = "of-another-user"  # the file that fills a disk


class InjectedError(Exception):
    """What a failing rank raises."""


FAILURE_MARKS: list[Path] = []  # files that appear when a rank fails
current_run: list[Any] = []  # the run, once it takes steps


def before(module: Any, name: str, action: Callable[..., None]) -> None:
    """`action` gets the arguments of every call of `module.name`, before it runs."""
    original = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return original(*arguments, **options)

    setattr(module, name, wrapped)


def after(module: Any, name: str, action: Callable[..., Any]) -> None:
    """`action` gets the result and the arguments of every call; what it returns is the new result."""
    original = getattr(module, name)
    setattr(module, name, lambda *arguments, **options: action(original(*arguments, **options), *arguments, **options))


def before_step(step: int, action: Callable[[], None]) -> None:
    """`action` is called right before that training step, counted from 1."""
    before(loop, "train_one_step", lambda run, order: action() if run.state.step + 1 == step else None)


def current_step() -> int:
    """The step that is being computed, from 1; 0 before the first."""
    return current_run[0].state.step + 1 if current_run else 0


def inject(faults: dict[str, Any]) -> None:
    before(loop, "train_one_step", lambda run, order: current_run.__setitem__(slice(None), [run]))
    for name, value in faults.items():
        globals()[f"inject_{name}"](*(value if isinstance(value, list) else [value]))


# ---- failures ----


def inject_fail(rank: int, phase: str, step: int = 1) -> None:
    """Raise on that rank in a phase: data, forward, backward, eval, save, manifest, read, load, predict."""
    if rank != RANK:
        return

    def fail(*_: Any, **__: Any) -> None:
        for path in FAILURE_MARKS:
            path.touch()
        raise InjectedError(f"injected in {phase}")

    def fail_at_step(*_: Any, **__: Any) -> None:
        if current_run and current_step() == step:
            fail()

    if phase == "backward":
        original = torch.Tensor.backward

        def backward(*arguments: Any, **options: Any) -> None:
            fail_at_step()
            original(*arguments, **options)

        torch.Tensor.backward = backward
    elif phase == "manifest":
        before(checkpoint, "write_json", lambda path, _: fail() if path.name == checkpoint.MANIFEST else None)
    else:
        module, name, action = {
            "data": (train, "prepare", fail),
            "forward": (hooks, "training_step", fail_at_step),
            "eval": (hooks, "validation_step", fail),
            "save": (checkpoint, "save_checkpoint", fail),
            "load": (start, "restore", fail),
            "predict": (hooks, "run_epoch", fail),
            "read": (checkpoint, "read_checkpoint", fail),
        }[phase]
        before(module, name, action)


def inject_failure_mark(folder: str) -> None:
    """FOLDER/failed appears when this rank fails."""
    FAILURE_MARKS.append(Path(folder) / "failed")


def inject_die_after_save(*steps: int) -> None:
    """Every rank kills itself right after the checkpoint of each of these steps."""

    def die(result: None, run: Any) -> None:
        if run.state.step in steps:
            os.kill(os.getpid(), signal.SIGKILL)

    after(loop, "save", die)


def inject_poison(rank: int, step: int, kind: str) -> None:
    """Once, in the first micro-batch of that step: a loss that is nan, or a finite loss with an infinite gradient."""
    if rank != RANK:
        return
    done: list[int] = []

    def poison(result: dict[str, torch.Tensor], *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        if not current_run or current_step() != step or done:
            return result
        done.append(step)
        loss = result["loss"]
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return {"loss": loss * float("nan") if kind == "loss" else loss}

    after(hooks, "training_step", poison)


def inject_loss_scale(first: float, factor: float) -> None:
    """fp16 begins with that loss scale, and multiplies it by the factor after an overflow."""
    start.build_scaler = lambda precision, device: torch.amp.GradScaler(
        device.type, init_scale=first, backoff_factor=factor
    )


# ---- delays: seconds, so that a test can act in a given phase ----


def inject_slow_save(seconds: float, step: int | None = None) -> None:
    """Before each file of a checkpoint; with a step, of that step's checkpoint alone."""

    def wait(*_: Any) -> None:
        if step in (None, current_step() - 1):
            time.sleep(seconds)

    before(checkpoint, "save_tensors", wait)
    before(checkpoint, "write_json", wait)


def inject_slow_step(seconds: float, step: int | None = None) -> None:
    """Before each training step, or before that one."""
    before(loop, "train_one_step", lambda run, order: time.sleep(seconds if step in (None, run.state.step + 1) else 0))


def inject_slow_forward(seconds: float) -> None:
    """Before each micro-batch."""
    before(hooks, "training_step", lambda *_, **__: time.sleep(seconds))


def inject_slow_eval(seconds: float) -> None:
    """Before each evaluated batch."""
    before(hooks, "_evaluate_batch", lambda *_: time.sleep(seconds))


def inject_slow_data(seconds: float) -> None:
    """Before data are read."""
    before(train, "prepare", lambda *_: time.sleep(seconds))


def inject_native_data(seconds: float) -> None:
    """Before data are read: in native code, in which Python handles no signal."""

    def wait(*_: Any) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**28)  # takes minutes

    before(train, "prepare", wait)


# ---- notes for the test ----


def inject_rows(folder: str) -> None:
    """Every rank writes the rows of each step to FOLDER/rows-<rank>.jsonl."""
    stream = open(Path(folder) / f"rows-{RANK}.jsonl", "a", encoding="utf-8")
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()

    def note(model, batch, batch_idx, *, task, weight_sum=None):
        # neither the row of weight 0 of an idle rank, nor a trial before step 1
        if not current_run or weight_sum == float("inf"):
            return
        line = {
            "attempt": [launcher, ranks.restart_count()],
            "time": time.time(),
            "step": current_step(),
            "rows": batch.row_index.tolist(),
        }
        stream.write(json.dumps(line) + "\n")
        stream.flush()

    before(hooks, "training_step", note)


def inject_reached(folder: str, step: int = 3) -> None:
    """FOLDER/<phase>-<rank> appears when a rank reaches a phase.

    Phases: reading, training (that step), checkpoint (that step or later), validation, test (the rank's third batch).
    Comes after delays, so that a phase is marked before its delay.
    """
    counts: dict[str, int] = {}

    def mark(phase: str, number: int = 1) -> Callable[..., None]:
        def note(*_: Any, **__: Any) -> None:
            counts[phase] = counts.get(phase, 0) + 1
            if counts[phase] == number:
                (Path(folder) / f"{phase}-{RANK}").touch()

        return note

    mark_checkpoint = mark("checkpoint")
    before(train, "prepare", mark("reading"))
    before_step(step, mark("training"))
    before(checkpoint, "save_checkpoint", lambda *_, state, **__: mark_checkpoint() if state["step"] >= step else None)
    before(hooks, "validation_step", mark("validation", 3))
    before(hooks, "test_step", mark("test", 3))


def inject_phases(folder: str) -> None:
    """Every rank writes the phases it begins to FOLDER/phases-<rank>.jsonl: data, start, step, ...

    Comes after delays.
    """
    stream = open(Path(folder) / f"phases-{RANK}.jsonl", "a", encoding="utf-8")

    def note(phase: str, step: int = 0) -> None:
        stream.write(json.dumps({"restart": ranks.restart_count(), "phase": phase, "step": step}) + "\n")
        stream.flush()

    before(train, "prepare", lambda *_: note("data"))
    before(loop, "start_run", lambda *_, **__: note("start"))
    before(loop, "train_one_step", lambda run, order: note("step", run.state.step + 1))
    phases = {"fit_head_first": "head first", "validate": "validation", "save": "save", "finish": "finish"}
    for name, phase in phases.items():
        before(loop, name, lambda run, phase=phase: note(phase, run.state.step))


def inject_weights(folder: str) -> None:
    """Every rank writes a digest of its weights after each step to FOLDER/weights-<rank>.txt."""
    stream = open(Path(folder) / f"weights-{RANK}.txt", "a", encoding="utf-8")

    def note(result: Any, run: Any, order: Any) -> Any:
        tensors = run.model.state_dict().values()
        digest = hashlib.sha256(b"".join(tensor.numpy(force=True).tobytes() for tensor in tensors))
        stream.write(f"{run.state.step} {digest.hexdigest()}\n")
        stream.flush()
        return result

    after(loop, "train_one_step", note)


def inject_errors(folder: str) -> None:
    """Every rank writes the error that ended its training to FOLDER/error-<rank>."""
    original = train.fit

    def fit(*arguments: Any, **options: Any) -> Any:
        try:
            return original(*arguments, **options)
        except Exception as error:
            (Path(folder) / f"error-{RANK}").write_text(f"{type(error).__name__}: {error}")
            raise

    train.fit = fit


def inject_trials(folder: str) -> None:
    """Every rank writes its peak MB: of each trial to FOLDER/trials-<rank>.txt, of all steps to steps-<rank>.txt."""
    original = memory.peak_mb

    def note(name: str, peak: float) -> float:
        with open(Path(folder) / f"{name}-{RANK}.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{peak:.1f}\n")
        return peak

    after(memory, "peak_mb", lambda peak: note("trials", peak))
    before(loop, "train_to_the_end", lambda run: (memory.return_freed_memory(), memory.reset_peak()))
    after(loop, "train_to_the_end", lambda result, run: note("steps", original()))


# ---- limits of rows, disk and memory ----


def inject_evaluation_rows(number: int) -> None:
    """At most so many rows in a batch of validation and test."""
    scoring.evaluation_batches = functools.partial(scoring.evaluation_batches, max_rows=number)


def checkpoint_bytes(weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))


def fill_disk(folder: str | Path, left: int = 0) -> None:
    """Write until only `left` bytes of the folder's disk are free."""
    with open(Path(folder) / FILLER, "ab") as stream:
        while (free := shutil.disk_usage(folder).free - left) > 0:
            stream.write(bytes(min(free, 2**20)))
            stream.flush()


def inject_fill(folder: str, step: int, share: float) -> None:
    """The disk of FOLDER has space for only that share of a checkpoint, right before that step's is written.

    This is after the check of the free space, as with another user of the disk.
    """

    def fill(final: Path, weights: Any, moments: Any, state: Any) -> None:
        if state["step"] == step:
            fill_disk(folder, int(share * checkpoint_bytes(weights, moments)))

    before(checkpoint, "_write", fill)


def inject_full(folder: str, file: str) -> None:
    """The disk of FOLDER is full when rank 0 writes a file: cache, metrics (step 4), model, test, results."""

    def fill(*_: Any, **__: Any) -> None:
        if RANK == 0 and (file != "metrics" or current_step() > 3):
            fill_disk(folder)

    module, name = {
        "cache": (train, "prepare"),
        "metrics": (loop, "log_step"),
        "model": (finish, "save_model_folder"),
        "test": (hooks, "on_test_epoch_end"),
        "results": (finish, "write_json"),
    }[file]
    before(module, name, fill)


def inject_file_limit(step: int, share: float) -> None:
    """No file of rank 0 may exceed that share of a checkpoint, from that step's checkpoint on."""

    def limit(final: Path, weights: Any, moments: Any, state: Any) -> None:
        if state["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * checkpoint_bytes(weights, moments)),) * 2)

    before(checkpoint, "_write", limit)


def inject_memory(rank: int, step: int, megabytes: int) -> None:
    """That rank's address space may grow by so much from that step on; 0 is the trial before step 1."""
    if rank != RANK:
        return

    def limit(*_: Any, **__: Any) -> None:
        memory.return_freed_memory()  # else the step would fit into memory that is already mapped
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit_bytes = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    if step == 0:
        before(start, "resolve_by_trial", limit)
    else:
        before_step(step, limit)


def inject_gpu_memory(rank: int, step: int, megabytes: int) -> None:
    """The same for a GPU's memory; the limit of the trial is lifted after it."""
    if rank != RANK:
        return

    def limit(*_: Any, **__: Any) -> None:
        torch.cuda.empty_cache()
        limit_bytes = torch.cuda.memory_reserved() + megabytes * 2**20
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total)

    def lift(micro_batches: int, *_: Any, **__: Any) -> int:
        torch.cuda.set_per_process_memory_fraction(1.0)
        return micro_batches

    if step == 0:
        before(start, "resolve_by_trial", limit)
        after(start, "resolve_by_trial", lift)
    else:
        before_step(step, limit)
