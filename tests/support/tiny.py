"""Small real things for tests: an encoder folder, tables, configs, and torchrun on a worker script."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mmbert_core.config import Config
from mmbert_core.runtime.ranks import DistContext, read_context
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training import loop
from mmbert_core.training.results import Results
from mmbert_core.training.run import Run
from mmbert_core.training.train import kept_torch_settings, run_training

ROOT = Path(__file__).resolve().parents[2]
WORDS = """
    refund pay outside shop thanks ship item broken money bank now please hello where is my order wrong size colour late
    great never again
""".split()


def write_encoder(folder: Path, *, hidden: int = 32, layers: int = 2, dropout: float = 0.1, seed: int = 0) -> Path:
    """A tiny random BERT with its tokenizer, as a pretrained folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special_tokens, *WORDS, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_table(
    path: Path, num_rows: int, *, seed: int = 0, num_classes: int = 2, labels: bool = True, missing: float = 0.1
) -> Path:
    """Texts of 0 to 30 words, two numbers, a category; the label depends on words and on a number."""
    rng = np.random.default_rng(seed)
    names = ["row_id", "text", "age", "amount", "kind", *(["label"] if labels else [])]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in range(num_rows):
            words = rng.choice(WORDS, size=rng.integers(0, 31))
            age, amount = rng.integers(0, 100), round(float(rng.lognormal()), 2)
            kind = rng.choice(["a", "b", "c", ""])
            score = (0.3 * ("refund" in words) + 0.3 * ("pay" in words) + age / 200 + rng.normal(0, 0.05)) * num_classes
            cells = [f"{row:05d}", " ".join(words), "" if rng.random() < missing else age, amount, kind]
            writer.writerow([*cells, *([min(num_classes - 1, max(0, int(score)))] if labels else [])])
    return path


def settings(folder: Path, *, num_rows: int = 64, num_classes: int = 2, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of a Config for tiny files in `folder` (written once), overridden by `changes`."""
    folder = Path(folder)
    if not (folder / "encoder").exists():
        write_encoder(folder / "encoder")
        for seed, (name, rows) in enumerate([("train", num_rows), ("val", 23), ("test", 37)]):
            write_table(folder / f"{name}.csv", rows, seed=seed, num_classes=num_classes)
    values: dict[str, Any] = {
        "train_path": (str(folder / "train.csv"),),
        "val_path": (str(folder / "val.csv"),),
        "test_path": (str(folder / "test.csv"),),
        "text_name": ("text",),
        "label_name": "label",
        "id_name": "row_id",
        "tab_field_list": ("age", "amount"),
        "cat_field_list": ("kind",),
        "is_binary": num_classes == 2,
        "num_classes": num_classes,
        "encoder": str(folder / "encoder"),
        "model_path": str(folder / "run"),
        "cache_path": str(folder / "cache"),
        "max_length": 32,
        "batch_size": 8,
        "max_epochs": 2,
        "num_threads": 1,
        "log_every": 1,
        "microbatches_per_step": 4,
        "lr": 1e-3,
        "warmup_steps": 2,
        "hidden_common_dim": 16,
    }
    return values | changes


def train(config: Config, context: DistContext | None = None) -> Results:
    """Train as the command does: in this process or, inside a process group, on every rank."""
    with kept_torch_settings():
        return run_training(config, context or read_context())


def train_in_two_starts(config: Config, monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Train until the checkpoint of `step` is written, stop as a kill does, and train again to the end."""
    save = loop.save

    def interrupted_save(run: Run) -> None:
        save(run)
        if run.state.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", interrupted_save)
        train(config)
    train(config)


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` except the token cache's, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and folder / "cache" not in path.parents)
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


def run_command(
    arguments: list[str], *, timeout: float = 180, input: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python command line from the project's root; its output as text."""
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        input=input,
    )


def without_manifest(folder: Path) -> Path:
    """Remove the folder's manifest, as of older versions, so that edited files are refused only for their content."""
    (Path(folder) / MANIFEST).unlink()
    return Path(folder)


def torchrun(num_processes: int, arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python command line under torchrun on one machine."""
    return run_command(
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *arguments], **options
    )


def mmbert(num_processes: int, *arguments: str) -> None:
    """Run an `mmbert` command on so many processes; it must succeed."""
    start = run_command if num_processes == 1 else lambda args, **more: torchrun(num_processes, args, **more)
    done = start(["-m", "mmbert_core", *arguments], timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
