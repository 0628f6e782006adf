"""Dropout whose masks are cheap to draw on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LEVELS = 2**16  # of a 16-bit draw


def resolution(rate: float) -> tuple[int, float]:
    """How many of the LEVELS are dropped, and by what a survivor is multiplied, so that its mean stays exact."""
    dropped = round(rate * LEVELS)
    return dropped, LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def draw_kept(shape: torch.Size | tuple[int, ...], rate: float) -> torch.Tensor:
    """Which elements survive, int8 zeros and ones of this shape, on the CPU, from torch's global generator.

    A full-range 64-bit integer is four draws of 16 bits, at a quarter of `bernoulli_`'s cost each. `random_()` without
    bounds leaves the sign bit zero; with the lower bound alone it draws all 64. No bool: its kernels are not vectorised.
    """
    count = torch.Size(shape).numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return torch.ge(draws, resolution(rate)[0] - LEVELS // 2, out=torch.empty(count, dtype=torch.int8)).view(shape)


def apply_kept(values: torch.Tensor, kept: torch.Tensor, rate: float) -> torch.Tensor:
    """`values` where kept, scaled, else 0: forward and backward of dropout alike."""
    return torch.addcmul(values.new_zeros(()), values, kept.to(values.dtype), value=resolution(rate)[1])


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU its rate is rounded to k/65536 and its masks come from 16-bit draws."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        return super().forward(input) if input.device.type != "cpu" else _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rate: float) -> torch.Tensor:
        kept = draw_kept(values.shape, rate)
        ctx.save_for_backward(kept)
        ctx.rate = rate
        return apply_kept(values, kept, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return apply_kept(gradient, *ctx.saved_tensors, ctx.rate), None


def replace_dropouts(module: nn.Module) -> None:
    """Every nn.Dropout below `module` becomes a `Dropout` of the same rate, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
