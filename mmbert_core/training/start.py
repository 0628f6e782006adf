"""The start of a run: all that its first step needs, new or from a checkpoint."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmbert_core.config import Config
from mmbert_core.data.batches import resolve_micro_batches
from mmbert_core.data.prepare import Data
from mmbert_core.data.tokens import keeps_end, sample_tokens
from mmbert_core.evaluation.metrics import check_metric_choices
from mmbert_core.evaluation.thresholds import parse_rule
from mmbert_core.hooks import run_epoch
from mmbert_core.inference.model_folder import build_model
from mmbert_core.inference.precision import build_scaler, resolve_precision
from mmbert_core.inference.scoring import Task
from mmbert_core.model.losses import LossOp, add_loss_op, build_loss_op, row_weights
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.probe import ProbeTokens, check_text_encoder
from mmbert_core.model.text_encoder import POOLINGS
from mmbert_core.runtime import ddp, distributed
from mmbert_core.runtime.ddp import UsedRows
from mmbert_core.runtime.errors import phase
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import read_json
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import Checkpoint, TrainState
from mmbert_core.training.head_fit import check_head_first
from mmbert_core.training.memory import keep_freed_memory, resolve_by_trial
from mmbert_core.training.optim import configure_optimizers, resolve_learning_rates
from mmbert_core.training.resume import (
    changed_micro_batches,
    check_pooling,
    check_same_on_all_ranks,
    load_weights,
    read_for_all_ranks,
    restore,
)
from mmbert_core.training.run import Plan, Run, make_plan, rotate_checkpoints, save
from mmbert_core.training.run_folder import already_finished, open_folder
from mmbert_core.training.run_log import RunLog

logger = logging.getLogger(__name__)
# Size of a micro-batch when microbatches_per_step is auto: in tokens for packed texts, else in rows. Smaller packed
# ones cost time, as each computes its own gradient of the embeddings; larger padded ones cost padding.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}


# ---- before the process group ----


def prepare_model(config: Config, data: Data) -> MultimodalBert:
    """Check metric names, threshold rule and `head_first`; build the model; check its encoder on short texts.

    Needs no process group. Raises `InputError`.
    """
    parse_rule(config.threshold_rule)
    check_head_first(config)
    check_metric_choices(config.metric_choices, data.labels.names)
    if config.early_stop_metric != "val_loss":
        metric = config.early_stop_metric.removeprefix("val/")
        check_metric_choices([metric], data.labels.names, key="early_stop_metric")
    model = build_model(replace(config, pooling=resolve_stored_pooling(config)), data.features)
    if model.text_subnetwork is not None:
        tokens = ProbeTokens(**sample_tokens(data.tokenizer))
        check_text_encoder(model.text_subnetwork, tokens, max_length=config.max_length, name=config.encoder)
    if config.aux_loss_weight:
        model.add_auxiliary_heads()
    return model


def resolve_stored_pooling(config: Config) -> str:
    """The config's pooling; `auto` becomes what a run in `model_path` with the same encoder resolved it to, if any.

    The encoder's folder may have changed since then, so that `auto` would be resolved to another pooling now.
    """
    if config.pooling != "auto" or config.resume == "never":
        return config.pooling
    try:
        record = read_json(Path(config.model_path) / "config.json")
        is_same = (record["config"]["encoder"], record["config"]["pooling"]) == (config.encoder, "auto")
        pooling = record["resolved"]["pooling"] if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return config.pooling
    return pooling if pooling in POOLINGS else config.pooling


def resolve_class_weights(config: Config, data: Data) -> list[float] | None:
    """One weight per class, or None. `balanced`: training rows / (classes * training rows of the class)."""
    if config.class_weights == "balanced":
        counts = np.bincount(data.train.label_index, minlength=config.num_classes)
        return (len(data.train) / (config.num_classes * counts)).tolist()
    return None if config.class_weights is None else list(config.class_weights)


def with_resolved_rates(config: Config, resolved: dict[str, Any]) -> Config:
    """The config with numbers where `lr` and `head_lr` were auto."""
    return replace(config, **{key: resolved[key] for key in ("lr", "head_lr") if key in resolved})


# ---- within the process group ----


def start_run(
    config: Config, data: Data, model: MultimodalBert, context: DistContext, *, loss_op: LossOp | None = None
) -> Run:
    """Collective. A new run before its first step, or a resumed one at the step of its checkpoint.

    `loss_op` replaces the cross entropy. Raises `InputError` when the checkpoint has other settings, data or model.
    """
    set_up_process(config, data, model, context)
    check_same_on_all_ranks(config, data, model.pooling, context)

    # ---- the checkpoint, if there is one ----
    with phase("load"):
        found, source = read_for_all_ranks(config, data, model, context)
    if found:
        check_pooling(found, model.pooling)
    saved = found.state["resolved"] if found else None
    precision = resolve_precision(saved["precision"] if saved else config.precision, context.device)

    # ---- the model on its device, behind DDP ----
    task, class_weights = make_task(config, data, precision, context, loss_op)
    used_rows = used_embedding_rows(model, context)
    ddp_model = to_device(model, found, data, task, context, used_rows)
    if found:
        resolved = {**saved, "precision": precision, **changed_micro_batches(config, found.state)}
    else:
        resolved = resolve_new(config, data, model, ddp_model, task, context)
    warm_up(ddp_model, data, task)

    # ---- optimizer and state ----
    plan = make_plan(config, len(data.train), resolved["microbatches_per_step"])
    optimizer, scheduler = configure_optimizers(model, with_resolved_rates(config, resolved), plan.total_steps)
    scaler = build_scaler(precision, context.device)
    with phase("load"):
        state = distributed.on_all(lambda: restore(found, model, optimizer, scheduler, scaler))[context.rank]

    # ---- the first files of the run ----
    log = open_run(config, resolved, plan, state, context, is_resumed=found is not None)
    run = Run(
        config=config,
        data=data,
        context=context,
        model=model,
        ddp_model=ddp_model,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        plan=plan,
        state=state,
        log=log,
        resolved=resolved,
        class_weights=class_weights,
        used_rows=used_rows,
        is_resumed=found is not None,
    )
    if source != 0:  # the checkpoint is on another node: rank 0, which writes from now on, needs it too
        save(run)
    elif found:
        distributed.on_main(lambda: rotate_checkpoints(run))  # a run that was killed in its last save has not
    return run


def set_up_process(config: Config, data: Data, model: MultimodalBert, context: DistContext) -> None:
    """Set, for this process: packed batches, the memory allocator, deterministic kernels."""
    for dataset in (data.train, data.val, data.test):
        if dataset is not None:
            dataset.packed = model.text_subnetwork is not None and model.text_subnetwork.is_packed
    if context.device.type == "cpu":
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
        torch.use_deterministic_algorithms(True)


def resolve_new(
    config: Config, data: Data, model: MultimodalBert, ddp_model: nn.Module, task: Task, context: DistContext
) -> dict[str, Any]:
    """Collective. The values of a new run's `auto` settings, which config.json and the checkpoints keep."""
    resolved = {"pooling": model.pooling, "precision": task.precision, **resolve_learning_rates(config, model)}
    if keeps_end(data.tokenizer):
        resolved["truncation_side"] = "left"  # without the key: right
    return resolved | resolve_batching(config, data, ddp_model, task, context)


def open_run(
    config: Config, resolved: dict[str, Any], plan: Plan, state: TrainState, context: DistContext, *, is_resumed: bool
) -> RunLog:
    """Collective. Write config.json, rename the checkpoints later than the step in `resume`, and open the log."""
    folder = Path(config.model_path)
    distributed.on_main(lambda: open_folder(folder, config, resolved, fresh=not is_resumed, finished=state.finished))
    if is_resumed and config.resume == state.step:
        distributed.on_main(lambda: checkpoint.set_aside(folder / "checkpoints", state.step))
    return RunLog(
        folder,
        is_main=context.is_main,
        first_step=state.step,
        total_steps=plan.total_steps,
        is_resumed=is_resumed,
        validated=not state.validation_pending,
        tested=state.finished and already_finished(config) is not None,
    )


def make_task(
    config: Config, data: Data, precision: str, context: DistContext, loss_op: LossOp | None
) -> tuple[Task, np.ndarray]:
    """The task that the hooks use for every batch, and the weight of each class in the loss, float64 [K]."""
    loss_op = build_loss_op(resolve_class_weights(config, data)) if loss_op is None else add_loss_op(loss_op)
    class_weights = row_weights(loss_op, torch.arange(config.num_classes)).double().numpy()
    loss_op = loss_op.to(context.device) if isinstance(loss_op, nn.Module) else loss_op
    return Task(config.is_binary, loss_op, precision, context.device, config.aux_loss_weight), class_weights


def used_embedding_rows(model: MultimodalBert, context: DistContext) -> UsedRows | None:
    """For `ddp.wrap_ddp`: the token embedding, of which only the rows of a step's tokens have a gradient.

    None, which sums the gradient of all rows, on a GPU and for an encoder that may look up other tokens than those of
    the step (not packed).
    """
    if context.device.type != "cpu" or model.text_subnetwork is None or not model.text_subnetwork.is_packed:
        return None
    return UsedRows(model.text_subnetwork.encoder.get_input_embeddings().weight)


def to_device(
    model: MultimodalBert,
    found: Checkpoint | None,
    data: Data,
    task: Task,
    context: DistContext,
    used_rows: UsedRows | None,
) -> nn.Module:
    """Collective. Move the model to the rank's device, load the checkpoint's weights, wrap it in DDP."""
    model.to(context.device).train()
    if found:
        with phase("load"):
            distributed.on_all(lambda: load_weights(model, found))
    freeze_unused(model, data, task)
    return ddp.wrap_ddp(model, context, used_rows)


def resolve_batching(
    config: Config, data: Data, ddp_model: nn.Module, task: Task, context: DistContext
) -> dict[str, int]:
    """Collective. Micro-batches per step, as configured (or `auto`) and as they fit into memory."""
    device, train = context.device.type, data.train
    if train.packed:
        rows_at_once = max(1, int(TOKENS_AT_ONCE[device] / max(1.0, train.lengths.mean())))
    else:
        rows_at_once = ROWS_AT_ONCE[device] if config.text_name else config.batch_size
    asked = resolve_micro_batches(
        config.microbatches_per_step,
        batch_size=config.batch_size,
        num_ranks=context.world_size,
        rows_at_once=rows_at_once,
    )
    used = resolve_by_trial(asked, ddp_model, data.train, task=task, config=config)
    if config.microbatches_per_step == "auto":
        repeat = "to repeat this run on another number of processes"
        logger.info("microbatches_per_step is auto; %s: --microbatches_per_step %d", repeat, used)
    return {"microbatches_asked": asked, "microbatches_per_step": used}


def freeze_unused(model: nn.Module, data: Data, task: Task) -> None:
    """Freeze parameters that have no influence on the loss: DDP would wait for their gradients forever."""
    loss, _, _ = run_epoch(model, data.train.batch(np.arange(1)), "train", task=task, weight_sum=1.0)
    loss.backward()
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    unused = {name: parameter for name, parameter in trainable if parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    if unused:
        first = ", ".join(list(unused)[:4])
        logger.info("%d parameters are not reached by the loss and are not trained: %s", len(unused), first)


def warm_up(ddp_model: nn.Module, data: Data, task: Task) -> None:
    """Collective. Under DDP, a forward and backward pass of one row with weight 0.

    DDP rebuilds its buckets after its first backward, and the buckets decide the order in which the gradients of three
    and more ranks are summed. Without this, the first step after a resume would sum in another order than the same
    step of a run that was not interrupted.
    """
    if hasattr(ddp_model, "module"):  # wrapped in DDP
        with distributed.as_peer_error():
            loss, _, _ = run_epoch(ddp_model, data.train.batch(np.arange(1)), "train", task=task, weight_sum=math.inf)
            loss.backward()
        ddp_model.zero_grad(set_to_none=True)
