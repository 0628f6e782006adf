"""Dropout whose masks are cheap to draw on the CPU."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LEVELS = 2**16  # values of a 16-bit draw


def rounded_rate(rate: float) -> tuple[int, float]:
    """How many of the LEVELS are dropped, and the factor of the kept elements that preserves the mean exactly."""
    num_dropped = round(rate * LEVELS)
    return num_dropped, LEVELS / (LEVELS - num_dropped) if num_dropped < LEVELS else 0.0


def draw_keep_mask(shape: torch.Size | tuple[int, ...], rate: float) -> torch.Tensor:
    """int8 of this shape on the CPU, 1 where an element is kept, 0 where it is dropped; from torch's global generator.

    Each 64-bit integer supplies four draws of 16 bits; a draw costs a quarter of one by `bernoulli_`. `random_()`
    without bounds leaves the sign bit zero; with a lower bound it draws all 64 bits. int8 rather than bool, whose
    kernels are not vectorised.
    """
    count = torch.Size(shape).numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    threshold = rounded_rate(rate)[0] - LEVELS // 2
    return torch.ge(draws, threshold, out=torch.empty(count, dtype=torch.int8)).view(shape)


def apply_keep_mask(values: torch.Tensor, keep_mask: torch.Tensor, rate: float) -> torch.Tensor:
    """Kept values times their factor, 0 elsewhere: the forward of dropout and, applied to a gradient, its backward."""
    return torch.addcmul(values.new_zeros(()), values, keep_mask.to(values.dtype), value=rounded_rate(rate)[1])


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU its rate is rounded to k/65536 and its masks come from 16-bit draws."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        return super().forward(input) if input.device.type != "cpu" else _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rate: float) -> torch.Tensor:
        keep_mask = draw_keep_mask(values.shape, rate)
        ctx.save_for_backward(keep_mask)
        ctx.rate = rate
        return apply_keep_mask(values, keep_mask, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return apply_keep_mask(gradient, *ctx.saved_tensors, ctx.rate), None


def replace_dropouts(module: nn.Module) -> None:
    """Replace every nn.Dropout below `module` by a `Dropout` of the same rate, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))
