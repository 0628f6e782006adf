"""The section of a report about a blend: its members, their weights, and the metrics of each alone.

N rows, K classes.
"""

from typing import Any

import numpy as np
import torch

from mmbert_core.data.batches import evaluation_batches
from mmbert_core.evaluation.blending import DESCRIPTIONS, NETWORK
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.inference.scoring import TOKEN_BUDGETS
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.report_schema import Blend, BlendMember, Cell

METRICS = ("auroc", "average_precision", "log_loss", "accuracy")
SMALLEST = 1e-7  # of a probability that is computed from those of the blend


def blend_section(evaluated: EvaluatedRows) -> Blend:
    """The members with their metrics on the evaluated rows; one without weight has only its validation loss."""
    record = evaluated.loaded.blend
    assert record is not None
    by_member = member_probabilities(evaluated)
    rows = [
        BlendMember(
            name=member.name,
            how=DESCRIPTIONS[member.name],
            weight=member.weight,
            val_log_loss=member.val_log_loss,
            metrics=_cells(evaluated, by_member[member.name]) if member.name in by_member else {},
        )
        for member in record.members
    ]
    preds = evaluated.preds
    blended = np.stack([1 - preds, preds], axis=1) if preds.ndim == 1 else preds
    whole = BlendMember(name="the blend", val_log_loss=record.val_log_loss, metrics=_cells(evaluated, blended))
    return Blend(rows=[whole, *rows], metrics=list(METRICS), val_rows=record.rows)


def member_probabilities(evaluated: EvaluatedRows) -> dict[str, np.ndarray]:
    """Member with a weight -> probabilities [N, K] of the rows.

    Those of the network follow from the blend's and the other members', so that no text is encoded again.
    """
    record, blend = evaluated.loaded.blend, evaluated.loaded.model.blend
    dataset, device, num_classes = evaluated.dataset, evaluated.task.device, len(evaluated.class_names)
    weights = {member.name: member.weight for member in record.members if member.weight}
    found = {name: np.empty((len(dataset), num_classes)) for name in weights}
    with torch.no_grad():
        for positions in evaluation_batches(dataset.lengths, token_budget=TOKEN_BUDGETS[device.type]):
            batch = dataset.batch(positions).to(device)
            words = None if blend.words is None else blend.words(batch.input_ids, batch.attention_mask)
            unused = torch.zeros(len(positions), num_classes, device=device)  # logits of the network
            results = blend.member_log_probabilities(unused, words, batch.numbers, batch.categories)
            for name, log_probabilities in zip(weights, results, strict=True):
                found[name][positions] = log_probabilities.exp().double().numpy(force=True)
    if NETWORK in found:
        preds = evaluated.preds.astype(np.float64)
        blended = np.stack([1 - preds, preds], axis=1) if preds.ndim == 1 else preds
        others = sum((weight * found[name] for name, weight in weights.items() if name != NETWORK), np.zeros(1))
        network = np.maximum((blended - others) / weights[NETWORK], SMALLEST)
        found[NETWORK] = network / network.sum(axis=1, keepdims=True)
    return found


def _cells(evaluated: EvaluatedRows, probabilities: np.ndarray) -> dict[str, Cell | None]:
    """Metrics of probabilities [N, K]; accuracy with the larger probability as the prediction."""
    preds = probabilities.astype(np.float32)
    metrics: dict[str, Any] = compute_metrics(
        preds[:, 1] if evaluated.task.is_binary else preds,
        evaluated.labels,
        list(METRICS),
        evaluated.loaded.config.task,
        len(evaluated.class_names),
        "test",
        class_names=evaluated.class_names,
    ).values
    return {name: Cell(value=metrics[f"test/{name}"]) for name in METRICS}
