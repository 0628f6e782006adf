"""An encoder's linear layers in 8-bit integers, for prediction on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

TINY = 1e-12
LEVELS = 127


class Int8Linear(nn.Module):
    """nn.Linear with a scale for each output's weights and for each token's input, both symmetric around zero.

    A token has a scale of its own (as in ZeroQuant, Yao et al. 2022), so that no row's prediction depends on the rows
    that are scored beside it, as it would with one scale for the tokens of a batch (torch's and ONNX Runtime's dynamic
    quantisation).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = weight.abs().amax(1).clamp(min=TINY) / LEVELS  # [out]
        self.weight = (weight / self.scales[:, None]).round().to(torch.int8).t()  # [in, out]
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        # without VNNI instructions two products are added in 16 bits, which 7-bit inputs cannot overflow
        self.input_levels = LEVELS if torch.cpu._is_vnni_supported() else LEVELS // 2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] float32 -> [..., out] float32"""
        if torch.is_grad_enabled() and inputs.requires_grad:  # an explanation's: rounding has no gradient
            return F.linear(inputs, self.weight.t() * self.scales[:, None], self.bias)
        scales = inputs.abs().amax(-1, keepdim=True).clamp_(min=TINY).div_(self.input_levels)
        quantised = (inputs / scales).round_().to(torch.int8)
        products = torch._int_mm(quantised.flatten(0, -2), self.weight).unflatten(0, inputs.shape[:-1])
        outputs = products.float().mul_(self.scales)
        return outputs.mul_(scales) if self.bias is None else torch.addcmul(self.bias, outputs, scales)


def quantise_linears(module: nn.Module) -> None:
    """Every nn.Linear below `module` becomes an `Int8Linear`, in place; for inference alone."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
