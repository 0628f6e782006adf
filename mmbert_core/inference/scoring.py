"""Evaluation batches divided over the ranks, and their results gathered in the order of the table.

B rows of a batch, N rows of the table, K classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mmbert_core.data.batches import assign_to_ranks, evaluation_batches
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.model.losses import LossOp
from mmbert_core.runtime import distributed
from mmbert_core.runtime.ranks import DistContext

TOKEN_BUDGETS = {"cpu": 1024, "cuda": 16384}  # per evaluation batch: fits into a CPU's caches, fills a GPU


@dataclass(frozen=True)
class Task:
    """What every training, evaluation and prediction step needs in addition to the model and the batch."""

    is_binary: bool
    loss_op: LossOp  # logits [B, K], labels [B] -> weighted losses [B]
    precision: str
    device: torch.device
    aux_loss_weight: float = 0.0  # of each auxiliary head's losses, in training


@dataclass(frozen=True)
class BatchResult:
    """Results of one evaluated batch, on the CPU."""

    batch_idx: int
    row_index: np.ndarray  # [B] rows of the table
    preds: np.ndarray  # [B] probability of class 1, or [B, K]
    labels: np.ndarray | None  # [B]
    ids: list[str] | None
    loss_sum: float  # weighted losses of the batch's rows
    weight_sum: float


@dataclass(frozen=True)
class EpochResult:
    """Results of all ranks, every row once, in the table's order."""

    preds: np.ndarray  # [N] or [N, K]
    labels: np.ndarray | None  # [N]
    ids: list[str] | None
    loss: float | None  # over all rows, the sum of weighted losses / the sum of weights; None if not finite


def non_finite_rows(preds: np.ndarray) -> np.ndarray:
    """Indices of the rows of probabilities [N] or [N, K] with a value that is not finite."""
    return np.unique(np.argwhere(~np.isfinite(preds))[:, 0])


def own_batches(
    dataset: Dataset, context: DistContext, positions: np.ndarray | None = None
) -> Iterator[tuple[int, Batch] | None]:
    """This rank's evaluation batches with their indices; the batches do not depend on the number of ranks.

    Every rank yields the same number of items, so that the caller can synchronise at each: a rank with fewer batches
    yields None after them. `positions`: of these rows only.
    """
    token_budget = TOKEN_BUDGETS[context.device.type]
    if positions is None:
        plan = evaluation_batches(dataset.lengths, token_budget=token_budget)
    else:
        plan = [positions[rows] for rows in evaluation_batches(dataset.lengths[positions], token_budget=token_budget)]
    batches_by_rank = assign_to_ranks([dataset.cost(rows) for rows in plan], context.world_size)
    own = batches_by_rank[context.rank]
    for index in own:
        yield index, dataset.batch(plan[index])
    for _ in range(max(map(len, batches_by_rank)) - len(own)):
        yield None


def gather_results(outputs: list[BatchResult], num_rows: int) -> EpochResult:
    """Collective. The results of all ranks in the order of the table.

    Sums run in batch order, so that the figures do not depend on the number of ranks. Raises `RuntimeError` unless
    every row has exactly one result.
    """
    gathered = distributed.all_gather_objects(outputs)
    results = sorted((item for of_rank in gathered for item in of_rank), key=lambda item: item.batch_idx)
    rows = np.concatenate([item.row_index for item in results]) if results else np.zeros(0, np.int64)
    if len(rows) != num_rows or not np.array_equal(np.bincount(rows, minlength=num_rows), np.ones(num_rows)):
        raise RuntimeError(
            f"expected each of {num_rows} rows once, found {len(rows)} results for {len(np.unique(rows))} rows"
        )
    if not results:
        return EpochResult(np.zeros(0, np.float32), np.zeros(0, np.int64), [], None)
    order = np.argsort(rows)
    ids = None if results[0].ids is None else [cell for item in results for cell in item.ids or []]
    weight_sum = sum(item.weight_sum for item in results)
    loss = sum(item.loss_sum for item in results) / weight_sum if weight_sum > 0 else math.nan
    return EpochResult(
        preds=np.concatenate([item.preds for item in results])[order],
        labels=None if results[0].labels is None else np.concatenate([item.labels for item in results])[order],
        ids=None if ids is None else [ids[position] for position in order],
        loss=loss if math.isfinite(loss) else None,
    )
