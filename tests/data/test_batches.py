"""Steps, micro-batches and evaluation batches: every row once, balanced costs, the same for any number of ranks."""

import itertools

import numpy as np
import pytest

from mmbert_core.data import batches


def area(lengths: np.ndarray, rows: np.ndarray) -> int:
    return len(rows) * int(lengths[rows].max())


@pytest.mark.parametrize("num_rows, batch_size", [(1, 4), (8, 4), (97, 32)])
def test_steps_of_an_epoch_hold_every_row_once(num_rows, batch_size):
    order = batches.epoch_order(num_rows, seed=3, epoch=1)
    steps = [batches.step_rows(order, i, batch_size) for i in range(batches.steps_per_epoch(num_rows, batch_size))]
    assert sorted(np.concatenate(steps)) == list(range(num_rows))
    assert all(len(rows) == batch_size for rows in steps[:-1]) and len(steps[-1]) > 0


def test_order_depends_on_seed_and_epoch_alone():
    first = batches.epoch_order(50, seed=0, epoch=0)
    assert np.array_equal(first, batches.epoch_order(50, seed=0, epoch=0))
    assert not np.array_equal(first, batches.epoch_order(50, seed=0, epoch=1))
    assert not np.array_equal(first, batches.epoch_order(50, seed=1, epoch=0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12, 40])
def test_micro_batches_hold_the_rows_once_sorted_by_length(count):
    rows = np.arange(100, 133)
    lengths = np.random.default_rng(0).integers(2, 256, size=200)
    found = batches.micro_batches(rows, lengths[rows], count)
    assert len(found) == min(count, len(rows)) and all(len(rows) for rows in found)
    joined = np.concatenate(found)
    assert sorted(joined) == list(rows)
    assert np.all(np.diff(lengths[joined]) >= 0)


def test_micro_batches_minimise_the_largest_area():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = np.sort(rng.integers(1, 40, size=8))
        found = batches.micro_batches(np.arange(8), lengths, 3)
        best = min(
            max((b - a) * lengths[b - 1] for a, b in [(0, i), (i, j), (j, 8)])
            for i, j in itertools.combinations(range(1, 8), 2)
        )
        assert max(area(lengths, rows) for rows in found) == best


def test_packed_micro_batches_minimise_the_most_tokens():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = np.sort(rng.integers(1, 40, size=8))
        found = batches.micro_batches(np.arange(8), lengths, 3, packed=True)
        best = min(
            max(lengths[:i].sum(), lengths[i:j].sum(), lengths[j:].sum())
            for i, j in itertools.combinations(range(1, 8), 2)
        )
        assert max(lengths[rows].sum() for rows in found) == best
        assert len(found) == 3 and np.array_equal(np.concatenate(found), np.arange(8))


def test_micro_batches_cost_less_padding_than_one_batch():
    lengths = np.random.default_rng(2).integers(5, 250, size=32)
    whole = area(lengths, np.arange(32))
    assert sum(area(lengths, p) for p in batches.micro_batches(np.arange(32), lengths, 4)) < 0.8 * whole


def test_each_micro_batch_is_assigned_to_one_rank_and_ranks_are_balanced():
    areas = [100, 90, 10, 20, 30]
    indices_by_rank = batches.assign_to_ranks(areas, 2)
    assert sorted(index for indices in indices_by_rank for index in indices) == [0, 1, 2, 3, 4]
    assert max(sum(areas[index] for index in indices) for indices in indices_by_rank) <= 130
    assert batches.assign_to_ranks([5], 3) == [[0], [], []]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 200])
def test_evaluation_batches_hold_every_row_once_within_the_budget(num_rows):
    lengths = np.random.default_rng(0).integers(1, 120, size=num_rows)
    plan = batches.evaluation_batches(lengths, token_budget=500, max_rows=16, window=64)
    assert sorted(itertools.chain.from_iterable(plan)) == list(range(num_rows))
    assert all(len(rows) <= 16 and (area(lengths, rows) <= 500 or len(rows) == 1) for rows in plan)


def test_evaluation_batches_of_a_stream_equal_those_of_the_table():
    lengths = np.random.default_rng(0).integers(1, 120, size=150)
    whole = batches.evaluation_batches(lengths, window=64)
    streamed = [s + b for s in range(0, 150, 64) for b in batches.evaluation_batches(lengths[s : s + 64], window=64)]
    assert [b.tolist() for b in whole] == [b.tolist() for b in streamed]


def test_dropout_seeds_differ_by_step_and_micro_batch():
    seeds = {batches.micro_batch_seed(0, step, index) for step in range(20) for index in range(20)}
    assert len(seeds) == 400 and max(seeds) < 2**63


def test_auto_micro_batches_are_a_multiple_of_the_ranks():
    counts = [batches.resolve_micro_batches("auto", batch_size=32, num_ranks=r, rows_at_once=8) for r in (1, 2, 3, 4)]
    assert counts == [4, 4, 6, 4]
    assert batches.resolve_micro_batches(5, batch_size=32, num_ranks=4, rows_at_once=8) == 5
