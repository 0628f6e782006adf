"""Permutation importance: how much the metric drops when a column, or the text, is shuffled over rows (Breiman 2001).

N rows, F numeric inputs, K categorical columns, D width of a text vector.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mmbert_core.data.batches import evaluation_batches
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.features import Features
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.inference.precision import autocast
from mmbert_core.inference.scoring import TOKEN_BUDGETS, Task
from mmbert_core.model.multimodal_bert import MultimodalBert

MAX_ROWS, MIN_ROWS = 1000, 200  # of the sample on which drops are measured
REPEATS = 5  # shuffles of each column

Inputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]  # vectors [N, D], numbers [N, F], categories [N, K]


def permutation_importance(
    model: MultimodalBert,
    dataset: Dataset,
    *,
    task: Task,
    metric: str,
    class_names: Sequence[str],
    threshold: float,
    text_name: str,
    seed: int,
) -> dict[str, Any]:
    """Drops of the metric on a sample of the labelled rows, the largest first, or the `reason` why there are none.

    Each text is encoded once; a shuffle reorders the text vectors and costs one pass through the other layers.
    """
    num_rows = min(MAX_ROWS, max(MIN_ROWS, len(dataset) // 4))  # so encoding costs at most a quarter of the evaluation
    positions = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num_rows])
    labels = dataset.label_index[positions]
    vectors, numbers, categories = encode(model, dataset, positions, task)

    def score(vectors: torch.Tensor | None, numbers: torch.Tensor, categories: torch.Tensor) -> float | None:
        probabilities = torch.softmax(model.merge(vectors, numbers, categories), dim=1).numpy(force=True)
        preds = probabilities[:, 1] if task.is_binary else probabilities
        kind = "binary" if task.is_binary else "multiclass"
        metrics = compute_metrics(
            preds, labels, [metric], kind, len(class_names), "x", class_names=class_names, threshold=threshold
        )
        return metrics.values[f"x/{metric}"]

    with torch.no_grad():
        baseline = score(vectors, numbers, categories)
        if baseline is None:
            return {"reason": f"{metric} is undefined on {len(positions)} rows"}
        generator = np.random.default_rng(seed)
        items = []
        for name, kind, permute in inputs_to_permute(dataset.features, vectors, numbers, categories, text_name):
            drops = [baseline - score(*permute(generator.permutation(len(positions)))) for _ in range(REPEATS)]
            items.append({"name": name, "kind": kind, "drop": float(np.mean(drops)), "spread": float(np.std(drops))})
    return {
        "metric": metric,
        "rows": len(positions),
        "repeats": REPEATS,
        "items": sorted(items, key=lambda item: -item["drop"]),
    }


def encode(model: MultimodalBert, dataset: Dataset, positions: np.ndarray, task: Task) -> Inputs:
    """Text vectors [N, D] (None for a columns-only model), numbers [N, F], categories [N, K], on the task's device."""
    vectors = None
    if model.text_subnetwork is not None:
        plan = evaluation_batches(dataset.lengths[positions], token_budget=TOKEN_BUDGETS[task.device.type])
        by_batch = []
        with torch.no_grad(), autocast(task.precision, task.device):
            for rows in plan:
                batch = dataset.batch(positions[rows])
                by_batch.append(model.text_subnetwork(batch.input_ids, batch.attention_mask).float())
        order = torch.from_numpy(np.argsort(np.concatenate(plan))).to(task.device)
        vectors = torch.cat(by_batch)[order]
    numbers, categories = (torch.from_numpy(values).to(task.device) for values in dataset.columns(positions))
    return vectors, numbers, categories


def inputs_to_permute(
    features: Features, vectors: torch.Tensor | None, numbers: torch.Tensor, categories: torch.Tensor, text_name: str
) -> Iterator[tuple[str, str, Callable[[np.ndarray], Inputs]]]:
    """For the text and each column: its name, its kind, and a function from a row order [N] to inputs so reordered.

    A numeric column is reordered together with its missing indicator.
    """

    def reorder(values: torch.Tensor, order: np.ndarray, columns: list[int] | None = None) -> torch.Tensor:
        reordered = values[torch.from_numpy(order).to(values.device)]
        if columns is None:
            return reordered
        copy = values.clone()
        copy[:, columns] = reordered[:, columns]
        return copy

    def permute_numbers(columns: list[int]) -> Callable[[np.ndarray], Inputs]:
        return lambda order: (vectors, reorder(numbers, order, columns), categories)

    def permute_category(column: int) -> Callable[[np.ndarray], Inputs]:
        return lambda order: (vectors, numbers, reorder(categories, order, [column]))

    if vectors is not None:
        yield text_name, "text", lambda order: (reorder(vectors, order), numbers, categories)
    indicator = len(features.number_names)  # index of the next missing indicator; they follow the numbers
    for column, name in enumerate(features.number_names):
        columns = [column, indicator] if features.has_indicator[column] else [column]
        indicator += features.has_indicator[column]
        yield name, "numeric", permute_numbers(columns)
    for column, name in enumerate(features.category_names):
        yield name, "categorical", permute_category(column)
