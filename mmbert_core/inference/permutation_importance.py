"""Permutation importance: how much the metric drops when a column, or the text, is shuffled over rows (Breiman 2001).

N rows, F numeric inputs, K categorical columns.
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
from mmbert_core.model.text_features import TextFeatures

MAX_ROWS, MIN_ROWS = 1000, 200  # of the sample on which drops are measured
REPEATS = 5  # shuffles of each column

# features of the texts, numbers [N, F], categories [N, K]
Inputs = tuple[TextFeatures | None, torch.Tensor, torch.Tensor]


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

    Each text is encoded once; a shuffle reorders the features of the texts and costs one pass through the other layers.
    """
    num_rows = min(MAX_ROWS, max(MIN_ROWS, len(dataset) // 4))  # so encoding costs at most a quarter of the evaluation
    positions = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num_rows])
    labels = dataset.label_index[positions]
    texts, numbers, categories = encode(model, dataset, positions, task)

    def score(texts: TextFeatures | None, numbers: torch.Tensor, categories: torch.Tensor) -> float | None:
        probabilities = torch.softmax(model.merge(texts, numbers, categories), dim=1).numpy(force=True)
        preds = probabilities[:, 1] if task.is_binary else probabilities
        kind = "binary" if task.is_binary else "multiclass"
        metrics = compute_metrics(
            preds, labels, [metric], kind, len(class_names), "x", class_names=class_names, threshold=threshold
        )
        return metrics.values[f"x/{metric}"]

    with torch.no_grad():
        baseline = score(texts, numbers, categories)
        if baseline is None:
            return {"reason": f"{metric} is undefined on {len(positions)} rows"}
        generator = np.random.default_rng(seed)
        items = []
        for name, kind, permute in inputs_to_permute(dataset.features, texts, numbers, categories, text_name):
            drops = [baseline - score(*permute(generator.permutation(len(positions)))) for _ in range(REPEATS)]
            items.append({"name": name, "kind": kind, "drop": float(np.mean(drops)), "spread": float(np.std(drops))})
    return {
        "metric": metric,
        "rows": len(positions),
        "repeats": REPEATS,
        "items": sorted(items, key=lambda item: -item["drop"]),
    }


def encode(model: MultimodalBert, dataset: Dataset, positions: np.ndarray, task: Task) -> Inputs:
    """Features of the texts (None: columns only), numbers [N, F], categories [N, K], on the task's device."""
    texts = None
    if model.text_subnetwork is not None:
        plan = evaluation_batches(dataset.lengths[positions], token_budget=TOKEN_BUDGETS[task.device.type])
        by_batch = []
        with torch.no_grad(), autocast(task.precision, task.device):
            for rows in plan:
                batch = dataset.batch(positions[rows])
                by_batch.append(model.encode_text(batch.input_ids, batch.attention_mask).float())
        order = torch.from_numpy(np.argsort(np.concatenate(plan))).to(task.device)
        texts = TextFeatures.cat(by_batch).select(order)
    numbers, categories = (torch.from_numpy(values).to(task.device) for values in dataset.columns(positions))
    return texts, numbers, categories


def inputs_to_permute(
    features: Features, texts: TextFeatures | None, numbers: torch.Tensor, categories: torch.Tensor, text_name: str
) -> Iterator[tuple[str, str, Callable[[np.ndarray], Inputs]]]:
    """For the text and each column: its name, its kind, and a function from a row order [N] to inputs so reordered.

    A numeric column is reordered together with its missing indicator.
    """

    def reorder(values: torch.Tensor, order: np.ndarray, columns: list[int]) -> torch.Tensor:
        copy = values.clone()
        copy[:, columns] = values[torch.from_numpy(order).to(values.device)][:, columns]
        return copy

    def permute_text(order: np.ndarray) -> Inputs:
        return texts.select(torch.from_numpy(order).to(numbers.device)), numbers, categories

    def permute_numbers(columns: list[int]) -> Callable[[np.ndarray], Inputs]:
        return lambda order: (texts, reorder(numbers, order, columns), categories)

    def permute_category(column: int) -> Callable[[np.ndarray], Inputs]:
        return lambda order: (texts, numbers, reorder(categories, order, [column]))

    if texts is not None:
        yield text_name, "text", permute_text
    indicator = len(features.number_names)  # index of the next missing indicator; they follow the numbers
    for column, name in enumerate(features.number_names):
        columns = [column, indicator] if features.has_indicator[column] else [column]
        indicator += features.has_indicator[column]
        yield name, "numeric", permute_numbers(columns)
    for column, name in enumerate(features.category_names):
        yield name, "categorical", permute_category(column)
