"""Resumes with edited data and with another number of processes; and two runs alike are equal bit for bit."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmbert_core.training.checkpoint import list_steps, step_folder
from tests.faults.inputs import command, count_refusal
from tests.faults.runs import (
    ENVIRONMENT,
    STEPS,
    count_rows,
    differences,
    input_folder,
    largest_difference,
    noted_faults,
    notes_of,
    predictions,
    reference_run,
    write_run_config,
)
from tests.faults.stopped_run import StoppedRun, count_resume
from tests.support import tiny
from tests.support.fault_matrix import Figures, row
from tests.support.jobs import Job, digest, error_lines, rows_of_steps, run_job, steps_saved

pytestmark = pytest.mark.fault


# ---- D15: other data ----

EDITS: dict[str, Callable[[bytes], bytes]] = {
    "one letter of a text": lambda data: (
        data.replace(b"please", b"pleads", 1) if b"please" in data else data.replace(b"e", b"a", 1)
    ),
    "one digit of a number": lambda data: (
        data[:-1].rpartition(b",")[0][:-1] + b"9" + data[len(data[:-1].rpartition(b",")[0]) :]
    ),
    "a row more": lambda data: data + data.splitlines(keepends=True)[-1].replace(b"0", b"8", 1),
    "a row fewer": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "two rows exchanged": lambda data: b"".join(
        [*(lines := data.splitlines(keepends=True))[:-2], lines[-1], lines[-2]]
    ),
    "other line ends": lambda data: data.replace(b"\r\n", b"\n"),
}


def edit(path: Path, data: bytes) -> None:
    """Other content with the same modification time, as after `cp -p`: a check of size and time alone would miss it."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@row(
    "D15",
    f"a data file edited between start and restart, its time as before: {', '.join(EDITS)}",
    "refused with the file's name; the run is unchanged, and resumes when the file is restored",
    full={"processes": (1, 2, 3)},
)
def test_D15_data_edited_between_start_and_restart(tmp_path: Path, processes: tuple[int, ...] = (2,)) -> Figures:
    """In this process: every file and edit. Under torchrun: an edit while the run trains, then all ranks are killed."""
    figures = Figures()
    started = StoppedRun(tmp_path / "started")
    run = started.copy()
    before = tiny.file_hashes(run)
    for name, (what, change) in itertools.product(("train", "val"), EDITS.items()):
        path = started.folder / f"{name}.csv"
        data = path.read_bytes()
        figures.count(change(data) != data, f"{what} of {name}.csv changes nothing")
        edit(path, change(data))
        expected = f"{path} has changed since the checkpoint at step 5"
        for check in ((), ("--check",)):
            done = command("train", started.write(run), *check)
            count_refusal(figures, f"{what} of {name}.csv {' '.join(check)}", done, expected)
        edit(path, data)
        figures.count(tiny.file_hashes(run) == before, f"{what} of {name}.csv: the run was changed")
    os.utime(started.folder / "train.csv")  # the same content with a new time is the same data
    count_resume(figures, "restored", started.write(run), run, started.expected)
    for num_processes in processes:
        edited_under_torchrun(figures, tmp_path / f"by{num_processes}", num_processes)
    figures.notes.append(f"{len(EDITS)} edits of 2 files; test rows edited between two starts under torchrun")
    return figures


def edited_under_torchrun(figures: Figures, folder: Path, num_processes: int) -> None:
    folder.mkdir()
    test = folder / "test.csv"
    shutil.copy(input_folder() / "test.csv", test)
    data = test.read_bytes()
    config = write_run_config(folder, save_every=1, test_path=[str(test)])
    job = Job(
        num_processes,
        ["train", str(config)],
        faults=noted_faults(folder, slow_step=0.2, die_after_save=9),
        max_restarts=1,
        **ENVIRONMENT,
    )
    try:
        job.wait_until(lambda: any(note["phase"] == "step" for note in notes_of(folder, 0)))
        edit(test, EDITS["one digit of a number"](data))
        code = job.wait(seconds=180)
    finally:
        job.kill_all()
    errors = error_lines(job.output())
    is_refused = len(errors) == 1 and f"{test} has changed since the checkpoint at step 9" in errors[0]
    figures.refused(
        code == 1 and is_refused and steps_saved(folder / "run")[-1] == 9,
        f"{num_processes} processes: exit code {code}, {errors}:\n{job.output()[-2000:]}",
    )
    edit(test, data)
    code, output = run_job(num_processes, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    problems = (
        differences(folder, reference_run(num_processes)) if code == 0 else [f"exit code {code}:\n{output[-2000:]}"]
    )
    figures.count(not problems, f"{num_processes} processes, restored: {problems}")


# ---- F13: another number of processes ----

LOW_LR = {"lr": 2e-5, "head_lr": None}  # rounding differences do not grow over 24 steps


def continued(folder: Path, source: Path, step: int, num_processes: int) -> None:
    """Copy a run as it was right after `step`, and resume it with another number of processes."""
    config = write_run_config(folder, save_every=1, keep_checkpoints=1000, **LOW_LR)
    run = folder / "run"
    shutil.copytree(
        source / "run", run, ignore=shutil.ignore_patterns("multimodal_bert-*", "tensorboard", "train_results.json")
    )
    (run / "model.safetensors").unlink()
    for other in list_steps(run / "checkpoints"):
        if other > step:
            shutil.rmtree(step_folder(run / "checkpoints", other))
    for path in source.glob("rows-*.jsonl"):
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        (folder / f"rows-1{path.stem[5:]}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    code, output = run_job(num_processes, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    assert code == 0 and f"resuming from {step_folder(run / 'checkpoints', step)}" in output, output[-3000:]


@row(
    "F13",
    "saved by W processes, continued by W'",
    "the same steps, learning rates and rows in every step; none lost or repeated; "
    "losses within 1e-5 of the run that W processes finish",
    full={"pairs": tuple(itertools.product((1, 2, 3, 4), repeat=2))},
)
def test_F13_another_number_of_processes(
    tmp_path: Path, pairs: tuple[tuple[int, int], ...] = ((1, 3), (2, 1)), step: int = 9
) -> Figures:
    """Step 9 is in the middle of the second epoch of 6 steps."""
    figures, worst = Figures(), 0.0
    for before, after in pairs:
        folder, source = tmp_path / f"{before}-{after}", reference_run(before, **LOW_LR)
        continued(folder, source, step, after)
        found, wanted = digest(folder / "run"), digest(source / "run")
        rates = [(step, lr) for step, _, lr in found["losses"]] == [(step, lr) for step, _, lr in wanted["losses"]]
        figures.count(
            rates and found["scheduler"] == wanted["scheduler"] and found["step"] == STEPS,
            f"{before} -> {after}: other steps or learning rates",
        )
        figures.count(rows_of_steps(folder) == rows_of_steps(source), f"{before} -> {after}: steps took other rows")
        lost, repeated = count_rows(folder)
        figures.rows_lost += lost
        figures.rows_repeated += repeated
        difference = largest_difference(found["losses"], wanted["losses"])
        worst = max(worst, difference)
        figures.count(difference <= 1e-5, f"{before} -> {after}: losses differ by {difference:.1e}")
        if before == after:
            problems = differences(folder, source)
            figures.count(not problems, f"{before} -> {after}: {problems}")
    figures.notes.append(
        f"{len(pairs)} pairs of W and W', {STEPS} steps, changed after step {step}; "
        f"losses differ by at most {worst:.1e} relative"
    )
    return figures


# ---- F22: repeated runs ----


@row(
    "F22",
    "the same run again; with another number of threads",
    "bit-equal with the same number of threads and processes",
    full={"kinds": ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1))},
)
def test_F22_repeated_runs(tmp_path: Path, kinds: tuple[tuple[int, int], ...] = ((1, 2),)) -> Figures:
    """`kinds`: processes and threads. Each runs twice; the difference between 2 threads and 1 is a note."""
    figures = Figures()
    for num_processes, num_threads in kinds:
        folder = tmp_path / f"{num_processes}-{num_threads}"
        once = reference_run(num_processes, num_threads=num_threads)
        config = write_run_config(folder, num_threads=num_threads)
        code, output = run_job(num_processes, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
        problems = differences(folder, once) if code == 0 else [f"exit code {code}:\n{output[-2000:]}"]
        figures.count(not problems, f"{num_processes} processes, {num_threads} threads: {problems}")
        if num_threads > 1:
            one = reference_run(num_processes, num_threads=1)
            difference = largest_difference(digest(once / "run")["losses"], digest(one / "run")["losses"])
            are_equal = predictions(once / "run") == predictions(one / "run")
            note = (
                f"losses differ by at most {difference:.1e} relative, predictions {'equal' if are_equal else 'differ'}"
            )
            if not differences(once, one):
                note = "the same bits"
            figures.notes.append(f"{num_processes} processes, {num_threads} threads against 1: {note}")
    return figures
