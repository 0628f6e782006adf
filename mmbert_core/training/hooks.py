"""The original module's hooks as plain functions of the same names: what happens, while `loop` says when. Floor 2.

Imports distributed, config, files, data, model, evaluation, assessment and optim. A hook takes what it uses and returns what it made.
B rows of a batch, N rows of the evaluated table, K classes.
`configure_optimizers` is in `optim`, `add_loss_op` in `model.losses`, `build_merge_subnetwork` in `model.fusion`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmbert_core import distributed
from mmbert_core.assessment import figures_of
from mmbert_core.config import Config
from mmbert_core.data.batches import deal, evaluation_batches
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.distributed import DistContext
from mmbert_core.evaluation.judgement import Judgement
from mmbert_core.evaluation.metrics import compute_metrics
from mmbert_core.evaluation.plots import write_plots
from mmbert_core.evaluation.predictions import Columns, prediction_columns, table_line, table_rows
from mmbert_core.files import make_folder_by_time, names_by_time, remove_path, write_json, write_text
from mmbert_core.model.losses import LossOp, row_losses, row_weights
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.progress import slow_step
from mmbert_core.training.optim import autocast

logger = logging.getLogger(__name__)

MODEL_CLASS = "multimodal_bert"
TOKEN_BUDGETS = {"cpu": 1024, "cuda": 16384}  # of an evaluation batch: what a CPU keeps in its caches, what fills a GPU


@dataclass(frozen=True)
class Task:
    """What every step needs beside the model and the batch."""

    is_binary: bool
    loss_op: LossOp  # logits [B, K], labels [B] -> weighted losses [B]
    precision: str
    device: torch.device


@dataclass(frozen=True)
class BatchResult:
    """Results of one evaluated batch, on the CPU."""

    batch_idx: int
    row_index: np.ndarray  # [B] rows of the table
    preds: np.ndarray  # [B] probability of class 1, or [B, K]
    labels: np.ndarray | None  # [B]
    ids: list[str] | None
    loss_sum: float  # weighted losses of the batch's rows
    weight_sum: float


@dataclass(frozen=True)
class EpochResult:
    """Results of all ranks, every row once, in the table's order."""

    preds: np.ndarray  # [N] or [N, K]
    labels: np.ndarray | None  # [N]
    ids: list[str] | None
    loss: float | None  # weighted losses over their weight sum, over all rows; None where that is no finite number


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


def training_step(model: nn.Module, batch: Batch, batch_idx: int, *, task: Task, weight_sum: float | None = None) -> dict[str, torch.Tensor]:
    """`{'loss': loss}` of one micro-batch as its share of the step: over the weight sum of all rows of the step.

    The shares of all micro-batches and ranks add up to `train_loss`. The original took the mean of rank means.
    """
    loss, _, _ = run_epoch(model, batch, "train", task=task, weight_sum=weight_sum)
    return {"loss": loss}


def predict_step(model: nn.Module, batch: Batch, batch_idx: int, *, task: Task) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
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
    metrics = compute_metrics(result.preds, result.labels, tuple(choices), config.task, config.num_classes, "val", class_names=class_names)
    # rank 0's figures for all: a last bit that differs between machines must not stop some ranks and not others
    values = {"val_loss": result.loss, **metrics.values, **({"undefined": metrics.undefined} if metrics.undefined else {})}
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


def test_step(model: nn.Module, batch: Batch, batch_idx: int, outputs: list[BatchResult], *, task: Task, has_labels: bool) -> None:
    """Extend `outputs`; stage `test` with labels, else `pred`. Which one is decided once, from the table's columns."""
    outputs.append(_evaluate_batch(model, batch, batch_idx, "test" if has_labels else "pred", task))


def on_test_epoch_end(
    outputs: list[BatchResult], dataset: Dataset, folder: Path, *, config: Config, class_names: Sequence[str], judgement: Judgement | None
) -> tuple[dict[str, Any], EpochResult]:
    """Collective. Rank 0 writes `test_result_0.tsv` in input order and `test_metrics.json`; all ranks get the figures and the rows.

    `judgement` is rank 0's: the others may not have it.
    """
    result = gather_results(outputs, len(dataset))

    def write() -> dict[str, Any]:
        return write_results(result, dataset, folder, config=config, class_names=class_names, judgement=judgement)

    return distributed.on_main(write, patient=True), result


def columns_of(result: EpochResult, dataset: Dataset, *, config: Config, class_names: Sequence[str], judgement: Judgement) -> Columns:
    """Scored rows as a prediction file has them; without an id column where the rows came without ids."""
    return prediction_columns(
        result.preds, class_names, is_binary=config.is_binary, id_name=None if result.ids is None else config.id_name, ids=result.ids,
        labels=dataset.label_strings(range(len(dataset))) if dataset.has_labels else None,
        calibrated=judgement.calibration.apply(result.preds), threshold=judgement.threshold.value,
    )  # fmt: skip


def broken_rows(preds: np.ndarray) -> np.ndarray:
    """Positions of the rows, of [N] or [N, K] probabilities, with one that is no finite number."""
    return np.unique(np.argwhere(~np.isfinite(preds))[:, 0])


def write_results(
    result: EpochResult, dataset: Dataset, folder: Path, *, config: Config, class_names: Sequence[str], judgement: Judgement
) -> dict[str, Any]:
    """Rank 0 only. Scored rows as a prediction file, figures and pictures in `folder`; returns the figures."""
    figures: dict[str, Any] = {"test/num_rows": len(dataset)}
    broken = broken_rows(result.preds)
    if len(broken):
        logger.warning("probabilities that are no numbers: %d of %d rows, first %s: their pred says nothing", len(broken), len(dataset), dataset.where(broken[0]))
    if dataset.has_labels:
        if result.labels is not None:  # else rows of a prediction, which has no loss
            figures["test_loss"] = result.loss
        figures |= figures_of(result.preds, dataset.label_index, dataset, stage="test", config=config, class_names=class_names, judgement=judgement)
    with slow_step("test_result_0.tsv"):
        columns = columns_of(result, dataset, config=config, class_names=class_names, judgement=judgement)
        write_text(folder / "test_result_0.tsv", "".join([table_line(columns), *table_rows(columns)]))
    write_json(folder / "test_metrics.json", figures)
    if dataset.has_labels:
        with slow_step("pictures of the test"):
            draw(result.preds, dataset.label_index, folder / "plots", class_names, judgement.threshold.value)
    return figures


def draw(preds: np.ndarray, labels: np.ndarray, folder: Path, class_names: Sequence[str], threshold: float) -> None:
    """Rank 0 only. Pictures are an extra: whatever goes wrong with them, the figures are written."""
    try:
        if not write_plots(preds, labels, folder, class_names=class_names, threshold=threshold):
            logger.info("no pictures of the test: they need matplotlib (extra `plots`) and labelled rows of several classes")
    except Exception as error:  # noqa: BLE001 - matplotlib, fonts, disks
        logger.warning("no pictures of the test: %s: %s", type(error).__name__, error)


# ---- both ----


def own_batches(dataset: Dataset, context: DistContext) -> Iterator[tuple[int, Batch] | None]:
    """This rank's share of the evaluation batches, with their numbers: whole batches, so that no shape depends on the ranks.

    As many items on every rank, so that the ranks can ask each other something at each; None: nothing more to do here.
    """
    plan = evaluation_batches(dataset.lengths, token_budget=TOKEN_BUDGETS[context.device.type])
    hands = deal([dataset.cost(rows) for rows in plan], context.world_size)
    hand = hands[context.rank]
    for index in hand:
        yield index, dataset.batch(plan[index])
    for _ in range(max(map(len, hands)) - len(hand)):
        yield None


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


def gather_results(outputs: list[BatchResult], num_rows: int) -> EpochResult:
    """Collective. The results of all ranks through `all_gather_object`, put in the table's order.

    Raises `RuntimeError` unless every row is there exactly once. Sums run in batch order, so that the figures do not
    depend on the number of ranks.
    """
    results = sorted((item for part in distributed.all_gather_objects(outputs) for item in part), key=lambda item: item.batch_idx)
    rows = np.concatenate([item.row_index for item in results]) if results else np.zeros(0, np.int64)
    if len(rows) != num_rows or not np.array_equal(np.bincount(rows, minlength=num_rows), np.ones(num_rows)):
        raise RuntimeError(f"expected each of {num_rows} rows once, found {len(rows)} results for {len(np.unique(rows))} rows")
    if not results:
        return EpochResult(np.zeros(0, np.float32), np.zeros(0, np.int64), [], None)
    order = np.argsort(rows)
    ids = None if results[0].ids is None else [cell for item in results for cell in item.ids or []]
    weight_sum = sum(item.weight_sum for item in results)
    loss = sum(item.loss_sum for item in results) / weight_sum if weight_sum > 0 else math.nan
    return EpochResult(
        preds=np.concatenate([item.preds for item in results])[order],
        labels=None if results[0].labels is None else np.concatenate([item.labels for item in results])[order],
        ids=None if ids is None else [ids[position] for position in order],
        loss=loss if math.isfinite(loss) else None,
    )
