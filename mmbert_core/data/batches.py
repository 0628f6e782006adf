"""Which rows are learned from or scored together, as pure functions of lengths, seed and step.

N rows, B rows of a step, M micro-batches of a step, R ranks. Nothing here knows which rank asks, so that the same
steps come out for any number of ranks.
"""

from collections.abc import Sequence

import numpy as np

WINDOW = 8192  # rows that are sorted by length together for evaluation, and that a streaming reader holds at a time


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation [N] int64 of all rows in an epoch, from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch; the last may be short."""
    return -(-num_rows // batch_size)


def step_rows(order: np.ndarray, index: int, batch_size: int) -> np.ndarray:
    """Rows of step `index` of an epoch: a random sample, never sorted by length across steps."""
    return order[index * batch_size : (index + 1) * batch_size]


def micro_batches(rows: np.ndarray, lengths: np.ndarray, count: int, *, packed: bool = False) -> list[np.ndarray]:
    """A step's rows [B], sorted by length and cut into min(count, B) parts of which the most expensive is as cheap as can be.

    `lengths` [B] int are the tokens of these rows. A part costs its padded area, rows times the longest, or, where the
    model packs rows end to end, its tokens.
    """
    sorting = np.lexsort((rows, lengths))
    rows, lengths = rows[sorting], np.maximum(lengths[sorting], 1)
    tokens = np.concatenate([[0], np.cumsum(lengths)])  # before each row

    def cost(start: int, stop: int) -> int:
        return int(tokens[stop] - tokens[start]) if packed else (stop - start) * int(lengths[stop - 1])

    def first_of(stop: int, limit: int) -> int:
        """Where a part that ends at `stop` may begin at the earliest."""
        return (
            int(np.searchsorted(tokens, tokens[stop] - limit))
            if packed
            else max(0, stop - limit // int(lengths[stop - 1]))
        )

    def greedy_cuts(limit: int) -> list[int]:
        """First rows of parts filled from the long end up to `limit`."""
        cuts, stop = [], len(rows)
        while stop > 0:
            stop = first_of(stop, limit)
            cuts.append(stop)
        return cuts

    count = min(count, len(rows))
    low, high = int(lengths[-1]), cost(0, len(rows))
    while low < high:  # the smallest limit with which a greedy cut needs no more parts
        limit = (low + high) // 2
        low, high = (low, limit) if len(greedy_cuts(limit)) <= count else (limit + 1, high)
    cuts = greedy_cuts(low)
    while len(cuts) < count:  # parts to spare: halve the most expensive one
        starts = [*sorted(cuts), len(rows)]
        costs = [cost(start, stop) if stop - start > 1 else 0 for start, stop in zip(starts, starts[1:])]
        widest = int(np.argmax(costs))
        cuts.append((starts[widest] + starts[widest + 1]) // 2)
    starts = [*sorted(cuts), len(rows)]
    return [rows[start:stop] for start, stop in zip(starts, starts[1:])]


def assign_to_ranks(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Micro-batch indices for each rank: the largest first, each to the rank with least so far (Graham's LPT rule).

    A rank's list ascends. A rank may get none when there are fewer micro-batches than ranks.
    """
    loads: list[int] = [0] * num_ranks
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[index]
        hands[rank].append(index)
    return [sorted(hand) for hand in hands]


def resolve_micro_batches(asked: int | str, *, batch_size: int, num_ranks: int, rows_at_once: int) -> int:
    """The number of micro-batches of a step: as asked, or for `auto` a multiple of the ranks, about `rows_at_once` rows each."""
    if asked != "auto":
        return int(asked)
    wanted = max(num_ranks, -(-batch_size // rows_at_once))
    return -(-wanted // num_ranks) * num_ranks


def evaluation_batches(
    lengths: np.ndarray, *, token_budget: int = 2048, max_rows: int = 256, window: int = WINDOW
) -> list[np.ndarray]:
    """All rows [N] in batches of at most `token_budget` padded tokens, sorted by length inside each window of rows.

    A reader that streams windows of `window` rows makes the same batches, so predictions of a stream equal those of a
    table in memory, bit for bit.
    """
    batches = []
    for start in range(0, len(lengths), window):
        part = np.asarray(lengths[start : start + window])
        order = np.argsort(part, kind="stable")
        first = 0
        for position, row in enumerate(order):
            rows_with = position - first + 1
            if rows_with > 1 and (rows_with > max_rows or rows_with * max(1, part[row]) > token_budget):
                batches.append(start + order[first:position])
                first = position
        if len(order):
            batches.append(start + order[first:])
    return batches


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Seed of the dropout of one micro-batch, the same wherever it runs; below 2**63."""
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
