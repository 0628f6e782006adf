"""The robust scale and the bins of a numeric column, fitted on its training rows: see `model.column_features`."""

import numpy as np

MAX_BINS = 16  # 32 gave lower AUROC on most of six data sets of 800 to 4,000 rows
MIN_ROWS_PER_BIN = 20  # fewer rows than MAX_BINS times that: fewer bins
MAX_EDGES = 65  # of a column in a model folder: more than this version writes
MAX_EDGE = float(np.finfo(np.float32).max) / 2  # so that the width of a bin is finite in float32


def robust_scale(column: np.ndarray) -> float:
    """The factor of (number - median): 1 / (75 % quantile - 25 % quantile) of `column` [N], which has no NaN.

    Where these are equal, 2 / (maximum - minimum), and 0 for a constant column: as in RealMLP (Holzmüller et al. 2024).
    """
    rounded = _rounded(column)
    lower, upper = np.quantile(rounded, [0.25, 0.75])
    for width, numerator in ((upper - lower, 1.0), (rounded.max() - rounded.min(), 2.0)):
        if width > 0 and (scale := numerator / width) <= MAX_EDGE:
            return float(scale)
    return 0.0


def quantile_edges(column: np.ndarray) -> tuple[float, ...]:
    """Ascending values of `column` [N], which has no NaN, that divide it into at most MAX_BINS bins of similar counts.

    The first is the minimum, the last the maximum; none for a constant column. A value with more rows than a bin
    counts as one bin: of a column that is 0 in most rows, the other rows get the other bins.
    """
    values, counts = np.unique(np.clip(_rounded(column), -MAX_EDGE, MAX_EDGE), return_counts=True)
    if len(values) < 2:
        return ()
    weights = np.cumsum(np.minimum(counts, max(MIN_ROWS_PER_BIN, len(column) / MAX_BINS)))
    num_bins = int(np.clip(weights[-1] // MIN_ROWS_PER_BIN, 1, MAX_BINS))
    inner = np.searchsorted(weights, np.linspace(0, weights[-1], num_bins + 1)[1:-1])
    edges = np.unique(values[[0, *inner, len(values) - 1]])
    return tuple(edges.tolist())


def _rounded(column: np.ndarray) -> np.ndarray:
    """Float64 numbers that float32 has, as the model reads them."""
    return column.astype(np.float32).astype(np.float64)
