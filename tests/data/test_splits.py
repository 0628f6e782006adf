"""Samples and splits: every row on one side, shares kept, groups whole, the same for a seed."""

import numpy as np
import pytest

from mmbert_core.data.splits import sample_rows, split_rows


def test_sample_is_sorted_seeded_and_without_repeats():
    rows = sample_rows(1000, 100, 7)
    assert rows.dtype == np.int64 and len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(1000, 100, 7)) and not np.array_equal(rows, sample_rows(1000, 100, 8))
    assert sample_rows(5, None, 0).tolist() == sample_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]


def split(labels, groups=None, fraction=0.1, seed=0):
    labels = np.asarray(labels)
    train, val = split_rows(labels, None if groups is None else np.asarray(groups), val_fraction=fraction, seed=seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    assert set(labels[train]) == set(labels)  # every class is trained on
    return train, val


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.33, 0.9])
def test_class_shares_are_kept(fraction):
    labels = np.repeat([0, 1, 2], [700, 250, 50])
    train, val = split(labels, fraction=fraction)
    assert len(val) == round(1000 * fraction)
    assert np.abs(np.bincount(labels[val], minlength=3) - np.array([700, 250, 50]) * fraction).max() <= 1


def test_seed_decides():
    labels = np.arange(100) % 2
    assert np.array_equal(split(labels)[1], split(labels)[1])
    assert not np.array_equal(split(labels)[1], split(labels, seed=1)[1])


def test_small_tables():
    assert split([0])[1].tolist() == []
    assert split([0, 1])[1].tolist() == []  # either row is the last of its class
    assert len(split([0, 1, 1])[1]) == 1
    assert len(split([0, 0, 1, 1], fraction=0.9)[1]) == 2
    assert split([0, 1] * 50, fraction=0)[1].tolist() == []
    assert len(split([0] * 3 + [1] * 3, groups=[0, 1, 2, 3, 4, 5])[1]) == 1


def test_groups_stay_on_one_side_and_shares_are_near():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), generator.integers(1, 8, size=400)) * 1_000_003
    labels = (generator.random(len(groups)) < 0.2).astype(int)
    train, val = split(labels, groups, fraction=0.2)
    assert not set(groups[train]) & set(groups[val])
    assert abs(len(val) / len(labels) - 0.2) < 0.01
    assert abs(labels[val].mean() - labels.mean()) < 0.02


def test_a_group_that_is_most_of_the_table_trains():
    groups = [0] * 90 + list(range(1, 11))
    labels = [0, 1] * 50
    train, val = split(labels, groups, fraction=0.1)
    assert 0 not in np.asarray(groups)[val] and len(val) > 0


def test_groups_too_large_for_the_share_still_give_a_validation_group():
    labels, groups = [0, 1] * 20, [0] * 20 + [1] * 20
    assert len(split(labels, groups, fraction=0.05)[1]) == 20


def test_a_class_within_one_group_stays_in_training():
    labels = [0] * 50 + [1] * 10
    groups = list(range(50)) + [99] * 10
    for seed in range(5):
        _, val = split(labels, groups, fraction=0.5, seed=seed)
        assert len(val) and not set(val) & set(range(50, 60))
