"""What simple models make of the same rows: the most frequent class, columns alone, words alone.

N rows, K classes, F features, L tokens over all rows. A result says little without them beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import array, mapping, number, record, text, whole

HASHED = 2**18  # features of tokens and pairs of neighbours
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3)  # of the L2 penalty, of which the validation rows choose
STRENGTH = 1e-4  # where there are none
MAX_ROWS, MAX_TOKENS = 50_000, 5_000_000  # that a baseline is fitted on
MAX_CELLS = 1_500_000  # rows x classes, all MAX_ROWS of 30 classes: each step of the fit goes through them
ITERATIONS = 60
PAIR, SPREAD = 1_000_003, 0x9E3779B97F4A7C15  # odd multipliers that scatter token ids over the features


MAJORITY, COLUMNS_ONLY, TEXT_ONLY = "most frequent class", "columns only", "text only"
MAX_CLASSES = {
    TEXT_ONLY: 50,
    COLUMNS_ONLY: 500,
}  # words: HASHED weights for each; columns: MAX_CELLS are then a few rows of each
DESCRIPTIONS = {
    MAJORITY: "the shares of the classes in the training rows",
    COLUMNS_ONLY: "logistic regression on standardised numbers and one-hot categories",
    TEXT_ONLY: "logistic regression on a bag of the encoder's tokens and pairs of them",
}
BASELINES_JSON = record(
    {
        "shares": array(number(0, 1), min_length=2),
        "rows": whole(0),
        "models": array(text(choices=(COLUMNS_ONLY, TEXT_ONLY)), distinct=True),
        "thresholds": mapping(number(-1, 1), keys=text(choices=(COLUMNS_ONLY, TEXT_ONLY))),
        "reasons": mapping(text(), keys=text(choices=(COLUMNS_ONLY, TEXT_ONLY))),
    }
)


# ---- rows as sparse features ----


def word_features(ids: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """Sparse CSR [N, HASHED] float32, each row of length 1: 1 + log(count) of tokens and of pairs of neighbours (a bag of words).

    `ids` [L] token ids of all rows, row n is `ids[offsets[n]:offsets[n + 1]]`.
    """
    ids = ids.astype(np.uint64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    is_pair = rows[1:] == rows[:-1]
    keys = np.concatenate([ids + 1, ((ids[:-1] + 1) * np.uint64(PAIR) + ids[1:] + 1)[is_pair]])
    columns = ((keys * np.uint64(SPREAD)) >> np.uint64(46)).astype(np.int64)  # the upper 18 bits
    cells, counts = np.unique(np.concatenate([rows, rows[1:][is_pair]]) * HASHED + columns, return_counts=True)
    values = 1 + np.log(counts)
    norms = np.sqrt(np.bincount(cells // HASHED, values**2, minlength=len(offsets) - 1))
    return _csr(cells // HASHED, cells % HASHED, values / norms[cells // HASHED], (len(offsets) - 1, HASHED))


def column_features(numbers: np.ndarray, categories: np.ndarray, cardinalities: Sequence[int]) -> torch.Tensor:
    """Sparse CSR [N, F] float32: the numbers, standardised [N, numbers], and one feature for each category; codes [N, columns]."""
    num_rows = len(numbers)
    starts = (
        numbers.shape[1] + np.concatenate([[0], np.cumsum(cardinalities)[:-1]]).astype(np.int64)
        if len(cardinalities)
        else np.zeros(0, np.int64)
    )
    columns = np.concatenate([np.tile(np.arange(numbers.shape[1]), (num_rows, 1)), categories + starts], axis=1)
    values = np.concatenate([numbers, np.ones_like(categories, dtype=np.float64)], axis=1)
    return _csr(
        np.repeat(np.arange(num_rows), columns.shape[1]),
        columns.ravel(),
        values.ravel(),
        (num_rows, numbers.shape[1] + int(sum(cardinalities))),
    )


def _csr(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """`rows` ascend."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    with torch.sparse.check_sparse_tensor_invariants(enable=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the format is in beta
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(values).float(), shape
        )


# ---- models ----


@dataclass(frozen=True)
class LogisticRegression:
    """A logistic regression."""

    weight: torch.Tensor  # [F, K]
    bias: torch.Tensor  # [K]

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all())

    def probabilities(self, features: torch.Tensor) -> np.ndarray:
        """[N, F] sparse -> [N, K] float32"""
        return torch.softmax(features @ self.weight + self.bias, dim=1).numpy()

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(features @ self.weight + self.bias, labels))


@dataclass(frozen=True)
class Baselines:
    """The models that a result is shown beside, with weights of their own: kept in the model folder."""

    shares: np.ndarray  # [K] float32 of the classes in the training rows
    models: Mapping[str, LogisticRegression]  # COLUMNS_ONLY, TEXT_ONLY, where the rows have such features
    thresholds: Mapping[str, float]  # of the models, chosen as the model's own is
    rows: int  # that they were fitted on
    reasons: Mapping[str, str]  # of what is not among `models`

    def probabilities(self, num_rows: int, features: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Name -> [N, K] float32, of sparse features [N, F] by name."""
        made = {MAJORITY: np.tile(self.shares, (num_rows, 1))}
        return made | {name: model.probabilities(features[name]) for name, model in self.models.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "shares": self.shares.tolist(),
            "rows": self.rows,
            "models": list(self.models),
            "thresholds": dict(self.thresholds),
            "reasons": dict(self.reasons),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """`<name>.weight` [F, K] and `<name>.bias` [K]."""
        return {
            f"{name}.{part}": getattr(model, part) for name, model in self.models.items() for part in ("weight", "bias")
        }

    @classmethod
    def from_json(
        cls, values: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, num_classes: int, num_columns: int
    ) -> Baselines:
        """The models of a value that BASELINES_JSON declares; `num_columns`: features of COLUMNS_ONLY.

        Raises `InputError` for shares that are none, and for weights of another shape or that are not finite.
        """
        if len(values["shares"]) != num_classes or abs(sum(values["shares"]) - 1) > 1e-3:
            raise InputError(
                f"shares: expected {num_classes} shares that sum to 1, found {len(values['shares'])} that sum to {sum(values['shares']):.6g}"
            )
        models = {}
        for name in values["models"]:
            shapes = {"weight": (HASHED if name == TEXT_ONLY else num_columns, num_classes), "bias": (num_classes,)}
            for entry, shape in shapes.items():
                tensor = tensors.get(f"{name}.{entry}")
                if (
                    tensor is None
                    or tuple(tensor.shape) != shape
                    or tensor.dtype != torch.float32
                    or not torch.isfinite(tensor).all()
                ):
                    found = "none" if tensor is None else f"{tensor.dtype} of shape {list(tensor.shape)}"
                    raise InputError(
                        f"its weights {name}.{entry}: expected finite float32 of shape {list(shape)}, found {found}"
                    )
            models[name] = LogisticRegression(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        return cls(
            np.array(values["shares"], dtype=np.float32),
            models,
            values["thresholds"],
            values["rows"],
            values["reasons"],
        )


def majority(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[K] float32: every row's probabilities when only the training labels are known."""
    return (np.bincount(labels, minlength=num_classes) / len(labels)).astype(np.float32)


def fit_best(
    train: tuple[torch.Tensor, np.ndarray], val: tuple[torch.Tensor, np.ndarray] | None, num_classes: int
) -> LogisticRegression:
    """The logistic regression of STRENGTHS that fits the validation rows best; features [N, F] sparse, labels [N]. None: of STRENGTH."""
    features, labels = train[0], torch.from_numpy(train[1])
    transposed = features.to_sparse_coo().t().coalesce().to_sparse_csr()
    if val is None:
        return _fit(features, transposed, labels, num_classes, STRENGTH)
    made = [_fit(features, transposed, labels, num_classes, strength) for strength in STRENGTHS]
    return min(made, key=lambda model: model.loss(val[0], torch.from_numpy(val[1])))


def _fit(
    features: torch.Tensor, transposed: torch.Tensor, labels: torch.Tensor, num_classes: int, strength: float
) -> LogisticRegression:
    """Mean cross entropy plus strength / 2 |weight|^2, by L-BFGS; gradients by hand, since autograd has none through CSR."""
    weight, bias = torch.zeros(features.shape[1], num_classes), torch.zeros(num_classes)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> float:
        logits = features @ weight + bias
        residual = torch.softmax(logits, dim=1)
        loss = torch.nn.functional.cross_entropy(logits, labels) + strength / 2 * weight.square().sum()
        residual[torch.arange(len(labels)), labels] -= 1
        residual /= len(labels)
        weight.grad.copy_(transposed @ residual + strength * weight)
        bias.grad.copy_(residual.sum(0))
        return float(loss)

    with torch.no_grad():
        optimizer.step(closure)
    return LogisticRegression(weight, bias)
