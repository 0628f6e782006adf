"""One run of a candidate on one division of a set: a config of ours in its own process, a peer, the mean of peers."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.peers import MEAN, PEERS, Vectors, inputs_of
from benchmarks.quality_scores import MIN_PROBABILITY, Predictions, log_loss, scores
from benchmarks.quality_sets import FILES, GROUP, ID, Rows, sha_of

ROOT = Path(__file__).resolve().parents[1]
MEAN_OF = 4  # peers


@dataclass(frozen=True)
class Setup:
    """What the runs of one call share."""

    encoder: str
    num_threads: int
    tree: Path  # the version of the project that configs of ours run with
    folder: Path  # of rows, vectors and predictions
    vectors: Vectors


@dataclass(frozen=True)
class Candidate:
    name: str
    overrides: dict[str, Any] | None  # of our config; None: a peer

    def sha(self, setup: Setup) -> str:
        """Of all that decides its result except the rows and the version of the project."""
        if self.overrides is not None:
            return sha_of({"overrides": self.overrides, "encoder": setup.vectors.sha})
        if self.name == MEAN:
            return sha_of({"mean": MEAN_OF, "of": [Candidate(name, None).sha(setup) for name in PEERS]})
        peer = PEERS[self.name]
        return sha_of(peer.settings | ({"encoder": setup.vectors.sha} if peer.needs_vectors else {}))

    def fits(self, rows: Rows) -> bool:
        """Whether the set has what a peer reads."""
        if self.overrides is not None or self.name == MEAN:
            return True
        peer, table_set = PEERS[self.name], rows.table_set
        has_columns = bool(table_set.numbers or table_set.categories or table_set.dates)
        return (bool(table_set.text) or not peer.needs_text) and (has_columns or not peer.needs_columns)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("set", "resample", "candidate", "seed", "config", "rows"))


def run(candidate: Candidate, rows: Rows, setup: Setup, finished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of one run; its probabilities are stored under the record's `predictions`."""
    record = {
        "set": rows.table_set.name,
        "resample": rows.resample,
        "candidate": candidate.name,
        "seed": rows.seed,
        "config": candidate.sha(setup),
        "rows": rows.sha,
        "is_peer": candidate.overrides is None,
    }
    started = time.perf_counter() - setup.vectors.seconds_spent
    if candidate.overrides is not None:
        result, more = _ours(candidate.overrides, rows, setup)
        record |= {"overrides": candidate.overrides, "version": version_of(setup.tree)}
    elif candidate.name == MEAN:
        result, more = _mean_of_best(rows, setup, finished)
    else:
        result, more = _peer(candidate.name, rows, setup)
    seconds = time.perf_counter() - setup.vectors.seconds_spent - started + more.get("encoding_seconds", 0)
    record |= {"seconds": round(seconds, 2), "num_threads": setup.num_threads}
    labels = rows.labels("test")
    path = f"predictions/{sha_of([str(each) for each in key_of(record)])}.npz"
    (setup.folder / "predictions").mkdir(exist_ok=True)
    np.savez(setup.folder / path, labels=labels, **result)
    record |= scores(Predictions(result["test"], result["predicted"], labels, labels))
    return record | more | {"predictions": path}


def load_predictions(record: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / record["predictions"]) as stored:
        return {name: stored[name] for name in stored}


# ---- peers ----


def _peer(name: str, rows: Rows, setup: Setup) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    inputs, peer, more = inputs_of(rows, num_threads=setup.num_threads), PEERS[name], {}
    if peer.needs_vectors:
        inputs.vectors = {name: setup.vectors.of(inputs.texts[name]) for name in FILES}
        taken = sum(setup.vectors.seconds_of(texts) for texts in inputs.texts.values())
        more["encoding_seconds"] = round(taken, 2)  # as if nothing had been stored
    found = peer.run(inputs)
    result = {"val": found["val"], "test": found["test"], "predicted": found["test"].argmax(axis=1)}
    return result, more | {"val_log_loss": log_loss(found["val"], inputs.labels["val"])}


def _mean_of_best(
    rows: Rows, setup: Setup, finished: Sequence[dict[str, Any]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The mean of the probabilities of the peers with the lowest validation log loss on the same rows."""
    current = {(name, Candidate(name, None).sha(setup)) for name in PEERS}
    same = [
        record
        for record in finished
        if (record["candidate"], record["config"]) in current
        and (record["set"], record["resample"], record["seed"], record["rows"])
        == (rows.table_set.name, rows.resample, rows.seed, rows.sha)
    ]
    best = sorted(same, key=lambda record: record["val_log_loss"])[:MEAN_OF]
    if not best:
        raise SystemExit(f"{rows.table_set.name}: {MEAN!r} needs runs of the other peers first")
    stored = [load_predictions(record, setup.folder) for record in best]
    val, test = (np.mean([each[name] for each in stored], axis=0) for name in ("val", "test"))
    more = {"members": [record["candidate"] for record in best], "val_log_loss": log_loss(val, rows.labels("val"))}
    return {"val": val, "test": test, "predicted": test.argmax(axis=1)}, more


# ---- ours ----


def config_of(rows: Rows, overrides: dict[str, Any], setup: Setup, model_path: Path) -> dict[str, Any]:
    """A YAML config as a user writes it: files, columns, classes and the encoder; all else by the overrides."""
    table_set = rows.table_set
    is_binary = len(table_set.classes) == 2
    config: dict[str, Any] = {
        "train_path": str(rows.path("train")),
        "val_path": str(rows.path("val")),
        "test_path": str(rows.path("test")),
        "text_name": list(table_set.text),
        "tab_field_list": list(table_set.numbers),
        "cat_field_list": list(table_set.categories),
        "label_name": table_set.label,
        "id_name": ID,
        "is_binary": is_binary,
        "num_classes": len(table_set.classes),
        "encoder": setup.encoder,
        "seed": rows.seed,
        "num_threads": setup.num_threads,
        "model_path": str(model_path),
    }
    if is_binary:
        config["positive_label"] = table_set.classes[1]
    if table_set.group:
        config["group_name"] = GROUP
    if table_set.dates and "date_field_list" in (setup.tree / "mmbert_core/config.py").read_text(encoding="utf-8"):
        config["date_field_list"] = list(table_set.dates)
    return config | overrides


def _ours(overrides: dict[str, Any], rows: Rows, setup: Setup) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`python train.py` of the tree. Raises `RuntimeError` with the end of its output when it fails."""
    folder = setup.folder / "work" / f"{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        config = config_of(rows, overrides, setup, folder / "run")
        (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "train.py", str(folder / "config.yaml")],
            cwd=setup.tree,
            env=os.environ | {"PYTHONPATH": str(setup.tree)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
        return read_run(folder / "run", rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_run(folder: Path, rows: Rows) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Test probabilities and decisions of a run folder, and the log loss after its temperature."""
    [path] = folder.glob("multimodal_bert-*/test_result_0.tsv")
    with open(path, newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t"))
    cells = rows.cells("test")
    if [line[ID] for line in lines] != cells[ID]:
        raise RuntimeError(f"{path}: expected the test rows in their order")
    classes, labels = rows.table_set.classes, rows.labels("test")
    if len(classes) == 2:
        of_class_1 = np.array([float(line["prob"]) for line in lines])
        probabilities = np.stack([1 - of_class_1, of_class_1], axis=1)
    else:
        probabilities = np.array([[float(line[f"prob_{name}"]) for name in classes] for line in lines])
    predicted = np.array([classes.index(line["pred"]) for line in lines])
    results = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    thresholds = json.loads((folder / "thresholds.json").read_text(encoding="utf-8"))
    temperature = (thresholds.get("calibration") or {}).get("temperature", 1.0)
    more = {
        "log_loss_calibrated": log_loss(with_temperature(probabilities, temperature), labels),
        "training_seconds": results["train_seconds"],
    }
    return {"test": probabilities, "predicted": predicted}, more


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of the logits over the temperature."""
    logits = np.log(np.clip(probabilities, MIN_PROBABILITY**2, 1)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def version_of(tree: Path) -> str:
    """The commit of the tree, with a mark where files differ from it; "" without git."""
    done = subprocess.run(["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip()
