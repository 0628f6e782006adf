"""What may differ between a start and a resume: some settings, versions of packages, weights of the encoder."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbert_core.config import FREE_ON_RESUME, SETTINGS
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import step_folder
from tests.faults.inputs import command, count_refusal
from tests.faults.stopped_run import StoppedRun, count_resume
from tests.support import tiny
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault
CHANGES: dict[str, Any] = {  # one other value of every key; file names are in the stopped run's folder
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
    "recipe": "original",
    "schedule": "cosine",
    "layer_decay": 0.8,
    "ema_decay": 0.9,
    "aux_loss_weight": 0.1,
    "head_first": "auto",
    "fusion": "gate",
    "blend": "auto",
    "column_encoding": "piecewise_linear",
    "min_category_count": 2,
    "wide_columns": True,
    "date_field_list": ["row_id2"],
    "date_order": "day_first",
}
# Refused before the checkpoint is read: the data have two labels, and no dates.
BY_DATA = {"num_classes": "num_classes", "date_field_list": "expected a date"}


def try_key(figures: Figures, started: StoppedRun, key: str) -> None:
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
        same_bits = key not in ("num_threads", "log_every", "microbatches_per_step", "blend")
        err = count_resume(figures, key, config, run, started.expected, same_bits=same_bits)
        if key == "resume":
            figures.count("step-00000003" in err, f"resume: 3: {err[-500:]}")
    else:
        old = json.loads((run / "config.json").read_text())["config"][key]
        also = {"is_binary": False} if key == "num_classes" else {}
        words = (
            [BY_DATA[key]] if key in BY_DATA else [f"{key} was {old!r} in the checkpoint at step 5 and is {new!r} now"]
        )
        before = tiny.file_hashes(run)
        for check in ((), ("--check",)):
            done = command("train", started.write(run, **{key: new}, **also), *check)
            count_refusal(figures, f"{key} {' '.join(check)}", done, *words)
        figures.count(tiny.file_hashes(run) == before, f"{key}: the run was changed")
        torch.use_deterministic_algorithms(False)
    shutil.rmtree(run)


@contextmanager
def replaced(path: Path, other: Path) -> Iterator[None]:
    """Another folder's copy under the first one's path, inside the block."""
    kept = path.with_name(f"{path.name}-kept")
    path.rename(kept)
    shutil.copytree(other, path)
    try:
        yield
    finally:
        shutil.rmtree(path)
        kept.rename(path)


def try_encoders(figures: Figures, started: StoppedRun, work: Path) -> None:
    """Another model or tokenizer under the same path. Other weights of the same shapes change nothing.

    The checkpoint holds the encoder's weights.
    """
    tiny.write_encoder(work / "narrow", hidden=16)
    tiny.write_encoder(work / "shallow", layers=1)
    tiny.write_encoder(work / "other-weights", seed=5)
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
        before = tiny.file_hashes(run)
        with replaced(started.folder / "encoder", work / name):
            count_refusal(figures, f"encoder {name}", command("train", started.write(run)), expected)
        figures.count(tiny.file_hashes(run) == before, f"encoder {name}: the run was changed")
    run = started.copy()
    with replaced(started.folder / "encoder", work / "other-weights"):
        count_resume(figures, "encoder other-weights", started.write(run), run, started.expected)


def try_versions(figures: Figures, started: StoppedRun) -> None:
    """A checkpoint of other versions of the packages: one warning each, and the run resumes."""
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
        err = count_resume(figures, package, started.write(run), run, started.expected)
        warnings = [line for line in err.splitlines() if line.startswith("warning: ") and "0.0.1" in line]
        expected = f"warning: {package} was 0.0.1 at the checkpoint and is {new} now"
        figures.refused(len(warnings) == 1 and warnings[0].startswith(expected), f"{package}: {warnings}")


@row(
    "F12",
    "every setting changed between start and restart, one at a time; "
    "other encoder or tokenizer under the same name; other versions",
    "free keys: the run resumes; all others are refused with key, old and new value; versions: a warning",
)
def test_F12_changed_settings(tmp_path: Path) -> Figures:
    figures, started = Figures(), StoppedRun(tmp_path / "started")
    figures.refused(set(CHANGES) == set(SETTINGS), f"keys not tried: {set(SETTINGS) ^ set(CHANGES)}")
    for key in CHANGES:
        try_key(figures, started, key)
    try_encoders(figures, started, tmp_path / "encoders")
    try_versions(figures, started)
    figures.notes.append(
        f"{len(FREE_ON_RESUME)} keys may change, {len(CHANGES) - len(FREE_ON_RESUME)} are refused; "
        "3 other encoders refused; warnings of 3 versions"
    )
    return figures
