"""Parameter groups, schedule, precision, and the one order of an optimizer step."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict, read_config
from mmbert_core.inference.precision import AUTOCAST_DTYPES, autocast, build_scaler, resolve_precision
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.training.optim import (
    configure_optimizers,
    names_without_decay,
    optimizer_step,
    resolve_learning_rates,
    warmup_in_steps,
)
from tests.model.conftest import build
from tests.support.configs import REQUIRED
from tests.training.conftest import warnings_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENCODER = "text_subnetwork.encoder."
INF, NAN = float("inf"), float("nan")


def config_of(**changes) -> Config:
    return Config(text_name=("text",), label_name="label", model_path="unused", **changes)


def model_of(family: str) -> MultimodalBert:
    text = TextBertBase(build(family, num_hidden_layers=1), pooling="cls", hidden_common_dim=8)
    return MultimodalBert(text, TabAE(2, [4], hidden_common_dim=8, means=[0.0, 1.0], stds=[1.0, 2.0]), 2)


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


# ---- parameter groups ----


@pytest.mark.parametrize("head_lr", (None, 1e-3))
@pytest.mark.parametrize("family", ("Bert", "DistilBert", "ModernBert"))
def test_every_trainable_parameter_is_in_exactly_one_group(family, head_lr):
    model = model_of(family)
    frozen = next(name for name, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    optimizer, _ = configure_optimizers(
        model, config_of(lr=2e-5, head_lr=head_lr, weight_decay=0.01, adam_epsilon=1e-6), 10
    )
    groups = names_by_group(model, optimizer)
    assert len(groups) == (2 if head_lr is None else 4)
    assert sorted(name for group in groups for name in group) == sorted(
        name for name, _ in model.named_parameters() if name != frozen
    )
    assert all(type(optimizer) is torch.optim.AdamW and group["eps"] == 1e-6 for group in optimizer.param_groups)
    for names, group in zip(groups, optimizer.param_groups, strict=True):
        # in these families a vector is a bias or belongs to a normalisation, and nothing else does
        assert {model.get_parameter(name).ndim >= 2 for name in names} == {group["weight_decay"] == 0.01}
        assert {name.startswith(ENCODER) for name in names} == (
            {True, False} if head_lr is None else {group["initial_lr"] == 2e-5}
        )
        assert group["initial_lr"] in (2e-5, head_lr)


def test_normalisations_of_every_family_are_found_without_their_usual_name():
    found = {family: names_without_decay(model_of(family)) for family in ("Bert", "DistilBert", "ModernBert")}
    assert f"{ENCODER}embeddings.LayerNorm.weight" in found["Bert"]
    assert f"{ENCODER}transformer.layer.0.sa_layer_norm.weight" in found["DistilBert"]
    assert f"{ENCODER}layers.0.mlp_norm.weight" in found["ModernBert"]


@pytest.mark.parametrize("head_lr", (None, 1e-3))
@pytest.mark.parametrize(
    ("family", "layer", "first", "last"),
    [
        ("Bert", "encoder.layer", "embeddings.LayerNorm.bias", "encoder.layer.2.output.dense.weight"),
        ("DistilBert", "transformer.layer", "embeddings.word_embeddings.weight", "transformer.layer.2.ffn.lin1.weight"),
        ("ModernBert", "layers", "embeddings.tok_embeddings.weight", "final_norm.weight"),
        ("MPNet", "encoder.layer", "embeddings.position_embeddings.weight", "encoder.relative_attention_bias.weight"),
        ("DebertaV2", "encoder.layer", "embeddings.word_embeddings.weight", "encoder.rel_embeddings.weight"),
        ("Electra", "encoder.layer", "embeddings_project.weight", "encoder.layer.2.output.dense.weight"),
        ("Albert", None, "embeddings.word_embeddings.weight", "encoder.embedding_hidden_mapping_in.weight"),
    ],
)
def test_learning_rate_by_layer(family, layer, first, last, head_lr):
    """Half of it a layer down; one group for each pair of learning rate and weight decay, the head's last."""
    encoder = build(family, num_hidden_layers=3)
    model = MultimodalBert(TextBertBase(encoder, pooling="cls", hidden_common_dim=8), None, 2)
    config = config_of(lr=0.8, head_lr=head_lr, layer_decay=0.5, weight_decay=0.01)
    optimizer, scheduler = configure_optimizers(model, config, 10)
    groups = names_by_group(model, optimizer)
    assert sorted(sum(groups, [])) == sorted(name for name, _ in model.named_parameters())
    rates = {name: group["initial_lr"] for names, group in zip(groups, optimizer.param_groups) for name in names}
    num_layers = 1 if layer is None else 3
    expected = {first: 0.8 * 0.5**num_layers, last: 0.4 if family == "Albert" else 0.8}
    for index in range(3 if layer else 0):
        names = [name for name in rates if name.startswith(f"{ENCODER}{layer}.{index}.")]
        assert names and {rates[name] for name in names} == {0.8 * 0.5 ** (2 - index)}
    assert {name: rates[ENCODER + name] for name in expected} == pytest.approx(expected)
    assert rates["text_subnetwork.linear.weight"] == (head_lr or 0.8)
    of_encoder = [rate for rate in scheduler.base_lrs if rate != head_lr]
    assert of_encoder == sorted(of_encoder, reverse=True) and len(groups) <= 2 * (num_layers + 1) + 2
    again = names_by_group(model, configure_optimizers(model, config, 10)[0])
    assert again == groups


@pytest.mark.parametrize(
    ("hidden", "lr"), [(128, 2e-4), (312, 1.9e-4), (384, 1.1e-4), (512, 5.5e-5), (768, 2e-5), (1024, 2e-5)]
)
def test_automatic_learning_rates_follow_from_the_hidden_size(hidden, lr, caplog):
    encoder = nn.Module()
    encoder.config = SimpleNamespace(hidden_size=hidden)
    model = SimpleNamespace(text_subnetwork=SimpleNamespace(encoder=encoder))
    assert resolve_learning_rates(config_of(lr="auto", head_lr="auto"), model) == {"lr": lr, "head_lr": 1e-3}
    assert resolve_learning_rates(config_of(lr=1e-4, head_lr=None), model) == {}
    assert resolve_learning_rates(config_of(lr="auto"), SimpleNamespace(text_subnetwork=None)) == {"lr": 1e-3}
    assert caplog.messages[0] == f"lr {lr:g}, head_lr 0.001: auto, by the encoder's hidden size"


class StrangeRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class Standardise(nn.LayerNorm):
    """A normalisation whose class name does not say so."""


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.temperature = nn.Parameter(torch.ones(4))
        self.bias_scale = nn.Parameter(torch.ones(4))
        self.a1 = StrangeRMSNorm()
        self.a2 = Standardise(4)
        self.a3 = nn.BatchNorm1d(4)
        self.a4 = nn.GroupNorm(2, 4)
        self.layernorm_like = nn.Linear(4, 4)
        self.relative_attention_bias = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)


def test_biases_and_normalisations_by_type_whatever_their_names():
    assert names_without_decay(Odd()) == {
        "bias",
        "a1.gamma",
        "a2.weight",
        "a2.bias",
        "a3.weight",
        "a3.bias",
        "a4.weight",
        "a4.bias",
        "layernorm_like.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }


# ---- schedule ----


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"run_scheduler": True}, "linear"),
        ({"run_scheduler": False}, "constant"),
        ({"schedule": "linear"}, "linear"),
        ({"schedule": "cosine"}, "cosine"),
        ({"schedule": "constant"}, "constant"),
        ({"schedule": "constant", "run_scheduler": False}, "constant"),
    ],
)
@pytest.mark.parametrize("warmup", (0, 5, 0.25))
def test_schedule_equals_transformers_at_every_step(keys, kind, warmup):
    total, in_steps = 20, {0: 0, 5: 5, 0.25: 5}[warmup]
    config = config_of(lr=1e-3, head_lr=4e-3, warmup_steps=warmup, **keys)
    assert config.run_scheduler == (kind != "constant")
    optimizer, scheduler = configure_optimizers(Odd(), config, total)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)  # all of Odd is head
    expected = {
        "linear": lambda: get_linear_schedule_with_warmup(plain, in_steps, total),
        "cosine": lambda: get_cosine_schedule_with_warmup(plain, in_steps, total),
        "constant": lambda: get_constant_schedule_with_warmup(plain, in_steps),
    }[kind]()
    rates = []
    for step in range(total + 1):
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        assert set(scheduler.get_last_lr()) == set(expected.get_last_lr())
        rates.append(scheduler.get_last_lr()[0])
        for stepping in (optimizer, scheduler, plain, expected):
            stepping.step()
    assert rates[0] == (0 if in_steps else 4e-3) and rates[in_steps] == 4e-3
    left = 5 / (20 - in_steps)  # of the decay, at step 15
    share = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[kind]
    assert rates[-1] == pytest.approx(4e-3 if kind == "constant" else 0, abs=1e-18)
    assert rates[15] == pytest.approx(4e-3 * share)


def test_a_schedule_that_contradicts_run_scheduler_is_refused():
    with pytest.raises(InputError, match="run_scheduler is false and schedule is cosine: they contradict"):
        config_of(run_scheduler=False, schedule="cosine")
    with pytest.raises(InputError, match="run_scheduler is true and schedule is constant: they contradict"):
        read_config(None, {**REQUIRED, "run_scheduler": True, "schedule": "constant"})
    stored = read_config(None, {**REQUIRED, "schedule": "constant"})
    assert config_from_dict(stored.to_dict()) == stored and not stored.run_scheduler


@pytest.mark.parametrize(
    ("asked", "total", "steps"),
    [(0, 100, 0), (7, 100, 7), (0.1, 94, 9), (0.1, 3, 0), (0.99, 10, 10), (1, 10, 1), (200, 10, 200)],
)
def test_warmup_is_a_number_of_steps_or_a_share_of_all(asked, total, steps):
    assert warmup_in_steps(asked, total) == steps


# ---- one optimizer step ----


def optimizer_for(
    *values: float, max_scale: float | None = None
) -> tuple[nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR, torch.amp.GradScaler]:
    """Ones as a parameter with gradient `values`, SGD with lr 1, 1 % less a step, scaler (off without `max_scale`)."""
    parameter = nn.Parameter(torch.ones(len(values)))
    parameter.grad = torch.tensor(values)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    scaler = torch.amp.GradScaler("cpu", enabled=max_scale is not None, init_scale=max_scale or 1.0)
    return parameter, optimizer, scheduler, scaler


def test_order_of_a_step(monkeypatch):
    parameter, optimizer, scheduler, scaler = optimizer_for(3.0, 4.0)
    calls = []

    def note(name, plain):
        def noted(*arguments, **options):
            calls.append(name)
            return plain(*arguments, **options)

        return noted

    for target, method in (
        (scaler, "unscale_"),
        (scaler, "step"),
        (scaler, "update"),
        (scheduler, "step"),
        (optimizer, "zero_grad"),
    ):
        name = "schedule" if target is scheduler else method
        monkeypatch.setattr(target, method, note(name, getattr(target, method)))
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", note("clip", nn.utils.clip_grads_with_norm_))
    assert optimizer_step([parameter], optimizer, scheduler, scaler, max_norm=1.0) == (True, 5.0)
    assert calls == ["unscale_", "clip", "step", "update", "schedule", "zero_grad"]
    assert parameter.grad is None
    assert scheduler.get_last_lr() == [0.99]


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, (-2.0, -3.0)), (1.0, (0.4, 0.2)), (5.5, (-2.0, -3.0))])
@pytest.mark.parametrize("scale", (None, 256.0))
def test_clipping_sees_unscaled_gradients(max_norm, expected, scale):
    """Clipping before unscaling would move the weights 256 times less."""
    parameter, optimizer, scheduler, scaler = optimizer_for(3.0, 4.0, max_scale=scale)
    parameter.grad *= scaler.scale(torch.ones(()))
    stepped, grad_norm = optimizer_step([parameter], optimizer, scheduler, scaler, max_norm=max_norm)
    assert stepped and grad_norm == pytest.approx(5.0)
    assert torch.allclose(parameter, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("max_norm", (0.0, 1.0))
@pytest.mark.parametrize("bad", (NAN, INF, -INF))
def test_non_finite_gradient_raises_before_the_weights_move(bad, max_norm):
    parameter, optimizer, scheduler, scaler = optimizer_for(3.0, bad)
    with pytest.raises(RunError, match="gradient norm is (nan|inf)"):
        optimizer_step([parameter], optimizer, scheduler, scaler, max_norm=max_norm)
    assert parameter.tolist() == [1.0, 1.0] and scheduler.get_last_lr() == [1.0]


def test_parameters_without_gradient_are_left_alone():
    parameter, optimizer, scheduler, scaler = optimizer_for(3.0, 4.0)
    other = nn.Parameter(torch.ones(2))
    assert optimizer_step([parameter, other], optimizer, scheduler, scaler, max_norm=0.0) == (True, 5.0)
    assert other.tolist() == [1.0, 1.0]


def test_overflow_skips_optimizer_and_schedule_together():
    """A loss scale of 2**127 overflows twice (gradient 4), then fits; its state goes through JSON in between."""
    parameter, optimizer, scheduler, scaler = optimizer_for(0.0, max_scale=2.0**127)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(4 * parameter.sum()).backward()
        stepped, grad_norm = optimizer_step([parameter], optimizer, scheduler, scaler, max_norm=1.0)
        seen.append(
            (stepped, grad_norm == 4.0, parameter.item(), scheduler.last_epoch, scaler.get_scale(), parameter.grad)
        )
        state, scaler = json.loads(json.dumps(scaler.state_dict())), torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.load_state_dict(state)
    assert seen == [
        (False, False, 1.0, 0, 2.0**126, None),
        (False, False, 1.0, 0, 2.0**125, None),
        (True, True, pytest.approx(0.0, abs=1e-6), 1, 2.0**125, None),
    ]
    assert scaler.state_dict()["_growth_tracker"] == 1


def test_gradients_that_no_loss_scale_helps_stop_the_run():
    parameter, optimizer, scheduler, scaler = optimizer_for(NAN, max_scale=2.0**16)
    with pytest.raises(RunError, match="at any loss scale"):
        for _ in range(100):
            scaler.scale(NAN * parameter.sum()).backward()
            optimizer_step([parameter], optimizer, scheduler, scaler, max_norm=0.0)
    assert parameter.tolist() == [1.0]


# ---- precision ----


NO_BF16 = "precision bf16 asked for, but this CPU has no bf16 instructions: fp32 is used"
NO_GPU = "precision fp16 asked for, but there is no GPU: fp32 is used"


@pytest.mark.parametrize(
    ("asked", "capabilities", "used", "warned"),
    [
        ("auto", {"avx512_bf16": True}, "fp32", []),
        ("fp32", {"avx512_bf16": True}, "fp32", []),
        ("bf16", {"avx512_bf16": True}, "bf16", []),
        ("bf16", {"amx_bf16": True}, "bf16", []),
        ("bf16", {"avx512_bf16": False, "avx512_f": True}, "fp32", [NO_BF16]),
        ("fp16", {"avx512_bf16": True}, "fp32", [NO_GPU]),
    ],
)
def test_the_cpu_trains_in_fp32_unless_it_has_the_bf16_asked_for(
    asked, capabilities, used, warned, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision(asked, CPU) == used
    assert warnings_in(caplog) == warned


@pytest.mark.parametrize(
    ("asked", "has_bf16", "used", "warned"),
    [
        ("auto", True, "bf16", False),
        ("auto", False, "fp16", False),
        ("bf16", True, "bf16", False),
        ("bf16", False, "fp16", True),
        ("fp16", True, "fp16", False),
        ("fp32", True, "fp32", False),
    ],
)
def test_precision_of_a_gpu(asked, has_bf16, used, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision(asked, CUDA) == used
    assert bool(warnings_in(caplog)) == warned


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_and_scaler_do_nothing_where_they_are_not_needed(precision, dtype):
    with autocast(precision, CPU):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
        assert torch.is_autocast_enabled("cpu") == (precision != "fp32")
    assert build_scaler(precision, CPU).is_enabled() == (precision == "fp16")
    assert build_scaler("fp32", CPU).scale(torch.ones(())) == 1.0
    assert set(AUTOCAST_DTYPES) == {"fp32", "bf16", "fp16"}
