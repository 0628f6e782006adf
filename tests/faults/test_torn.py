"""Damaged checkpoints, rotation among foreign files and folders, and two runs in one folder."""

import os
import random
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import (
    CHECKPOINT_FILES,
    find_checkpoint,
    list_steps,
    rotate,
    save_checkpoint,
    step_folder,
    why_invalid,
)
from tests.faults.checkpoint_writer import tensors_of
from tests.faults.runs import (
    ENVIRONMENT,
    SLOW,
    SMALL_EVALUATION_BATCHES,
    differences,
    noted_faults,
    notes_of,
    reference_run,
    write_run_config,
)
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, captured_warnings, error_lines, run_job, steps_saved
from tests.training.test_checkpoint import DAMAGES

pytestmark = pytest.mark.fault


# ---- F9: torn files ----

TORN = {
    **DAMAGES,
    "half": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "a flipped bit": lambda path, data: path.write_bytes(
        data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 1]) + data[len(data) // 3 + 1 :]
    ),
}


def save(folder: Path, step: int, version: int = 0) -> Path:
    return save_checkpoint(
        folder,
        weights=tensors_of(step, version),
        moments=tensors_of(version, step),
        state={"step": step, "version": version},
    )


def torn_copies(folder: Path, work: Path) -> Iterator[tuple[str, str, Path]]:
    """Name of a file, its damage, and a copy of the checkpoints in which the newest one has it."""
    for name in (*CHECKPOINT_FILES, MANIFEST):
        for damage, tear in TORN.items():
            copy = work / "torn"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            file = step_folder(copy, list_steps(copy)[0]) / name
            tear(file, file.read_bytes())
            yield name, damage, copy


@row(
    "F9",
    f"each file of a checkpoint: {', '.join(TORN)}",
    "never loaded; the one before is used, with one warning that names the file; refused when none is complete",
    full={"random_bits": 200, "in_jobs": (*CHECKPOINT_FILES, MANIFEST)},
)
def test_F9_torn_files(
    tmp_path: Path, random_bits: int = 20, in_jobs: tuple[str, ...] = ("model.safetensors",)
) -> Figures:
    """`random_bits`: flipped bits anywhere in any file. `in_jobs`: files that are torn under a real run."""
    figures = Figures()
    whole = tmp_path / "whole"
    save(whole, 10), save(whole, 20)
    for name, damage, copy in torn_copies(whole, tmp_path):
        with captured_warnings() as warnings:
            found = find_checkpoint(copy, "auto")
        # a flipped bit of a checksum in the manifest: the warning names the file of that checksum
        names = CHECKPOINT_FILES if (name, damage) == (MANIFEST, "a flipped bit") else ()
        is_warned = (
            len(warnings) == 1
            and any(word in warnings[0] for word in (name, *names))
            and "step-00000020" in warnings[0]
            and "\n" not in warnings[0]
        )
        figures.refused(
            found == step_folder(copy, 10) and is_warned, f"{name} {damage}: found {found}, warned {warnings}"
        )
        shutil.rmtree(step_folder(copy, 10))
        try:
            figures.refused(False, f"{name} {damage}, no other checkpoint: found {find_checkpoint(copy, 'auto')}")
        except InputError as error:
            figures.refused("none of the checkpoints is whole" in str(error), str(error))
    count_random_bits(figures, whole, tmp_path, random_bits)
    for name in in_jobs:
        count_torn_run(figures, tmp_path / f"run-{name}", name)
    figures.notes.append(
        f"{len(CHECKPOINT_FILES) + 1} files x {len(TORN)} damages with and without an older checkpoint, "
        f"{random_bits} random bits, {len(in_jobs)} real runs"
    )
    return figures


def count_random_bits(figures: Figures, whole: Path, work: Path, count: int) -> None:
    """A flipped bit may change nothing: one of a manifest's white space leaves its content the same."""
    generator = random.Random(0)
    for _ in range(count):
        copy = work / "bits"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        file = step_folder(copy, 20) / generator.choice((*CHECKPOINT_FILES, MANIFEST))
        data = bytearray(file.read_bytes())
        index, bit = generator.randrange(len(data)), generator.randrange(8)
        data[index] ^= 1 << bit
        file.write_bytes(data)
        with captured_warnings() as warnings:
            found = find_checkpoint(copy, "auto")
        is_blank = (
            file.name == MANIFEST and bytes(data).split() == (step_folder(whole, 20) / MANIFEST).read_bytes().split()
        )
        figures.refused(
            is_blank or (found == step_folder(copy, 10) and len(warnings) == 1),
            f"{file.name}, bit {bit} of byte {index}: found {found}, warned {warnings}",
        )


def count_torn_run(figures: Figures, folder: Path, name: str) -> None:
    """The real command: killed after step 9, newest checkpoint torn, resumes from step 8; the same with all torn."""
    config = write_run_config(folder, save_every=1, val_path=(), val_fraction=0.0)
    checkpoints = folder / "run/checkpoints"
    code, _ = run_job(0, ["train", str(config)], faults=noted_faults(folder, die_after_save=9), **ENVIRONMENT)
    figures.count(
        code == -signal.SIGKILL and steps_saved(folder / "run") == [8, 9],
        f"exit code {code}, checkpoints {steps_saved(folder / 'run')}",
    )
    shutil.copytree(folder, folder.with_suffix(".all-torn"))
    file = step_folder(checkpoints, 9) / name
    TORN["half"](file, file.read_bytes())
    code, output = run_job(0, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    warnings = [line for line in output.splitlines() if line.startswith("warning: checkpoint ")]
    is_warned = len(warnings) == 1 and str(file.parent) in warnings[0] and name in warnings[0]
    figures.count(code == 0 and is_warned, f"{name}: exit code {code}, warnings {warnings}:\n{output[-2000:]}")
    figures.count(
        f"resuming from {step_folder(checkpoints, 8)}" in output,
        f"{name}: did not resume from step 8:\n{output[-2000:]}",
    )
    if code == 0:
        problems = differences(folder, reference_run(0, val_path=(), val_fraction=0.0))
        figures.count(not problems, f"{name}: {problems}")
    folder = folder.with_suffix(".all-torn")
    config = write_run_config(folder, save_every=1, val_path=(), val_fraction=0.0)
    for step in (8, 9):
        file = step_folder(folder / "run/checkpoints", step) / name
        TORN["half"](file, file.read_bytes())
    before = tiny.file_hashes(folder / "run/checkpoints")
    code, output = run_job(0, ["train", str(config)], faults=SMALL_EVALUATION_BATCHES, **ENVIRONMENT)
    last = output.splitlines()[-1]
    is_refused = code == 2 and last.startswith("error: ") and "none of the checkpoints is whole" in last
    figures.refused(
        is_refused and tiny.file_hashes(folder / "run/checkpoints") == before,
        f"{name}, all torn: exit code {code}:\n{output[-2000:]}",
    )


# ---- F23: rotation ----


def write_foreign_files(folder: Path, generator: random.Random) -> None:
    """Files and folders next to the checkpoints, with names that no checkpoint gets."""
    for name in ("step-7", "step-000000007", "step-0000000x", "old", "step-00000007.bak", "..."):
        if generator.random() < 0.5:
            (folder / name).mkdir(parents=True)
            (folder / name / "model.safetensors").write_text(name)
    (folder / "notes.txt").write_text("mine")
    (folder / "step-00000001.txt").write_text("mine")
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    (folder.parent / "elsewhere/model.safetensors").write_text("elsewhere")
    (folder / "step-00009999").symlink_to(folder.parent / "elsewhere")


def foreign_contents(folder: Path) -> dict[str, str]:
    """Digests of all files that belong to no checkpoint, and the targets of links."""
    found = tiny.file_hashes(folder.parent / "elsewhere") | {
        "links": str({path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()})
    }
    return found | {
        name: value for name, value in tiny.file_hashes(folder).items() if not re.match(r"(aside-)?step-\d{8}/", name)
    }


def count_history(figures: Figures, folder: Path, seed: int) -> None:
    """Saves and rotations of several attempts; each starts from any complete checkpoint, the newest may be torn."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    write_foreign_files(folder, generator)
    before, keep = foreign_contents(folder), generator.randint(1, 3)
    step, best = 0, None
    for _attempt in range(generator.randint(1, 4)):
        for _ in range(generator.randint(1, 6)):
            step += generator.randint(1, 3)
            best = step if best is None or generator.random() < 0.3 else best
            save(folder, step)
            rotate(folder, keep=keep, newest=step, best_step=best)
            steps = list_steps(folder)
            below = [other for other in steps if other <= step]
            is_there = why_invalid(step_folder(folder, step)) is None and why_invalid(step_folder(folder, best)) is None
            holds = is_there and len(below) == len(set(below)) and len(below) <= keep + (best not in below[:keep])
            is_unchanged = foreign_contents(folder) == before
            figures.count(
                holds and is_unchanged,
                f"history {seed}: step {step}, best {best}, keep {keep}: {steps} left; "
                f"foreign files unchanged: {is_unchanged}",
            )
        # the next attempt may start from an earlier step; this one's checkpoints of higher steps remain
        whole = [
            other
            for other in list_steps(folder)
            if why_invalid(step_folder(folder, other)) is None and (best is None or other >= best)
        ]
        step = generator.choice(whole)
        for stale in (other for other in list_steps(folder) if other > step):
            if generator.random() < 0.5:
                (step_folder(folder, stale) / MANIFEST).unlink(missing_ok=True)


@row(
    "F23",
    "rotation with a pinned best, higher steps from before a resume, torn and foreign folders",
    "the newest and the best always exist and are complete; what is no checkpoint is not changed",
    full={"histories": 200},
)
def test_F23_rotation(tmp_path: Path, histories: int = 15) -> Figures:
    figures = Figures()
    for seed in range(histories):
        count_history(figures, tmp_path / f"history{seed}/checkpoints", seed)
    count_rotating_run(figures, tmp_path / "run-with-foreign-files")
    figures.notes.append(f"{histories} random histories of 1 to 4 attempts, checked after every save, and a real run")
    return figures


def count_rotating_run(figures: Figures, folder: Path) -> None:
    """A finished run, started again from step 4 with foreign files: its end leaves the last two and the best."""
    config = write_run_config(folder, save_every=1, keep_checkpoints=30)
    checkpoints = folder / "run/checkpoints"
    code, output = run_job(0, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    figures.count(code == 0, f"exit code {code}:\n{output[-2000:]}")
    write_foreign_files(checkpoints, random.Random(1))
    before = foreign_contents(checkpoints)
    config = write_run_config(folder, save_every=1, keep_checkpoints=2, resume=4)
    link = checkpoints / "step-00009999"
    code, output = run_job(0, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    figures.refused(
        code == 2 and f"error: {link}: expected no links" in output and foreign_contents(checkpoints) == before,
        f"a link: exit code {code}:\n{output[-2000:]}",
    )
    link.unlink()
    before = foreign_contents(checkpoints)
    code, output = run_job(0, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
    figures.count(
        code == 0 and f"resuming from {step_folder(checkpoints, 4)}" in output,
        f"from step 4: exit code {code}:\n{output[-2000:]}",
    )
    wanted = reference_run(0)
    problems = differences(folder, wanted)
    figures.count(
        not problems and foreign_contents(checkpoints) == before,
        f"from step 4: {problems}; foreign files unchanged: {foreign_contents(checkpoints) == before}",
    )
    best = int(re.search(r'"best_step": (\d+)', (folder / "run/train_results.json").read_text())[1])
    left = steps_saved(folder / "run")
    aside = [path for path in checkpoints.glob("aside-*") if why_invalid(path) is None]
    figures.count(set(left) == {23, 24, best} and len(aside) == 20, f"left {left}, best {best}, set aside {aside}")


# ---- F24: two runs in one folder ----


@row(
    "F24",
    "two runs in one folder at once",
    "the second is refused with exit 2 and a line naming process and machine; the first ends like a run alone; "
    "the lock is free after its process ended, also by SIGKILL",
)
def test_F24_two_runs_in_one_folder(tmp_path: Path) -> Figures:
    figures, folder = Figures(), tmp_path / "shared"
    config = write_run_config(folder)
    first = Job(1, ["train", str(config)], faults=noted_faults(folder, **{**SLOW, "slow_step": 5.0}), **ENVIRONMENT)
    try:
        first.wait_until(lambda: any(note["phase"] == "step" for note in notes_of(folder, 0)))
        [holder] = first.workers().values()
        for num_processes in (0, 2):  # plain Python: exit code 2; torchrun makes 1 of it
            code, output = run_job(
                num_processes, ["train", str(config)], faults=SMALL_EVALUATION_BATCHES, **ENVIRONMENT
            )
            errors = error_lines(output)
            names_holder = (
                len(errors) == 1
                and f"process {holder} on {socket.gethostname()}" in errors[0]
                and str(folder / "run") in errors[0]
            )
            figures.refused(
                code == (2 if num_processes == 0 else 1) and names_holder,
                f"{num_processes} processes: exit code {code}, {errors}:\n{output[-2000:]}",
            )
        figures.count(first.process.poll() is None, "the first run ended before it was tried")
        first.send(signal.SIGKILL, rank=0)
        first.wait(seconds=MAX_SECONDS)
    finally:
        first.kill_all()
    for case in ("after a SIGKILL", "after the end"):
        code, output = run_job(0, ["train", str(config)], faults=noted_faults(folder), **ENVIRONMENT)
        figures.count(code == 0, f"{case}: exit code {code}:\n{output[-2000:]}")
    problems = differences(folder, reference_run(1))
    figures.count(not problems, f"the first run: {problems}")
    figures.count("this run is finished" in output, f"started once more: {output[-500:]}")
    return figures
