"""The bag of words: the same scores from padded tensors, chunks and the sparse matrix of a fit."""

import numpy as np
import pytest
import torch

from mmbert_core.data.tokens import Tokens
from mmbert_core.model.bag_of_words import (
    NUM_FEATURES,
    BagOfWords,
    design_matrix,
    fit_idf,
    pair_features,
    token_features,
    word_cells,
)
from mmbert_core.model.blend import Blend, MemberInputs

IDS = 60


def texts(num_rows: int = 40, max_chunks: int = 3) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """Random token ids, once as the rows of a table and once padded [B, C, T] with their mask; some texts are empty."""
    rng = np.random.default_rng(0)
    rows = [
        [rng.integers(0, IDS, rng.integers(0, 9)) for _ in range(rng.integers(0, max_chunks + 1))]
        for _ in range(num_rows)
    ]
    lengths = [len(chunk) for row in rows for chunk in row]
    ids = np.concatenate([chunk for row in rows for chunk in row]).astype(np.int32)
    tokens = Tokens(ids, np.cumsum([0, *lengths]), np.cumsum([0, *map(len, rows)]), 0)
    padded, mask = (torch.zeros(num_rows, max_chunks, 12, dtype=torch.int64) for _ in range(2))
    for index, row in enumerate(rows):
        for number, chunk in enumerate(row):
            padded[index, number, : len(chunk)], mask[index, number, : len(chunk)] = torch.from_numpy(chunk), 1
    return tokens, padded, mask


@pytest.fixture
def bag() -> tuple[BagOfWords, torch.Tensor]:
    """A bag fitted on the texts, and the scores of its sparse matrix."""
    tokens, padded, _ = texts()
    row_of_chunk = np.repeat(np.arange(len(padded)), np.diff(tokens.row_chunks))
    cells = word_cells(tokens.ids, tokens.chunk_offsets, row_of_chunk)
    idf = fit_idf(cells[1], len(padded))
    used = np.flatnonzero(idf.numpy())
    weight = torch.zeros(NUM_FEATURES, 2)
    weight[used] = torch.randn(len(used), 2, generator=torch.Generator().manual_seed(0))
    return BagOfWords(idf, weight), design_matrix(cells, idf, used, len(padded)) @ weight[used]


def test_scores_are_those_of_the_sparse_matrix(bag):
    module, expected = bag
    _, padded, mask = texts()
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(module(padded, mask), expected, atol=1e-6, rtol=0)
    alone = torch.cat([module(padded[row : row + 1, :, :9], mask[row : row + 1, :, :9]) for row in range(len(padded))])
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)
    one_chunk = mask[:, 1:].sum(dim=(1, 2)) == 0
    torch.testing.assert_close(module(padded[one_chunk, 0], mask[one_chunk, 0]), expected[one_chunk], atol=1e-6, rtol=0)


def test_contributions_of_tokens_add_up_to_the_scores(bag):
    module, expected = bag
    _, padded, mask = texts()
    contributions = module.contributions(padded, mask)
    assert contributions.shape == (*padded.shape, 2)
    assert not contributions[mask == 0].any()
    torch.testing.assert_close(contributions.sum(dim=(1, 2)), expected, atol=1e-6, rtol=0)


def test_padding_and_its_ids_do_not_count(bag):
    module, expected = bag
    _, padded, mask = texts()
    torch.testing.assert_close(module(padded.masked_fill(mask == 0, 17), mask), expected, atol=1e-6, rtol=0)


def test_idf_is_of_features_that_some_rows_have_and_some_have_not():
    ids = np.array([1, 5, 7, 1, 5, 8, 1, 6, 7])  # three rows
    _, features, _ = word_cells(ids, np.array([0, 3, 6, 9]), np.arange(3))
    idf = fit_idf(features, 3)
    used = {int(feature) for feature in np.flatnonzero(idf.numpy())}
    assert used == {int(token_features(5)), int(token_features(7)), int(pair_features(1, 5))}
    assert idf[int(token_features(5))] == pytest.approx(np.log(4 / 3) + 1)


def test_hash_is_the_same_in_numpy_and_torch_and_never_overflows():
    ids = np.array([0, 1, 2**31 - 1, 250_000])
    for features, expected in (
        (token_features(torch.from_numpy(ids)), token_features(ids)),
        (pair_features(torch.from_numpy(ids), torch.from_numpy(ids[::-1].copy())), pair_features(ids, ids[::-1])),
    ):
        assert features.tolist() == expected.tolist() and (0 <= expected).all() and (expected < NUM_FEATURES).all()
    assert len(set(token_features(np.arange(30_000)).tolist())) > 28_000
    assert [int(token_features(value)) for value in ids.tolist()] == token_features(ids).tolist()  # without a limit


def test_blend_is_the_weighted_mean_of_probabilities():
    members = [MemberInputs("network", 0.3), MemberInputs("a", 0.5, True), MemberInputs("b", 0.2, True)]
    blend = Blend(members, num_classes=2, temperature=2.0, column_features=None)
    blend.linear["a"].bias.fill_(0.4)
    logits, words = torch.tensor([[0.0, 3.0], [90.0, -90.0]]), torch.tensor([[-2.0, 3.0], [0.5, 0.1]])
    expected = 0.3 * torch.softmax(logits / 2, dim=1)[:, 1] + 0.5 * torch.sigmoid(words[:, 0] + 0.4)
    expected += 0.2 * torch.sigmoid(words[:, 1])
    torch.testing.assert_close(torch.softmax(blend(logits, words, None, None), dim=1)[:, 1], expected)
