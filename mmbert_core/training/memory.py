"""A trial before the first step: do its micro-batches fit into memory? And settings of glibc's allocator."""

import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

MAX_ROWS_EXAMINED = 5_000_000  # whole epochs, at least one: a permutation of 10^7 rows takes a second
NUM_CANDIDATES = 64  # steps whose micro-batches are compared: so many by tokens, and so many by longest text
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of mallopt(3)
# the last alternative is oneDNN's message, nearly always for a failed allocation
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc|could not create a primitive", re.IGNORECASE
)


def resolve_by_trial(configured: int, ddp_model: nn.Module, dataset: Dataset, *, task: Task, config: Config) -> int:
    """Collective. Micro-batches per step: `configured`, doubled until the largest one of the run fits on every rank.

    Raises `RunError` when not even a single row fits. Leaves no gradients.
    """
    batch_size = config.batch_size
    epochs = min(config.max_epochs, max(1, MAX_ROWS_EXAMINED // len(dataset)))
    orders = (epoch_order(len(dataset), config.seed, epoch) for epoch in range(epochs))
    steps = heaviest_steps(orders, dataset.lengths, batch_size)
    count = configured
    copies = 3 if config.ema_decay else 2  # of the weights: AdamW's two moments, and the moving average
    limit = config.memory_limit_mb
    while reason := memory_shortage_on_any_rank(steps, count, ddp_model, dataset, task, limit, copies):
        if count >= batch_size:
            num_tokens = int(dataset.lengths[largest_micro_batches(steps, dataset, count)[0]].max())
            distributed.on_main(partial(raise_one_row_too_large, num_tokens, reason))
        count = min(2 * count, batch_size)
    if count != configured:
        message = "microbatches_per_step %d does not fit into memory: %d are used for this run"
        logger.warning(message, configured, count)
    return count


def memory_shortage_on_any_rank(
    steps: list[np.ndarray],
    count: int,
    ddp_model: nn.Module,
    dataset: Dataset,
    task: Task,
    limit_mb: int | None,
    copies: int = 2,
) -> str | None:
    """Collective. Why `steps`, in `count` micro-batches each, do not fit into memory on every rank; else None.

    `copies`: of the trained weights, which are allocated with the model and its gradients.
    """
    largest = largest_micro_batches(steps, dataset, count)

    def compute_all() -> None:
        for rows in largest:
            forward_backward(ddp_model, dataset, rows, task, copies)

    with phase("the trial of the largest micro-batch"):
        reason = memory_shortage(compute_all, task.device, limit_mb)
    ddp_model.zero_grad(set_to_none=True)
    [num_failed] = distributed.all_reduce_sum([reason is not None])
    return (reason or "on another rank") if num_failed else None


def raise_one_row_too_large(num_tokens: int, reason: str) -> NoReturn:
    advice = "use a smaller max_length, max_chunks or encoder"
    raise RunError(f"not even one row ({num_tokens} tokens) at a time fits into memory ({reason}): {advice}")


def heaviest_steps(orders: Iterable[np.ndarray], lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The rows of the steps with the most tokens and of those with the longest texts, over all epochs.

    orders: the permutation of the rows [N] in each epoch. lengths [N]: tokens. Returns row indices, [B] a step.
    """
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
    """Indices of the NUM_CANDIDATES largest."""
    return set(np.argsort(-np.array(weights), kind="stable")[:NUM_CANDIDATES].tolist())


def largest_micro_batches(steps: list[np.ndarray], dataset: Dataset, count: int) -> list[np.ndarray]:
    """Split the steps into `count` micro-batches each and return those that may need the most memory.

    They have the highest cost, the most tokens, the most tokens when padded, or the most pairs of tokens.
    """
    candidates = [
        micro_batch
        for rows in steps
        for micro_batch in micro_batches(rows, dataset.lengths[rows], count, packed=dataset.packed)
    ]
    sizes = []
    for micro_batch in candidates:
        lengths = dataset.lengths[micro_batch]
        sizes.append((dataset.cost(micro_batch), lengths.sum(), len(lengths) * lengths.max(), (lengths**2).sum()))
    return [candidates[index] for index in dict.fromkeys(np.argmax(sizes, axis=0).tolist())]


def forward_backward(ddp_model: nn.Module, dataset: Dataset, rows: np.ndarray, task: Task, copies: int = 2) -> None:
    """Forward and backward of `rows` without DDP's all-reduce, with `copies` of the trained weights allocated."""
    trained = [parameter for parameter in ddp_model.parameters() if parameter.requires_grad]
    moments = [torch.ones_like(parameter) for parameter in trained for _ in range(copies)]
    with ddp.no_sync(ddp_model, enabled=True):
        loss, _, _ = run_epoch(ddp_model, dataset.batch(rows), "train", task=task)
        loss.backward()
    del moments


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a GPU or of the machine ran out, as PyTorch or Python report it. A `RunError` is never one."""
    if isinstance(error, RunError):
        return False
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    )


def memory_shortage(action: Callable[[], object], device: torch.device, limit_mb: int | None) -> str | None:
    """Run `action`; None when it fits, else why not: out of memory, or a peak above `limit_mb` (MB, CPU only)."""
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
    """Return freed memory to the system, also after `keep_freed_memory`. Allocating it again costs 0.2 s a gigabyte."""
    call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Keep freed memory in this process from now on, as every step allocates about the same again.

    By default glibc returns blocks beyond 32 MB and the top of the heap to the system at every free, and the kernel
    maps and zeroes them again page by page: a sixth of a step's time. Does nothing when the user has set MALLOC_....
    """
    if not any(name.startswith("MALLOC_") for name in os.environ):
        call_glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)
        call_glibc("mallopt", MMAP_MAX, 0)


def call_glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc; with another C library do nothing."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError):
        pass
