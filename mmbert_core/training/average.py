"""The moving average of the weights (`ema_decay`), which is validated and saved as the model instead of the last ones.

The optimizer's state holds it with AdamW's moments, so checkpoints keep and a resume restores it with them. It is a
function of the weights, which are the same on all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from mmbert_core.training.saved_state import AVERAGE


@torch.no_grad()
def update_average(optimizer: Optimizer, *, decay: float, num_updates: int) -> None:
    """Move the average towards the weights, after each optimizer step that changed them; the first one starts it.

    `num_updates`: such steps so far, this one included. Early averages forget faster, by (1 + n) / (10 + n), so that
    the weights of the first steps do not weigh down a short run.
    """
    parameters = _updated_parameters(optimizer)
    for parameter in parameters:
        if AVERAGE not in optimizer.state[parameter]:
            optimizer.state[parameter][AVERAGE] = parameter.detach().clone()
    averages = [optimizer.state[parameter][AVERAGE] for parameter in parameters]
    kept = min(decay, (1 + num_updates) / (10 + num_updates))
    if averages:
        torch._foreach_lerp_(averages, parameters, 1 - kept)


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Within it the model has its averaged weights, where there are any; no tensor is copied."""
    swap_average(optimizer)
    try:
        yield
    finally:
        swap_average(optimizer)


def swap_average(optimizer: Optimizer) -> None:
    """Exchange the weights and their average, where there is one."""
    for parameter in _updated_parameters(optimizer):
        state = optimizer.state[parameter]
        if AVERAGE in state:
            parameter.data, state[AVERAGE] = state[AVERAGE], parameter.data


def _updated_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Those that an optimizer step has changed: the others have no state."""
    return [
        parameter for group in optimizer.param_groups for parameter in group["params"] if optimizer.state.get(parameter)
    ]
