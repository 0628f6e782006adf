"""Everything of a run put together before its first step: a fresh start or the continuation of a checkpoint. Floor 2.

Imports distributed, config, data, model_folder and the files of this folder named before it (checkpoint, run_log, optim, hooks).
"""

import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import mmbert_core
from mmbert_core import distributed
from mmbert_core.config import FREE_ON_RESUME, Config
from mmbert_core.data.batches import settle_micro_batches, steps_per_epoch
from mmbert_core.data.prepare import Data
from mmbert_core.distributed import DistContext
from mmbert_core.errors import InputError
from mmbert_core.evaluation.metrics import check_metric_choices
from mmbert_core.files import read_json, write_json
from mmbert_core.model.losses import LossOp, add_loss_op, build_loss_op, row_weights
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model_folder import WEIGHTS, build_model, config_record
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import Checkpoint, TrainState
from mmbert_core.training.hooks import Task, run_epoch
from mmbert_core.training.optim import build_scaler, configure_optimizers, resolve_precision
from mmbert_core.training.run_log import RunLog

logger = logging.getLogger(__name__)

RESULTS = "train_results.json"
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}  # rows of a micro-batch when microbatches_per_step is auto


@dataclass(frozen=True)
class Plan:
    """Durations in optimizer steps, fixed before the first."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    validate_by_epoch: bool  # a share of an epoch counts from the epoch's start, a number of steps from the run's
    micro_batches: int


@dataclass
class Run:
    """All parts of a training run on this rank."""

    config: Config
    data: Data
    context: DistContext
    folder: Path
    model: MultimodalBert  # the raw module: evaluated and saved
    ddp_model: nn.Module  # the same module as training sees it
    task: Task
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    plan: Plan
    state: TrainState
    log: RunLog
    resolved: dict[str, Any]
    class_weights: np.ndarray  # [K] float64, as the loss weighs rows
    train_labels: np.ndarray  # [N] int64
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics.jsonl

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


# ---- before the process group: what a user's mistake can break ----


def prepare_model(config: Config, data: Data) -> tuple[MultimodalBert, str | None]:
    """Check the metric names and build the model. Raises `InputError`; needs no process group."""
    check_metric_choices(config.metric_choices, data.labels.names)
    if config.early_stop_metric != "val_loss":
        check_metric_choices([config.early_stop_metric.removeprefix("val/")], data.labels.names, key="early_stop_metric")
    return build_model(config, data.features)


def settle_class_weights(config: Config, data: Data) -> list[float] | None:
    """One weight per class: none, as given, or `balanced` = rows / (classes * rows of the class), from the training rows."""
    if config.class_weights == "balanced":
        counts = np.bincount(data.train.label_index, minlength=config.num_classes)
        return (len(data.train) / (config.num_classes * counts)).tolist()
    return None if config.class_weights is None else list(config.class_weights)


# ---- within the process group ----


def already_finished(config: Config) -> dict[str, Any] | None:
    """Collective. The results of the run in `model_path`, once all of it is written; else None."""

    def read() -> dict[str, Any] | None:
        try:
            return read_json(Path(config.model_path) / RESULTS)
        except (OSError, ValueError):  # not there, or torn: the end of the run is done once more
            return None

    return distributed.on_main(read)


def start_run(
    config: Config, data: Data, model: MultimodalBert, pooling: str | None, context: DistContext, *, loss_op: LossOp | None = None
) -> Run:
    """Collective. A run at its first step, or at the step of the newest whole checkpoint. `loss_op` replaces cross entropy."""
    folder = Path(config.model_path)
    check_agreement(config, data, context)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
        torch.use_deterministic_algorithms(True)
    found = read_for_all_ranks(config, data, folder / "checkpoints")
    old = found.state["resolved"] if found else {}
    precision = resolve_precision(old.get("precision", config.precision), context.device)
    micro = old.get("microbatches_per_step") or settle_micro_batches(
        config.microbatches_per_step, batch_size=config.batch_size, num_ranks=context.world_size, rows_at_once=ROWS_AT_ONCE[context.device.type]
    )
    resolved = {"pooling": old.get("pooling", pooling), "precision": precision, "microbatches_per_step": micro}
    if config.microbatches_per_step == "auto" and context.is_main and not found:
        logger.info("microbatches_per_step is auto; to repeat this run on another number of processes: --microbatches_per_step %d", micro)

    loss_op = build_loss_op(settle_class_weights(config, data)) if loss_op is None else add_loss_op(loss_op)
    class_weights = row_weights(loss_op, torch.arange(config.num_classes)).double().numpy()
    loss_op = loss_op.to(context.device) if isinstance(loss_op, nn.Module) else loss_op
    task = Task(config.is_binary, loss_op, precision, context.device)
    model.to(context.device).train()
    if found:
        model.load_state_dict(found.weights)
    freeze_unused(model, data, task)
    ddp_model = distributed.wrap_ddp(model, context)
    plan = make_plan(config, len(data.train), micro)
    optimizer, scheduler = configure_optimizers(model, config, plan.total_steps)
    scaler = build_scaler(precision, context.device)
    state = restore(found, model, optimizer, scheduler, scaler) if found else TrainState()
    distributed.on_main(lambda: open_folder(folder, config, resolved, fresh=found is None, finished=state.finished))
    log = RunLog(folder, is_main=context.is_main, first_step=state.step, total_steps=plan.total_steps)
    return Run(
        config, data, context, folder, model, ddp_model, task, optimizer, scheduler, scaler, plan, state, log, resolved,
        class_weights, np.asarray(data.train.label_index),
    )  # fmt: skip


def check_agreement(config: Config, data: Data, context: DistContext) -> None:
    """Collective. All ranks must have read the same config and data, or their plans would part; a node may hold old copies."""
    here = {**config.to_dict(), "device": context.device.type, **{path: value["sha256"] for path, value in data.fingerprints.items()}}
    for rank, there in enumerate(item for part in distributed.all_gather_objects([here]) for item in part):
        for key in sorted({*here, *there} - {"num_threads", "model_path", "cache_path"}):  # which may be a node's own
            if here.get(key) != there.get(key):
                raise InputError(f"{key}: expected the same on all ranks, found {here.get(key)!r} on rank {context.rank} and {there.get(key)!r} on rank {rank}")


def make_plan(config: Config, num_rows: int, micro_batches: int) -> Plan:
    """Epochs and shares of an epoch as optimizer steps."""
    per_epoch = steps_per_epoch(num_rows, config.batch_size)
    by_epoch = isinstance(config.val_check_interval, float)
    every = max(1, int(config.val_check_interval * per_epoch)) if by_epoch else int(config.val_check_interval)
    return Plan(config.max_epochs * per_epoch, per_epoch, every, by_epoch, micro_batches)


def open_folder(folder: Path, config: Config, resolved: dict[str, Any], *, fresh: bool, finished: bool) -> None:
    """Rank 0 only, after every check: the first thing a run writes."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.clean_up(folder / "checkpoints")
    if not finished:  # results of an earlier life, which would pass for this one's
        (folder / RESULTS).unlink(missing_ok=True)
    if fresh:
        write_json(folder / "config.json", config_record(config, resolved))


def read_for_all_ranks(config: Config, data: Data, folder: Path) -> Checkpoint | None:
    """Collective. Rank 0 chooses and reads the checkpoint, the others get step and tensors from it: no shared disk needed."""

    found: Checkpoint | None = None

    def choose() -> dict[str, Any] | None:
        nonlocal found
        path = checkpoint.find_checkpoint(folder, config.resume)
        if path is None:
            if (folder.parent / WEIGHTS).exists():
                raise InputError(f"{folder.parent}: expected an empty folder or a run to go on from, found a trained model without checkpoints: choose another model_path")
            return None
        found = checkpoint.read_checkpoint(path)
        checkpoint.check_resumable(found.state, config=config.to_dict(), fingerprints=data.fingerprints, free_keys=FREE_ON_RESUME)
        checkpoint.forget_lost_best(folder, found.state)
        logger.info("going on from %s", path)
        return found.state

    state = distributed.on_main(choose)
    if state is None:
        return None
    weights = distributed.broadcast_tensors(found.weights if found else None)
    moments = distributed.broadcast_tensors(found.moments if found else None)
    return Checkpoint(checkpoint.step_folder(folder, state["step"]), weights, moments, state)


def restore(found: Checkpoint, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler) -> TrainState:
    """Optimizer, schedule and loss scale as they were; the model's weights were loaded before DDP took them."""
    checkpoint.restore_moments(model, optimizer, found.moments)
    scheduler.load_state_dict(found.state["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = lr
    if found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    return checkpoint.train_state_from(found.state)


def freeze_unused(model: nn.Module, data: Data, task: Task) -> None:
    """Freeze parameters that no loss reaches (an encoder's unused parts): DDP would wait for their gradients for ever."""
    _, preds, _ = run_epoch(model, data.train.batch(np.arange(1)), "pred", task=task)
    preds.sum().backward()
    unused = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    if unused:
        logger.info("%d parameters are not reached by the loss and stay as they are: %s", len(unused), ", ".join(list(unused)[:4]))


# ---- saving ----


def save(run: Run) -> None:
    """Collective. A checkpoint of this step, written by rank 0; on failure every rank raises."""

    def write() -> None:
        weights, moments = checkpoint.weights_of(run.model), checkpoint.moments_of(run.model, run.optimizer)
        checkpoint.save_checkpoint(run.checkpoints, weights=weights, moments=moments, state=state_record(run))
        checkpoint.rotate(run.checkpoints, keep=run.config.keep_checkpoints, newest=run.state.step, best_step=run.state.best_step)

    distributed.on_main(write)


def state_record(run: Run) -> dict[str, Any]:
    """What state.json holds."""
    return {
        **asdict(run.state),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "seed": run.config.seed,
        "config": run.config.to_dict(),
        "resolved": run.resolved,
        "fingerprints": run.data.fingerprints,
        "parameters": [[name, list(parameter.shape)] for name, parameter in run.model.named_parameters()],
        "world_size": run.context.world_size,
        "versions": {"mmbert_core": mmbert_core.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
