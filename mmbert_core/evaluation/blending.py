"""Weights of a blend: a convex combination of the probabilities of several members, by its log loss.

With few training rows, the simple members share their weight by training rows, each predicted by models that were
fitted without it, and by validation rows; these alone decide the weight of the network. With many training rows, the
validation rows decide all weights.

N rows, M members, K classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmbert_core.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import array, boolean, nullable, number, record, text, whole

NETWORK, WORDS, WORDS_AND_COLUMNS, COLUMNS = "network", "words", "words + columns", "columns"
MEMBERS = (NETWORK, WORDS, WORDS_AND_COLUMNS, COLUMNS)
READ_WORDS, READ_COLUMNS = (WORDS, WORDS_AND_COLUMNS), (WORDS_AND_COLUMNS, COLUMNS)
DESCRIPTIONS = {
    NETWORK: "the trained network, at its own temperature",
    WORDS: "logistic regression on tokens and pairs of tokens",
    WORDS_AND_COLUMNS: "logistic regression on tokens, pairs of tokens and the columns",
    COLUMNS: "logistic regression on the columns: numbers in bins, one-hot categories",
}
# Words have 2^18 weights per class.
MAX_CLASSES = {WORDS: 50, WORDS_AND_COLUMNS: 50, COLUMNS: 500}
MIN_WEIGHT = 0.02  # a member with less is left out
MIN_GAIN = 1e-4  # of the mean log loss; so is a member that brings less
GRID = np.linspace(0, 1, 201)  # of the network's weight
STEPS = 1000  # of the iteration for several weights
MAX_ROWS = 20_000  # that decide weights: of more, evenly spread ones
SMALLEST = 1e-9  # probability of a label, so that a single row does not decide

BLEND_JSON = record(
    {
        "members": array(
            record(
                {
                    "name": text(choices=MEMBERS),
                    "weight": number(0, 1),
                    "val_log_loss": nullable(number(0)),
                    "c": nullable(number(0)),
                }
            ),
            min_length=2,
        ),
        "temperature": number(MIN_TEMPERATURE / 2, 2 * MAX_TEMPERATURE),
        "rows": whole(0),
        "val_log_loss": nullable(number(0)),
        "is_cross_fitted": boolean,
    }
)


@dataclass(frozen=True)
class Member:
    """One member of a blend; weight 0: it was fitted and left out."""

    name: str
    weight: float
    val_log_loss: float | None  # of it alone, on the validation rows
    c: float | None = None  # inverse strength of its L2 penalty; None for the network


@dataclass(frozen=True)
class BlendRecord:
    """The contents of blend.json; the members' tensors are in the weights, under `blend.`."""

    members: tuple[Member, ...]  # the network first
    temperature: float  # of the network, inside the blend
    rows: int  # validation rows
    val_log_loss: float | None  # of the blend, each validation row with weights fitted without it
    is_cross_fitted: bool  # whether training rows decided the weights among the simple members

    def weight(self, name: str) -> float:
        """The weight of the member of that name; 0 without one."""
        return next((member.weight for member in self.members if member.name == name), 0.0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "members": [asdict(member) for member in self.members]}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, has_text: bool, has_columns: bool, num_classes: int) -> "BlendRecord":
        """From a value that BLEND_JSON has checked. Raises `InputError` for members that the model cannot have."""
        members = tuple(Member(**member) for member in values["members"])
        names = [member.name for member in members]
        total = sum(member.weight for member in members)
        if abs(total - 1) > 1e-6:
            raise InputError(f"members: expected weights that sum to 1, found {total:.6g}")
        possible = member_names(has_text=has_text, has_columns=has_columns, num_classes=num_classes)
        if names != [name for name in possible if name in names]:
            raise InputError(
                f"members: expected some of {', '.join(possible)}, in this order, found {', '.join(names)}"
            )
        return cls(**{**values, "members": members})


def member_names(*, has_text: bool, has_columns: bool, num_classes: int) -> list[str]:
    """The members of a model with these inputs and so many classes, in their order."""
    lacking = {*(() if has_text else READ_WORDS), *(() if has_columns else READ_COLUMNS)}
    simple = [name for name in MEMBERS[1:] if name not in lacking and num_classes <= MAX_CLASSES[name]]
    return [NETWORK, *simple]


@dataclass(frozen=True)
class LabelProbabilities:
    """Probability of each row's own label by member, and the rows' weights in the loss."""

    by_member: np.ndarray  # [N, M]
    row_weights: np.ndarray  # [N]

    def select(self, rows: np.ndarray | slice, members: Sequence[int] | slice = slice(None)) -> "LabelProbabilities":
        return LabelProbabilities(self.by_member[rows][:, members], self.row_weights[rows])

    def thinned(self) -> "LabelProbabilities":
        """At most MAX_ROWS of the rows, evenly spread."""
        return self.select(slice(None, None, -(-len(self.row_weights) // MAX_ROWS) or 1))

    def log_loss(self, weights: np.ndarray) -> float:
        """Of the members' mixture."""
        of_label = np.maximum(self.by_member @ weights, SMALLEST)
        return float(-(self.row_weights * np.log(of_label)).sum() / self.row_weights.sum())


def of_labels(probabilities: Sequence[np.ndarray], labels: np.ndarray, row_weights: np.ndarray) -> LabelProbabilities:
    """From each member's probabilities [N, K]."""
    rows = np.arange(len(labels))
    columns = [np.maximum(member[rows, labels].astype(np.float64), SMALLEST) for member in probabilities]
    return LabelProbabilities(np.stack(columns, axis=1), row_weights / row_weights.mean())


def fit_weights(val: LabelProbabilities, simple: LabelProbabilities | None) -> np.ndarray:
    """Weights [M] of the network and the simple members, as `val` has them; those left out are 0.

    `simple`: the simple members' probabilities [N, M - 1] of training rows that they were not fitted on, which count
    with the validation rows when these members share their weight. None: the validation rows decide all weights.
    """
    if simple is None:
        return _without_idle(val)
    among_simple = _without_idle(_of_simple(val, simple))
    share = network_share(val, among_simple)
    weights = np.concatenate([[share], (1 - share) * among_simple])
    weights[weights < MIN_WEIGHT] = 0
    return weights / weights.sum()


def refit_weights(val: LabelProbabilities, simple: LabelProbabilities | None, weights: np.ndarray) -> np.ndarray:
    """Weights of the members that have one in `weights`, fitted again on other validation rows."""
    kept = np.flatnonzero(weights)
    refitted = np.zeros(len(weights))
    if simple is None:
        refitted[kept] = mixture_weights(val.select(slice(None), kept))
    elif weights[0] == 1:
        refitted = weights
    else:
        simple_kept = np.flatnonzero(weights[1:])
        among_simple = np.zeros(len(weights) - 1)
        among_simple[simple_kept] = mixture_weights(_of_simple(val, simple).select(slice(None), simple_kept))
        share = network_share(val, among_simple) if weights[0] else 0.0
        refitted = np.concatenate([[share], (1 - share) * among_simple])
    return refitted


def _of_simple(val: LabelProbabilities, simple: LabelProbabilities) -> LabelProbabilities:
    """The simple members' probabilities of training and validation rows."""
    return LabelProbabilities(
        np.concatenate([simple.by_member, val.by_member[:, 1:]]), np.concatenate([simple.row_weights, val.row_weights])
    )


def network_share(val: LabelProbabilities, among_simple: np.ndarray) -> float:
    """The mean of the posterior of the network's weight under a flat prior: moderate where rows are few."""
    val = val.thinned()
    mixture = val.by_member[:, 1:] @ among_simple  # [N]
    log_likelihood = np.array(
        [(val.row_weights * np.log(share * val.by_member[:, 0] + (1 - share) * mixture)).sum() for share in GRID]
    )
    posterior = np.exp(log_likelihood - log_likelihood.max())
    return float((GRID * posterior).sum() / posterior.sum())


def mixture_weights(rows: LabelProbabilities) -> np.ndarray:
    """Weights [M] of the lowest log loss by expectation maximisation; each member starts with one row more."""
    rows = rows.thinned()
    weights = np.full(rows.by_member.shape[1], 1 / rows.by_member.shape[1])
    for _ in range(STEPS):
        shares = rows.by_member * weights
        new = (rows.row_weights[:, None] * shares / shares.sum(axis=1, keepdims=True)).sum(axis=0) + 1
        new /= new.sum()
        if np.abs(new - weights).max() < 1e-7:
            return new
        weights = new
    return weights


def _without_idle(rows: LabelProbabilities) -> np.ndarray:
    """`mixture_weights` [M] of the members that bring something; those left out one by one are 0."""
    num_members = rows.by_member.shape[1]
    kept = list(range(num_members))
    weights = mixture_weights(rows)
    while len(kept) > 1:
        options = []
        for member in kept:
            others = [other for other in kept if other != member]
            without = np.zeros(num_members)
            without[others] = mixture_weights(rows.select(slice(None), others))
            options.append((rows.log_loss(without), others, without))
        loss, others, without = min(options, key=lambda option: option[0])
        [idle] = set(kept) - set(others)
        if weights[idle] >= MIN_WEIGHT and loss - rows.log_loss(weights) >= MIN_GAIN:
            break
        kept, weights = others, without
    return weights
