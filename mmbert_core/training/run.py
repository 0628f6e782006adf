"""The state of a training run, its plan in steps, and its checkpoints."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmbert_core.config import Config
from mmbert_core.data.batches import steps_per_epoch
from mmbert_core.data.prepare import Data
from mmbert_core.inference.scoring import Task
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.runtime import distributed
from mmbert_core.runtime.ddp import UsedRows
from mmbert_core.runtime.errors import RunError, phase
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.runtime.versions import VERSIONS
from mmbert_core.storage.files import LOCK
from mmbert_core.storage.folder_lock import Claim
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import TrainState
from mmbert_core.training.run_log import RunLog


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
    used_rows: UsedRows | None  # of the token embedding; none: DDP sums all of it
    best_validation: np.ndarray | None = (
        None  # [N] or [N, K] predictions of the best step, if this life of the run validated it
    )
    folder_lock: Claim | None = None  # rank 0 only
    stopping: bool = False  # all ranks have agreed to stop: one of them had a signal
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics.jsonl

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def make_plan(config: Config, num_rows: int, micro_batches: int) -> Plan:
    """Epochs and shares of an epoch as optimizer steps."""
    per_epoch = steps_per_epoch(num_rows, config.batch_size)
    by_epoch = isinstance(config.val_check_interval, float)
    every = max(1, int(config.val_check_interval * per_epoch)) if by_epoch else int(config.val_check_interval)
    return Plan(config.max_epochs * per_epoch, per_epoch, every, by_epoch, micro_batches)


def parameter_shapes(model: nn.Module) -> list[list[Any]]:
    """Name and shape of every parameter, in order."""
    return [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]


def save(run: Run, *, is_due: bool = True) -> None:
    """Collective. A checkpoint of this step, written by rank 0; on failure every rank raises. `is_due`: not only because of a signal."""

    def write() -> None:
        if run.folder_lock is not None:
            run.folder_lock.check()
        if not (run.folder / LOCK).exists():
            raise RunError(
                f"the run's folder {run.folder} is gone; the checkpoint of step {run.state.step} was not written"
            )
        run.log.sync()  # the lines of the steps that this checkpoint has
        weights, moments = checkpoint.weights_of(run.model), checkpoint.moments_of(run.model, run.optimizer)
        checkpoint.save_checkpoint(
            run.checkpoints, weights=weights, moments=moments, state={**state_record(run), checkpoint.DUE: is_due}
        )
        rotate_checkpoints(run)

    with phase("save"):
        distributed.on_main(write)


def rotate_checkpoints(run: Run) -> None:
    """Rank 0 only. Remove the checkpoints that the run does not keep."""
    checkpoint.rotate(
        run.checkpoints, keep=run.config.keep_checkpoints, newest=run.state.step, best_step=run.state.best_step
    )


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
        "parameters": parameter_shapes(run.model),
        "world_size": run.context.world_size,
        "versions": VERSIONS,
    }
