"""One rank fails, stalls or computes non-finite values: all end soon with one line of rank and phase, or skip the step.

pytest tests/faults/test_failing_ranks.py -s
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mmbert_core.training.checkpoint import step_folder, why_invalid
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, digest, error_lines, run_job, steps_saved, write_config

pytestmark = pytest.mark.fault
STEPS = 16  # 2 epochs
PHASES = {  # as the error line has them
    "data": "reading data and encoder",
    "forward": "the forward pass of step 3",
    "backward": "the backward pass of step 3",
    "eval": "the evaluation at step 8",
    "save": "save",
    "predict": "prediction",
}


def count_failure(figures: Figures, case: str, job: Job, since: float, *expected: str) -> None:
    """Every process ends in time and with an exit code other than 0; one line, with the expected words, says why."""
    code = job.wait(seconds=MAX_SECONDS)
    figures.seconds.append(time.monotonic() - since)
    figures.count(code == 1, f"{case}: exit code {code}: {job.output()[-4000:]}")
    codes = job.exit_codes()
    figures.count(
        len(codes) == max(1, job.num_processes) and 0 not in codes.values(),
        f"{case}: exit codes {codes}: {job.output()[-4000:]}",
    )
    figures.count(not job.left_alive(), f"{case}: {job.left_alive()} left alive")
    lines = error_lines(job.output())
    figures.count(
        len(lines) == 1 and all(words in lines[0] for words in expected),
        f"{case}: expected one line with {expected}, found {lines}: {job.output()[-4000:]}",
    )


def wait_for(job: Job, mark: Path) -> float:
    """The time when the rank has failed, which leaves a mark, or when the job has ended."""
    while not mark.exists() and job.process.poll() is None:
        time.sleep(0.02)
    return time.monotonic()


# ---- F14, F15: an exception on one rank ----


@row(
    "F14",
    "an exception on one rank: data, forward, backward, evaluation, save, predict",
    "all ranks exit other than 0 within 60 s; one line names rank and phase, once",
    full={
        "cases": tuple(
            (count, rank, phase)
            for count in (2, 3)
            for phase in PHASES
            for rank in range(count)
            if phase != "save" or rank == 0
        )
    },
)
def test_F14_one_rank_raises(
    tmp_path: Path,
    cases: tuple[tuple[int, int, str], ...] = tuple((2, int(phase != "save"), phase) for phase in PHASES),
) -> Figures:
    """`cases`: processes, the rank that fails, phase. Only rank 0 saves."""
    figures = Figures()
    config = write_config(tmp_path)
    code, output = run_job(0, ["train", str(config), "--max_epochs", "1", "--model_path", str(tmp_path / "trained")])
    figures.count(code == 0, f"training: {output[-3000:]}")
    for num_processes, rank, phase in cases:
        case, folder = f"rank {rank} of {num_processes} in {phase}", tmp_path / f"{num_processes}-{rank}-{phase}"
        folder.mkdir()
        words = ["train", str(config), "--model_path", str(folder / "run"), "--timeout_seconds", "300"]
        if phase == "predict":
            words = ["predict", str(tmp_path / "trained"), str(tmp_path / "test.csv"), str(folder / "predictions.tsv")]
        job = Job(
            num_processes,
            words,
            faults={"evaluation_rows": 2, "fail": [rank, phase, 3], "failure_mark": str(folder)},
            exit_code_file=folder / "ends.txt",
        )
        count_failure(
            figures,
            case,
            job,
            wait_for(job, folder / "failed"),
            f"error: rank {rank}, {PHASES[phase]}: InjectedError: injected in {phase}",
        )
        figures.notes.append(f"{case}: {figures.seconds[-1]:.1f} s; exit codes {job.exit_codes()}")
        if phase == "predict":
            left = sorted(path.name for path in folder.iterdir() if "pred" in path.name)
            figures.count(not left, f"{case}: {left} left")
        elif phase != "data":
            left = [*(folder / "run").rglob(".tmp-*")]
            figures.count(
                steps_saved(folder / "run") == [] and not left,
                f"{case}: checkpoints {steps_saved(folder / 'run')}, {left} left",
            )
    return figures


@row(
    "F15",
    "rank 0 fails in save; one rank fails in load",
    "every rank ends with the same error; older checkpoints are complete, and the run resumes from them",
    full={
        "cases": tuple(
            (count, rank, phase)
            for count in (2, 3)
            for rank, phase in ((0, "save"), (0, "load"), (count - 1, "load"), (0, "manifest"), (0, "read"))
        )
    },
)
def test_F15_every_rank_ends_with_the_same_error(
    tmp_path: Path, cases: tuple[tuple[int, int, str], ...] = ((2, 1, "load"), (2, 0, "manifest"))
) -> Figures:
    """`cases`: processes, the rank that fails, phase; `manifest` is the last file of a checkpoint."""
    figures = Figures()
    config = write_config(tmp_path, save_every=1, keep_checkpoints=100)
    for num_processes in sorted({case[0] for case in cases}):
        reference = tmp_path / f"reference{num_processes}"
        code, output = run_job(
            num_processes, ["train", str(config), "--model_path", str(reference)], faults={"die_after_save": 5}
        )
        figures.count(steps_saved(reference) == [1, 2, 3, 4, 5], f"first attempt: exit code {code}: {output[-3000:]}")
        shutil.copytree(reference, tmp_path / f"first{num_processes}")
        code, output = run_job(num_processes, ["train", str(config), "--model_path", str(reference)])
        figures.count(code == 0, f"reference: exit code {code}: {output[-3000:]}")
    for num_processes, rank, phase in cases:
        case, folder = f"rank {rank} of {num_processes} in {phase}", tmp_path / f"{num_processes}-{rank}-{phase}"
        folder.mkdir()
        run = shutil.copytree(tmp_path / f"first{num_processes}", folder / "run")
        words = ["train", str(config), "--model_path", str(run)]
        job = Job(
            num_processes,
            words,
            faults={"fail": [rank, phase, 6], "failure_mark": str(folder), "errors": str(folder)},
            exit_code_file=folder / "ends.txt",
        )
        named_phase = "load" if phase in ("load", "read") else "save"
        count_failure(
            figures,
            case,
            job,
            wait_for(job, folder / "failed"),
            f"error: rank {rank}, {named_phase}: InjectedError: injected in {phase}",
        )
        errors = {path.name.removeprefix("error-"): path.read_text() for path in folder.glob("error-*")}
        message = f"InjectedError: injected in {phase}"
        expected = {
            str(other): message if other == rank else f"PeerError: rank {rank}: {message}"
            for other in range(num_processes)
        }
        figures.count(errors == expected, f"{case}: expected {expected}, found {errors}")
        invalid = [step for step in steps_saved(run) if why_invalid(step_folder(run / "checkpoints", step))]
        left = [*run.rglob(".tmp-*")]
        figures.count(
            steps_saved(run) == [1, 2, 3, 4, 5] and not invalid and not left,
            f"{case}: checkpoints {steps_saved(run)}, invalid {invalid}, {left} left",
        )
        code, output = run_job(num_processes, words)
        figures.count(
            code == 0 and digest(run) == digest(tmp_path / f"reference{num_processes}"),
            f"{case}: resumed: exit code {code}: {output[-3000:]}",
        )
    return figures


# ---- F16: a rank that stalls ----


@row(
    "F16",
    "SIGSTOP of one rank, timeout_seconds 20",
    "the others stop after that time with one line; all processes, also the stopped one, end within 60 s",
    full={"cases": ((2, 0), (3, 1)), "timeout_seconds": 20},
)
def test_F16_a_rank_stalls(
    tmp_path: Path, cases: tuple[tuple[int, int], ...] = ((2, 1),), timeout_seconds: int = 5
) -> Figures:
    """`cases`: processes, the rank that is stopped. torchrun kills it 30 s after another one has failed."""
    figures = Figures()
    for num_processes, rank in cases:
        case, folder = f"rank {rank} of {num_processes} stopped", tmp_path / f"{num_processes}-{rank}"
        folder.mkdir()
        config = write_config(folder, save_every=1, timeout_seconds=timeout_seconds)
        job = Job(num_processes, ["train", str(config)], faults={"slow_step": 0.3}, exit_code_file=folder / "ends.txt")
        job.wait_until(lambda: len(steps_saved(folder / "run")) >= 2)
        since = job.send(signal.SIGSTOP, rank)
        count_failure(figures, case, job, since, "lost contact with another rank")
        figures.notes.append(
            f"{case}: {figures.seconds[-1]:.1f} s with timeout_seconds {timeout_seconds}; exit codes {job.exit_codes()}"
        )
        saved = steps_saved(folder / "run")
        figures.count(
            why_invalid(step_folder(folder / "run/checkpoints", saved[-1])) is None,
            f"{case}: the checkpoint of step {saved[-1]} is damaged",
        )
    return figures


# ---- F17: values that are not finite ----


def all_finite(run: Path) -> bool:
    """Every tensor of every checkpoint and of the model."""
    tensors = [
        load_file(path) for path in (*run.glob("checkpoints/step-*/*.safetensors"), *run.glob("model.safetensors"))
    ]
    return all(abs(value).max() < float("inf") for file in tensors for value in file.values() if value.size)


def count_nonfinite_stop(figures: Figures, case: str, job: Job, run: Path, rank: int, kind: str) -> None:
    """All ranks stop before the optimizer step of step 3, and one error line says why.

    A loss is reported by the rank that computed it, a gradient, which is the same on all ranks, by rank 0.
    """
    reporting_rank = rank if kind == "loss" else 0
    prefix = f"error: rank {reporting_rank}" if job.num_processes > 1 else "error: "
    if kind == "loss":
        expected = ("the loss of a micro-batch of step 3 is nan", "first ", "train.csv row ")
    else:
        expected = ("the gradient norm is ", "at step 3")
    count_failure(figures, case, job, time.monotonic(), prefix, *expected)
    figures.seconds.pop()  # counted from the start, not from the fault
    figures.count(steps_saved(run) == [1, 2], f"{case}: checkpoints {steps_saved(run)}")


def count_nonfinite_skip(figures: Figures, case: str, job: Job, folder: Path, rates: list[float]) -> None:
    """Step 3 leaves weights and learning rate unchanged on all ranks; a line says so, and another one at the end."""
    code, run = job.wait(), folder / "run"
    found = [line["lr"] for line in tiny.metrics_lines(run) if "train_loss" in line]
    results = json.loads((run / "train_results.json").read_text()) if code == 0 else {}
    figures.count(
        code == 0 and results["steps"] == STEPS and results["skipped_steps"] == 1,
        f"{case}: exit code {code}, {results}: {job.output()[-3000:]}",
    )
    expected = rates[:3] + rates[2:-1]
    figures.count(found == expected, f"{case}: rates {found}, expected {expected}")
    weights = [(folder / f"weights-{rank}.txt").read_text().splitlines() for rank in range(max(1, job.num_processes))]
    moved = [old.split()[1] != new.split()[1] for old, new in zip(weights[0], weights[0][1:])]
    # the learning rate of the first step is 0, so the second step is the first to change weights
    figures.count(
        all(each == weights[0] for each in weights) and moved[1] is False and all(moved[2:]),
        f"{case}: weights of the ranks after each step {weights}",
    )
    lines = re.findall(r"^error: .*|.*left out.*", job.output(), re.MULTILINE)
    summary = f"warning: 1 of {STEPS} steps were left out because their loss or gradient was not finite"
    figures.count(
        len(lines) == 2 and "left out" in lines[0] and lines[1] == summary,
        f"{case}: expected a line of the step and one of their number, found {lines}",
    )


@row(
    "F17",
    "a loss that is nan on one rank, or an infinite gradient, in step 3",
    "on_nonfinite stop: exit other than 0 before the optimizer step; skip: all ranks leave the step out, the learning "
    "rate does not advance, the run ends; all values in every checkpoint are finite",
    full={
        "cases": tuple(
            (*processes_and_rank, kind, policy)
            for processes_and_rank in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 2))
            for kind in ("loss", "gradient")
            for policy in ("stop", "skip")
        )
    },
)
def test_F17_values_that_are_not_finite(
    tmp_path: Path,
    cases: tuple[tuple[int, int, str, str], ...] = (
        (0, 0, "loss", "skip"),
        (0, 0, "gradient", "stop"),
        (2, 1, "loss", "stop"),
        (2, 1, "gradient", "skip"),
    ),
) -> Figures:
    """`cases`: processes, rank, loss or gradient, on_nonfinite."""
    figures = Figures()
    reference = tmp_path / "reference"
    config = write_config(tmp_path, save_every=1, keep_checkpoints=100)
    code, output = run_job(0, ["train", str(config), "--model_path", str(reference)])
    figures.count(code == 0, f"reference: {output[-3000:]}")
    rates = [line["lr"] for line in tiny.metrics_lines(reference) if "lr" in line]
    for num_processes, rank, kind, policy in cases:
        case = f"{kind} of rank {rank} of {num_processes}, {policy}"
        folder = tmp_path / f"{num_processes}-{rank}-{kind}-{policy}"
        folder.mkdir()
        words = ["train", str(config), "--model_path", str(folder / "run"), "--on_nonfinite", policy]
        faults = {"poison": [rank, 3, kind], "weights": str(folder)}
        job = Job(num_processes, words, faults=faults, exit_code_file=folder / "ends.txt")
        if policy == "stop":
            count_nonfinite_stop(figures, case, job, folder / "run", rank, kind)
        else:
            count_nonfinite_skip(figures, case, job, folder, rates)
        figures.count(all_finite(folder / "run"), f"{case}: a checkpoint has a value that is not finite")
    return figures


# ---- F21: no processes besides the ranks ----


def children_of(pid: int) -> list[int]:
    """Child processes that exist now."""
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


@row(
    "F21",
    "checked in reading, training, validation and test: processes other than the ranks, such as data loaders",
    "there are none: the ranks are torchrun's only children, and the ranks have none",
    full={"counts": (0, 1, 2, 4)},
)
def test_F21_there_are_no_other_processes(tmp_path: Path, counts: tuple[int, ...] = (2,)) -> Figures:
    """`counts`: processes. F3 tests that a killed rank ends the job."""
    figures = Figures()
    for num_processes in counts:
        folder = tmp_path / str(num_processes)
        notes = folder / "notes"
        notes.mkdir(parents=True)
        config = write_config(folder)
        slow = {"evaluation_rows": 2, "slow_data": 1, "slow_step": 0.1, "slow_eval": 0.1}
        job = Job(
            num_processes, ["train", str(config), "--num_threads", "2"], faults={**slow, "reached": [str(notes), 3]}
        )
        for phase in ("reading", "training", "validation", "test"):
            job.wait_until(lambda: len(list(notes.glob(f"{phase}-*"))) == max(1, num_processes))
            workers = job.workers()
            children = {pid: children_of(pid) for pid in workers.values()}
            launched = sorted(children_of(job.process.pid)) if num_processes else []
            figures.count(
                not any(children.values()) and launched == (sorted(children) if num_processes else []),
                f"{phase}: children {children}, torchrun's {launched}",
            )
        others = len(launched) - len(workers) if num_processes else 0
        figures.notes.append(
            f"{num_processes} processes: {len(workers)} ranks, {others} other children of torchrun, 0 of the ranks"
        )
        figures.count(job.wait() == 0, f"exit code {job.process.returncode}: {job.output()[-3000:]}")
    return figures
