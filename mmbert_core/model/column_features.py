"""Columns as linear features: scaled numbers, piecewise-linear encodings, missing indicators, one-hot categories.

B rows, F numeric columns, I missing indicators, K categorical columns, E encoded numbers, P features, C classes.
"""

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SOFT_LIMIT = 3.0  # of a scaled number; its neighbourhood of 0 is hardly changed
MAX_DIFFERENCE = 3e38  # of a number to its column's center
MAX_ROWS_AT_ONCE = 8192  # of a design matrix, dense before they become sparse


class NumberFeatures(nn.Module):
    """Numeric inputs [B, F + I] (columns imputed with `centers`, then indicators) to features [B, E].

    E, column by column: the scaled number x = (number - center) * scale, smoothly clipped to x / sqrt(1 + (x / 3)^2);
    then one feature for each bin between `edges`, 0 below it, 1 above it, linear inside; then the indicator, if any. A
    cell that an indicator calls missing has 0 in the other features of its column, so it does not look like a number.

    Scaling and clipping: Holzmüller et al. 2024, "Better by Default", RealMLP. Bins: Gorishniy et al. 2022, "On
    Embeddings for Numerical Features", piecewise-linear encoding over quantiles; here the outer bins end, too.

    `edges`: ascending, two or more, or none, of each column. All are buffers. Attributes: `widths`, the number of
    features of each column; `num_features`, their sum E.
    """

    def __init__(
        self,
        *,
        centers: Sequence[float],
        scales: Sequence[float],
        has_indicator: Sequence[bool],
        edges: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__()
        if not len(centers) == len(scales) == len(has_indicator) or len(edges) not in (0, len(centers)):
            lengths = f"{len(scales)} scales, {len(has_indicator)} indicators, {len(edges)} edges"
            raise ValueError(f"NumberFeatures: expected {len(centers)} of each, as centers, found {lengths}")
        self.num_columns, self.num_indicators = len(centers), sum(map(bool, has_indicator))
        self.register_buffer("center", _float32(centers))
        self.register_buffer("scale", _float32(scales))
        bins = [(column, *ends) for column, values in enumerate(edges) for ends in pairwise(values)]
        self.register_buffer("bin_start", _float32([start for _, start, _ in bins]))
        self.register_buffer("bin_width", _float32([end - start for _, start, end in bins]))
        if not bool((self.bin_width > 0).all()):
            raise ValueError("NumberFeatures: expected ascending edges that differ in float32")
        # positions, which follow from the arguments and are not saved
        self.register_buffer("bin_column", torch.tensor([column for column, _, _ in bins]).long(), persistent=False)
        with_indicator = [column for column, has in enumerate(has_indicator) if has]
        self.register_buffer("with_indicator", torch.tensor(with_indicator).long(), persistent=False)
        selection = torch.zeros(self.num_indicators, self.num_columns)
        selection[torch.arange(self.num_indicators), self.with_indicator] = 1.0
        self.register_buffer("indicator_to_column", selection, persistent=False)
        columns = [*range(self.num_columns), *(column for column, _, _ in bins), *with_indicator]
        order = sorted(range(len(columns)), key=columns.__getitem__)  # stable: number, bins, indicator
        self.register_buffer("order", torch.tensor(order).long(), persistent=False)
        self.widths = [columns.count(column) for column in range(self.num_columns)]
        self.num_features = len(columns)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Float [B, F + I], imputed, in the columns' own units -> float32 [B, E]."""
        columns, indicators = numbers.float().split([self.num_columns, self.num_indicators], dim=1)
        present = 1 - indicators @ self.indicator_to_column  # [B, F], 0 for a missing cell
        # the bounds keep the difference, and below the square, finite in float32
        scaled = ((columns - self.center).clamp(-MAX_DIFFERENCE, MAX_DIFFERENCE) * self.scale).clamp(-1e18, 1e18)
        scaled = scaled / torch.sqrt(1 + (scaled / SOFT_LIMIT).square())
        filled = ((columns[:, self.bin_column] - self.bin_start) / self.bin_width).clamp(0, 1)
        features = [scaled * present, filled * present[:, self.bin_column], indicators]
        return torch.cat(features, dim=1)[:, self.order]


class LinearColumnFeatures(nn.Module):
    """Numbers [B, F + I] and categories [B, K] as P features: those of `numbers` [E], then one-hot categories.

    The same features once as a product with given weights, inside a model, and once as a sparse matrix, for a convex
    fit. `cardinalities`: indices of each categorical column, missing and unseen ones included. There are no
    parameters. Attribute: `num_features`, P.
    """

    def __init__(self, numbers: NumberFeatures, cardinalities: Sequence[int]) -> None:
        super().__init__()
        self.numbers = numbers
        ends = list(accumulate(cardinalities, initial=0))
        self.register_buffer("first_index", torch.tensor(ends[:-1]).long(), persistent=False)  # [K]
        self.num_features = numbers.num_features + ends[-1]

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """The features times `weight` [P, C]: float32 [B, C]. `categories` may be None where there are none."""
        of_numbers, of_categories = weight.split([self.numbers.num_features, len(weight) - self.numbers.num_features])
        product = self.numbers(numbers) @ of_numbers
        if categories is None or not len(self.first_index):
            return product
        return product + functional.embedding(categories + self.first_index, of_categories).sum(dim=1)

    @torch.no_grad()
    def design_matrix(self, numbers: np.ndarray, categories: np.ndarray) -> torch.Tensor:
        """Sparse CSR [N, P] float32 for `numbers` [N, F + I] and `categories` [N, K] as `Dataset.columns` gives them.

        On the CPU. `design_matrix(...) @ weight` is what `forward` gives.
        """
        device, pieces = self.first_index.device, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
        for start in range(0, len(numbers), MAX_ROWS_AT_ONCE):
            rows = slice(start, start + MAX_ROWS_AT_ONCE)
            dense = self.numbers(torch.from_numpy(numbers[rows]).to(device)).cpu()  # [B, E]
            one_hot = torch.from_numpy(categories[rows]) + self.first_index.cpu() + dense.shape[1]  # [B, K]
            indices = torch.arange(dense.shape[1]).expand(len(dense), -1)
            indices = torch.cat([indices, one_hot], dim=1)
            values = torch.cat([dense, torch.ones(one_hot.shape)], dim=1)
            is_set = values != 0
            pieces.append((is_set.sum(dim=1), indices[is_set], values[is_set]))
        counts, indices, values = (
            torch.cat([piece[index] for piece in pieces]) if pieces else torch.zeros(0) for index in range(3)
        )
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.long().cumsum(0)])
        with torch.sparse.check_sparse_tensor_invariants(enable=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that CSR is in beta
            return torch.sparse_csr_tensor(starts, indices.long(), values, (len(numbers), self.num_features))


def _float32(values: Sequence[float]) -> torch.Tensor:
    """A float32 tensor of numbers that are finite in float32."""
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)
