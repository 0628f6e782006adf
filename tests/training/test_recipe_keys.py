"""Keys that change how the weights are trained: the same on any number of processes, and after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmbert_core import config_recipe, hooks
from mmbert_core.config_reader import read_config
from mmbert_core.config_recipe import RECOMMENDED_VALUES, recipe_line
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError
from mmbert_core.training import loop
from mmbert_core.training.train import prepare_training
from tests.support import tiny
from tests.training.conftest import CONTEXT, STEPS, Interrupted, die_before, lines_of, train, weights_in

KEYS = {
    "rates": {"lr": "auto", "head_lr": "auto", "layer_decay": 0.8, "schedule": "cosine"},
    "average": {"ema_decay": 0.9, "gradient_clip_val": 1.0, "aux_loss_weight": 0.5, "head_first": "always"},
}


@pytest.mark.parametrize("name", [*KEYS, "bf16"])
def test_a_run_killed_within_an_epoch_ends_with_the_same_bytes(config_of, tmp_path, monkeypatch, name):
    keys = KEYS.get(name, {"precision": "bf16"})  # fp32 on a CPU without bf16
    straight = config_of(save_every=3, val_check_interval=0.5, model_path=str(tmp_path / "straight"), **keys)
    train(straight)
    config = replace(straight, model_path=str(tmp_path / "killed"))
    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=8)
        train(config)
    train(config)
    assert weights_in(config) == weights_in(straight)
    last = f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "killed" / last / file).read_bytes() == (tmp_path / "straight" / last / file).read_bytes()
    values = [[(line["step"], line["val_loss"]) for line in lines_of(each, "val_loss")] for each in (config, straight)]
    assert values[0] == values[1] and len(values[0]) == 5 + ("head_first" in keys)


def test_two_processes_train_what_one_does(config_of, tmp_path):
    keys = {key: value for group in KEYS.values() for key, value in group.items()}
    alone = config_of(microbatches_per_step=4, model_path=str(tmp_path / "by1"), **keys)
    train(alone)
    config = replace(alone, model_path=str(tmp_path / "by2"))
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    result = tiny.torchrun(2, ["train.py", str(tmp_path / "run.json")])
    assert result.returncode == 0, result.stderr
    for key in ("train_loss", "val_loss", "lr"):
        values = [[line[key] for line in lines_of(each, key)] for each in (alone, config)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    weights, others = (load_file(Path(each.model_path) / "model.safetensors") for each in (alone, config))
    # Adam divides by the root of its second moment: rounding grows where a gradient is nearly 0
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


# ---- recipe ----


def test_a_run_of_an_older_recipe_resumes_with_its_own_values(config_of, files, monkeypatch, caplog):
    """What version 1 calls recommended may be something else in version 2."""
    unnamed = ["lr", "head_lr", "warmup_steps", "gradient_clip_val", "head_first", "recipe"]
    values = {key: value for key, value in config_of(save_every=3).to_dict().items() if key not in unnamed}
    began = read_config(None, {**values, "recipe": "recommended"})
    assert (began.lr, began.warmup_steps) == ("auto", 0.1)
    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=8)
        train(began)
    assert [line for line in caplog.messages if line.startswith("recipe recommended: ")] == [recipe_line(vars(began))]
    assert json.loads((Path(began.model_path) / "config.json").read_text())["resolved"]["head_lr"] == 1e-3
    monkeypatch.setattr(config_recipe, "RECOMMENDED_VALUES", {**RECOMMENDED_VALUES, "warmup_steps": 0.5, "lr": 1.0})
    assert read_config(None, {**values, "recipe": "recommended", "model_path": "other"}).lr == 1.0
    for named in ({}, {"recipe": "recommended"}):
        again = read_config(None, {**values, **named})
        assert again == began
    assert train(again)[0].steps == STEPS
    with pytest.raises(InputError, match="was .* in the checkpoint at step 10 and is .* now"):
        train(read_config(None, {**values, "recipe": "original"}))


# ---- auxiliary heads ----


def test_auxiliary_losses_are_added_in_training_only_and_no_part_of_the_model(config_of, monkeypatch, tmp_path):
    config = config_of(aux_loss_weight=0.5, class_weights=(1.0, 3.0), save_every=5)
    seen, plain_step = [], hooks.training_step

    def training_step(model, batch, batch_idx, *, task, weight_sum):
        torch.manual_seed(0)
        outputs = model(batch.input_ids, batch.attention_mask, hooks.TabAE.combine_tab_data(batch), batch.categories)
        torch.manual_seed(0)
        step = plain_step(model, batch, batch_idx, task=task, weight_sum=weight_sum)
        losses = [torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none") for logits in outputs]
        expected = ((losses[0] + 0.5 * losses[1] + 0.5 * losses[2]) * (1.0 + 2.0 * batch.labels)).sum() / weight_sum
        seen.append((step["loss"].item(), expected.item()))
        return step

    monkeypatch.setattr(hooks, "training_step", training_step)
    _, _, model = train(config)
    assert len(seen) == 2 * STEPS and all(found == pytest.approx(expected, rel=1e-5) for found, expected in seen)
    in_checkpoint = load_file(Path(config.model_path) / "checkpoints/step-00000005/model.safetensors")
    in_folder = load_file(Path(config.model_path) / "model.safetensors")
    assert set(in_checkpoint) - set(in_folder) == {
        f"auxiliary_heads.{name}.{kind}" for name in ("text", "columns") for kind in ("weight", "bias")
    }
    predictor = Predictor.from_folder(config.model_path)
    predictor.predict_file([str(config.val_path[0])], tmp_path / "out.tsv")
    assert len((tmp_path / "out.tsv").read_text().splitlines()) == 24


@pytest.mark.parametrize("missing", ({"text_name": ()}, {"tab_field_list": (), "cat_field_list": ()}))
def test_a_model_of_one_input_has_no_auxiliary_heads(config_of, tmp_path, missing):
    plain = config_of(max_epochs=1, **missing)
    config = replace(plain, aux_loss_weight=0.5, model_path=str(tmp_path / "with"))
    for each in (plain, config):
        train(each)
    assert weights_in(config) == weights_in(plain)


@pytest.mark.parametrize("fusion", ("concat", "gate", "cross_attention", "moe", "tabm"))
def test_auxiliary_heads_of_every_fusion_reach_text_and_columns(config_of, fusion):
    data, model = prepare_training(config_of(fusion=fusion, aux_loss_weight=0.5), CONTEXT)
    batch = data.train.batch(np.arange(3))
    inputs = batch.input_ids, batch.attention_mask, hooks.TabAE.combine_tab_data(batch), batch.categories
    _, *auxiliary = model.train()(*inputs)
    assert [logits.shape for logits in auxiliary] == [(3, 2), (3, 2)]
    sum(logits.square().sum() for logits in auxiliary).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert {name.split(".")[0] for name in trained} == {"text_subnetwork", "tab_subnetwork", "auxiliary_heads"}
    assert isinstance(model.eval()(*inputs), torch.Tensor)


# ---- moving average ----


def test_the_average_is_validated_and_saved_as_the_model_and_training_continues_from_the_weights(
    config_of, tmp_path, monkeypatch
):
    """Compared with a run without average: the same losses, and averages computed from its weights."""
    plain = config_of(save_every=1, keep_checkpoints=100, max_epochs=1, early_stop_metric="val_loss", lr=1e-2)
    config = replace(plain, ema_decay=0.5, model_path=str(tmp_path / "averaged"))
    train(plain)
    validated, step_of_hook = [], hooks.validation_step

    def validation_step(model, *arguments, **options):
        validated.append(model.final_merge_network.linear_layer_final.weight.detach().clone())
        return step_of_hook(model, *arguments, **options)

    monkeypatch.setattr(hooks, "validation_step", validation_step)
    results, data, model = train(config)
    assert [line["train_loss"] for line in lines_of(config)] == [line["train_loss"] for line in lines_of(plain)]
    averages: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        folder = f"checkpoints/step-{step:08d}"
        weights = load_file(Path(plain.model_path) / folder / "model.safetensors")
        assert weights.keys() == load_file(tmp_path / "averaged" / folder / "model.safetensors").keys()
        kept = min(0.5, (1 + step) / (10 + step))
        averages = {
            name: weights[name] if step == 1 else kept * averages[name] + (1 - kept) * weights[name] for name in weights
        }
        stored = load_file(tmp_path / "averaged" / folder / "optimizer.safetensors")
        stored = {key.removesuffix(".average"): value for key, value in stored.items() if key.endswith(".average")}
        trained = dict(model.named_parameters()).keys()
        assert stored.keys() == trained
        assert all(torch.allclose(stored[name], averages[name], atol=1e-6) for name in trained)
    final = load_file(tmp_path / "averaged/model.safetensors")
    assert results.best_step == 5 and all(torch.equal(final[name], stored[name]) for name in stored)
    assert torch.equal(validated[-1], stored["final_merge_network.linear_layer_final.weight"])
    assert not torch.allclose(final["final_merge_network.linear_layer_final.weight"], weights_of_last(plain))


def weights_of_last(config) -> torch.Tensor:
    return load_file(Path(config.model_path) / "model.safetensors")["final_merge_network.linear_layer_final.weight"]


def test_the_best_step_s_average_is_the_model_also_when_it_is_not_the_last(config_of, monkeypatch, tmp_path):
    config = config_of(ema_decay=0.5, early_stop_metric="val_loss", save_every=1, val_check_interval=2)
    end = hooks.on_validation_epoch_end
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])

    def on_validation_epoch_end(*arguments, **options):
        values, result = end(*arguments, **options)
        return {**values, "val_loss": next(losses)}, result

    monkeypatch.setattr(hooks, "on_validation_epoch_end", on_validation_epoch_end)
    results, _, _ = train(config)
    stored = load_file(Path(config.model_path) / "checkpoints/step-00000004/optimizer.safetensors")
    final = load_file(Path(config.model_path) / "model.safetensors")
    assert results.best_step == 4
    assert all(torch.equal(final[name], stored[f"{name}.average"]) for name in final if f"{name}.average" in stored)


def test_a_step_that_is_left_out_does_not_move_the_average(config_of, monkeypatch):
    config = config_of(ema_decay=0.5, on_nonfinite="skip", save_every=1, keep_checkpoints=100)
    plain = loop.step_optimizer

    def step_optimizer(run):
        if run.state.step in (0, 3):
            next(run.model.parameters()).grad.fill_(np.nan)
        return plain(run)

    monkeypatch.setattr(loop, "step_optimizer", step_optimizer)
    assert train(config)[0].skipped_steps == 2
    stored = [
        load_file(Path(config.model_path) / f"checkpoints/step-{step:08d}/optimizer.safetensors") for step in (1, 3, 4)
    ]
    assert stored[0] == {} and stored[1].keys() == stored[2].keys()
    assert all(torch.equal(stored[1][name], stored[2][name]) for name in stored[1])


def test_a_checkpoint_without_its_average_is_refused(config_of):
    config = config_of()
    train(replace(config, max_epochs=1))
    with pytest.raises(InputError, match="ema_decay was 0.0 in the checkpoint at step 5 and is 0.5 now"):
        train(replace(config, max_epochs=1, ema_decay=0.5))
