"""Whether a step fits into memory, tried before the first one."""

import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from mmbert_core.config import Config
from mmbert_core.data.batches import epoch_order, micro_batches
from mmbert_core.data.dataset import Dataset
from mmbert_core.hooks import run_epoch
from mmbert_core.inference.scoring import Task
from mmbert_core.runtime import ddp, distributed
from mmbert_core.runtime.errors import RunError, phase
from mmbert_core.runtime.memory import peak_mb, reset_peak

logger = logging.getLogger(__name__)

ROWS_LOOKED_AT = 5_000_000  # whole epochs, at least one: a permutation of 10^7 rows takes a second
CANDIDATES = 64  # steps that are looked at closely: those with the most tokens, and those with the longest texts
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of mallopt(3)
# the last is what oneDNN makes of a failed allocation, and hardly ever of anything else
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc|could not create a primitive", re.IGNORECASE
)


def resolve_by_trial(asked: int, ddp_model: nn.Module, dataset: Dataset, *, task: Task, config: Config) -> int:
    """Collective. The micro-batches of a step: `asked`, or doubled until the largest one of the run fits on every rank.

    Raises `RunError` when not even a row alone fits. Leaves no gradients behind.
    """
    batch_size, limit_mb = config.batch_size, config.memory_limit_mb
    epochs = min(config.max_epochs, max(1, ROWS_LOOKED_AT // len(dataset)))
    orders = (epoch_order(len(dataset), config.seed, epoch) for epoch in range(epochs))
    steps = heaviest_steps(orders, dataset.lengths, batch_size)
    count = asked
    while True:
        largest = largest_micro_batches(steps, dataset, count)
        with phase("the trial of the largest micro-batch"):
            reason = why_not(
                lambda: [compute(ddp_model, dataset, rows, task) for rows in largest], task.device, limit_mb
            )
        ddp_model.zero_grad(set_to_none=True)
        [num_failed] = distributed.all_reduce_sum([reason is not None])
        if not num_failed:
            break
        if count >= batch_size:
            distributed.on_main(lambda: refuse(int(dataset.lengths[largest[0]].max()), reason or "on another rank"))
        count = min(2 * count, batch_size)
    if count != asked:
        logger.warning("microbatches_per_step %d does not fit into memory: %d are used for this run", asked, count)
    return count


def refuse(num_tokens: int, reason: str) -> NoReturn:
    raise RunError(
        f"not even one row ({num_tokens} tokens) at a time fits into memory ({reason}): use a smaller max_length, max_chunks or encoder"
    )


def heaviest_steps(orders: Iterable[np.ndarray], lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Of all steps of these epochs, as rows: those with the most tokens and those with the longest texts."""
    steps: list[np.ndarray] = []
    for order in orders:
        starts = np.arange(0, len(order), batch_size)
        in_order = lengths[order]
        chosen = heaviest(np.add.reduceat(in_order, starts)) | heaviest(np.maximum.reduceat(in_order, starts))
        steps += [order[starts[index] : starts[index] + batch_size] for index in sorted(chosen)]
        chosen = heaviest([lengths[rows].sum() for rows in steps]) | heaviest([lengths[rows].max() for rows in steps])
        steps = [steps[index] for index in sorted(chosen)]
    return steps


def heaviest(weights: Sequence[int] | np.ndarray) -> set[int]:
    """Places of the CANDIDATES largest."""
    return set(np.argsort(-np.array(weights), kind="stable")[:CANDIDATES].tolist())


def largest_micro_batches(steps: list[np.ndarray], dataset: Dataset, count: int) -> list[np.ndarray]:
    """Of all parts when each step is cut into `count`, those that cost most, with the most tokens, the most when padded, and the most pairs of tokens."""
    parts = [
        part for rows in steps for part in micro_batches(rows, dataset.lengths[rows], count, packed=dataset.packed)
    ]
    sizes = [
        (dataset.cost(part), lengths.sum(), len(lengths) * lengths.max(), (lengths**2).sum())
        for part, lengths in ((part, dataset.lengths[part]) for part in parts)
    ]
    return [parts[index] for index in dict.fromkeys(np.argmax(sizes, axis=0).tolist())]


def compute(ddp_model: nn.Module, dataset: Dataset, rows: np.ndarray, task: Task) -> None:
    """Forward and backward of `rows` without synchronisation, beside stand-ins for AdamW's two moments."""
    moments = [
        torch.ones_like(parameter) for parameter in ddp_model.parameters() if parameter.requires_grad for _ in range(2)
    ]
    with ddp.no_sync(ddp_model, enabled=True):
        loss, _, _ = run_epoch(ddp_model, dataset.batch(rows), "train", task=task)
        loss.backward()
    del moments


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of this machine as PyTorch and Python report it; not what this file makes of it."""
    if isinstance(error, RunError):
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    )


def why_not(action: Callable[[], object], device: torch.device, limit_mb: int | None) -> str | None:
    """Run `action`; None when it fits. Else memory ran out, or, on the CPU, the process's resident memory passed the limit."""
    return_freed_memory()
    reset_peak()
    try:
        action()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    if limit_mb is None or device.type == "cuda" or (peak := peak_mb()) <= limit_mb:
        return None
    return f"{peak:.0f} MB, memory_limit_mb is {limit_mb}"


def return_freed_memory() -> None:
    """What is freed but kept, by `keep_freed_memory` or the C library itself, goes back to the system; using it again costs a fifth of a second a gigabyte."""
    call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees: a step takes the same sizes again.

    Left alone, glibc gives blocks beyond 32 MB, and the top of the heap, back at every free, and the kernel hands them
    out anew page by page and zeroed: a sixth of a step. Settings of the user's (MALLOC_...) stay.
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        call_glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)
        call_glibc("mallopt", MMAP_MAX, 0)


def call_glibc(function: str, *arguments: int) -> None:
    """A function of glibc's own; nothing where the C library is another."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError):
        pass
