"""DDP around a model. Of a large embedding, only the gradient rows that a step looks up are averaged over the ranks."""

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
    """The rows of an embedding that a step looks up on any rank; all other rows have a gradient of zero."""

    weight: nn.Parameter  # [V, H]
    rows: torch.Tensor | None = None  # [U] int64, the same on all ranks; None: all rows


def wrap_ddp(model: nn.Module, context: DistContext, used: UsedRows | None = None) -> nn.Module:
    """Collective. Returns the module wrapped in DDP, or the module itself in a single process.

    DDP copies rank 0's parameters to all ranks. It does not broadcast buffers, which are constants here (column
    statistics), and without device_ids it does not move the inputs: texts are packed on the CPU. Evaluate and save the
    unwrapped module: DDP's forward is a collective.

    `used`: an embedding of which the ranks average only the gradient of `used.rows`; the caller sets the rows before
    each step. The vocabulary is half of a small BERT and its gradient comes last in a backward pass, but a step looks
    up only a few hundred of its tokens.
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
    """DDP's communication hook: mean of a bucket's gradients over the ranks; of `used.weight` only the used rows."""
    buffer, gradients, rows = bucket.buffer(), bucket.gradients(), used.rows
    is_embedding = [parameter is used.weight for parameter in bucket.parameters()]
    if not any(is_embedding) or rows is None:
        return allreduce_hook(None, bucket)
    pairs = list(zip(gradients, is_embedding, strict=True))
    sent = [gradient.index_select(0, rows) if has_rows else gradient for gradient, has_rows in pairs]
    flat = torch.cat([tensor.flatten() for tensor in sent]).div_(dist.get_world_size())

    def write_back(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        [mean] = done.value()
        means = mean.split([tensor.numel() for tensor in sent])
        for (gradient, has_rows), received in zip(pairs, means, strict=True):
            if has_rows:
                gradient.index_copy_(0, rows, received.view(len(rows), -1))
            else:
                gradient.copy_(received.view_as(gradient))
        return buffer

    return dist.all_reduce(flat, async_op=True).get_future().then(write_back)


def no_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """While `enabled`, backward passes add to the rank's own gradients only.

    For all micro-batches of a step but the last, whose backward pass averages the sums over the ranks.
    """
    return model.no_sync() if enabled and isinstance(model, DistributedDataParallel) else nullcontext()
