"""An encoder's linear layers in 8-bit integers, for prediction on the CPU."""

import torch
import torch.nn.functional as F
from torch import nn

MIN_SCALE = 1e-12  # an all-zero row must not divide by zero
LEVELS = 127  # the largest quantised value


class Int8Linear(nn.Module):
    """nn.Linear with one scale per output for the weights and one per token for the inputs, both symmetric around zero.

    With a scale per token (as in ZeroQuant, Yao et al. 2022) a row's prediction does not depend on the other rows of
    its batch, as it would with one scale per batch (the dynamic quantisation of torch and of ONNX Runtime).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = weight.abs().amax(1).clamp(min=MIN_SCALE) / LEVELS  # [out]
        self.weight = (weight / self.scales[:, None]).round().to(torch.int8).t()  # [in, out]
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        # CPUs without VNNI instructions add two products in 16 bits, which 7-bit inputs cannot overflow
        self.input_levels = LEVELS if torch.cpu._is_vnni_supported() else LEVELS // 2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] float32 -> [..., out] float32"""
        if torch.is_grad_enabled() and inputs.requires_grad:  # attributions need a gradient, which rounding has not
            return F.linear(inputs, self.weight.t() * self.scales[:, None], self.bias)
        scales = inputs.abs().amax(-1, keepdim=True).clamp_(min=MIN_SCALE).div_(self.input_levels)  # [..., 1]
        quantised = (inputs / scales).round_().to(torch.int8)
        products = torch._int_mm(quantised.flatten(0, -2), self.weight).unflatten(0, inputs.shape[:-1])  # [..., out]
        outputs = products.float().mul_(self.scales)
        return outputs.mul_(scales) if self.bias is None else torch.addcmul(self.bias, outputs, scales)


def quantise_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module` by an `Int8Linear`, in place; for inference only."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
