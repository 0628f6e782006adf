"""How much worse the model gets when a column, or the text, is that of another row (Breiman 2001).

N rows, D width of a text vector.
"""

from collections.abc import Iterator, Sequence
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

MAX_ROWS, MIN_ROWS, REPEATS = 1000, 200, 5


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
    """Drops of the metric on a sample of the labelled rows, the largest first, or the reason why there are none.

    The text is encoded once: only its vectors change places, so that every drop costs one pass through the head.
    """
    num_rows = min(MAX_ROWS, max(MIN_ROWS, len(dataset) // 4))  # encoding them is a quarter of the scoring, at most
    positions = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:num_rows])
    labels = dataset.label_index[positions]
    vectors, numbers, categories = encode(model, dataset, positions, task)

    def score(vectors: torch.Tensor | None, numbers: torch.Tensor, categories: torch.Tensor) -> float | None:
        probabilities = torch.softmax(model.merge(vectors, numbers, categories), dim=1).numpy(force=True)
        preds = probabilities[:, 1] if task.is_binary else probabilities
        kind = "binary" if task.is_binary else "multiclass"
        return compute_metrics(
            preds, labels, [metric], kind, len(class_names), "x", class_names=class_names, threshold=threshold
        ).values[f"x/{metric}"]

    with torch.no_grad():
        whole = score(vectors, numbers, categories)
        if whole is None:
            return {"reason": f"{metric} is undefined on {len(positions)} rows"}
        generator = np.random.default_rng(seed)
        items = []
        for name, kind, swap in inputs_of(dataset.features, vectors, numbers, categories, text_name):
            drops = [whole - score(*swap(generator.permutation(len(positions)))) for _ in range(REPEATS)]
            items.append({"name": name, "kind": kind, "drop": float(np.mean(drops)), "spread": float(np.std(drops))})
    return {
        "metric": metric,
        "rows": len(positions),
        "repeats": REPEATS,
        "items": sorted(items, key=lambda item: -item["drop"]),
    }


def encode(
    model: MultimodalBert, dataset: Dataset, positions: np.ndarray, task: Task
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Text vectors [N, D] (None: a columns-only model), numbers [N, F], categories [N, K], on the device."""
    vectors = None
    if model.text_subnetwork is not None:
        parts = evaluation_batches(dataset.lengths[positions], token_budget=TOKEN_BUDGETS[task.device.type])
        made = []
        with torch.no_grad(), autocast(task.precision, task.device):
            for rows in parts:
                batch = dataset.batch(positions[rows])
                made.append(model.text_subnetwork(batch.input_ids, batch.attention_mask).float())
        order = torch.from_numpy(np.argsort(np.concatenate(parts))).to(task.device)
        vectors = torch.cat(made)[order]
    numbers, categories = (torch.from_numpy(values).to(task.device) for values in dataset.columns(positions))
    return vectors, numbers, categories


def inputs_of(
    features: Features, vectors: torch.Tensor | None, numbers: torch.Tensor, categories: torch.Tensor, text_name: str
) -> Iterator[tuple[str, str, Any]]:
    """Name, kind, and a function from an order of rows to the model's inputs with this one in that order."""

    def moved(values: torch.Tensor, places: list[int], order: np.ndarray) -> torch.Tensor:
        made = values.clone()
        made[:, places] = values[torch.from_numpy(order).to(values.device)][:, places]
        return made

    if vectors is not None:
        yield (
            text_name,
            "text",
            lambda order: (vectors[torch.from_numpy(order).to(vectors.device)], numbers, categories),
        )
    indicator = len(features.number_names)
    for place, name in enumerate(features.number_names):
        places = [place, indicator] if features.has_indicator[place] else [place]
        indicator += features.has_indicator[place]
        yield name, "numeric", lambda order, places=places: (vectors, moved(numbers, places, order), categories)
    for place, name in enumerate(features.category_names):
        yield name, "categorical", lambda order, place=place: (vectors, numbers, moved(categories, [place], order))
