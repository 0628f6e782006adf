"""The original LightningModule's hooks as plain functions of the same names; `training.loop` calls them.

A hook takes what it uses as arguments and returns its result. B rows of a batch, N rows of the evaluated table,
K classes.

Hooks in other modules: `configure_optimizers` in `training.optim`, `add_loss_op` in `model.losses`,
`build_merge_subnetwork` in `model.fusion`, `forward` in `model.multimodal_bert`, `combine_tab_data` in
`model.tabular_encoder`, `compute_metrics` in `evaluation.metrics`.
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
from mmbert_core.model.losses import mean_over_members, row_losses, row_weights
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
    """`(loss, preds, labels)` of one batch, although the original's name says epoch.

    loss: the sum of the weighted losses, those of auxiliary heads included, divided by `weight_sum`; by default that is
    the sum of the batch's weights, as in `nn.CrossEntropyLoss(weight)`. preds: softmax probability of class 1 [B] when
    binary, else of all [B, K]. labels [B]. Loss and labels are None in stage `pred` and for a batch without labels.
    """
    batch = batch.to(task.device)
    with autocast(task.precision, task.device):
        outputs = model(batch.input_ids, batch.attention_mask, TabAE.combine_tab_data(batch), batch.categories)
    logits, *auxiliary = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    logits = logits.float()
    probabilities = torch.softmax(mean_over_members(logits), dim=1)
    preds = probabilities[:, 1] if task.is_binary else probabilities
    if stage == "pred" or batch.labels is None:
        return None, preds, None
    divisor = row_weights(task.loss_op, batch.labels).sum() if weight_sum is None else weight_sum
    losses = row_losses(task.loss_op, logits, batch.labels)
    for other_logits in auxiliary:
        losses = losses + task.aux_loss_weight * row_losses(task.loss_op, other_logits, batch.labels)
    return losses.sum() / divisor, preds, batch.labels


def training_step(
    model: nn.Module, batch: Batch, batch_idx: int, *, task: Task, weight_sum: float | None = None
) -> dict[str, torch.Tensor]:
    """`{'loss': loss}` of one micro-batch, divided by `weight_sum`: the class weights of all rows of the step.

    So the losses of all micro-batches and ranks add up to `train_loss`. The original averages the means of the ranks.
    """
    loss, _, _ = run_epoch(model, batch, "train", task=task, weight_sum=weight_sum)
    return {"loss": loss}


def predict_step(
    model: nn.Module, batch: Batch, batch_idx: int, *, task: Task
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`preds`, or `(preds, labels)` when the batch has labels."""
    _, preds, _ = run_epoch(model, batch, "pred", task=task)
    return preds if batch.labels is None else (preds, batch.labels)


# ---- validation ----


def on_validation_epoch_start() -> list[BatchResult]:
    """The empty list that the validation steps fill (the original's id, prediction and label lists)."""
    return []


def validation_step(model: nn.Module, batch: Batch, batch_idx: int, outputs: list[BatchResult], *, task: Task) -> None:
    """Append the batch's results to `outputs`, on the CPU."""
    outputs.append(_evaluate_batch(model, batch, batch_idx, "val", task))


def on_validation_epoch_end(
    outputs: list[BatchResult], num_rows: int, *, config: Config, class_names: Sequence[str]
) -> tuple[dict[str, Any], EpochResult]:
    """Collective. `val_loss` and `val/<metric>` over all N rows, the same on every rank, and the results by row.

    An undefined metric is None; `undefined` maps its name to the reason.
    """
    result = gather_results(outputs, num_rows)
    choices = dict.fromkeys([*config.metric_choices, config.early_stop_metric.removeprefix("val/")])
    choices.pop("val_loss", None)
    metrics = compute_metrics(
        result.preds, result.labels, tuple(choices), config.task, config.num_classes, "val", class_names=class_names
    )
    undefined = {"undefined": metrics.undefined} if metrics.undefined else {}
    values = {"val_loss": result.loss, **metrics.values, **undefined}
    # those of rank 0: values that differ in the last bit between machines must not stop some ranks early and not others
    return distributed.broadcast_object(values), result


# ---- test ----


def choose_test_folder(model_path: str | Path) -> str:
    """Collective. A new name for the run's test folder, chosen by rank 0.

    The run's state keeps it, so that a repeated test replaces the folder of the first.
    """
    return distributed.on_main(lambda: next(names_by_time(Path(model_path), MODEL_CLASS)).name)


def on_test_epoch_start(model_path: str | Path, name: str | None = None) -> tuple[list[BatchResult], Path]:
    """Collective. The empty list, and the folder `multimodal_bert-<time>`, which rank 0 has created.

    `name`: from `choose_test_folder`; the folder of a killed test of the same run is replaced. None: a new name.
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
    """Append the batch's results to `outputs`, on the CPU. `has_labels`: whether the test table has a label column."""
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
    """Collective. Rank 0 writes `test_result_0.tsv` in input order and `test_metrics.json`.

    Returns what test_metrics.json holds, and the results by row. `decision` is used on rank 0 only; the other ranks may
    pass None.
    """
    result = gather_results(outputs, len(dataset))

    def write() -> dict[str, Any]:
        return write_results(result, dataset, folder, config=config, class_names=class_names, decision=decision)

    return distributed.on_main(write, long_timeout=True), result


# ---- validation and test ----


def _evaluate_batch(model: nn.Module, batch: Batch, batch_idx: int, stage: str, task: Task) -> BatchResult:
    """Results of one batch on the CPU. The caller turns gradients off."""
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
