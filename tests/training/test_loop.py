"""The loop: what is learned, from which inputs, what a run writes, and when it must stop."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.data.batches import step_rows
from mmbert_core.data.prepare import prepare
from mmbert_core.model import packed_attention
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import RunError
from mmbert_core.training import checkpoint, loop, start
from mmbert_core.training.results import Results
from tests.support import tiny
from tests.training.conftest import (
    CONTEXT,
    NO_VALIDATION,
    NUM_ROWS,
    STEPS,
    before_each_step,
    lines_of,
    save_encoder,
    train,
    warnings_in,
)

TRAIN_KEYS = {"step", "epoch", "train_loss", "lr", "grad_norm", "rows_per_second", "tokens_per_second", "padding_share"}


# ---- what is learned ----


def test_sixteen_rows_are_learned_by_heart(config_of):
    config = config_of(
        max_train_rows=16,
        batch_size=16,
        max_epochs=40,
        lr=1e-2,
        run_scheduler=False,
        microbatches_per_step=1,
        **NO_VALIDATION,
    )
    train(config, dropout=False)
    losses = [line["train_loss"] for line in lines_of(config)]
    assert len(losses) == 40 and losses[0] > 0.5 and losses[-1] < 0.05


# A change of these figures is a change of what every run learns: say so, or find out why. Dropout is off, because its
# draws may differ between builds of PyTorch.
GOLDEN_LOSSES = [0.6130286, 0.6996205, 0.7212847, 0.6807279, 0.7126048]


def test_golden_losses(config_of):
    config = config_of(
        max_epochs=1, class_weights=(1.0, 2.0), gradient_clip_val=1.0, weight_decay=0.01, head_lr=3e-3, **NO_VALIDATION
    )
    train(config, dropout=False)
    assert [line["train_loss"] for line in lines_of(config)] == pytest.approx(GOLDEN_LOSSES, rel=1e-4)


def test_micro_batches_do_not_change_what_a_step_learns(config_of, tmp_path):
    weights, losses = {}, {}
    for count in (1, 4):
        config = config_of(
            microbatches_per_step=count,
            batch_size=12,
            class_weights=(1.0, 3.0),
            model_path=str(tmp_path / str(count)),
            **NO_VALIDATION,
        )
        weights[count] = train(config, dropout=False)[2].state_dict()
        losses[count] = [line["train_loss"] for line in lines_of(config)]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5) and len(losses[1]) == 8
    worst = max((weights[1][name] - value).abs().max().item() for name, value in weights[4].items())
    print(f"largest difference of a weight after 8 steps, 1 and 4 micro-batches: {worst:.1e}")
    assert worst < 1e-6


@pytest.mark.parametrize("class_weights", (None, (1.0, 3.0), "balanced"))
def test_train_loss_is_a_plain_weighted_mean_also_of_a_short_last_step(config_of, monkeypatch, class_weights):
    expected, sizes = [], []

    def plain_loss(run, order):
        rows = step_rows(order, run.state.rows_consumed // 16, 16)
        batch = run.data.train.batch(rows)
        with torch.no_grad():
            logits = run.model(batch.input_ids, batch.attention_mask, batch.numbers, batch.categories)
        counts = np.bincount(run.train_labels)
        weights = {"balanced": NUM_ROWS / (2 * counts), None: None}.get(class_weights, class_weights)
        weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        expected.append(nn.functional.cross_entropy(logits, batch.labels, weight=weights).item())
        sizes.append(len(rows))

    before_each_step(monkeypatch, plain_loss)
    config = config_of(
        batch_size=16, microbatches_per_step=3, class_weights=class_weights, max_epochs=2, **NO_VALIDATION
    )
    results, _, _ = train(config, dropout=False)
    assert sizes == [16, 16, 8] * 2 and results.rows == 80
    assert [line["train_loss"] for line in lines_of(config)] == pytest.approx(expected, rel=1e-5)


def test_training_has_dropout_and_evaluation_has_none(config_of, files, monkeypatch):
    """A pretrained encoder comes in eval mode, and would stay so."""
    modes = []

    def note(name):
        plain = getattr(hooks, name)

        def noted(model, *arguments, **options):
            modes.append((name, {module.training for module in model.modules()}))
            return plain(model, *arguments, **options)

        monkeypatch.setattr(hooks, name, noted)

    for name in ("training_step", "validation_step", "test_step"):
        note(name)
    train(config_of(max_epochs=1, val_check_interval=2, test_path=(str(files / "test.csv"),)))
    assert {name for name, _ in modes} == {"training_step", "validation_step", "test_step"}
    assert all(mode == {name == "training_step"} for name, mode in modes)
    assert [name for name, _ in modes[:5]] == ["training_step"] * 4 + ["validation_step"] and modes[5][
        0
    ] == "training_step"


# ---- what can be learned from ----


@pytest.mark.parametrize(
    ("family", "pooling", "num_unused"),
    [
        ("Bert", "cls", 0),
        ("Roberta", "mean", 0),
        ("DistilBert", "auto", 0),
        ("ModernBert", "mean", 0),
        ("Luke", "mean", 12),
    ],
)
def test_encoders_of_other_families_train(config_of, files, tmp_path, family, pooling, num_unused, caplog):
    """Every parameter moves, but those that no loss reaches: they are frozen, and their number is said."""
    folder = save_encoder(family, tmp_path / "encoder", files)
    before = {name: value.clone() for name, value in AutoModel.from_pretrained(folder).state_dict().items()}
    config = config_of(
        encoder=str(folder), pooling=pooling, max_epochs=1, lr=1e-2, warmup_steps=0, batch_size=20, **NO_VALIDATION
    )
    _, _, model = train(config)
    encoder = model.text_subnetwork.encoder
    still = {name for name, parameter in encoder.named_parameters() if torch.equal(parameter, before[name])}
    assert len(still) == num_unused and all("entity" in name or "w2e" in name or "e2" in name for name in still)
    assert still == {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert any(
        message.startswith(f"{num_unused} parameters are not reached by the loss") for message in caplog.messages
    ) == bool(num_unused)
    assert getattr(encoder, "pooler", None) is None  # not used: it would stop DDP
    test = prepare(replace(config, test_path=(str(files / "test.csv"),))).test
    assert len(Predictor.from_folder(config.model_path, CONTEXT).score(test).preds) == 37


@pytest.mark.parametrize("inputs", ("text only", "columns only", "several classes"))
def test_inputs_and_several_classes(config_of, files, tmp_path, inputs):
    changes = {
        "text only": {"tab_field_list": (), "cat_field_list": ()},
        "columns only": {"text_name": (), "encoder": "not needed"},
        "several classes": {},
    }[inputs]
    if inputs == "several classes":
        values = tiny.settings(tmp_path, num_rows=NUM_ROWS, num_classes=3, max_epochs=1, early_stop_metric="val_loss")
        config = Config(**values)
    else:
        config = config_of(test_path=(str(files / "test.csv"),), max_epochs=1, **changes)
    results, _, model = train(config)
    assert (model.text_subnetwork is None, model.tab_subnetwork is None) == (
        inputs == "columns only",
        inputs == "text only",
    )
    with open(results.test_folder / "test_result_0.tsv", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    probabilities = ["prob_0", "prob_1", "prob_2"] if inputs == "several classes" else ["prob"]
    assert list(rows[0]) == ["row_id", *probabilities, "label", "pred", "prob_calibrated"] and len(rows) == 37
    if inputs == "columns only":
        assert {line["padding_share"] for line in lines_of(config)} == {0.0}


# ---- what a run writes ----


def test_metrics_file(config_of):
    config = config_of(log_every=3, run_scheduler=True, warmup_steps=2, lr=1e-3)
    train(config)
    lines, validations = lines_of(config), lines_of(config, "val_loss")
    assert [line["step"] for line in lines] == [3, 6, 9, 10]  # the last step has its line
    assert all(set(line) == TRAIN_KEYS for line in lines)
    assert all(
        set(line) == {"step", "val_loss", "val/auroc", "val/average_precision", "val/accuracy", "val/f1_score"}
        for line in validations
    )
    steps = [line["step"] for line in tiny.metrics_lines(config.model_path)]
    assert steps == sorted(steps) and len(steps) == 6
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (11 - step) / 8 for step in (3, 6, 9, 10)])
    assert all(
        0 <= line["padding_share"] < 1
        and line["rows_per_second"] > 0
        and line["tokens_per_second"] > line["rows_per_second"]
        for line in lines
    )


@pytest.mark.parametrize("packed", [True, False])
def test_padding_share_and_gradient_norm_are_what_they_say(config_of, monkeypatch, packed):
    shares, norms, cells = [], [], [0, 0]
    plain_step, plain_optimizer_step = hooks.training_step, loop.optimizer_step

    def training_step(model, batch, batch_idx, **options):
        cells[0] += int(batch.attention_mask.sum())
        cells[1] += batch.attention_mask.numel()
        return plain_step(model, batch, batch_idx, **options)

    def optimizer_step(parameters, *arguments, **options):
        parameters = list(parameters)
        norms.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).norm().item())
        shares.append(0.0 if packed else 1 - cells[0] / cells[1])
        cells[:] = [0, 0]
        return plain_optimizer_step(parameters, *arguments, **options)

    if not packed:
        monkeypatch.setattr(packed_attention, "use_packed_attention", lambda _: False)
    monkeypatch.setattr(hooks, "training_step", training_step)
    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    config = config_of(gradient_clip_val=0.01, **NO_VALIDATION)
    train(config)
    assert [line["padding_share"] for line in lines_of(config)] == pytest.approx(shares)
    assert [line["grad_norm"] for line in lines_of(config)] == pytest.approx(norms, rel=1e-5)  # before clipping


def test_train_results(config_of, files):
    config = config_of(test_path=(str(files / "test.csv"),))
    results, _, _ = train(config)
    written = json.loads((Path(config.model_path) / "train_results.json").read_text())
    assert results == Results.from_record(config.model_path, written)
    assert set(written) == {
        "steps",
        "epochs",
        "best_step",
        "best_metric",
        "best_value",
        "rows",
        "train_rows",
        "skipped_steps",
        "train_seconds",
        "train_rows_per_second",
        "peak_memory_mb",
        "world_size",
        "pooling",
        "precision",
        "microbatches_asked",
        "microbatches_per_step",
        "test_folder",
        "test_metrics",
    }
    assert (results.steps, results.epochs, results.rows, results.train_rows, results.world_size) == (
        STEPS,
        2.0,
        80,
        NUM_ROWS,
        1,
    )
    assert (results.pooling, results.precision, results.microbatches_per_step, results.skipped_steps) == (
        "pooler",
        "fp32",
        2,
        0,
    )
    assert results.train_rows_per_second == pytest.approx(80 / results.train_seconds)
    assert 50 < results.peak_memory_mb < 1e5
    figures = json.loads((results.test_folder / "test_metrics.json").read_text())
    assert figures == results.test_metrics and figures["test/num_rows"] == 37


def test_checkpoints_every_so_many_steps_and_at_the_best(config_of):
    config = config_of(save_every=4, keep_checkpoints=100, val_check_interval=100)
    train(config)
    assert sorted(checkpoint.list_steps(Path(config.model_path) / "checkpoints")) == [4, 8, 10]


# ---- what is not finite ----


@pytest.mark.parametrize("poison", ("weights", "loss", "gradient"))
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_optimizer_step(config_of, monkeypatch, poison):
    """At step 4, with its number; the checkpoint of step 3 is finite, and the next start resumes from it."""
    config = config_of(save_every=1, keep_checkpoints=100, **NO_VALIDATION)
    moved, plain = [], start.configure_optimizers

    def configure_optimizers(*arguments):
        optimizer, scheduler = plain(*arguments)
        optimizer.register_step_post_hook(lambda *_: moved.append(1))
        return optimizer, scheduler

    def act(run, order):
        if run.state.step + 1 == 4 and poison == "weights":
            run.model.final_merge_network.linear_layer_final.weight.data[0, 0] = math.nan
        elif run.state.step + 1 == 4 and poison == "loss":
            run.task.loss_op.forward = lambda logits, labels: (
                torch.where(labels == 0, math.inf, 0.0) + 0 * logits.sum(dim=1)
            )
        elif run.state.step + 1 == 4:
            run.model.final_merge_network.linear_layer_final.bias.register_hook(lambda gradient: gradient * math.inf)

    with monkeypatch.context() as patches:
        patches.setattr(start, "configure_optimizers", configure_optimizers)
        before_each_step(patches, act)
        with pytest.raises(
            RunError,
            match="(step 4 is (nan|inf), .*|gradient norm is inf at step 4); stopped before the optimizer step",
        ):
            train(config)
    assert len(moved) == 3
    checkpoints = Path(config.model_path) / "checkpoints"
    assert checkpoint.list_steps(checkpoints) == [3, 2, 1]
    assert all(
        value.isfinite().all()
        for value in load_file(checkpoint.find_checkpoint(checkpoints, "auto") / "model.safetensors").values()
    )
    results, _, _ = train(config)
    assert results.steps == STEPS


def assert_no_model(config):
    """Nothing that passes for a model or a result; the same command says the same again."""
    folder = Path(config.model_path)
    assert not [
        name
        for name in ("model.safetensors", "train_results.json", "thresholds.json", "README.md")
        if (folder / name).exists()
    ]
    assert not list(folder.glob("multimodal_bert-*"))


@pytest.mark.parametrize("what", ("loss", "gradient"))
def test_a_run_whose_every_step_was_left_out_fails(config_of, files, monkeypatch, what):
    config = config_of(on_nonfinite="skip", max_epochs=1, test_path=(str(files / "test.csv"),))

    def act(run, order):
        if what == "loss":
            run.task.loss_op.forward = lambda logits, labels: math.nan * logits.sum(dim=1)
        elif run.state.step == 0:
            run.model.final_merge_network.linear_layer_final.bias.register_hook(lambda gradient: gradient * math.inf)

    with monkeypatch.context() as patches:
        before_each_step(patches, act)
        reason = "because their loss or gradient was not finite: nothing was trained, and no model is written"
        with pytest.raises(RunError, match=f"all 5 steps were left out {reason}"):
            train(config)
    assert_no_model(config)
    with pytest.raises(RunError, match="all 5 steps were left out"):
        train(config)


@pytest.mark.parametrize("num_classes", (2, 3))
@pytest.mark.parametrize("validated", (True, False))
def test_a_model_of_predictions_that_are_not_finite_is_not_written(tmp_path, monkeypatch, validated, num_classes):
    """Its weights are finite, but so large that it computes with infinity; after some steps, which count."""
    changes = {} if validated else NO_VALIDATION
    config = Config(
        **tiny.settings(tmp_path, num_rows=40, num_classes=num_classes, on_nonfinite="skip", max_epochs=1, **changes)
    )

    def act(run, order):
        if run.state.step + 1 == 4:
            run.model.final_merge_network.linear_layer_final.weight.data[:] = 3e38

    with monkeypatch.context() as patches:
        before_each_step(patches, act)
        with pytest.raises(RunError) as error:
            train(config)
    rows = "23 of 23 val rows" if validated else "32 of 32 train rows"
    assert f"the model of step 5 gives probabilities that are not finite: {rows}, first " in str(
        error.value
    ) and "\n" not in str(error.value)
    assert_no_model(config)
    with pytest.raises(RunError, match="probabilities that are not finite"):
        train(config)
    assert_no_model(config)


def test_a_best_step_before_the_weights_went_wrong_is_the_model(config_of, monkeypatch, caplog):
    config = config_of(on_nonfinite="skip", max_epochs=2)

    def act(run, order):
        if run.state.step + 1 == 7:
            run.model.final_merge_network.linear_layer_final.weight.data[:] = 3e38

    before_each_step(monkeypatch, act)
    results, _, _ = train(config)
    assert results.best_step == 5 and results.skipped_steps == 4
    assert "4 of 10 steps were left out because their loss or gradient was not finite" in warnings_in(caplog)


def test_a_loss_of_the_users_replaces_cross_entropy(config_of, tmp_path):
    """Label smoothing, of torch's own losses; and one of the user's that forgets its rows is refused."""

    def train_with(name, loss_op):
        config = config_of(model_path=str(tmp_path / name), max_epochs=1)
        data = prepare(config)
        loop.fit(config, data, start.prepare_model(config, data), CONTEXT, loss_op=loss_op)
        return [line["train_loss"] for line in lines_of(config, "train_loss")]

    plain, same = train_with("plain", None), train_with("same", nn.CrossEntropyLoss())
    smooth = train_with("smooth", nn.CrossEntropyLoss(label_smoothing=0.3))
    assert plain == same and plain != smooth
    with pytest.raises(ValueError, match="one loss per row"):
        train_with("mean", lambda logits, labels: nn.functional.cross_entropy(logits, labels))
