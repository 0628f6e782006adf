"""Baselines against scikit-learn's logistic regression on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmbert_core.evaluation import baselines


def texts(num_rows: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of rows whose label depends on which words are frequent."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    rows = [
        rng.choice(100, rng.integers(3, 30), p=weights / weights.sum())
        for weights in 1 + 3.0 * (np.arange(100) % num_classes == labels[:, None])
    ]
    return np.concatenate(rows).astype(np.int32), np.concatenate([[0], np.cumsum([len(row) for row in rows])]), labels


def test_words_and_pairs_are_counted() -> None:
    features = baselines.word_features(np.array([5, 5, 7, 7, 5]), np.array([0, 3, 5])).to_dense()
    assert features.shape == (2, baselines.NUM_HASHED)
    counted = [sorted(np.round(row[row > 0].numpy(), 4).tolist()) for row in features]
    first = np.array([1, 1, 1, 1 + np.log(2)])  # 5 twice, 7, (5, 5), (5, 7)
    assert counted[0] == pytest.approx(sorted(np.round(first / np.linalg.norm(first), 4))) and counted[
        1
    ] == pytest.approx([3**-0.5] * 3, abs=1e-4)
    assert int(((features[0] > 0) & (features[1] > 0)).sum()) == 2  # 5 and 7; (7, 5) is not (5, 7)


def test_columns_are_numbers_and_one_hot() -> None:
    features = baselines.column_features(
        np.array([[0.5, -1.0], [2.0, 0.0]]), np.array([[1, 0], [2, 1]]), [3, 2]
    ).to_dense()
    assert features.tolist() == [[0.5, -1, 0, 1, 0, 1, 0], [2, 0, 0, 0, 1, 0, 1]]
    assert baselines.column_features(np.ones((2, 1)), np.zeros((2, 0), int), []).to_dense().tolist() == [[1], [1]]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_it_is_scikit_learns_logistic_regression(num_classes: int) -> None:
    ids, offsets, labels = texts(400, num_classes, 0)
    features, strength = baselines.word_features(ids, offsets), 1e-3
    transposed = features.to_sparse_coo().t().coalesce().to_sparse_csr()
    model = baselines._fit(features, transposed, torch.from_numpy(labels), num_classes, strength)
    used = features.to_dense().numpy()
    used = used[:, (used > 0).any(0)]
    # two classes: scikit-learn penalises one vector w, here two of half its size
    oracle = LogisticRegression(C=1 / (strength * 400) * (2 if num_classes == 2 else 1), max_iter=2000, tol=1e-8).fit(
        used, labels
    )
    np.testing.assert_allclose(model.probabilities(features), oracle.predict_proba(used), atol=2e-3)


def test_the_validation_rows_choose_the_penalty() -> None:
    train, val = ((baselines.word_features(*rows[:2]), rows[2]) for rows in (texts(300, 2, 1), texts(300, 2, 2)))
    best = baselines.fit_best(train, val, 2)
    transposed = train[0].to_sparse_coo().t().coalesce().to_sparse_csr()
    losses = [
        baselines._fit(train[0], transposed, torch.from_numpy(train[1]), 2, strength).loss(
            val[0], torch.from_numpy(val[1])
        )
        for strength in baselines.STRENGTHS
    ]
    assert best.loss(val[0], torch.from_numpy(val[1])) == pytest.approx(min(losses), abs=1e-6)
    assert (best.probabilities(val[0]).argmax(1) == val[1]).mean() > 0.8


def test_majority() -> None:
    assert baselines.majority(np.array([0, 1, 1, 1]), 3).tolist() == [0.25, 0.75, 0]
