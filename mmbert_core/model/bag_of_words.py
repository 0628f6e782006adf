"""A linear bag of tokens and of pairs of neighbouring tokens, hashed: scores of texts without an encoder.

B rows, C chunks, T tokens, S scores, N rows, L tokens of all rows.
"""

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mmbert_core.model.packing import to_device

NUM_FEATURES = 2**18
MIN_ROWS = 2  # training rows in which a feature must occur
# Of the hash: a prime, and factors so small that no product of an id below 2^31 overflows int64. The same arithmetic in
# numpy, torch and an exported graph.
PRIME, FIRST, SECOND, SHIFT = 2**31 - 1, 899_809_363, 654_188_429, 104_729
SHORTEST = 1e-9  # norm of a text without any feature


def token_features(ids):  # noqa: ANN001, ANN201 - numpy or torch
    """The feature of each token id, int64 in and out: below NUM_FEATURES."""
    return (FIRST * (ids + 1) + SHIFT) % PRIME % NUM_FEATURES


def pair_features(first, second):  # noqa: ANN001, ANN201 - numpy or torch
    """The feature of each pair of neighbouring token ids, in their order."""
    return (FIRST * (first + 1) + SECOND * (second + 1) + SHIFT) % PRIME % NUM_FEATURES


class BagOfWords(nn.Module):
    """Token ids [B, T] or [B, C, T] -> scores [B, S]: sum of idf * weight / sqrt(sum of idf^2) over its features.

    A feature that occurs twice counts twice. Pairs do not cross chunks. A feature of too few training rows, or of all,
    has idf 0: it counts neither above nor below. Buffers: `idf` [NUM_FEATURES], `weight` [NUM_FEATURES, S].
    """

    def __init__(self, idf: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("idf", idf)
        self.register_buffer("weight", weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """float32 [B, S] on the device of the weights; ids and mask may be on the CPU."""
        features, idf = self._features(input_ids, attention_mask)
        weighted = functional.embedding(features, self.weight) * (idf / _norm(idf)).unsqueeze(-1)
        return weighted.flatten(1, -2).sum(dim=1)

    def contributions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, (C,) T, S]: each token's share of the scores, half of a pair's. Their sum is what forward gives."""
        features, idf = self._features(input_ids, attention_mask)
        values = functional.embedding(features, self.weight) * (idf / _norm(idf)).unsqueeze(-1)
        tokens, pairs = values.chunk(2, dim=-2)
        return tokens + pairs / 2 + functional.pad(pairs, (0, 0, 1, 0))[..., :-1, :] / 2

    def _features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and their idf [B, (C,) 2 T]: tokens, then each token with the next; what is no token has idf 0."""
        ids = to_device(input_ids, self.idf.device)
        is_token = to_device(attention_mask, self.idf.device) != 0
        # by padding, as an exported graph cannot have an axis of T - 1 where T may be 2
        following, is_followed = (functional.pad(values, (0, 1))[..., 1:] for values in (ids, is_token))
        features = torch.cat([token_features(ids), pair_features(ids, following)], dim=-1)
        is_set = torch.cat([is_token, is_token & is_followed], dim=-1)
        return features, functional.embedding(features, self.idf.unsqueeze(-1)).squeeze(-1) * is_set


def _norm(idf: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B, 1, ...]: the L2 norm of each row."""
    norm = idf.flatten(1).square().sum(dim=1).sqrt().clamp(min=SHORTEST)
    return norm.reshape(-1, *[1] * (idf.ndim - 1))


# ---- the same features as a sparse matrix, for a convex fit ----


def word_cells(
    ids: np.ndarray, chunk_offsets: np.ndarray, row_of_chunk: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, features and counts of the cells that are not 0, by row and feature, int64 each.

    `ids` [L]: chunk q of the texts is `ids[chunk_offsets[q]:chunk_offsets[q + 1]]`, of row `row_of_chunk[q]`.
    """
    ids = ids.astype(np.int64)
    chunks = np.repeat(np.arange(len(row_of_chunk)), np.diff(chunk_offsets))
    rows, is_pair = row_of_chunk[chunks], chunks[1:] == chunks[:-1]
    features = np.concatenate([token_features(ids), pair_features(ids[:-1], ids[1:])[is_pair]])
    keys = np.concatenate([rows, rows[1:][is_pair]]) * NUM_FEATURES + features
    cells, counts = np.unique(keys, return_counts=True)
    return cells // NUM_FEATURES, cells % NUM_FEATURES, counts


def fit_idf(features: np.ndarray, num_rows: int) -> torch.Tensor:
    """float32 [NUM_FEATURES]: log((1 + rows) / (1 + rows with it)) + 1 from the features of `word_cells`.

    0 for a feature of fewer than MIN_ROWS rows, and for one that all rows have, such as the first token.
    """
    with_feature = np.bincount(features, minlength=NUM_FEATURES)
    idf = np.log((1 + num_rows) / (1 + with_feature)) + 1
    return torch.from_numpy(np.where((with_feature >= MIN_ROWS) & (with_feature < num_rows), idf, 0)).float()


def design_matrix(
    cells: tuple[np.ndarray, np.ndarray, np.ndarray], idf: torch.Tensor, used: np.ndarray, num_rows: int
) -> torch.Tensor:
    """Sparse CSR [N, len(used)] float32 of cells of `word_cells`: `design_matrix(...) @ weight[used]` is the scores.

    `used`: ascending, all features whose idf is not 0.
    """
    rows, features, counts = cells
    weights = idf.numpy().astype(np.float64)
    column_of = np.full(NUM_FEATURES, -1, dtype=np.int64)
    column_of[used] = np.arange(len(used))
    is_used = column_of[features] >= 0
    rows, features, counts = rows[is_used], features[is_used], counts[is_used]
    values = weights[features]
    norms = np.sqrt(np.bincount(rows, counts * values**2, minlength=num_rows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    with torch.sparse.check_sparse_tensor_invariants(enable=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that CSR is in beta
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts),
            torch.from_numpy(column_of[features]),
            torch.from_numpy(counts * values / np.maximum(norms[rows], SHORTEST)).float(),
            (num_rows, len(used)),
        )
