"""Validation: when it happens, which step is the best, and when the run stops early."""

import csv
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mmbert_core import hooks
from mmbert_core.inference import scoring
from mmbert_core.storage.files import read_json
from mmbert_core.training import checkpoint
from tests.training.conftest import (
    NO_VALIDATION,
    STEPS,
    Interrupted,
    die_before,
    lines_of,
    train,
    warnings_in,
    weights_in,
)


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        (1.0, [5, 10]),
        (0.5, [2, 4, 7, 9, 10]),
        (0.01, list(range(1, 11))),
        (3, [3, 6, 9, 10]),
        (1, list(range(1, 11))),
        (100, [10]),
    ],
)
def test_validation_every_share_of_an_epoch_or_number_of_steps(config_of, interval, steps):
    config = config_of(val_check_interval=interval)
    train(config)
    assert [line["step"] for line in lines_of(config, "val_loss")] == steps


@pytest.mark.parametrize(
    ("metric", "lr", "seed"), [("val/f1_score", 1e-3, 0), ("val_loss", 2e-3, 6), ("val/log_loss", 1e-2, 0)]
)
def test_early_stop_after_patience_and_the_best_step_is_the_model(config_of, caplog, metric, lr, seed):
    patience = 3
    config = config_of(
        early_stop_metric=metric,
        early_stop_patience=patience,
        lr=lr,
        seed=seed,
        max_epochs=20,
        val_check_interval=1,
        warmup_steps=0,
        run_scheduler=False,
        keep_checkpoints=1,
    )
    results, _, _ = train(config)
    values = [line[metric] for line in lines_of(config, "val_loss")]
    losses = [line["val_loss"] for line in lines_of(config, "val_loss")]
    sign = -1 if metric == "val/f1_score" else 1
    best = (
        min(range(len(values)), key=lambda index: (sign * values[index], losses[index])) + 1
    )  # of equal values the lower loss
    assert results.best_step == best and results.best_value == values[best - 1] and results.best_metric == metric
    assert results.steps == len(values) == best + patience < 100
    assert weights_in(config) == weights_in(config, best) != weights_in(config, results.steps)
    assert sorted(checkpoint.list_steps(Path(config.model_path) / "checkpoints")) == [best, results.steps]
    assert any(message.startswith("early stop: 3 validations") for message in caplog.messages)


@pytest.mark.parametrize(
    ("metric", "values", "best", "steps"),
    [
        ("val/f1_score", [0.5, 0.6, 0.6, 0.1, 0.9], 2, 4),
        ("val/f1_score", [0.1, 0.0, 0.2, 0.1, 0.3, 0.2, 0.2], 5, 7),
        ("val_loss", [0.5, 0.6, 0.4, 0.5, 0.4], 3, 5),
        ("val/ece", [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.05, 0.04, 0.03, 0.02], 10, 10),
        ("val/f1_score", [None, 0.2, None, 0.1], 2, 4),  # val_loss stands in, and gives way
        ("val_loss", [None, None], 2, 2),  # nothing to choose by: the last step
        ("val_loss", [None, 0.9, None, 0.8, None, 0.9], 4, 6),
    ],
)
def test_best_and_stop_follow_from_the_validations(config_of, monkeypatch, metric, values, best, steps):
    left = iter(values)

    def on_validation_epoch_end(outputs, num_rows, **_):
        value = next(left)
        return {"val_loss": 1.0 if value is None else value, metric: value}, scoring.gather_results(outputs, num_rows)

    monkeypatch.setattr(hooks, "on_validation_epoch_end", on_validation_epoch_end)
    config = config_of(early_stop_metric=metric, early_stop_patience=2, val_check_interval=1)
    results, _, _ = train(config)
    assert (results.best_step, results.steps) == (best, steps)
    assert weights_in(config) == weights_in(config, best)


@pytest.mark.parametrize(
    ("metric", "values", "losses", "best"),
    [
        ("val/f1_score", [0.0, 0.0, 0.0, 0.0], [0.7, 0.6, 0.5, 0.55], 3),  # a rare class: F1 is 0 at every step
        ("val/auroc", [0.5, 1.0, 1.0, 1.0], [0.7, 0.3, 0.4, 0.2], 4),
        ("val/auroc", [0.9, 0.9, 0.8, 0.9], [0.2, 0.2, 0.1, 0.3], 1),
        ("val/log_loss", [0.5, 0.5, 0.6, 0.5], [0.5, 0.4, 0.1, 0.45], 2),
        ("val/f1_score", [0.5, 0.5, 0.5, 0.5], [None, 0.4, 0.3, 0.2], 1),  # nothing to compare the first one's loss by
        ("val/f1_score", [0.5, 0.5, 0.5, 0.5], [0.4, None, 0.3, 0.2], 4),
    ],
)
def test_of_equal_values_the_step_with_the_lower_loss_is_the_best(config_of, monkeypatch, metric, values, losses, best):
    left = iter(zip(values, losses, strict=True))

    def on_validation_epoch_end(outputs, num_rows, **_):
        value, loss = next(left)
        return {"val_loss": loss, metric: value}, scoring.gather_results(outputs, num_rows)

    monkeypatch.setattr(hooks, "on_validation_epoch_end", on_validation_epoch_end)
    config = config_of(early_stop_metric=metric, max_epochs=1, val_check_interval=1, batch_size=10)
    results, _, _ = train(config)
    assert (results.best_step, results.best_value) == (best, values[best - 1])
    assert weights_in(config) == weights_in(config, best)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_ties_across_a_resume_choose_the_step_of_an_undisturbed_run(config_of, monkeypatch, tmp_path, stop):
    plain = hooks.on_validation_epoch_end

    def on_validation_epoch_end(*arguments, **options):
        values, result = plain(*arguments, **options)
        return {**values, "val/f1_score": 0.5}, result  # always a tie: the real losses decide

    monkeypatch.setattr(hooks, "on_validation_epoch_end", on_validation_epoch_end)
    shared = {
        "early_stop_metric": "val/f1_score",
        "max_epochs": 1,
        "val_check_interval": 1,
        "batch_size": 10,
        "save_every": 1,
        "keep_checkpoints": 9,
    }
    straight = config_of(**shared, model_path=str(tmp_path / "straight"))
    expected, _, _ = train(straight)
    config = config_of(**shared)
    with monkeypatch.context() as patches:
        die_before(patches, stop)
        with pytest.raises(Interrupted):
            train(config)
    results, _, _ = train(config)
    assert results.best_step == expected.best_step and weights_in(config) == weights_in(straight)
    states = [
        read_json(checkpoint.step_folder(Path(each.model_path) / "checkpoints", 4) / "state.json")
        for each in (config, straight)
    ]
    assert states[0]["best_val_loss"] == states[1]["best_val_loss"] is not None


def test_a_checkpoint_of_an_older_version_knows_no_loss_of_its_best_step():
    state = asdict(checkpoint.TrainState(step=3, best_metric="val/f1_score", best_value=0.5, best_step=2))
    assert checkpoint.train_state_from(state | {"best_val_loss": 0.25}).best_val_loss == 0.25
    del state["best_val_loss"]
    assert checkpoint.train_state_from(state).best_val_loss is None


def write_one_class(files: Path, path: Path) -> str:
    with open(files / "val.csv", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *(row for row in rows if row[-1] == "0")])
    return str(path)


def test_an_undefined_early_stop_metric_leaves_it_to_val_loss(config_of, files, tmp_path, caplog):
    config = config_of(
        val_path=(write_one_class(files, tmp_path / "one.csv"),), early_stop_metric="val/auroc", val_check_interval=0.5
    )
    results, _, _ = train(config)
    validations = lines_of(config, "val_loss")
    assert all(line["val/auroc"] is None and line["val/accuracy"] is not None for line in validations)
    best = min(validations, key=lambda line: line["val_loss"])
    assert (results.best_metric, results.best_step, results.best_value) == (
        "val_loss",
        best["step"],
        best["val_loss"],
    )
    [warning] = [message for message in warnings_in(caplog) if "is undefined on these validation rows" in message][:1]
    [line] = [line for line in lines_of(config, "val_loss")][:1]
    assert (
        line["val/auroc"] is None
        and warning
        == f"val/auroc is undefined on these validation rows ({line['undefined']['val/auroc']}): val_loss decides"
    )


def test_a_validation_that_is_not_finite_is_null_and_never_the_best(config_of, monkeypatch):
    plain, calls = hooks.validation_step, []

    def validation_step(model, batch, batch_idx, outputs, *, task):
        plain(model, batch, batch_idx, outputs, task=task)
        calls.append(1)
        if len(calls) == 1:
            outputs[-1] = replace(outputs[-1], loss_sum=math.nan, preds=np.full_like(outputs[-1].preds, math.nan))

    monkeypatch.setattr(hooks, "validation_step", validation_step)
    config = config_of(early_stop_metric="val_loss")
    results, _, _ = train(config)
    first, second = lines_of(config, "val_loss")
    reason = "23 of 23 predictions are not finite"
    assert first == {
        "step": 5,
        "val_loss": None,
        "val/accuracy": None,
        "val/f1_score": None,
        "undefined": {"val/accuracy": reason, "val/f1_score": reason},
    }
    assert results.best_step == 10 and results.best_value == second["val_loss"]


def test_without_validation_rows_the_last_step_is_the_model(config_of):
    config = config_of(**NO_VALIDATION)
    results, data, _ = train(config)
    assert data.val is None and lines_of(config, "val_loss") == []
    assert (results.best_step, results.best_metric, results.best_value) == (STEPS, None, None)
    assert weights_in(config) == weights_in(config, STEPS)
