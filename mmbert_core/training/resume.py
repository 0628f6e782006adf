"""Resume from a checkpoint: the same one on every rank, and only with the settings, data and model of its run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmbert_core.config import FREE_BETWEEN_NODES, FREE_ON_RESUME, SETTINGS, Config
from mmbert_core.data.prepare import Data
from mmbert_core.inference.model_files import WEIGHTS
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
    """Load the checkpoint's weights into the model. Raises `InputError` when names or shapes are not the model's."""
    with naming_checkpoint(found.path):
        check_tensors(found.weights, model.state_dict(), file="model.safetensors")
    model.load_state_dict(found.weights)


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Put the checkpoint's folder in front of an `InputError` about its content."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def changed_micro_batches(config: Config, state: dict[str, Any]) -> dict[str, int]:
    """The keys of `resolved` to replace when the config has another number of micro-batches than at the checkpoint.

    This setting may change on resume: a run that ran out of memory continues with more, smaller micro-batches.
    """
    new, old = config.microbatches_per_step, state["config"]["microbatches_per_step"]
    if new in ("auto", old, state["resolved"]["microbatches_per_step"]):
        return {}
    logger.warning(
        "microbatches_per_step was %s at the checkpoint and is %s now: steps have the same rows, but other dropout",
        state["resolved"]["microbatches_per_step"],
        new,
    )
    return {"microbatches_asked": new, "microbatches_per_step": new}


# ---- settings, data and model must be those of the checkpoint ----


def check_resumable(
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
    parameters: list[list[Any]],
    versions: Mapping[str, str],
    free_keys: frozenset[str],
) -> None:
    """Raise `InputError` with key, old and new value when config, data or model differ from the checkpoint's.

    Other versions of the packages are a warning: results are not promised to be bit-equal across them.
    """
    step = state["step"]
    other_folder = "choose another model_path"
    for key, new in config.items():
        old = state["config"].get(key, _default_of(key))  # an older checkpoint lacks newer keys
        if key == "pooling" and new == state["resolved"]["pooling"]:  # what `auto` was resolved to
            continue
        if key not in free_keys and (type(old), old) != (type(new), new):  # val_check_interval: 1.0 epoch, 1 step
            raise InputError(
                f"{key} was {old!r:.200} in the checkpoint at step {step} and is {new!r:.200} now: "
                f"set it back, or {other_folder}"
            )
    for path in {**state["fingerprints"], **fingerprints}:  # those of the checkpoint, then files that a glob now finds
        old, new = state["fingerprints"].get(path), fingerprints.get(path)
        if old != new:
            raise InputError(
                f"{path} has changed since the checkpoint at step {step} "
                f"({_format_fingerprint(old)} then, {_format_fingerprint(new)} now): restore it, or {other_folder}"
            )
    for old, new in zip_longest(state["parameters"], parameters):  # the encoder's folder may hold another model now
        if old != new:
            raise InputError(
                f"encoder: expected a model whose parameter is {old!s:.200} as in the checkpoint at step {step}, "
                f"found {new!s:.200}: restore it, or {other_folder}"
            )
    for package, new in versions.items():
        if (old := state["versions"].get(package)) != new:
            message = "%s was %.40s at the checkpoint and is %s now: numbers may differ in their last digits"
            logger.warning(message, package, old, new)


def check_pooling(found: Checkpoint, pooling: str | None) -> None:
    """Raise `InputError` when `auto` is resolved to another pooling than at the start of the run."""
    old = found.state["resolved"]["pooling"]
    if old != pooling:
        step = found.state["step"]
        raise InputError(f"pooling was {old} in the checkpoint at step {step} and is {pooling} now: set it back")


def _default_of(key: str) -> Any:
    """A setting's default as `Config.to_dict` returns it; None for a key that is required or unknown."""
    default = SETTINGS[key].default if key in SETTINGS else MISSING
    return None if default is MISSING else list(default) if isinstance(default, tuple) else default


def _format_fingerprint(fingerprint: Mapping[str, Any] | None) -> str:
    return f"sha256 {fingerprint['sha256'][:12]}" if fingerprint else "not read"


def check_same_on_all_ranks(config: Config, data: Data, pooling: str | None, context: DistContext) -> None:
    """Collective. Raise `InputError` unless all ranks have read the same config and data.

    A node may have old copies of the files; its ranks would plan other steps than the other ranks.
    """
    here = {
        **config.to_dict(),
        "pooling": pooling,
        "device": context.device.type,
        **{path: value["sha256"] for path, value in data.fingerprints.items()},
    }
    settings_by_rank = [item for [item] in distributed.all_gather_objects([here])]
    for rank, there in enumerate(settings_by_rank):
        for key in sorted({*here, *there} - FREE_BETWEEN_NODES):
            if here.get(key) != there.get(key):
                found = f"{here.get(key)!r} on rank {context.rank} and {there.get(key)!r} on rank {rank}"
                raise InputError(f"{key}: expected the same on all ranks, found {found}")


def read_for_all_ranks(
    config: Config, data: Data, model: nn.Module, context: DistContext
) -> tuple[Checkpoint | None, int]:
    """Collective. The checkpoint to resume from, on all ranks, and the rank that read it; (None, 0): a new run.

    The first rank of every node searches its own disk, and the newest checkpoint of all nodes is used: the nodes need
    no shared disk, and after a restart another node may have rank 0. The other ranks receive state and tensors by
    broadcast.
    """
    folder = Path(config.model_path) / "checkpoints"
    # torchrun restarts a worker with the arguments of its first start, and not every node may count the restart
    resume = "auto" if any(distributed.on_all(ranks.restart_count)) else config.resume

    def find_on_this_node() -> tuple[int, str] | None:
        """Step and path of this node's checkpoint; None without one, and on ranks that do not search."""
        searches = context.is_main or (context.local_rank == 0 and resume == "auto")
        path = checkpoint.find_checkpoint(folder, resume) if searches else None
        if path is None and context.is_main and (folder.parent / WEIGHTS).exists():
            found = "found a trained model without checkpoints: choose another model_path"
            raise InputError(f"{folder.parent}: expected an empty folder or a run to resume, {found}")
        return None if path is None else (checkpoint.step_of(path), str(path))

    by_rank = {rank: found for rank, found in enumerate(distributed.on_all(find_on_this_node)) if found is not None}
    if not by_rank:
        return None, 0
    source = max(by_rank, key=lambda rank: by_rank[rank][0])  # of equal steps the lowest rank
    step, path = by_rank[source]
    read: list[Checkpoint] = []  # on rank `source`: the checkpoint; on the others empty

    def check_and_read() -> dict[str, Any]:
        found = checkpoint.read_checkpoint(Path(path))
        with naming_checkpoint(found.path):
            check_run_state(found.state)
        check_resumable(
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
    logger.info("resuming from %s%s", path, f" of rank {source}" if source else "")
    weights = distributed.broadcast_tensors(read[0].weights if read else None, source=source)
    moments = distributed.broadcast_tensors(read[0].moments if read else None, source=source)
    state = distributed.on_main(lambda: checkpoint.without_lost_best(folder, state))
    return Checkpoint(checkpoint.step_folder(folder, step), weights, moments, state), source


def restore(
    found: Checkpoint | None,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """Restore optimizer, schedule and loss scale; return the progress. Without a checkpoint: that of a new run.

    The weights are loaded earlier, before DDP wraps the model.
    """
    if found is None:
        return TrainState()
    with naming_checkpoint(found.path):
        has_average = bool(found.state["config"].get("ema_decay"))
        parameters = dict(model.named_parameters())
        check_moments(found.moments, parameters, has_average=has_average, file="optimizer.safetensors")
        check_schedule(found.state["scheduler"], num_groups=len(optimizer.param_groups))
    checkpoint.restore_moments(model, optimizer, found.moments)
    scheduler.load_state_dict({**scheduler.state_dict(), **{key: found.state["scheduler"][key] for key in SCHEDULER}})
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    if found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    return checkpoint.train_state_from(found.state)
