"""Continue from a checkpoint: the same one on every rank, the settings it was trained with."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmbert_core.config import FREE_BETWEEN_NODES, FREE_ON_RESUME, Config
from mmbert_core.data.prepare import Data
from mmbert_core.inference.model_files import (
    WEIGHTS,
)
from mmbert_core.runtime import distributed, ranks
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.runtime.versions import VERSIONS
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import Checkpoint, TrainState
from mmbert_core.training.run import parameter_shapes
from mmbert_core.training.saved_state import (
    SCHEDULER,
    check_moments,
    check_progress,
    check_run_state,
    check_schedule,
    check_tensors,
)

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, found: Checkpoint) -> None:
    """The checkpoint's weights into the model. Raises `InputError` when they are another model's."""
    with naming_checkpoint(found.path):
        check_tensors(found.weights, model.state_dict(), file="model.safetensors")
    model.load_state_dict(found.weights)


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """A message on a checkpoint's content begins with its folder."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def changed_parts(config: Config, state: dict[str, Any]) -> dict[str, int]:
    """Another number of micro-batches than the checkpoint's, when the config has changed to it: the way out when memory gave out in mid-run."""
    new, old = config.microbatches_per_step, state["config"]["microbatches_per_step"]
    if new in ("auto", old, state["resolved"]["microbatches_per_step"]):
        return {}
    logger.warning(
        "microbatches_per_step was %s at the checkpoint and is %s now: steps have the same rows, but other dropout",
        state["resolved"]["microbatches_per_step"],
        new,
    )
    return {"microbatches_asked": new, "microbatches_per_step": new}


def check_agreement(config: Config, data: Data, pooling: str | None, context: DistContext) -> None:
    """Collective. All ranks must have read the same config and data, or their plans would part; a node may hold old copies."""
    here = {
        **config.to_dict(),
        "pooling": pooling,
        "device": context.device.type,
        **{path: value["sha256"] for path, value in data.fingerprints.items()},
    }
    for rank, there in enumerate(item for part in distributed.all_gather_objects([here]) for item in part):
        for key in sorted({*here, *there} - FREE_BETWEEN_NODES):
            if here.get(key) != there.get(key):
                raise InputError(
                    f"{key}: expected the same on all ranks, found {here.get(key)!r} on rank {context.rank} and {there.get(key)!r} on rank {rank}"
                )


def read_for_all_ranks(
    config: Config, data: Data, model: nn.Module, context: DistContext
) -> tuple[Checkpoint | None, int]:
    """Collective. The checkpoint to go on from, on all ranks, and the rank that read it; (None, 0): a fresh start.

    The first rank of every node looks into its own disk and the newest one counts, so that no shared disk is needed and
    a restart that numbers the nodes anew loses nothing. The others get step and tensors by broadcast.
    """
    folder = Path(config.model_path) / "checkpoints"
    # torchrun repeats the arguments of the first start; of several nodes it may count the restart on some only
    resume = "auto" if any(distributed.on_all(ranks.restart_count)) else config.resume

    def look() -> tuple[int, str] | None:
        """Step and path of this node's newest whole checkpoint."""
        looks = context.is_main or (context.local_rank == 0 and resume == "auto")
        path = checkpoint.find_checkpoint(folder, resume) if looks else None
        if path is None and context.is_main and (folder.parent / WEIGHTS).exists():
            raise InputError(
                f"{folder.parent}: expected an empty folder or a run to go on from, found a trained model without checkpoints: choose another model_path"
            )
        return None if path is None else (checkpoint.step_of(path), str(path))

    answers = distributed.on_all(look)
    if not any(answers):
        return None, 0
    step, source = max((answer[0], -rank) for rank, answer in enumerate(answers) if answer)
    source = -source
    read: list[Checkpoint] = []

    def check_and_read() -> dict[str, Any]:
        found = checkpoint.read_checkpoint(Path(answers[source][1]))
        with naming_checkpoint(found.path):
            check_run_state(found.state)
        checkpoint.check_resumable(
            found.state,
            config=config.to_dict(),
            fingerprints=data.fingerprints,
            parameters=parameter_shapes(model),
            versions=VERSIONS,
            free_keys=FREE_ON_RESUME,
        )
        with naming_checkpoint(found.path):
            check_progress(found.state, num_rows=len(data.train), batch_size=config.batch_size)
        read.append(found)
        return found.state

    state = distributed.on_rank(source, check_and_read)
    logger.info("resuming from %s%s", answers[source][1], f" of rank {source}" if source else "")
    weights = distributed.broadcast_tensors(read[0].weights if read else None, source=source)
    moments = distributed.broadcast_tensors(read[0].moments if read else None, source=source)
    state = distributed.on_main(lambda: checkpoint.without_lost_best(folder, state))
    return Checkpoint(checkpoint.step_folder(folder, step), weights, moments, state), source


def restore(
    found: Checkpoint, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler
) -> TrainState:
    """Optimizer, schedule and loss scale as they were; the model's weights were loaded before DDP took them."""
    with naming_checkpoint(found.path):
        check_moments(found.moments, dict(model.named_parameters()), file="optimizer.safetensors")
        check_schedule(found.state["scheduler"], num_groups=len(optimizer.param_groups))
    checkpoint.restore_moments(model, optimizer, found.moments)
    scheduler.load_state_dict({**scheduler.state_dict(), **{key: found.state["scheduler"][key] for key in SCHEDULER}})
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = lr
    if found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    return checkpoint.train_state_from(found.state)
