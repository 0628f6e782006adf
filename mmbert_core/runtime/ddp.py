"""DDP around a model: gradients averaged over the ranks, of a large embedding only the rows that a step looks up."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mmbert_core.runtime.distributed import is_distributed
from mmbert_core.runtime.ranks import DistContext


@dataclass
class UsedRows:
    """Which rows of an embedding a step looks up, on all ranks together; all others have a gradient of zero."""

    weight: nn.Parameter  # [V, H]
    rows: torch.Tensor | None = None  # [U] int64, the same on all ranks; None: all rows


def wrap_ddp(model: nn.Module, context: DistContext, used: UsedRows | None = None) -> nn.Module:
    """Collective. The module wrapped in DDP, or itself in a single process. Parameters become rank 0's.

    Buffers are constants here (column statistics), so DDP need not broadcast them at every forward. Without device_ids
    DDP does not move the inputs: texts are packed on the CPU. Evaluate and save the unwrapped module: DDP's forward is
    a collective. With `used`, which the caller keeps up to date, the ranks sum no more of that embedding's gradient
    than its used rows: the vocabulary is half of a small BERT, its gradient comes last in a backward pass, and a step
    looks up a few hundred tokens of it.
    """
    if not is_distributed():
        return model
    # torch 2.13 renamed the flag
    has_new_name = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if has_new_name else "broadcast_buffers"
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})
    if used is not None:
        ddp_model.register_comm_hook(used, _average_used_rows)
    return ddp_model


def _average_used_rows(used: UsedRows, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: mean over the ranks of a bucket of gradients, of `used.weight` only the used rows."""
    buffer, gradients = bucket.buffer(), bucket.gradients()
    embedding = next((index for index, parameter in enumerate(bucket.parameters()) if parameter is used.weight), None)
    if embedding is None or used.rows is None:
        return allreduce_hook(None, bucket)
    rows = used.rows
    sent = [
        gradient.index_select(0, rows) if index == embedding else gradient for index, gradient in enumerate(gradients)
    ]
    flat = torch.cat([tensor.flatten() for tensor in sent]).div_(dist.get_world_size())

    def write_back(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        [mean] = done.value()
        means = mean.split([tensor.numel() for tensor in sent])
        for index, (gradient, received) in enumerate(zip(gradients, means, strict=True)):
            if index == embedding:
                gradient.index_copy_(0, rows, received.view(len(rows), -1))
            else:
                gradient.copy_(received.view_as(gradient))
        return buffer

    return dist.all_reduce(flat, async_op=True).get_future().then(write_back)


def no_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """Gradients of this backward stay on the rank when `enabled`; the rank's last micro-batch synchronises."""
    return model.no_sync() if enabled and isinstance(model, DistributedDataParallel) else nullcontext()
