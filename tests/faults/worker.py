"""A training or prediction with faults planted: `worker.py PLANTS COMMAND...`, PLANTS a JSON object; the command line is mmbert's.

{"rows": FOLDER}                 every rank notes the rows of each step in FOLDER/rows-<rank>.jsonl
{"fail": [rank, phase, step]}    raise on that rank: data, forward, backward, eval, save, manifest, read, load, predict (step: where it has one)
{"failed": FOLDER}               FOLDER/failed appears when it does
{"die_after_save": step}         every rank kills itself right after that step's checkpoint; [step, ...]: after each of them
{"slow_save": seconds}           so long between the files of a checkpoint; [seconds, step]: of that step's alone
{"slow_step": seconds}           so long before each step; [seconds, step]: before that one
{"slow_forward": seconds}        so long before each micro-batch
{"slow_eval": seconds}           so long before each evaluated batch
{"slow_data": seconds}           so long before data are read
{"poison": [rank, step, kind]}   loss (nan) or gradient (inf) of one micro-batch
{"places": [FOLDER, step]}       FOLDER/<place>-<rank> appears when a rank gets to reading, training (that step), checkpoint
                                 (that step's or later), validation or test (the rank's third batch). The last plant, to come before slow ones
{"evaluation_rows": number}      at most so many rows of a batch of validation and test
{"native_data": seconds}         so long in native code, which no signal reaches, before data are read
{"phases": FOLDER}               every rank notes what it begins in FOLDER/phases-<rank>.jsonl: data, start, step, validation, save, finish.
                                 After the slow ones, to be told before they wait
{"weights": FOLDER}              every rank notes a digest of its weights after each step in FOLDER/weights-<rank>.txt
{"errors": FOLDER}               every rank notes the error that ended its training in FOLDER/error-<rank>
{"fill": [FOLDER, step, share]}  the disk of FOLDER is full but for that share of a checkpoint, right before that step's is written
{"full": [FOLDER, place]}        not a byte is left on the disk of FOLDER when rank 0 gets to place: cache, metrics (step 3), model, test, results
{"file_limit": [step, share]}    no file of rank 0 may get longer than that share of a checkpoint, from that step's on
{"memory": [rank, step, MB]}     that rank's address space may grow by so much, from that step on (0: from the trial before step 1 on)
{"gpu_memory": [rank, step, MB]} the same for a GPU's memory; lifted after the trial
{"loss_scale": [first, factor]}  fp16 begins with that loss scale, and shrinks it by that factor after an overflow
{"trials": FOLDER}               every rank notes the most resident MB of each trial of a micro-batch in FOLDER/trials-<rank>.txt, of all steps in steps-...
"""

import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmbert_core import cli, hooks, predictor
from mmbert_core.inference import scoring
from mmbert_core.runtime import ranks
from mmbert_core.training import checkpoint, finish, loop, memory, start

RANK = int(os.environ.get("RANK", "0"))


class Planted(Exception):
    """What a failing rank raises."""


FAILED: list[Path] = []  # a file that appears when a rank fails


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
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()

    def note(model, batch, batch_idx, *, task, weight_sum=None):
        if current and weight_sum != float(
            "inf"
        ):  # not the row without weight of an idle rank, nor a trial before step 1
            stream.write(
                json.dumps(
                    {
                        "life": [launcher, ranks.restart_count()],
                        "time": time.time(),
                        "step": step_now(),
                        "rows": batch.row_index.tolist(),
                    }
                )
                + "\n"
            )
            stream.flush()

    before(hooks, "training_step", note)


def plant_fail(rank: int, phase: str, step: int = 1) -> None:
    if rank != RANK:
        return

    def fail(*_: Any, **__: Any) -> None:
        for path in FAILED:
            path.touch()
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
            "data": (cli, "prepare", fail),
            "forward": (hooks, "training_step", fail_at_step),
            "eval": (hooks, "validation_step", fail),
            "save": (checkpoint, "save_checkpoint", fail),
            "load": (start, "restore", fail),
            "predict": (hooks, "run_epoch", fail),
            "manifest": (
                checkpoint,
                "write_json",
                lambda path, _: fail() if path.name == checkpoint.MANIFEST else None,
            ),
            "read": (checkpoint, "read_checkpoint", fail),
        }
        before(*places[phase])


def plant_failed(folder: str) -> None:
    FAILED.append(Path(folder) / "failed")


def plant_die_after_save(*steps: int) -> None:
    def die(result: None, run: Any) -> None:
        if run.state.step in steps:
            os.kill(os.getpid(), signal.SIGKILL)

    after(loop, "save", die)


def plant_slow_save(seconds: float, step: int | None = None) -> None:
    def wait(*_: Any) -> None:
        if step in (None, step_now() - 1):
            time.sleep(seconds)

    before(checkpoint, "save_tensors", wait)
    before(checkpoint, "write_json", wait)


def plant_slow_step(seconds: float, step: int | None = None) -> None:
    before(loop, "train_one_step", lambda run, order: time.sleep(seconds if step in (None, run.state.step + 1) else 0))


def plant_slow_forward(seconds: float) -> None:
    before(hooks, "training_step", lambda *_, **__: time.sleep(seconds))


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


# ---- notes for the test ----


def plant_places(folder: str, step: int = 3) -> None:
    counts: dict[str, int] = {}

    def place(name: str, number: int = 1) -> Callable[..., None]:
        def note(*_: Any, **__: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            if counts[name] == number:
                (Path(folder) / f"{name}-{RANK}").touch()

        return note

    note_training, note_checkpoint = place("training"), place("checkpoint")
    before(cli, "prepare", place("reading"))
    before(loop, "train_one_step", lambda run, order: note_training() if run.state.step + 1 == step else None)
    before(checkpoint, "save_checkpoint", lambda *_, state, **__: note_checkpoint() if state["step"] >= step else None)
    before(hooks, "validation_step", place("validation", 3))
    before(hooks, "test_step", place("test", 3))


def plant_phases(folder: str) -> None:
    stream = open(Path(folder) / f"phases-{RANK}.jsonl", "a", encoding="utf-8")

    def note(phase: str, step: int = 0) -> None:
        stream.write(json.dumps({"restart": ranks.restart_count(), "phase": phase, "step": step}) + "\n")
        stream.flush()

    before(cli, "prepare", lambda *_: note("data"))
    before(loop, "start_run", lambda *_, **__: note("start"))
    before(loop, "train_one_step", lambda run, order: note("step", run.state.step + 1))
    for name, phase in (("validate", "validation"), ("save", "save"), ("finish", "finish")):
        before(loop, name, lambda run, phase=phase: note(phase, run.state.step))


def plant_weights(folder: str) -> None:
    stream = open(Path(folder) / f"weights-{RANK}.txt", "a", encoding="utf-8")

    def note(result: Any, run: Any, order: Any) -> Any:
        digest = hashlib.sha256(
            b"".join(tensor.numpy(force=True).tobytes() for tensor in run.model.state_dict().values())
        )
        stream.write(f"{run.state.step} {digest.hexdigest()}\n")
        stream.flush()
        return result

    after(loop, "train_one_step", note)


def plant_errors(folder: str) -> None:
    plain = cli.fit

    def fit(*arguments: Any, **options: Any) -> Any:
        try:
            return plain(*arguments, **options)
        except Exception as error:
            (Path(folder) / f"error-{RANK}").write_text(f"{type(error).__name__}: {error}")
            raise

    cli.fit = fit


def plant_trials(folder: str) -> None:
    plain = memory.peak_mb

    def note(name: str, peak: float) -> float:
        with open(Path(folder) / f"{name}-{RANK}.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{peak:.1f}\n")
        return peak

    after(memory, "peak_mb", lambda peak: note("trials", peak))
    before(loop, "train_to_the_end", lambda run: (memory.return_freed_memory(), memory.reset_peak()))
    after(loop, "train_to_the_end", lambda result, run: note("steps", plain()))


# ---- what runs out ----


def plant_evaluation_rows(number: int) -> None:
    scoring.evaluation_batches = functools.partial(scoring.evaluation_batches, max_rows=number)


def plant_native_data(seconds: float) -> None:
    def wait(*_: Any) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**28)  # minutes, without a look at signals

    before(cli, "prepare", wait)


def size_of_checkpoint(weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))


def fill_disk(folder: str, left: int = 0) -> None:
    with open(Path(folder) / "of-another-user", "ab") as stream:
        while (free := shutil.disk_usage(folder).free - left) > 0:
            stream.write(bytes(min(free, 2**20)))
            stream.flush()


def plant_fill(folder: str, step: int, share: float) -> None:
    """Between the look at the free space and the writing, as another user of the disk would."""

    def fill(final: Path, weights: Any, moments: Any, state: Any) -> None:
        if state["step"] == step:
            fill_disk(folder, int(share * size_of_checkpoint(weights, moments)))

    before(checkpoint, "_write", fill)


def plant_full(folder: str, place: str) -> None:
    def fill(*_: Any, **__: Any) -> None:
        if RANK == 0 and (place != "metrics" or step_now() > 3):
            fill_disk(folder)

    places = {
        "cache": (cli, "prepare"),
        "metrics": (loop, "log_step"),
        "model": (finish, "save_model_folder"),
        "test": (hooks, "on_test_epoch_end"),
        "results": (finish, "write_json"),
    }
    before(*places[place], fill)


def plant_file_limit(step: int, share: float) -> None:
    def limit(final: Path, weights: Any, moments: Any, state: Any) -> None:
        if state["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size_of_checkpoint(weights, moments)),) * 2)

    before(checkpoint, "_write", limit)


def plant_memory(rank: int, step: int, megabytes: int) -> None:
    if rank != RANK:
        return

    def limit(*_: Any, **__: Any) -> None:
        memory.return_freed_memory()  # or the step would find its place there
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    if step == 0:
        before(start, "resolve_by_trial", limit)
    else:
        before(loop, "train_one_step", lambda run, order: limit() if run.state.step + 1 == step else None)


def plant_gpu_memory(rank: int, step: int, megabytes: int) -> None:
    if rank != RANK:
        return

    def limit(*_: Any, **__: Any) -> None:
        torch.cuda.empty_cache()
        most = torch.cuda.memory_reserved() + megabytes * 2**20
        torch.cuda.set_per_process_memory_fraction(
            most / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        )

    def lift(micro_batches: int, *_: Any, **__: Any) -> int:
        torch.cuda.set_per_process_memory_fraction(1.0)
        return micro_batches

    if step == 0:
        before(start, "resolve_by_trial", limit)
        after(start, "resolve_by_trial", lift)
    else:
        before(loop, "train_one_step", lambda run, order: limit() if run.state.step + 1 == step else None)


def plant_loss_scale(first: float, factor: float) -> None:
    start.build_scaler = lambda precision, device: torch.amp.GradScaler(
        device.type, init_scale=first, backoff_factor=factor
    )


PLANTS: dict[str, Callable[..., None]] = {
    name.removeprefix("plant_"): value for name, value in list(globals().items()) if name.startswith("plant_")
}


def main() -> None:
    note_run()
    for name, value in json.loads(sys.argv[1]).items():
        PLANTS[name](*(value if isinstance(value, list) else [value]))
    assert predictor  # imported so that every module is there to be planted in
    sys.argv[1:] = sys.argv[2:]
    cli.run()


if __name__ == "__main__":
    main()
