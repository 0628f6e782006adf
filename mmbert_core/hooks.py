"""The original module's hooks as plain functions of the same names: what happens, while `loop` says when.

A hook takes what it uses and returns what it made.
B rows of a batch, N rows of the evaluated table, K classes.
`configure_optimizers` is in `optim`, `add_loss_op` in `model.losses`, `build_merge_subnetwork` in `model.fusion`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmbert_core.config import Config
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.inference.precision import autocast
from mmbert_core.inference.scoring import BatchResult, EpochResult, Task, gather_results
from mmbert_core.model.losses import row_losses, row_weights
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.report.results import write_results
from mmbert_core.runtime import distributed
from mmbert_core.storage.files import make_folder_by_time, names_by_time, remove_path

logger = logging.getLogger(__name__)

MODEL_CLASS = "multimodal_bert"


# ---- one batch ----


def run_epoch(
    model: nn.Module, batch: Batch, stage: str, *, task: Task, weight_sum: float | None = None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """In spite of its name one batch: `(loss, preds, labels)`; stage `pred` has neither loss nor labels.

    The loss is the weighted losses over `weight_sum`, by default the batch's own, as `nn.CrossEntropyLoss(weight)` has it.
    preds: softmax probability of class 1 [B] when binary, else [B, K].
    """
    batch = batch.to(task.device)
    with autocast(task.precision, task.device):
        logits = model(batch.input_ids, batch.attention_mask, TabAE.combine_tab_data(batch), batch.categories)
    logits = logits.float()
    probabilities = torch.softmax(logits, dim=1)
    preds = probabilities[:, 1] if task.is_binary else probabilities
    if stage == "pred" or batch.labels is None:
        return None, preds, None
    divisor = row_weights(task.loss_op, batch.labels).sum() if weight_sum is None else weight_sum
    return row_losses(task.loss_op, logits, batch.labels).sum() / divisor, preds, batch.labels


def training_step(
    model: nn.Module, batch: Batch, batch_idx: int, *, task: Task, weight_sum: float | None = None
) -> dict[str, torch.Tensor]:
    """`{'loss': loss}` of one micro-batch as its share of the step: over the weight sum of all rows of the step.

    The shares of all micro-batches and ranks add up to `train_loss`. The original took the mean of rank means.
    """
    loss, _, _ = run_epoch(model, batch, "train", task=task, weight_sum=weight_sum)
    return {"loss": loss}


def predict_step(
    model: nn.Module, batch: Batch, batch_idx: int, *, task: Task
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """preds, or `(preds, labels)` where the batch has labels."""
    _, preds, _ = run_epoch(model, batch, "pred", task=task)
    return preds if batch.labels is None else (preds, batch.labels)


# ---- validation ----


def on_validation_epoch_start() -> list[BatchResult]:
    """The empty list that the validation steps fill (the original's id, prediction and label lists)."""
    return []


def validation_step(model: nn.Module, batch: Batch, batch_idx: int, outputs: list[BatchResult], *, task: Task) -> None:
    """Extend `outputs` by the batch's results, on the CPU."""
    outputs.append(_evaluate_batch(model, batch, batch_idx, "val", task))


def on_validation_epoch_end(
    outputs: list[BatchResult], num_rows: int, *, config: Config, class_names: Sequence[str]
) -> tuple[dict[str, Any], EpochResult]:
    """Collective. `val_loss` and `val/<metric>` over all rows of all ranks, the same on every rank, and the rows themselves.

    None: undefined, its reason under `undefined`.
    """
    result = gather_results(outputs, num_rows)
    choices = dict.fromkeys([*config.metric_choices, config.early_stop_metric.removeprefix("val/")])
    choices.pop("val_loss", None)
    metrics = compute_metrics(
        result.preds, result.labels, tuple(choices), config.task, config.num_classes, "val", class_names=class_names
    )
    # rank 0's figures for all: a last bit that differs between machines must not stop some ranks and not others
    values = {
        "val_loss": result.loss,
        **metrics.values,
        **({"undefined": metrics.undefined} if metrics.undefined else {}),
    }
    return distributed.broadcast_object(values), result


# ---- test ----


def choose_test_folder(model_path: str | Path) -> str:
    """Collective. The name of a run's own test folder, chosen by rank 0 and kept in the run's state: a test that is done once more replaces it."""
    return distributed.on_main(lambda: next(names_by_time(Path(model_path), MODEL_CLASS)).name)


def on_test_epoch_start(model_path: str | Path, name: str | None = None) -> tuple[list[BatchResult], Path]:
    """Collective. The empty list, and the new folder `multimodal_bert-<time>` that rank 0 chose and made.

    `name`: of `choose_test_folder`; what a killed test of the same run left there is removed.
    """

    def make_folder() -> Path:
        if name is None:
            return make_folder_by_time(Path(model_path), MODEL_CLASS)
        folder = Path(model_path) / name
        remove_path(folder)
        folder.mkdir(parents=True)
        return folder

    return [], distributed.on_main(make_folder)


def test_step(
    model: nn.Module, batch: Batch, batch_idx: int, outputs: list[BatchResult], *, task: Task, has_labels: bool
) -> None:
    """Extend `outputs`; stage `test` with labels, else `pred`. Which one is decided once, from the table's columns."""
    outputs.append(_evaluate_batch(model, batch, batch_idx, "test" if has_labels else "pred", task))


def on_test_epoch_end(
    outputs: list[BatchResult],
    dataset: Dataset,
    folder: Path,
    *,
    config: Config,
    class_names: Sequence[str],
    decision: Decision | None,
) -> tuple[dict[str, Any], EpochResult]:
    """Collective. Rank 0 writes `test_result_0.tsv` in input order and `test_metrics.json`; all ranks get the figures and the rows.

    `decision` is rank 0's: the others may not have it.
    """
    result = gather_results(outputs, len(dataset))

    def write() -> dict[str, Any]:
        return write_results(result, dataset, folder, config=config, class_names=class_names, decision=decision)

    return distributed.on_main(write, long_timeout=True), result


# ---- both ----


def _evaluate_batch(model: nn.Module, batch: Batch, batch_idx: int, stage: str, task: Task) -> BatchResult:
    """Run one batch without gradients and bring its results to the CPU."""
    loss, preds, labels = run_epoch(model, batch, stage, task=task)
    weight_sum = 0.0 if labels is None else float(row_weights(task.loss_op, labels).sum())
    return BatchResult(
        batch_idx=batch_idx,
        row_index=batch.row_index.numpy(force=True),
        preds=preds.numpy(force=True),
        labels=None if labels is None else labels.numpy(force=True),
        ids=batch.ids,
        loss_sum=0.0 if loss is None or weight_sum == 0 else float(loss) * weight_sum,
        weight_sum=weight_sum,
    )
