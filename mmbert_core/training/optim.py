"""Optimizer, schedule, and the order of an optimizer step."""

import logging
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from mmbert_core.config import Config
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.text_encoder import layers_above
from mmbert_core.runtime.errors import RunError

logger = logging.getLogger(__name__)

MIN_LOSS_SCALE = 1e-4  # of fp16, 30 halvings below the initial scale: gradients that overflow here always will
ENCODER = "text_subnetwork.encoder."
# What `lr: auto` and `head_lr: auto` mean: 1.1e-4 for a hidden size of 384.
LR_OF_BASE, HIDDEN_SIZE_OF_BASE, EXPONENT, MAX_RATIO = 2e-5, 768, 2.5, 10
HEAD_LR = 1e-3


# ---- optimizer and schedule ----


def is_normalisation(module: nn.Module) -> bool:
    """LayerNorm, BatchNorm, RMSNorm, ..., recognised by the module's type, not by the names of its parameters."""
    known_types = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known_types) or "Norm" in type(module).__name__


def names_without_decay(model: nn.Module) -> set[str]:
    """Names of biases and of all parameters of normalisation modules."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if name.endswith("bias") or is_normalisation(module):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def resolve_learning_rates(config: Config, model: MultimodalBert) -> dict[str, float]:
    """The values of `lr` and `head_lr` where they are `auto`.

    The narrower an encoder, the larger the rate: LR_OF_BASE at HIDDEN_SIZE_OF_BASE and above, growing with the ratio
    of the sizes to the power EXPONENT, to MAX_RATIO times that. Without an encoder all is head.
    """
    resolved = {}
    if config.lr == "auto" and model.text_subnetwork is None:
        resolved["lr"] = HEAD_LR
    elif config.lr == "auto":
        hidden_size = model.text_subnetwork.encoder.config.hidden_size
        ratio = min(max(1.0, (HIDDEN_SIZE_OF_BASE / hidden_size) ** EXPONENT), MAX_RATIO)
        resolved["lr"] = float(f"{LR_OF_BASE * ratio:.2g}")
    if config.head_lr == "auto":
        resolved["head_lr"] = HEAD_LR
    if resolved:
        values = ", ".join(f"{key} {value:g}" for key, value in resolved.items())
        logger.info("%s: auto, by the encoder's hidden size", values)
    return resolved


def configure_optimizers(model: nn.Module, config: Config, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Hook `configure_optimizers`: AdamW in two groups, with and without weight decay; a schedule by optimizer step.

    With `head_lr` each group is split into the text encoder's parameters and the rest, with `layer_decay` by encoder
    layer, the last one first. Every trainable parameter is in exactly one group. The learning rates are numbers, what
    `resolve_learning_rates` has made of auto.
    """
    undecayed = names_without_decay(model)
    above: dict[str, int] = {}
    if config.layer_decay != 1 and model.text_subnetwork is not None:
        above = {ENCODER + name: count for name, count in layers_above(model.text_subnetwork.encoder).items()}
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = config.head_lr is not None and not name.startswith(ENCODER)
            key = (is_head, above.get(name, 0), name in undecayed)
            groups.setdefault(key, []).append(parameter)
    param_groups = []
    for (is_head, num_above, no_decay), parameters in sorted(groups.items(), key=lambda item: item[0]):
        lr = config.head_lr if is_head else config.lr * config.layer_decay**num_above
        weight_decay = 0.0 if no_decay else config.weight_decay
        param_groups.append({"params": parameters, "weight_decay": weight_decay, "lr": lr})
    optimizer = AdamW(param_groups, lr=config.lr, eps=config.adam_epsilon, fused=True)
    return optimizer, build_schedule(optimizer, config, total_steps)


def build_schedule(optimizer: Optimizer, config: Config, total_steps: int) -> LambdaLR:
    """The learning rate by optimizer step: warm-up, then as `schedule`, or `run_scheduler`, says."""
    warmup = warmup_in_steps(config.warmup_steps, total_steps)
    schedule = config.schedule or ("linear" if config.run_scheduler else "constant")
    if schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, num_warmup_steps=warmup)
    get_schedule = get_linear_schedule_with_warmup if schedule == "linear" else get_cosine_schedule_with_warmup
    return get_schedule(optimizer, warmup, total_steps)


def warmup_in_steps(warmup_steps: int | float, total_steps: int) -> int:
    """Optimizer steps of warm-up; a value below 1 is a share of all steps."""
    return round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)


def optimizer_step(
    parameters: Iterable[nn.Parameter],
    optimizer: Optimizer,
    scheduler: LambdaLR,
    scaler: torch.amp.GradScaler,
    *,
    max_norm: float,
    skip_nonfinite: bool = False,
) -> tuple[bool, float]:
    """Unscale, clip, step, update the scaler, schedule, zero the gradients: in this order, only here.

    Returns whether the weights were updated (an fp16 overflow skips update and schedule) and the gradient norm before
    clipping. Raises `RunError` for a non-finite norm: without loss scaling unless `skip_nonfinite`, with it when the
    scale falls below `MIN_LOSS_SCALE`. The gradients are the same on all ranks, so every rank does the same.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    total_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
    grad_norm = float(total_norm)
    if not scaler.is_enabled() and not math.isfinite(grad_norm):
        if not skip_nonfinite:
            raise RunError(f"the gradient norm is {grad_norm}")
        optimizer.zero_grad(set_to_none=True)
        return False, grad_norm
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    stepped = scaler.get_scale() >= scale  # the scaler lowers its scale only after a skipped step
    if stepped:
        scheduler.step()
    elif scaler.get_scale() < MIN_LOSS_SCALE:
        raise RunError(f"the gradient norm is {grad_norm} at any loss scale down to {scaler.get_scale():.0e}")
    optimizer.zero_grad(set_to_none=True)
    return stepped, grad_norm
