"""The blend of a trained network with logistic regressions on words and columns, fitted after the training.

N rows, V validation rows, F features, K classes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmbert_core.config import Config
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.evaluation import blending
from mmbert_core.evaluation.blending import (
    COLUMNS,
    NETWORK,
    READ_COLUMNS,
    READ_WORDS,
    WORDS,
    WORDS_AND_COLUMNS,
    BlendRecord,
    Member,
    member_names,
    of_labels,
)
from mmbert_core.evaluation.calibration import fit_temperature
from mmbert_core.evaluation.convex_fit import assign_folds, fit_cross_fitted, fit_validated, log_loss
from mmbert_core.inference.column_modules import build_blend, build_linear_column_features, tensor_name
from mmbert_core.model import bag_of_words
from mmbert_core.model.blend import Blend
from mmbert_core.runtime import distributed
from mmbert_core.runtime.progress import slow_step
from mmbert_core.training.decision_fit import sample
from mmbert_core.training.run import Run

logger = logging.getLogger(__name__)

MAX_CROSS_FITTED_ROWS = 5_000  # training rows from which the validation rows decide strengths and all weights
NUM_FOLDS = 5
FOLDS_STREAM = 3  # with the seed: folds draw other numbers than the split of the rows
# In the member that reads both, so that one L2 penalty suits texts of norm 1 and columns of about unit variance.
WORDS_SCALE, COLUMNS_SCALE = 2.0, 0.5
CHUNK_ROWS = 8_192  # rows whose sparse features are in memory at a time


@dataclass(frozen=True)
class FittedBlend:
    """A blend, and its probabilities [V] or [V, K] of the validation rows, with weights fitted without each row."""

    record: BlendRecord
    tensors: dict[str, torch.Tensor]
    val_preds: np.ndarray


def blend_with_members(run: Run, val_preds: np.ndarray | None) -> tuple[BlendRecord | None, np.ndarray | None]:
    """Collective. Fit the blend that the config asks for and set `run.model.blend` on every rank.

    `val_preds` [V] or [V, K]: the network's. Returns, on rank 0, the record of the blend and the predictions of the
    validation rows that threshold and calibration are fitted on. Without a blend: None and `val_preds`.
    """
    if run.config.blend == "none":
        return None, val_preds
    fitted = distributed.on_main(lambda: _fit_or_warn(run, val_preds), share=False, long_timeout=True)
    record = distributed.broadcast_object(None if fitted is None else fitted.record, long_timeout=True)
    if record is None:
        return None, val_preds
    tensors = distributed.broadcast_tensors(None if fitted is None else fitted.tensors)
    blend = build_blend(run.config, run.data.features, record)
    blend.load_state_dict(tensors)
    run.model.blend = blend.to(run.context.device)
    return (None, None) if fitted is None else (record, fitted.val_preds)


def _fit_or_warn(run: Run, val_preds: np.ndarray | None) -> FittedBlend | None:
    if val_preds is None or run.data.val is None:
        logger.info("blend: none, because its weights need validation rows")
        return None
    try:
        with slow_step("blend"):
            return fit_blend(run.data, run.config, val_preds, np.asarray(run.class_weights, dtype=np.float64))
    except Exception as error:  # such as too little memory: the network alone is usable
        logger.warning("no blend: %s: %s", type(error).__name__, error)
        return None


# ---- one rank ----


def fit_blend(data: Data, config: Config, val_preds: np.ndarray, class_weights: np.ndarray) -> FittedBlend | None:
    """The blend; None where the network alone is as good. Rank 0 only; takes seconds.

    All members, and their weights, are fitted to the loss of the training, with its `class_weights` [K].
    """
    has_columns = bool(data.features.num_numbers or data.features.cardinalities)
    names = member_names(has_text=bool(config.text_name), has_columns=has_columns, num_classes=config.num_classes)
    if len(names) == 1:
        logger.info("blend: none, because there are too many classes for its simple members")
        return None
    val_labels, row_weights = data.val.label_index, class_weights[data.val.label_index]
    temperature, network = _network(val_preds, val_labels, config.num_classes, class_weights)
    simple = SimpleMembers(data, config, names[1:], class_weights)
    by_member = [network, *simple.val]  # [V, K] each
    val = of_labels(by_member, val_labels, row_weights)
    weights = blending.fit_weights(val, simple.out_of_fold)
    losses = [log_loss(probabilities, val_labels, row_weights) for probabilities in by_member]
    blended = _cross_fitted(data.val, val, simple.out_of_fold, weights, by_member, config.seed)
    models = [None, *simple.models]
    members = tuple(
        Member(name, float(weight), loss, None if model is None else model.c)
        for name, weight, loss, model in zip(names, weights, losses, models, strict=True)
    )
    loss = log_loss(blended, val_labels, row_weights)
    is_cross_fitted = simple.out_of_fold is not None
    record = BlendRecord(members, temperature, len(val_labels), loss, is_cross_fitted)
    logger.info("blend: %s", describe(record))
    if weights[0] == 1:
        return None
    blended = blended.astype(np.float32)
    tensors = simple.tensors(build_blend(config, data.features, record))
    return FittedBlend(record, tensors, blended[:, 1] if val_preds.ndim == 1 else blended)


def describe(record: BlendRecord) -> str:
    """The weight of each member, and its log loss on the validation rows, in one line."""
    members = ", ".join(f"{member.name} {member.weight:.2f} ({member.val_log_loss:.4f})" for member in record.members)
    of_blend = "" if record.weight(NETWORK) == 1 else f"; of the blend: {record.val_log_loss:.4f}"
    return f"weights of its members (log loss of {record.rows} validation rows): {members}{of_blend}"


def _network(
    val_preds: np.ndarray, labels: np.ndarray, num_classes: int, class_weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """The network's temperature, 1 with too few rows, and its probabilities [V, K] at it."""
    has_weights = bool((class_weights != class_weights[0]).any())  # a temperature would be fitted without them
    calibration = None if has_weights else fit_temperature(val_preds, labels, num_classes=num_classes)
    preds = (val_preds if calibration is None else calibration.apply(val_preds)).astype(np.float64)
    probabilities = np.stack([1 - preds, preds], axis=1) if preds.ndim == 1 else preds
    return 1.0 if calibration is None else calibration.temperature, probabilities


def _cross_fitted(
    val: Dataset,
    of_label: blending.LabelProbabilities,
    out_of_fold: blending.LabelProbabilities | None,
    weights: np.ndarray,
    by_member: Sequence[np.ndarray],
    seed: int,
) -> np.ndarray:
    """Probabilities [V, K] of the blend, each row with weights fitted on the other folds of the validation rows."""
    folds = _folds(val, np.arange(len(val)), seed)
    stacked, blended = np.stack(by_member, axis=2), np.empty(by_member[0].shape)  # [V, K, members], [V, K]
    for fold in range(folds.max() + 1):
        refitted = blending.refit_weights(of_label.select(folds != fold), out_of_fold, weights)
        blended[folds == fold] = stacked[folds == fold] @ refitted
    return blended


def _folds(dataset: Dataset, rows: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each of `rows`, stratified, groups kept together where the table has them."""
    codes = dataset.encoded.group_codes
    groups = None if codes is None else codes[dataset.rows[rows]]
    generator = np.random.default_rng([seed, FOLDS_STREAM])
    return assign_folds(dataset.label_index[rows], groups, num_folds=NUM_FOLDS, generator=generator)


class SimpleMembers:
    """The logistic regressions, fitted on a seeded sample of the training rows.

    Attributes: `models`; `val`, their probabilities [V, K] of the validation rows; `out_of_fold`, the probabilities of
    training rows by models that were fitted without them, or None where the validation rows chose the penalties.
    """

    def __init__(self, data: Data, config: Config, names: Sequence[str], class_weights: np.ndarray) -> None:
        rows, labels = sample(data.train, config.seed, config.num_classes)
        self.names = list(names)
        self.columns = build_linear_column_features(data.features)
        if config.text_name:
            cells = bag_of_words.word_cells(*data.train.token_chunks(rows))
            self.idf = bag_of_words.fit_idf(cells[1], len(rows))
            self.used = np.flatnonzero(self.idf.numpy())  # features of the words that may have a weight
        folds = _folds(data.train, rows, config.seed)
        is_cross_fitted = len(data.train) < MAX_CROSS_FITTED_ROWS and folds.max() > 0
        train = self.features(data.train, rows, cells if config.text_name else None)
        if is_cross_fitted:
            row_weights = class_weights[labels]
            fits = [fit_cross_fitted(train[name], labels, folds, row_weights, config.num_classes) for name in names]
        else:
            val_rows, val_labels = sample(data.val, config.seed, config.num_classes)
            val = self.features(data.val, val_rows)
            of_train, of_val = (labels, class_weights[labels]), (val_labels, class_weights[val_labels])
            fits = [fit_validated((train[name], *of_train), (val[name], *of_val), config.num_classes) for name in names]
        self.models = [fit.model for fit in fits]
        out_of_fold = [fit.probabilities for fit in fits]
        self.out_of_fold = of_labels(out_of_fold, labels, class_weights[labels]) if is_cross_fitted else None
        self.val = self.probabilities(data.val)

    def features(
        self, dataset: Dataset, positions: np.ndarray, cells: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    ) -> dict[str, torch.Tensor]:
        """Sparse CSR [N, F] of each member; of words and columns, the words come first. `cells`: of the words."""
        found = {}
        if set(READ_WORDS) & set(self.names):
            cells = cells or bag_of_words.word_cells(*dataset.token_chunks(positions))
            words = bag_of_words.design_matrix(cells, self.idf, self.used, len(positions))
            found[WORDS] = WORDS_SCALE * words
        if set(READ_COLUMNS) & set(self.names):
            found[COLUMNS] = self.columns.design_matrix(*dataset.columns(positions))
        if WORDS_AND_COLUMNS in self.names:
            found[WORDS_AND_COLUMNS] = _joined(found[WORDS], COLUMNS_SCALE * found[COLUMNS])
        return found

    def probabilities(self, dataset: Dataset) -> list[np.ndarray]:
        """Of all rows of a dataset, [N, K] of each member."""
        by_chunk = []
        for start in range(0, len(dataset), CHUNK_ROWS):
            features = self.features(dataset, np.arange(start, min(start + CHUNK_ROWS, len(dataset))))
            by_chunk.append(
                [model.probabilities(features[name]) for name, model in zip(self.names, self.models, strict=True)]
            )
        return [np.concatenate(of_member) for of_member in zip(*by_chunk, strict=True)]

    def tensors(self, blend: Blend) -> dict[str, torch.Tensor]:
        """The state of `blend` with the members' weights."""
        for name, model in zip(self.names, self.models, strict=True):
            if tensor_name(name) not in blend.linear:
                continue
            member, of_columns = blend.linear[tensor_name(name)], model.weight
            if name != COLUMNS:
                of_words, of_columns = model.weight.split([len(self.used), len(model.weight) - len(self.used)])
                blend.words.idf.copy_(self.idf)
                scores = blend.word_scores_of(tensor_name(name))
                blend.words.weight[torch.from_numpy(self.used), scores] = WORDS_SCALE * of_words
            if member.weight is not None:
                member.weight.copy_(of_columns if name == COLUMNS else COLUMNS_SCALE * of_columns)
            member.bias.copy_(model.bias)
        return blend.state_dict()


def _joined(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two sparse CSR matrices of the same rows as one, the columns of `right` after those of `left`."""
    left, right = left.to_sparse_coo(), right.to_sparse_coo()
    shift = torch.tensor([[0], [left.shape[1]]])
    indices = torch.cat([left.indices(), right.indices() + shift], dim=1)
    shape = (left.shape[0], left.shape[1] + right.shape[1])
    values = torch.cat([left.values(), right.values()])
    return torch.sparse_coo_tensor(indices, values, shape).coalesce().to_sparse_csr()
