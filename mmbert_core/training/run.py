"""A training run on one rank: its model, optimizer, state, plan in steps and checkpoints."""

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
    """Durations in optimizer steps, fixed before the first step."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    validate_by_epoch: bool  # whether `validate_every` counts from the start of each epoch, else of the run
    micro_batches: int  # per optimizer step, over all ranks


@dataclass
class Run:
    """What a training run needs on this rank."""

    config: Config
    data: Data
    context: DistContext
    model: MultimodalBert  # the raw module: evaluated and saved
    ddp_model: nn.Module  # the same module behind DDP; in a single process the module itself
    task: Task
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    plan: Plan
    state: TrainState
    log: RunLog
    resolved: dict[str, Any]  # the values of settings that were `auto`
    class_weights: np.ndarray  # [K] float64, of the loss
    used_rows: UsedRows | None  # of the token embedding; None: DDP sums its whole gradient
    # predictions [N] or [N, K] of the best step; None when it was not validated since the start or resume
    best_validation: np.ndarray | None = None
    folder_lock: Claim | None = None  # rank 0 only
    is_resumed: bool = False  # from a checkpoint
    stopping: bool = False  # whether any rank has received a signal; the same on all ranks
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics.jsonl

    @property
    def folder(self) -> Path:
        return Path(self.config.model_path)

    @property
    def train_labels(self) -> np.ndarray:
        """Class indices of the training rows, int64 [N]."""
        return np.asarray(self.data.train.label_index)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def make_plan(config: Config, num_rows: int, micro_batches: int) -> Plan:
    """Convert epochs and shares of an epoch to optimizer steps."""
    per_epoch = steps_per_epoch(num_rows, config.batch_size)
    by_epoch = isinstance(config.val_check_interval, float)
    every = max(1, int(config.val_check_interval * per_epoch)) if by_epoch else int(config.val_check_interval)
    return Plan(config.max_epochs * per_epoch, per_epoch, every, by_epoch, micro_batches)


def parameter_shapes(model: nn.Module) -> list[list[Any]]:
    """Name and shape of every parameter, in order."""
    return [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]


def save(run: Run, *, is_due: bool = True) -> None:
    """Collective. Rank 0 writes a checkpoint of this step; when that fails, every rank raises.

    `is_due`: whether the step has a checkpoint without a signal too.
    """

    def write() -> None:
        if run.folder_lock is not None:
            run.folder_lock.check()
        if not (run.folder / LOCK).exists():
            not_written = f"the checkpoint of step {run.state.step} was not written"
            raise RunError(f"the run's folder {run.folder} is gone; {not_written}")
        run.log.sync()  # first: metrics.jsonl must hold the lines of every step up to the checkpoint's
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
