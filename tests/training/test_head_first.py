"""Everything but the encoder is fitted before step 1: the vectors, the fit, step 0 as the best step, signals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.report.formatting import BEFORE_FINE_TUNING
from mmbert_core.runtime import signals
from mmbert_core.runtime.errors import InputError, Stopped
from mmbert_core.training import checkpoint, head_first, head_fit, loop
from mmbert_core.training.head_first import pooled_vectors, sample_rows
from mmbert_core.training.head_fit import HeadRows, fit_head, mean_loss
from mmbert_core.training.start import start_run
from mmbert_core.training.train import prepare_training
from tests.support import tiny
from tests.training.conftest import (
    CONTEXT,
    NO_VALIDATION,
    STEPS,
    Interrupted,
    die_before,
    lines_of,
    train,
    weights_in,
)


def stage_lines(config):
    return [line for line in lines_of(config, "stage") if line["stage"] == "head_first"]


def steps_saved(config):
    return sorted(checkpoint.list_steps(Path(config.model_path) / "checkpoints"))


# ---- the vectors ----


@pytest.mark.parametrize("changes", ({}, {"max_length": 8, "max_chunks": 3}))
def test_each_row_has_the_vector_that_the_encoder_gives_it(config_of, changes):
    config = config_of(head_first="always", **changes)
    data, model = prepare_training(config, CONTEXT)
    Path(config.model_path).mkdir()
    run = start_run(config, data, model, CONTEXT)
    positions = np.array([0, 3, 4, 17, 39])
    vectors = pooled_vectors(run, data.train, positions, if_stopped="")
    run.log.close()
    assert vectors.shape == (5, 32) and model.training
    model.eval()
    for position, vector in zip(positions, vectors, strict=True):
        batch = data.train.batch([position])
        with torch.no_grad():
            expected = model.text_subnetwork.pool_rows(batch.input_ids, batch.attention_mask)[0]
            logits = model.logits_from_pooled(torch.from_numpy(vector)[None], batch.numbers, batch.categories)
        assert vector == pytest.approx(expected.numpy(), abs=1e-6)
        preds = hooks.predict_step(model, batch, 0, task=run.task)[0]
        assert float(torch.softmax(logits, dim=1)[0, 1]) == pytest.approx(float(preds.detach()), abs=1e-6)


def test_a_sample_is_seeded_ascending_and_of_distinct_rows():
    assert sample_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    rows = sample_rows(1000, 100, 7)
    assert len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(1000, 100, 7)) and not np.array_equal(rows, sample_rows(1000, 100, 8))


# ---- the fit ----


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"num_classes": 3, "class_weights": "balanced"},
        {"text_name": ()},
        {"tab_field_list": (), "cat_field_list": ()},
        {"fusion": "tabm", "column_encoding": "piecewise_linear"},
        {"fusion": "moe", "aux_loss_weight": 0.1, "wide_columns": True},
    ),
    ids=("text and columns", "three weighted classes", "columns only", "text only", "tabm", "moe, wide"),
)
def test_the_fit_lowers_the_loss_and_leaves_the_encoder(tmp_path, changes):
    same = {"num_rows": 300, "val_path": (), "val_fraction": 0.3, "test_path": (), "pooling": "mean", "max_epochs": 1}
    config = Config(**tiny.settings(tmp_path, head_first="auto", **same, **changes))
    train(config)
    summary = stage_lines(config)[-1]
    assert (summary["head_rows"], summary["head_val_rows"], summary["step"]) == (210, 90, 0)
    assert summary["head_val_loss_after"] < summary["head_val_loss_before"] - 0.02
    first = lines_of(config, "val_loss")[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(summary["head_val_loss_after"], abs=1e-6)
    folder = tmp_path / "run/checkpoints"
    initial, at_0 = prepare_training(config, CONTEXT)[1].state_dict(), checkpoint.read_weights(folder, 0)
    changed = {name for name, value in at_0.items() if not torch.equal(value, initial[name])}
    assert changed and not any(name.startswith("text_subnetwork.encoder.") for name in changed)


def rows_of(generator, num_rows, weight):
    pooled = torch.randn(num_rows, 32, generator=generator)
    labels = (pooled @ weight + torch.randn(num_rows, generator=generator) > 0).long()
    return HeadRows(pooled, torch.zeros(num_rows, 3), torch.zeros(num_rows, 1, dtype=torch.int64), labels)


def test_a_fit_is_repeatable_and_never_worse_than_the_weights_before(config_of):
    config = config_of()
    data, model = prepare_training(config, CONTEXT)
    loss_op = torch.nn.CrossEntropyLoss(reduction="none")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, generator=generator)
    train_rows, val_rows = rows_of(generator, 400, weight), rows_of(generator, 200, weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = fit_head(model, train_rows, val_rows, loss_op=loss_op, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert first.loss == mean_loss(model, val_rows, loss_op) < 0.5 < first.loss_before
    assert first.weight_decay in head_fit.WEIGHT_DECAYS and first.loss == min(first.val_losses)
    model.load_state_dict(before)
    assert fit_head(model, train_rows, val_rows, loss_op=loss_op, seed=1) == first
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    # labels without a relation to the rows: what was is kept
    noise = HeadRows(train_rows.pooled, train_rows.numbers, train_rows.categories, train_rows.labels.flip(0))
    again = fit_head(model, noise, val_rows, loss_op=loss_op, seed=1)
    assert again.epoch == 0 and again.loss == again.loss_before == first.loss
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# ---- whether ----


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_first": "auto"}, "there are fewer than 50 training rows"),
        ({"head_first": "auto", **NO_VALIDATION}, "there are no validation rows"),
        (
            {"head_first": "auto", "fusion": "cross_attention"},
            "fusion cross_attention reads the text's tokens, not only its vector",
        ),
        ({"head_first": "never"}, None),
    ],
)
def test_auto_says_why_not(config_of, caplog, changes, reason):
    config = config_of(max_epochs=1, **changes)
    train(config)
    assert not stage_lines(config) and 0 not in steps_saved(config)
    lines = [line for line in caplog.messages if line.startswith("head_first")]
    expected = f"head_first is auto: the head is not fitted before fine-tuning: {reason}"
    assert lines == ([] if reason is None else [expected])


def test_always_is_refused_where_the_fusion_reads_tokens(config_of):
    config = config_of(head_first="always", fusion="cross_attention")
    with pytest.raises(InputError, match="^head_first is always, but fusion cross_attention reads the text's tokens"):
        prepare_training(config, CONTEXT)


# ---- step 0 ----


def test_a_step_0_that_is_never_beaten_is_the_model(config_of, caplog):
    config = config_of(head_first="always", lr=1.0, warmup_steps=0, early_stop_metric="val_loss", keep_checkpoints=1)
    results, _, _ = train(config)
    assert (results.best_step, results.steps, steps_saved(config)) == (0, STEPS, [0, STEPS])
    assert weights_in(config) == weights_in(config, 0) != weights_in(config, STEPS)
    assert f"model of step 0 ({BEFORE_FINE_TUNING}) written to {config.model_path}" in caplog.messages
    card = (Path(config.model_path) / "README.md").read_text()
    assert f"* best step 0 ({BEFORE_FINE_TUNING}): val_loss 0." in card
    # a finished run stays as it is
    assert train(config)[0].best_step == 0


def test_the_report_says_what_step_0_is(config_of, files):
    config = config_of(
        head_first="always", lr=1.0, warmup_steps=0, early_stop_metric="val_loss", test_path=(str(files / "test.csv"),)
    )
    results, _, _ = train(config)
    page = (results.test_folder / "report.html").read_text()
    assert results.best_step == 0 and f"Step 0: {BEFORE_FINE_TUNING}." in page
    report = json.loads((results.test_folder / "report.json").read_text())
    assert report["training"]["best_step"] == 0 and 0 not in report["training"]["steps"]


def test_without_validation_rows_fine_tuning_starts_from_a_few_epochs(config_of):
    config = config_of(head_first="always", **NO_VALIDATION)
    results, _, _ = train(config)
    assert [line["head_epoch"] for line in stage_lines(config)[:-1]] == [1, 2, 3, 4, 5]
    assert results.best_step == STEPS and steps_saved(config) == [0, STEPS]
    assert stage_lines(config)[-1]["head_val_loss_after"] is None


# ---- stops and kills ----


@pytest.fixture
def undisturbed(config_of, tmp_path):
    config = config_of(head_first="always", model_path=str(tmp_path / "undisturbed"))
    train(config)
    return config


def check_equal(config, expected):
    assert weights_in(config) == weights_in(expected) and weights_in(config, STEPS) == weights_in(expected, STEPS)

    def lines(run):
        timed = ("head_seconds", "rows_per_second", "tokens_per_second")
        return [
            {key: value for key, value in line.items() if key not in timed}
            for line in tiny.metrics_lines(run.model_path)
        ]

    assert lines(config) == lines(expected)


@pytest.mark.parametrize("module, name", ((head_first, "evaluate"), (head_first, "fit_head")))
def test_a_signal_in_the_stage_stops_with_nothing_lost(config_of, undisturbed, monkeypatch, module, name):
    config = config_of(head_first="always")
    plain = getattr(module, name)

    def with_signal(*arguments, **options):
        monkeypatch.setattr(signals._state, "first", signal.SIGTERM)
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, with_signal)
        with pytest.raises(Stopped, match="stopped by a signal before step 1, with nothing to save"):
            train(config)
    monkeypatch.setattr(signals._state, "first", None)
    monkeypatch.setattr(signals._state, "leaving", False)
    assert steps_saved(config) == [] and tiny.metrics_lines(config.model_path) == []
    train(config)
    check_equal(config, undisturbed)


def test_a_signal_in_the_validation_of_step_0_keeps_the_fit(config_of, undisturbed, monkeypatch):
    config = config_of(head_first="always")
    with monkeypatch.context() as patch:
        plain = loop.validate

        def with_signal(run):
            patch.setattr(signals._state, "first", signal.SIGTERM)
            return plain(run)

        patch.setattr(loop, "validate", with_signal)
        with pytest.raises(Stopped, match="the checkpoint of step 0 is written"):
            train(config)
    monkeypatch.setattr(signals._state, "leaving", False)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit_head_first", None)  # not called again
        train(config)
    check_equal(config, undisturbed)


@pytest.mark.parametrize("step", (1, 4))
def test_a_kill_in_fine_tuning_never_repeats_the_stage(config_of, undisturbed, monkeypatch, step):
    config = config_of(head_first="always")
    with monkeypatch.context() as patch:
        die_before(patch, step)
        with pytest.raises(Interrupted):
            train(config)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit_head_first", None)
        train(config)
    check_equal(config, undisturbed)
