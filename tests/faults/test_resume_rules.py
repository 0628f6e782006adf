"""What may differ between a start and the next: settings, encoder, versions, data, number of processes. And what may not differ at all: a second run."""

import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbert_core.config import FREE_ON_RESUME, config_fields
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import list_steps, step_folder
from tests.faults.inputs import command, contents, count_refusal
from tests.faults.launch import Job, digest, error_lines, rows_of_steps, run_job, steps_saved
from tests.faults.matrix import Figures, row
from tests.faults.soak import (
    ENVIRONMENT,
    STEPS,
    count_rows,
    differences,
    inputs,
    notes_of,
    plants_of,
    predictions,
    straight,
    write_run,
)
from tests.support import tiny

pytestmark = pytest.mark.fault


# ---- F12: other settings ----

STARTED = {
    "max_epochs": 2,
    "save_every": 1,
    "keep_checkpoints": 10,
    "test_path": (),
    "metric_choices": ["accuracy", "f1_score"],
}  # of 8 steps, stopped after the fifth
CHANGES: dict[str, Any] = {  # one other value of every key; a file name is one of the tables beside the run
    "train_path": ["train2.csv"],
    "val_path": ["val2.csv"],
    "test_path": ["test.csv"],
    "text_name": ["text2"],
    "label_name": "label2",
    "id_name": "row_id2",
    "tab_field_list": ["age"],
    "cat_field_list": ["kind2"],
    "group_name": "kind2",
    "val_fraction": 0.2,
    "max_train_rows": 20,
    "cache_path": "cache2",
    "is_binary": False,
    "num_classes": 3,
    "positive_label": "0",
    "class_weights": "balanced",
    "metric_choices": ["accuracy", "auroc"],
    "encoder": "encoder2",
    "pooling": "mean",
    "hidden_common_dim": 8,
    "reinit_pooler": True,
    "reinit_layers": 1,
    "max_length": 16,
    "max_chunks": 2,
    "max_epochs": 3,
    "batch_size": 4,
    "microbatches_per_step": 2,
    "lr": 2e-3,
    "head_lr": 2e-3,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-6,
    "run_scheduler": False,
    "warmup_steps": 0,
    "gradient_clip_val": 1.0,
    "on_nonfinite": "skip",
    "memory_limit_mb": 100_000,
    "val_check_interval": 1,
    "early_stop_metric": "val_loss",
    "early_stop_patience": 3,
    "model_path": "moved",
    "resume": 3,
    "save_every": 2,
    "keep_checkpoints": 1,
    "log_every": 3,
    "seed": 1,
    "precision": "bf16",
    "deterministic": True,
    "timeout_seconds": 60,
    "num_threads": 2,
    "threshold_rule": "half",
    "slice_columns": ["age"],
    "tsv_quoting": "none",
}
BY_DATA = {"num_classes"}  # refused even before the checkpoint is looked at: the labels of these data are two


class Started:
    """A run of 27 rows that was stopped after step 5 of 8, the tables beside it, and its undisturbed twin. Copies of it are started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny.write_encoder(folder / "encoder"), tiny.write_encoder(folder / "encoder2")
        for seed, (name, rows) in enumerate([("train", 27), ("val", 23), ("test", 37)]):
            tiny.write_table(folder / f"{name}.csv", rows, seed=seed)
            with_twins(folder / f"{name}.csv")
        for name in ("train", "val"):
            shutil.copy(folder / f"{name}.csv", folder / f"{name}2.csv")
        self.values = (
            tiny.settings(folder) | STARTED | {"model_path": str(folder / "run"), "val_path": [str(folder / "val.csv")]}
        )
        done = command("train", self.write(folder / "run"))
        assert done.code == 0, done.err
        self.expected = digest(folder / "run")
        for step in list_steps(folder / "run/checkpoints"):
            if step > 5:
                shutil.rmtree(step_folder(folder / "run/checkpoints", step))
        for name in ("model.safetensors", "train_results.json"):
            (folder / "run" / name).unlink()
        self.copies = itertools.count()

    def write(self, run: Path, **changes: Any) -> Path:
        """A config file for the run of that folder."""
        path = run.with_suffix(".json")
        path.write_text(json.dumps({**self.values, "model_path": str(run), **changes}))
        return path

    def copy(self) -> Path:
        return Path(shutil.copytree(self.folder / "run", self.folder / f"copy{next(self.copies)}"))


def with_twins(path: Path) -> None:
    """Every column once more, as NAME2."""
    with open(path, newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header + [f"{name}2" for name in header], *(cells + cells for cells in rows)])


def goes_on(
    figures: Figures, case: str, config: Path, run: Path, expected: dict[str, Any], *, same_bits: bool = True
) -> str:
    """Started again, a run goes on from a checkpoint to the same end. Returns what it said."""
    done = command("train", config)
    if (
        figures.count(
            done.code == 0 and "going on from" in done.err, f"{case}: exit code {done.code}: {done.err[-1500:]}"
        )
        and same_bits
    ):
        found = digest(run)
        figures.count(found == expected, f"{case}: {[key for key in found if found[key] != expected[key]]} differ")
    return done.err


def try_key(figures: Figures, started: Started, key: str) -> None:
    """A free key may change; any other is refused, with its name, its old and its new value."""
    new = CHANGES[key]
    if key in ("train_path", "val_path", "test_path"):
        new = [str(started.folder / name) for name in new]
    elif key in ("encoder", "cache_path"):
        new = str(started.folder / new)
    run = started.copy()
    if key in FREE_ON_RESUME:
        if key == "model_path":
            run, old = Path(shutil.move(run, started.folder / new)), run
        config = started.write(run, **({} if key == "model_path" else {key: new}))
        err = goes_on(
            figures,
            key,
            config,
            run,
            started.expected,
            same_bits=key not in ("num_threads", "log_every", "microbatches_per_step"),
        )
        if key == "resume":
            figures.count("step-00000003" in err, f"resume: 3: {err[-500:]}")
    else:
        old, also = (
            json.loads((run / "config.json").read_text())["config"][key],
            {"is_binary": False} if key == "num_classes" else {},
        )
        words = [key] if key in BY_DATA else [f"{key} was {old!r} in the checkpoint at step 5 and is {new!r} now"]
        before = contents(run)
        for check in ((), ("--check",)):
            count_refusal(
                figures,
                f"{key} {' '.join(check)}",
                command("train", started.write(run, **{key: new}, **also), *check),
                *words,
            )
        figures.count(contents(run) == before, f"{key}: the run was changed")
        torch.use_deterministic_algorithms(False)
    shutil.rmtree(run)


@contextmanager
def replaced(path: Path, other: Path) -> Iterator[None]:
    """Another folder under the name of the first."""
    kept = path.with_name(f"{path.name}-kept")
    path.rename(kept)
    shutil.copytree(other, path)
    try:
        yield
    finally:
        shutil.rmtree(path)
        kept.rename(path)


def try_encoders(figures: Figures, started: Started, work: Path) -> None:
    """Another model or tokenizer in the same folder. Other weights of the same shapes change nothing: they are in the checkpoint."""
    (
        tiny.write_encoder(work / "narrow", hidden=16),
        tiny.write_encoder(work / "shallow", layers=1),
        tiny.write_encoder(work / "other-weights", seed=5),
    )
    tiny.write_encoder(work / "other-words")
    words = (work / "other-words/vocab.txt").read_text().split()
    words[10], words[11] = words[11], words[10]
    (work / "other-words/vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = json.loads((work / "other-words/tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    (work / "other-words/tokenizer.json").write_text(json.dumps(tokenizer))
    for name, expected in (
        ("narrow", "encoder: expected a model whose parameter is"),
        ("shallow", "encoder: expected a model whose parameter is"),
        ("other-words", "the tokenizer has changed since the checkpoint at step 5"),
    ):
        run = started.copy()
        before = contents(run)
        with replaced(started.folder / "encoder", work / name):
            count_refusal(figures, f"encoder {name}", command("train", started.write(run)), expected)
        figures.count(contents(run) == before, f"encoder {name}: the run was changed")
    run = started.copy()
    with replaced(started.folder / "encoder", work / "other-weights"):
        goes_on(figures, "encoder other-weights", started.write(run), run, started.expected)


def try_versions(figures: Figures, started: Started) -> None:
    """A checkpoint of other versions of the packages: one warning each, and the run goes on."""
    for package in ("torch", "transformers", "mmbert_core"):
        run = started.copy()
        folder = step_folder(run / "checkpoints", 5)
        state = json.loads((folder / "state.json").read_text())
        new, state["versions"][package] = state["versions"][package], "0.0.1"
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"]["state.json"] = {
            "bytes": (folder / "state.json").stat().st_size,
            "sha256": sha256_of(folder / "state.json"),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))
        err = goes_on(figures, package, started.write(run), run, started.expected)
        warnings = [line for line in err.splitlines() if line.startswith("warning: ") and "0.0.1" in line]
        is_told = len(warnings) == 1 and warnings[0].startswith(
            f"warning: {package} was 0.0.1 at the checkpoint and is {new} now"
        )
        figures.refused(is_told, f"{package}: {warnings}")


@row(
    "F12",
    "every setting changed between start and restart, one at a time; other encoder or tokenizer under the same name; other versions",
    "free ones go on, all others are refused with key, old and new value; versions: a warning",
)
def test_F12_changed_settings(tmp_path: Path) -> Figures:
    figures, started = Figures(), Started(tmp_path / "started")
    figures.refused(set(CHANGES) == set(config_fields()), f"keys without a try: {set(config_fields()) ^ set(CHANGES)}")
    for key in CHANGES:
        try_key(figures, started, key)
    try_encoders(figures, started, tmp_path / "encoders")
    try_versions(figures, started)
    figures.notes.append(
        f"{len(FREE_ON_RESUME)} keys may change, {len(CHANGES) - len(FREE_ON_RESUME)} are refused; 3 other encoders refused; 3 versions told"
    )
    return figures


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
    """Other content with the same time, as `cp -p` and some editors leave it: no shortcut over size and time may be fooled."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@row(
    "D15",
    f"a data file edited between start and restart, its time as before: {', '.join(EDITS)}",
    "refused with the file's name; the run is as it was, and goes on when the file is restored",
    full={"processes": (1, 2, 3)},
)
def test_D15_data_edited_between_start_and_restart(tmp_path: Path, processes: tuple[int, ...] = (2,)) -> Figures:
    """In this process for every file and edit; and under torchrun, where the file is edited while the run trains and all ranks then die."""
    figures = Figures()
    started = Started(tmp_path / "started")
    run = started.copy()
    before = contents(run)
    for name, (what, change) in itertools.product(("train", "val"), EDITS.items()):
        path = started.folder / f"{name}.csv"
        data = path.read_bytes()
        figures.count(change(data) != data, f"{what} of {name}.csv changes nothing")
        edit(path, change(data))
        expected = f"{path} has changed since the checkpoint at step 5"
        for check in ((), ("--check",)):
            count_refusal(
                figures,
                f"{what} of {name}.csv {' '.join(check)}",
                command("train", started.write(run), *check),
                expected,
            )
        edit(path, data)
        figures.count(contents(run) == before, f"{what} of {name}.csv: the run was changed")
    os.utime(started.folder / "train.csv")  # the same content with a new time is the same data
    goes_on(figures, "restored", started.write(run), run, started.expected)
    for num_processes in processes:
        edited_under_torchrun(figures, tmp_path / f"by{num_processes}", num_processes)
    figures.notes.append(f"{len(EDITS)} edits of 2 files; test rows edited between two starts under torchrun")
    return figures


def edited_under_torchrun(figures: Figures, folder: Path, num_processes: int) -> None:
    folder.mkdir()
    test = folder / "test.csv"
    shutil.copy(inputs() / "test.csv", test)
    data = test.read_bytes()
    config = write_run(folder, save_every=1, test_path=[str(test)])
    job = Job(
        num_processes,
        ["train", str(config)],
        plants=plants_of(folder, slow_step=0.2, die_after_save=9),
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
    is_told = len(errors) == 1 and f"{test} has changed since the checkpoint at step 9" in errors[0]
    figures.refused(
        code == 1 and is_told and steps_saved(folder / "run")[-1] == 9,
        f"{num_processes} processes: exit code {code}, {errors}:\n{job.output()[-2000:]}",
    )
    edit(test, data)
    code, output = run_job(num_processes, ["train", str(config)], plants=plants_of(folder), **ENVIRONMENT)
    problems = differences(folder, straight(num_processes)) if code == 0 else [f"exit code {code}:\n{output[-2000:]}"]
    figures.count(not problems, f"{num_processes} processes, restored: {problems}")


# ---- F13: another number of processes ----

CALM = {"lr": 2e-5, "head_lr": None}  # as one fine-tunes: so rounding stays rounding over 24 steps


def continued(folder: Path, source: Path, step: int, num_processes: int) -> None:
    """The state in which a run died after `step`, and a job that goes on from there."""
    config = write_run(folder, save_every=1, keep_checkpoints=1000, **CALM)
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
    code, output = run_job(num_processes, ["train", str(config)], plants=plants_of(folder), **ENVIRONMENT)
    assert code == 0 and f"going on from {step_folder(run / 'checkpoints', step)}" in output, output[-3000:]


@row(
    "F13",
    "saved by W processes, continued by W'",
    "the same steps, learning rates and rows in every step; none lost or repeated; losses within 1e-5 of the run that W processes finish",
    full={"pairs": tuple(itertools.product((1, 2, 3, 4), repeat=2))},
)
def test_F13_another_number_of_processes(
    tmp_path: Path, pairs: tuple[tuple[int, int], ...] = ((1, 3), (2, 1)), step: int = 9
) -> Figures:
    """Step 9 is in the middle of the second epoch of 6 steps."""
    figures, worst = Figures(), 0.0
    for before, after in pairs:
        folder, source = tmp_path / f"{before}-{after}", straight(before, **CALM)
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
        difference = max(
            abs(a - b) / abs(b) for (_, a, _), (_, b, _) in zip(found["losses"], wanted["losses"], strict=True)
        )
        worst = max(worst, difference)
        figures.count(difference <= 1e-5, f"{before} -> {after}: losses differ by {difference:.1e}")
        if before == after:
            problems = differences(folder, source)
            figures.count(not problems, f"{before} -> {after}: {problems}")
    figures.notes.append(
        f"{len(pairs)} pairs of W and W', {STEPS} steps, changed after step {step}; losses differ by at most {worst:.1e} relative"
    )
    return figures


# ---- F22: once more ----


@row(
    "F22",
    "the same run again; with another number of threads",
    "bit-equal with the same number of threads and processes",
    full={"kinds": ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1))},
)
def test_F22_repeated_runs(tmp_path: Path, kinds: tuple[tuple[int, int], ...] = ((1, 2),)) -> Figures:
    """`kinds`: processes and threads. Each twice; what 2 threads change against 1 is a note."""
    figures = Figures()
    for num_processes, num_threads in kinds:
        folder = tmp_path / f"{num_processes}-{num_threads}"
        once = straight(num_processes, num_threads=num_threads)
        config = write_run(folder, num_threads=num_threads)
        code, output = run_job(num_processes, ["train", str(config)], plants=plants_of(folder), **ENVIRONMENT)
        problems = differences(folder, once) if code == 0 else [f"exit code {code}:\n{output[-2000:]}"]
        figures.count(not problems, f"{num_processes} processes, {num_threads} threads: {problems}")
        if num_threads > 1:
            one = straight(num_processes, num_threads=1)
            pairs = list(zip(digest(once / "run")["losses"], digest(one / "run")["losses"], strict=True))
            difference = max(abs(a - b) / abs(b) for (_, a, _), (_, b, _) in pairs)
            same = (
                "the same bits"
                if not differences(once, one)
                else f"losses differ by at most {difference:.1e} relative, predictions {'equal' if predictions(once / 'run') == predictions(one / 'run') else 'differ'}"
            )
            figures.notes.append(f"{num_processes} processes, {num_threads} threads against 1: {same}")
    return figures
