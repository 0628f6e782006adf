"""Permutation importance: what decides the label is on top, and noise is near zero, whatever kind of input it is."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import prepare
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.inference.permutation_importance import permutation_importance
from mmbert_core.inference.scoring import Task
from mmbert_core.model.losses import build_loss_op
from mmbert_core.report import results as report_results
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def write_decided(path: Path, num_rows: int, seed: int, decides: str) -> tuple[str]:
    """Five noise columns of 20 % missing numbers, categories and words; the label is in one of them alone."""
    rng = np.random.default_rng(seed)
    words = [word for word in tiny.WORDS if word != "refund"]
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "age", "amount", "kind", "colour", "label"])
        for row in range(num_rows):
            label = row % 2
            cells = {
                "text": " ".join(rng.choice(words, 5)),
                "kind": rng.choice(list("abc")),
                "colour": rng.choice(list("xyz")),
            }
            cells |= {name: "" if rng.random() < 0.2 else round(float(rng.normal()), 3) for name in ("age", "amount")}
            if decides == "amount":
                cells["amount"] = round(float(rng.normal()) + 6 * label, 3)
            elif decides == "missing":  # that it is missing, of the second of two numbers that have an indicator each
                cells["amount"] = "" if label else round(float(rng.normal()), 3)
            elif decides == "colour":
                cells["colour"] = "x" if label else rng.choice(["y", "z"])
            elif decides == "text" and label:
                cells["text"] = "refund " * 5
            writer.writerow([cells[name] for name in ("text", "age", "amount", "kind", "colour")] + [label])
    return (str(path),)


@pytest.mark.parametrize("decides", ["amount", "missing", "colour", "text"])
def test_what_decides_the_label_is_on_top_and_noise_is_near_zero(tmp_path, monkeypatch, decides):
    monkeypatch.setattr(report_results, "write_plots", lambda *_, **__: [])
    tiny.write_encoder(tmp_path / "encoder", layers=1)
    paths = {
        f"{name}_path": write_decided(tmp_path / f"{name}.csv", rows, seed, decides)
        for seed, (name, rows) in enumerate([("train", 256), ("val", 64), ("test", 240)])
    }
    values = tiny.settings(
        tmp_path,
        **paths,
        id_name=None,
        cat_field_list=("kind", "colour"),
        batch_size=16,
        lr=1e-2,
        max_epochs=3,
        pooling="mean",
        early_stop_metric="val/auroc",
    )
    if decides != "text":
        values["text_name"] = ()
    config = Config(**values)
    results, data = tiny.train(config), prepare(config)
    assert results.test_metrics["test/auroc"] > 0.95  # it has learned it
    loaded = load_model_folder(tmp_path / "run")
    task = Task(True, build_loss_op(None), "fp32", torch.device("cpu"))

    def measure(dataset: Dataset) -> dict[str, object]:
        return permutation_importance(
            loaded.model.eval(),
            dataset,
            task=task,
            metric="auroc",
            class_names=("0", "1"),
            threshold=0.5,
            text_name="text",
            seed=0,
        )

    importance = measure(data.test)
    first, *others = importance["items"]
    name = "amount" if decides == "missing" else decides
    kinds = {"age": "numeric", "amount": "numeric", "kind": "categorical", "colour": "categorical"} | (
        {"text": "text"} if decides == "text" else {}
    )
    assert {item["name"]: item["kind"] for item in importance["items"]} == kinds and importance["rows"] == 200
    assert first["name"] == name and 0.35 < first["drop"] < 0.65  # without it the model guesses: an AUROC of one half
    assert all(abs(item["drop"]) < 0.05 for item in others), others
    assert measure(data.test) == importance  # the same seed, the same permutations
