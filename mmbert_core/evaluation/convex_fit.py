"""Logistic regressions on sparse features: several at once on the same rows, each with row weights of its own.

N rows, F features, M models, K classes, S scores: 1 for two classes (of class 1), else K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

C_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # inverse strengths of the L2 penalty, strongest first
ITERATIONS = 100
MAX_WEIGHTS = 3_000_000  # of the models that are fitted together
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 3e-6, 1e-6  # of the mean loss, and of its change in a step
CLEARLY_WORSE = 1.02  # factor to the lowest loss so far at which weaker penalties are not tried
LOWEST = 1e-6  # probability of a label in a mean log loss


@dataclass(frozen=True)
class LinearModel:
    """A fitted logistic regression. `c`: its inverse strength."""

    weight: torch.Tensor  # [F, S]
    bias: torch.Tensor  # [S]
    c: float

    def probabilities(self, features: torch.Tensor) -> np.ndarray:
        """[N, K] float64 for sparse `features` [N, F]."""
        return torch.softmax(_all_logits((features @ self.weight + self.bias).double()), dim=-1).numpy()


@dataclass(frozen=True)
class Fit:
    """The model of the lowest loss, the loss, and the probabilities [N, K] that were compared."""

    model: LinearModel
    loss: float
    probabilities: np.ndarray  # of the training rows, each by a model not fitted on it, or of the validation rows


def fit_cross_fitted(
    features: torch.Tensor, labels: np.ndarray, folds: np.ndarray, row_weights: np.ndarray, num_classes: int
) -> Fit:
    """The strength of the lowest log loss of rows by models fitted without them, then the model of all rows.

    `folds` [N] numbers the folds from 0. `row_weights` [N].
    """
    of_model = torch.from_numpy(np.stack([*(folds != fold for fold in range(folds.max() + 1)), folds >= 0], axis=1))
    weights = of_model.double() * torch.from_numpy(row_weights).double()[:, None]  # [N, M]
    rows, own = torch.arange(len(labels)), torch.from_numpy(folds)

    def compare(models: "Models") -> tuple[np.ndarray, LinearModel]:
        logits = models.logits(features)  # [N, M, S]
        probabilities = torch.softmax(_all_logits(logits[rows, own].double()), dim=-1).numpy()
        return probabilities, models.select(-1)

    return _best(features, labels, weights, num_classes, compare, labels, row_weights)


def fit_validated(
    train: tuple[torch.Tensor, np.ndarray, np.ndarray],
    val: tuple[torch.Tensor, np.ndarray, np.ndarray],
    num_classes: int,
) -> Fit:
    """The model of the strength of the lowest log loss of the validation rows.

    `train` and `val`: sparse features, labels and row weights.
    """

    def compare(models: "Models") -> tuple[np.ndarray, LinearModel]:
        return models.select(0).probabilities(val[0]), models.select(0)

    weights = torch.from_numpy(train[2]).double()[:, None]
    return _best(train[0], train[1], weights, num_classes, compare, val[1], val[2])


def log_loss(probabilities: np.ndarray, labels: np.ndarray, row_weights: np.ndarray) -> float:
    """Weighted mean of -log of the label's probability; `probabilities` [N, K]."""
    of_label = np.maximum(probabilities[np.arange(len(labels)), labels], LOWEST)
    return float(-(row_weights * np.log(of_label)).sum() / row_weights.sum())


class Models:
    """M models of one strength each, fitted together: the features are read once for all of them."""

    def __init__(self, num_features: int, num_models: int, num_scores: int) -> None:
        self.weight = torch.zeros(num_features, num_models, num_scores)
        self.bias = torch.zeros(num_models, num_scores)
        self.c = 0.0

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[N, M, S]"""
        return (features @ self.weight.flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def select(self, index: int) -> LinearModel:
        return LinearModel(self.weight[:, index].clone(), self.bias[index].clone(), self.c)


def _best(
    features: torch.Tensor,
    labels: np.ndarray,
    weights: torch.Tensor,
    num_classes: int,
    compare: Callable[[Models], tuple[np.ndarray, LinearModel]],
    compared_labels: np.ndarray,
    compared_weights: np.ndarray,
) -> Fit:
    """From strong to weak penalties, each fit from the last one's weights, until the loss is clearly worse."""
    num_scores = 1 if num_classes == 2 else num_classes
    transposed = features.to_sparse_coo().t().coalesce().to_sparse_csr()
    models = Models(features.shape[1], weights.shape[1], num_scores)
    best: Fit | None = None
    for c in C_GRID:
        models.c = c
        _fit(models, features, transposed, torch.from_numpy(labels), weights)
        probabilities, model = compare(models)
        loss = log_loss(probabilities, compared_labels, compared_weights)
        if not np.isfinite(loss):
            break
        if best is None or loss < best.loss:
            best = Fit(model, loss, probabilities)
        elif loss > CLEARLY_WORSE * best.loss:
            break
    if best is None:
        raise ArithmeticError("a logistic regression whose loss is not finite")
    return best


def _fit(
    models: Models, features: torch.Tensor, transposed: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> None:
    """Minimise each model's weighted mean cross entropy + |weight|^2 / (2 c rows) by L-BFGS, in place."""
    groups = max(1, MAX_WEIGHTS // max(1, models.weight[:, 0].numel()))
    for start in range(0, weights.shape[1], groups):
        _fit_together(models, slice(start, start + groups), features, transposed, labels, weights)


def _fit_together(
    models: Models,
    chosen: slice,
    features: torch.Tensor,
    transposed: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    of_rows = weights[:, chosen]  # [N, M]
    strength = 1 / (models.c * (of_rows > 0).sum(dim=0).clamp(min=1))  # [M]
    strength = strength.float()[:, None]
    of_rows = (of_rows / of_rows.sum(dim=0)).float()
    weight, bias = models.weight[:, chosen].contiguous(), models.bias[chosen].contiguous()
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    num_scores, rows = bias.shape[1], torch.arange(len(labels))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=LOSS_TOLERANCE * len(bias),
    )

    def closure() -> float:
        logits = _all_logits((features @ weight.flatten(1)).unflatten(1, bias.shape) + bias)  # [N, M, K]
        log_probabilities = torch.log_softmax(logits, dim=-1)
        losses = -(of_rows * log_probabilities[rows, :, labels]).sum()
        residual = log_probabilities.exp()
        residual[rows, :, labels] -= 1
        residual = (residual * of_rows[..., None])[..., -num_scores:]  # [N, M, S]
        weight.grad.copy_((transposed @ residual.flatten(1)).unflatten(1, bias.shape) + strength * weight)
        bias.grad.copy_(residual.sum(dim=0))
        return float(losses + (strength / 2 * weight.square()).sum())

    with torch.no_grad():
        optimizer.step(closure)
    models.weight[:, chosen], models.bias[chosen] = weight, bias


def _all_logits(scores: torch.Tensor) -> torch.Tensor:
    """[..., S] -> [..., K]: of two classes, the first has the logit 0."""
    return torch.cat([torch.zeros_like(scores), scores], dim=-1) if scores.shape[-1] == 1 else scores


# ---- folds ----


def assign_folds(
    labels: np.ndarray, groups: np.ndarray | None, *, num_folds: int, generator: np.random.Generator
) -> np.ndarray:
    """The fold of each row [N], from 0: classes spread evenly, the rows of a group in one fold."""
    classes = np.unique(labels, return_inverse=True)[1].reshape(-1)
    num_folds = max(1, min(num_folds, len(labels) if groups is None else len(np.unique(groups))))
    shuffled = generator.permutation(len(labels))
    folds = np.empty(len(labels), dtype=np.int64)
    if groups is None:
        folds[shuffled[np.argsort(classes[shuffled], kind="stable")]] = np.arange(len(labels)) % num_folds
        return folds
    group_of = np.unique(groups, return_inverse=True)[1].reshape(-1)
    counts = np.zeros((group_of.max() + 1, classes.max() + 1))  # [groups, classes]
    np.add.at(counts, (group_of, classes), 1 / np.bincount(classes)[classes])
    random_rank = generator.permutation(len(counts))
    in_folds, fold_of_group = np.zeros((num_folds, counts.shape[1])), np.empty(len(counts), dtype=np.int64)
    for group in np.lexsort((random_rank, -counts.sum(axis=1))):  # the largest first
        fold = int(np.argmin(((in_folds + counts[group]) ** 2 - in_folds**2).sum(axis=1)))
        fold_of_group[group] = fold
        in_folds[fold] += counts[group]
    return fold_of_group[group_of]
