"""Simple models to compare a trained model with: the most frequent class, columns only, text only.

N rows, K classes, F features, L tokens over all rows.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import array, mapping, number, record, text, whole

NUM_HASHED = 2**18  # hash features of tokens and of pairs of neighbouring tokens
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3)  # of the L2 penalty; the validation rows select one
DEFAULT_STRENGTH = 1e-4  # without validation rows
MAX_ROWS, MAX_TOKENS = 50_000, 5_000_000  # that a baseline is fitted on
MAX_CELLS = 1_500_000  # rows x classes, which each step of the fit computes: all MAX_ROWS of 30 classes
ITERATIONS = 60
PAIR, SPREAD = 1_000_003, 0x9E3779B97F4A7C15  # odd multipliers of the hash of token ids; SPREAD is 2^64 / golden ratio

MAJORITY, COLUMNS_ONLY, TEXT_ONLY = "most frequent class", "columns only", "text only"
# Text has NUM_HASHED weights per class; with 500 classes, MAX_CELLS are few rows of each.
MAX_CLASSES = {TEXT_ONLY: 50, COLUMNS_ONLY: 500}
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
    """Bag of words, sparse CSR [N, NUM_HASHED] float32: 1 + log(count) of tokens and token pairs, rows of L2 norm 1.

    `ids` [L] token ids of all rows, those of row n are `ids[offsets[n]:offsets[n + 1]]`.
    """
    ids = ids.astype(np.uint64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    is_pair = rows[1:] == rows[:-1]
    keys = np.concatenate([ids + 1, ((ids[:-1] + 1) * np.uint64(PAIR) + ids[1:] + 1)[is_pair]])
    columns = ((keys * np.uint64(SPREAD)) >> np.uint64(46)).astype(np.int64)  # the upper 18 bits
    cells, counts = np.unique(np.concatenate([rows, rows[1:][is_pair]]) * NUM_HASHED + columns, return_counts=True)
    values = 1 + np.log(counts)
    norms = np.sqrt(np.bincount(cells // NUM_HASHED, values**2, minlength=len(offsets) - 1))
    return _csr(
        cells // NUM_HASHED, cells % NUM_HASHED, values / norms[cells // NUM_HASHED], (len(offsets) - 1, NUM_HASHED)
    )


def column_features(numbers: np.ndarray, categories: np.ndarray, cardinalities: Sequence[int]) -> torch.Tensor:
    """Sparse CSR [N, F] float32: the numbers, then one-hot features of the categories.

    `numbers` [N, number columns] are standardised; `categories` [N, category columns] are below `cardinalities`.
    """
    num_rows, num_numbers = numbers.shape
    starts = np.zeros(0, np.int64)  # first feature of each categorical column
    if len(cardinalities):
        starts = num_numbers + np.concatenate([[0], np.cumsum(cardinalities)[:-1]]).astype(np.int64)
    columns = np.concatenate([np.tile(np.arange(num_numbers), (num_rows, 1)), categories + starts], axis=1)
    values = np.concatenate([numbers, np.ones_like(categories, dtype=np.float64)], axis=1)
    rows = np.repeat(np.arange(num_rows), columns.shape[1])
    return _csr(rows, columns.ravel(), values.ravel(), (num_rows, num_numbers + int(sum(cardinalities))))


def _csr(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """A sparse CSR tensor from the indices and values of its cells; `rows` ascending."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    with torch.sparse.check_sparse_tensor_invariants(enable=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that CSR is in beta
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(values).float(), shape
        )


# ---- models ----


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted multinomial logistic regression."""

    weight: torch.Tensor  # [F, K]
    bias: torch.Tensor  # [K]

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all())

    def probabilities(self, features: torch.Tensor) -> np.ndarray:
        """Probabilities [N, K] float32 for sparse `features` [N, F]."""
        return torch.softmax(features @ self.weight + self.bias, dim=1).numpy()

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Mean cross entropy over sparse `features` [N, F] and `labels` [N]."""
        return float(torch.nn.functional.cross_entropy(features @ self.weight + self.bias, labels))


@dataclass(frozen=True)
class Baselines:
    """The simple models that a result is compared with, kept in the model folder."""

    shares: np.ndarray  # [K] float32 of the classes in the training rows
    models: Mapping[str, LogisticRegression]  # by COLUMNS_ONLY and TEXT_ONLY, where fitted
    thresholds: Mapping[str, float]  # of the models, by the same rule as that of the main model
    rows: int  # that they were fitted on
    reasons: Mapping[str, str]  # why one is not in `models`

    def probabilities(self, num_rows: int, features: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Name of a baseline -> probabilities [N, K] float32, from sparse features [N, F] by name."""
        by_name = {name: model.probabilities(features[name]) for name, model in self.models.items()}
        return {MAJORITY: np.tile(self.shares, (num_rows, 1)), **by_name}

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
        weights = {f"{name}.weight": model.weight for name, model in self.models.items()}
        return weights | {f"{name}.bias": model.bias for name, model in self.models.items()}

    @classmethod
    def from_json(
        cls, values: dict[str, Any], tensors: Mapping[str, torch.Tensor], *, num_classes: int, num_columns: int
    ) -> "Baselines":
        """The models of a value that BASELINES_JSON declares; `num_columns`: features of COLUMNS_ONLY.

        Raises `InputError` for shares that do not sum to 1, and for weights of another shape or that are not finite.
        """
        shares = values["shares"]
        if len(shares) != num_classes or abs(sum(shares) - 1) > 1e-3:
            raise InputError(
                f"shares: expected {num_classes} shares that sum to 1, "
                f"found {len(shares)} that sum to {sum(shares):.6g}"
            )
        models = {}
        for name in values["models"]:
            num_features = NUM_HASHED if name == TEXT_ONLY else num_columns
            weight = _checked(tensors, f"{name}.weight", (num_features, num_classes))
            models[name] = LogisticRegression(weight, _checked(tensors, f"{name}.bias", (num_classes,)))
        return cls(np.array(shares, dtype=np.float32), models, values["thresholds"], values["rows"], values["reasons"])


def _checked(tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of that name. Raises `InputError` where it is missing, of another shape or type, or not finite."""
    tensor = tensors.get(name)
    if tensor is None:
        found = "none"
    elif tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and torch.isfinite(tensor).all():
        return tensor
    else:
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
    raise InputError(f"its weights {name}: expected finite float32 of shape {list(shape)}, found {found}")


def majority(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Shares of the classes [K] float32: the probabilities of every row for a model that ignores its inputs."""
    return (np.bincount(labels, minlength=num_classes) / len(labels)).astype(np.float32)


def fit_best(
    train: tuple[torch.Tensor, np.ndarray], val: tuple[torch.Tensor, np.ndarray] | None, num_classes: int
) -> LogisticRegression:
    """The logistic regression of the L2 strength with the lowest loss on the validation rows.

    `train` and `val`: sparse features [N, F] and labels [N]. Without `val`, the strength is DEFAULT_STRENGTH.
    """
    features, labels = train[0], torch.from_numpy(train[1])
    transposed = features.to_sparse_coo().t().coalesce().to_sparse_csr()
    if val is None:
        return _fit(features, transposed, labels, num_classes, DEFAULT_STRENGTH)
    fitted = [_fit(features, transposed, labels, num_classes, strength) for strength in STRENGTHS]
    return min(fitted, key=lambda model: model.loss(val[0], torch.from_numpy(val[1])))


def _fit(
    features: torch.Tensor, transposed: torch.Tensor, labels: torch.Tensor, num_classes: int, strength: float
) -> LogisticRegression:
    """Minimise mean cross entropy + strength / 2 |weight|^2 by L-BFGS; autograd has no gradient of a CSR product."""
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
