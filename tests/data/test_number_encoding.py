"""Scale and bins of a column: of its training rows, robust against ties, tails and constants."""

import numpy as np
import pytest

from mmbert_core.data.number_encoding import MAX_BINS, quantile_edges, robust_scale

rng = np.random.default_rng(0)


def test_bins_of_similar_counts_between_minimum_and_maximum():
    column = rng.lognormal(size=10_000)
    edges = quantile_edges(column)
    assert len(edges) == MAX_BINS + 1 and edges[0] == np.float32(column.min()) and edges[-1] == np.float32(column.max())
    counts = np.histogram(column.astype(np.float32), bins=np.array(edges))[0]
    assert counts.min() > 600 and counts.max() < 650


def test_ties_share_a_bin_and_leave_the_others_to_other_rows():
    counts = np.concatenate([np.zeros(11_000), np.repeat([1, 2, 3, 7, 31], [500, 60, 25, 20, 1])])
    edges = quantile_edges(counts)
    assert edges[:3] == (0, 1, 2) and edges[-1] == 31
    assert quantile_edges(np.repeat([0.0, 1.0], [3, 1000])) == (0, 1)


@pytest.mark.parametrize("column", [np.full(50, 3.5), np.array([1e9, 1e9 + 1]), np.array([7.0])])
def test_a_constant_column_has_none(column):
    """Also one whose numbers are equal as float32."""
    assert quantile_edges(column) == () and robust_scale(column) == 0


def test_few_rows_have_few_bins():
    assert len(quantile_edges(rng.normal(size=60))) == 4 and len(quantile_edges(rng.normal(size=5))) == 2


def test_scale_by_quartiles_or_else_by_range():
    assert robust_scale(np.arange(101.0)) == 1 / 50
    assert robust_scale(np.repeat([0.0, 8.0], [99, 1])) == 2 / 8


def test_extreme_numbers_are_finite():
    edges = quantile_edges(np.array([-3.4e38, 3.4e38, 1e-45, 0.0] * 20))
    assert np.isfinite(np.diff(np.array(edges, dtype=np.float32))).all()
    assert 0 <= robust_scale(np.array([0.0, 1e-45] * 20)) < 1e39
