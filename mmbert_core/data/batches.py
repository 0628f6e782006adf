"""Which rows form a step, a micro-batch or an evaluation batch: pure functions of lengths, seed and step.

N rows, B rows of a step, M micro-batches of a step, R ranks. Steps and micro-batches do not depend on the rank, so that
they are the same for any number of ranks.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

WINDOW = 8192  # rows that evaluation sorts by length together, and that a streaming reader keeps in memory


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order [N] int64 of all rows in an epoch: a permutation drawn from (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; the last may be short."""
    return -(-num_rows // batch_size)


def step_rows(order: np.ndarray, index: int, batch_size: int) -> np.ndarray:
    """Rows of step `index` of an epoch: a random sample, never sorted by length across steps."""
    return order[index * batch_size : (index + 1) * batch_size]


def micro_batches(rows: np.ndarray, lengths: np.ndarray, count: int, *, packed: bool = False) -> list[np.ndarray]:
    """A step's rows [B], sorted by length and split into min(count, B) micro-batches; their maximum cost is minimal.

    `lengths` [B] int are the tokens of these rows. A micro-batch costs its padded area (rows times the longest) or,
    with `packed`, where the model concatenates rows instead of padding them, its tokens.
    """
    sorting = np.lexsort((rows, lengths))
    rows, lengths = rows[sorting], np.maximum(lengths[sorting], 1)
    tokens = np.concatenate([[0], np.cumsum(lengths)])  # before each row

    def cost(start: int, stop: int) -> int:
        return int(tokens[stop] - tokens[start]) if packed else (stop - start) * int(lengths[stop - 1])

    def earliest_start(stop: int, limit: int) -> int:
        """The first row of the largest micro-batch that ends before row `stop` and costs at most `limit`."""
        if packed:
            return int(np.searchsorted(tokens, tokens[stop] - limit))
        return max(0, stop - limit // int(lengths[stop - 1]))

    def greedy_starts(limit: int) -> list[int]:
        """First rows of micro-batches that are filled up to `limit`, from the longest row down."""
        starts, stop = [], len(rows)
        while stop > 0:
            stop = earliest_start(stop, limit)
            starts.append(stop)
        return starts

    count = min(count, len(rows))
    low, high = int(lengths[-1]), cost(0, len(rows))
    while low < high:  # bisection: the smallest limit with which `count` micro-batches are enough
        limit = (low + high) // 2
        low, high = (low, limit) if len(greedy_starts(limit)) <= count else (limit + 1, high)
    bounds = [*sorted(greedy_starts(low)), len(rows)]
    while len(bounds) <= count:  # fewer were needed: halve the most expensive one
        costs = [cost(start, stop) if stop - start > 1 else 0 for start, stop in pairwise(bounds)]
        widest = int(np.argmax(costs))
        bounds.insert(widest + 1, (bounds[widest] + bounds[widest + 1]) // 2)
    return [rows[start:stop] for start, stop in pairwise(bounds)]


def assign_to_ranks(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of micro-batches by rank: the most expensive first, each to the least loaded rank (Graham's LPT rule).

    Each list is ascending; it is empty for some ranks when there are fewer micro-batches than ranks.
    """
    loads: list[int] = [0] * num_ranks
    indices_by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[index]
        indices_by_rank[rank].append(index)
    return [sorted(indices) for indices in indices_by_rank]


def resolve_micro_batches(configured: int | str, *, batch_size: int, num_ranks: int, rows_at_once: int) -> int:
    """Micro-batches of a step: as configured; for `auto` a multiple of the ranks, of about `rows_at_once` rows each."""
    if configured != "auto":
        return int(configured)
    wanted = max(num_ranks, -(-batch_size // rows_at_once))
    return -(-wanted // num_ranks) * num_ranks


def evaluation_batches(
    lengths: np.ndarray, *, token_budget: int = 2048, max_rows: int = 256, window: int = WINDOW
) -> list[np.ndarray]:
    """All rows [N] in batches of at most `token_budget` padded tokens, sorted by length inside each window of rows.

    A reader that streams windows of `window` rows gets the same batches, so that predictions of a stream equal those
    of a table in memory, bit for bit.
    """
    batches = []
    for start in range(0, len(lengths), window):
        window_lengths = np.asarray(lengths[start : start + window])
        order = np.argsort(window_lengths, kind="stable")
        first = 0
        for position, row in enumerate(order):
            size = position - first + 1  # of the batch with this row
            if size > 1 and (size > max_rows or size * max(1, window_lengths[row]) > token_budget):
                batches.append(start + order[first:position])
                first = position
        if len(order):
            batches.append(start + order[first:])
    return batches


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Seed of one micro-batch's dropout masks, below 2**63; the same on whichever rank it runs."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
