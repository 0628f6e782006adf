"""This project equals the original module: the same run on both sides, step by step and hook by hook.

One process, one micro-batch a step, no dropout, fp32 on the CPU, the batches of our plan in its order.
`pytest tests/equality -s` prints the largest differences.
"""

import copy
import json
import logging
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from mmbert_core import hooks, predictor
from mmbert_core.config import Config
from mmbert_core.data.batches import epoch_order, evaluation_batches, micro_batches, step_rows, steps_per_epoch
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.inference import scoring
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training import loop, start
from tests.equality.original_module import OriginalMultimodalBert
from tests.support.tiny import metrics_lines, settings

TOLERANCE = 1e-6
NUM_STEPS = 20
CONTEXT = DistContext(0, 0, 1, 1, torch.device("cpu"))
HOOKS = (
    "training_step",
    "on_validation_epoch_start",
    "validation_step",
    "on_validation_epoch_end",
    "on_test_epoch_start",
    "test_step",
    "on_test_epoch_end",
    "predict_step",
)
CASES = {
    "binary": {},
    "binary, class weights, clipping": {"class_weights": (0.4, 1.7), "gradient_clip_val": 1.0},
    "three classes, clipping": {"num_classes": 3, "gradient_clip_val": 1.0},
    "three classes, class weights, constant schedule": {
        "num_classes": 3,
        "class_weights": (0.5, 1.3, 2.1),
        "run_scheduler": False,
    },
}

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:lightning") for kind in ("UserWarning", "FutureWarning")]


@pytest.fixture(autouse=True)
def quiet_lightning(caplog):
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")


@dataclass
class Record:
    """The values of one side's run. The lists have one item per optimizer step, or per validation."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[list[float]] = field(default_factory=list)  # of each parameter group
    grad_norms: list[float] = field(default_factory=list)  # after clipping
    logits: list[torch.Tensor] = field(default_factory=list)  # of a fixed batch, after the step
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)  # after the step
    validations: list[dict[str, float]] = field(default_factory=list)
    test_rows: pd.DataFrame | None = None
    predicted: dict[str, np.ndarray] = field(default_factory=dict)  # id -> probabilities

    def follow(self, optimizer: torch.optim.Optimizer, network: nn.Module, fixed: Batch) -> None:
        """Record every step of `optimizer` with its own hooks, which are the same in both training loops."""

        def before(*_: Any) -> None:
            self.learning_rates.append([group["lr"] for group in optimizer.param_groups])

        def after(*_: Any) -> None:
            gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            self.grad_norms.append(float(nn.utils.get_total_norm(gradients)))
            with torch.no_grad():
                self.logits.append(network(fixed.input_ids, fixed.attention_mask, fixed.numbers))
            self.weights.append({name: value.clone() for name, value in network.state_dict().items()})

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


# ---- the run, on both sides ----


def without_dropout(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder_config = network.text_subnetwork.encoder.config
    encoder_config.hidden_dropout_prob = encoder_config.attention_probs_dropout_prob = 0.0
    return network


def run_ours(config: Config, data: Data, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, int]:
    """Fit, test and predict with this project; the second value is the best step, whose weights it tests."""
    record = Record()
    configure = start.configure_optimizers

    def configure_and_follow(model: nn.Module, *arguments: Any) -> Any:
        optimizer, scheduler = configure(model, *arguments)
        record.follow(optimizer, model, data.val.batch(range(len(data.val))))
        return optimizer, scheduler

    monkeypatch.setattr(start, "configure_optimizers", configure_and_follow)
    results = loop.fit(config, data, network, CONTEXT)
    lines = metrics_lines(Path(config.model_path))
    record.losses = [line["train_loss"] for line in lines if "train_loss" in line]
    record.validations = [line for line in lines if "val_loss" in line]
    record.test_rows = pd.read_csv(
        results.test_folder / "test_result_0.tsv",
        sep="\t",
        dtype={"row_id": str},
        float_precision="round_trip",
    )
    evaluated = predictor.Predictor.from_folder(config.model_path, CONTEXT).score(data.test)
    record.predicted = dict(zip(evaluated.ids, evaluated.preds, strict=True))
    return record, results.best_step


class Follower(pl.Callback):
    """Fills a Record in Lightning's training loop."""

    def __init__(self, record: Record, fixed: Batch) -> None:
        self.record, self.fixed = record, fixed

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.record.follow(trainer.optimizers[0], module.network, self.fixed)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.record.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        values = trainer.callback_metrics.items()
        self.record.validations.append({name: float(value) for name, value in values if name.startswith("val")})


class PlannedBatches(pl.LightningDataModule):
    """Our plan's batches as the original's dicts, each epoch in its own order."""

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.config, self.data = config, data

    def loader(self, dataset: Dataset, plan: list[np.ndarray]) -> DataLoader:
        return DataLoader(
            [original_batch(dataset.batch(rows), self.config, self.data) for rows in plan], batch_size=None
        )

    def train_dataloader(self) -> DataLoader:
        dataset, config = self.data.train, self.config
        order = epoch_order(len(dataset), config.seed, self.trainer.current_epoch)
        steps = [
            step_rows(order, index, config.batch_size)
            for index in range(steps_per_epoch(len(dataset), config.batch_size))
        ]
        return self.loader(
            dataset, [batch for rows in steps for batch in micro_batches(rows, dataset.lengths[rows], 1)]
        )

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.data.val, scoring.evaluation_batches(self.data.val.lengths))

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.data.test, scoring.evaluation_batches(self.data.test.lengths))

    predict_dataloader = test_dataloader  # the test rows once more, as new rows


def number_fields(data: Data) -> list[str]:
    """A name for each numeric input: the columns, then the indicators of missing cells."""
    names = data.features.number_names
    return [
        *names,
        *(f"{name} is missing" for name, has in zip(names, data.features.has_indicator, strict=True) if has),
    ]


def original_batch(batch: Batch, config: Config, data: Data) -> dict[str, Any]:
    numbers = dict(zip(number_fields(data), batch.numbers.unbind(dim=1), strict=True))
    texts = {"text_input_ids": batch.input_ids, "text_attention_mask": batch.attention_mask}
    return {**texts, **numbers, config.label_name: batch.labels, config.id_name: batch.ids}


def original_config(config: Config, data: Data, folder: Path) -> dict[str, Any]:
    """The original's JSON for the same run."""
    values = config.to_dict()
    return values | {"text_name": "text", "tab_field_list": number_fields(data), "model_path": str(folder)}


def run_original(config: Config, data: Data, network: nn.Module, folder: Path, best_step: int) -> Record:
    """Fit, test and predict with Lightning."""
    record = Record()
    module = OriginalMultimodalBert(network, original_config(config, data, folder))
    # Encoders are loaded in eval mode, which newer Lightning keeps, while older Lightning switched to train mode.
    # Without dropout both give the same values.
    module.train()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        max_epochs=config.max_epochs,
        gradient_clip_val=config.gradient_clip_val,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[Follower(record, data.val.batch(range(len(data.val))))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = PlannedBatches(config, data)
    trainer.fit(module, datamodule=batches)
    network.load_state_dict(record.weights[best_step - 1])  # what Lightning's ModelCheckpoint does
    trainer.test(module, datamodule=batches, verbose=False)
    record.test_rows = pd.read_csv(
        module.test_output_folder / "test_result_0.tsv", sep="\t", dtype={"row_id": str}, float_precision="round_trip"
    )
    for batch, (preds, _) in zip(
        batches.predict_dataloader(), trainer.predict(module, datamodule=batches), strict=True
    ):
        record.predicted |= zip(batch[config.id_name], preds.numpy(), strict=True)
    return record


def run_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, evaluation_rows: int, **changes: Any
) -> tuple[Record, Record, Config]:
    """The same run on both sides from the same weights, with evaluation batches of `evaluation_rows` rows."""
    plan = partial(evaluation_batches, max_rows=evaluation_rows)
    monkeypatch.setattr(scoring, "evaluation_batches", plan)
    shared = {
        "cat_field_list": (),
        "microbatches_per_step": 1,
        "warmup_steps": 4,
        "weight_decay": 0.05,
        "early_stop_metric": "val_loss",
    }
    # 77 rows: each epoch of ten steps ends with a short one
    config = Config(**settings(folder, num_rows=77, **shared, **changes))
    data = prepare(config)
    network = start.prepare_model(config, data)
    assert network.pooling == "pooler"
    twin = copy.deepcopy(without_dropout(network))
    ours, best_step = run_ours(config, data, network, monkeypatch)
    return ours, run_original(config, data, twin, folder / "original", best_step), config


# ---- the comparison ----


def largest_difference(ours: Any, original: Any) -> float:
    """Over all numbers of two equally nested lists, dicts and tensors; NaN if any is NaN."""
    if isinstance(ours, dict):
        assert ours.keys() == original.keys()
        return largest_difference(list(ours.values()), list(original.values()))
    if isinstance(ours, list) and not isinstance(ours[0], (int, float)):
        return float(np.max([largest_difference(a, b) for a, b in zip(ours, original, strict=True)]))
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(original, dtype=np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def probabilities_by_id(rows: pd.DataFrame, num_classes: int) -> dict[str, np.ndarray]:
    """Probabilities of a test file's rows, sorted by id; with several classes the original wrote a Python list."""
    if num_classes > 2 and "prob" in rows:
        values = [np.array(json.loads(cell)) for cell in rows["prob"]]
    else:
        values = rows.filter(regex="^prob").drop(columns="prob_calibrated", errors="ignore").to_numpy()
    return dict(sorted(zip(rows["row_id"], values, strict=True)))


def check_that_it_trained(record: Record, config: Config) -> None:
    """The run must have changed weights and losses, else equality would mean nothing."""
    rates = [rate for rate, _ in record.learning_rates]  # two groups: with and without weight decay
    assert rates[0] == 0 and rates.index(max(rates)) == config.warmup_steps
    assert (0 < rates[-1] < rates[-2]) if config.run_scheduler else (rates[-1] == config.lr)
    assert largest_difference(record.weights[0], record.weights[-1]) > 1e-3
    assert np.mean(record.losses[-5:]) < np.mean(record.losses[:5])
    if config.gradient_clip_val:
        assert max(record.grad_norms) == pytest.approx(config.gradient_clip_val, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_validation_and_test_equal_the_original(case, tmp_path, monkeypatch):
    # With class weights the original's val_loss over several batches is a mean of batch means, ours is over all rows.
    evaluation_rows = 256 if "class_weights" in CASES[case] else 8
    ours, original, config = run_both(tmp_path, monkeypatch, evaluation_rows=evaluation_rows, **CASES[case])
    assert len(ours.losses) == len(ours.learning_rates) == len(ours.weights) == NUM_STEPS
    check_that_it_trained(ours, config)

    by_step = ("losses", "learning_rates", "grad_norms", "logits", "weights")
    differences = {name: largest_difference(getattr(ours, name), getattr(original, name)) for name in by_step}
    for name in ("val_loss", "val/accuracy", "val/f1_score"):
        differences[name] = largest_difference(
            *([values[name] for values in side.validations] for side in (ours, original))
        )
    test_sides = [probabilities_by_id(side.test_rows, config.num_classes) for side in (ours, original)]
    differences["test probabilities"] = largest_difference(*test_sides)
    differences["predict probabilities"] = largest_difference(
        *(dict(sorted(side.predicted.items())) for side in (ours, original))
    )
    print(f"\n{case}: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    assert all(value <= TOLERANCE for value in differences.values()), differences  # NaN fails too

    labels = [side.test_rows.set_index("row_id")["label"] for side in (ours, original)]
    pd.testing.assert_series_equal(labels[0], labels[1].reindex(labels[0].index))
    assert ours.test_rows["row_id"].is_monotonic_increasing and len(ours.test_rows) == 37


# ---- the order of the hooks ----


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, names: tuple[str, ...], calls: list[str]) -> None:
    """Append a hook's name to `calls` whenever it is called on `owner`, a module or a class."""

    def recorded(name: str) -> Any:
        hook = getattr(owner, name)

        @wraps(hook)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return hook(*arguments, **options)

        return wrapper

    for name in names:
        monkeypatch.setattr(owner, name, recorded(name))


def test_hooks_run_in_the_original_order(tmp_path, monkeypatch):
    ours: list[str] = []
    original: list[str] = []
    record_calls(monkeypatch, hooks, HOOKS, ours)
    record_calls(monkeypatch, start, ("configure_optimizers",), ours)
    record_calls(monkeypatch, OriginalMultimodalBert, ("configure_optimizers", *HOOKS), original)
    run_both(tmp_path, monkeypatch, evaluation_rows=8)
    assert ours == original
    epoch = (
        ["training_step"] * 10 + ["on_validation_epoch_start"] + ["validation_step"] * 3 + ["on_validation_epoch_end"]
    )
    test = ["on_test_epoch_start"] + ["test_step"] * 5 + ["on_test_epoch_end"]
    assert ours == ["configure_optimizers", *epoch, *epoch, *test, *["predict_step"] * 5]
