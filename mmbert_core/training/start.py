"""Everything of a run put together before its first step: a fresh start or the continuation of a checkpoint."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

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
from mmbert_core.runtime.errors import InputError, phase
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import read_json
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import Checkpoint, TrainState
from mmbert_core.training.memory import keep_freed_memory, resolve_by_trial
from mmbert_core.training.optim import configure_optimizers
from mmbert_core.training.resume import changed_parts, check_agreement, load_weights, read_for_all_ranks, restore
from mmbert_core.training.run import Run, make_plan, rotate_checkpoints, save
from mmbert_core.training.run_folder import already_finished, open_folder
from mmbert_core.training.run_log import RunLog

logger = logging.getLogger(__name__)
# Of a micro-batch when microbatches_per_step is auto: where texts are packed, more of them cost time (each has its own gradient
# of the embeddings); where they are padded, fewer of them cost padding.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}


# ---- before the process group: what a user's mistake can break ----


def prepare_model(config: Config, data: Data) -> MultimodalBert:
    """Check the metric names and the threshold's rule, build the model, and try its encoder on made-up texts.

    Raises `InputError`; needs no process group.
    """
    parse_rule(config.threshold_rule)
    check_metric_choices(config.metric_choices, data.labels.names)
    if config.early_stop_metric != "val_loss":
        check_metric_choices(
            [config.early_stop_metric.removeprefix("val/")], data.labels.names, key="early_stop_metric"
        )
    model = build_model(replace(config, pooling=resolve_stored_pooling(config)), data.features)
    if model.text_subnetwork is not None:
        tokens = ProbeTokens(**sample_tokens(data.tokenizer))
        check_text_encoder(model.text_subnetwork, tokens, max_length=config.max_length, name=config.encoder)
    return model


def resolve_stored_pooling(config: Config) -> str:
    """As asked; for `auto` what it meant when the run in `model_path` began, if it did: the encoder's files may say more by now."""
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
    """One weight per class: none, as given, or `balanced` = rows / (classes * rows of the class), from the training rows."""
    if config.class_weights == "balanced":
        counts = np.bincount(data.train.label_index, minlength=config.num_classes)
        return (len(data.train) / (config.num_classes * counts)).tolist()
    return None if config.class_weights is None else list(config.class_weights)


# ---- within the process group ----


def start_run(
    config: Config,
    data: Data,
    model: MultimodalBert,
    context: DistContext,
    *,
    loss_op: LossOp | None = None,
) -> Run:
    """Collective. A run at its first step, or at the step of the newest whole checkpoint. `loss_op` replaces cross entropy."""
    folder = Path(config.model_path)
    for part in (data.train, data.val, data.test):
        if part is not None:
            part.packed = model.text_subnetwork is not None and model.text_subnetwork.is_packed
    if context.device.type == "cpu":
        keep_freed_memory()
    check_agreement(config, data, model.pooling, context)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
        torch.use_deterministic_algorithms(True)
    with phase("load"):
        found, source = read_for_all_ranks(config, data, model, context)
    if found and found.state["resolved"]["pooling"] != model.pooling:
        raise InputError(
            f"pooling was {found.state['resolved']['pooling']} in the checkpoint at step {found.state['step']} and is {model.pooling} now: set it back"
        )
    precision = resolve_precision(found.state["resolved"]["precision"] if found else config.precision, context.device)
    task, class_weights = make_task(config, data, precision, context, loss_op)
    used_rows = rows_to_sum(model, context)
    ddp_model = place_model(model, found, data, task, context, used_rows)
    if found:
        resolved = {**found.state["resolved"], "precision": precision, **changed_parts(config, found.state)}
    else:
        sides = (
            {"truncation_side": "left"} if keeps_end(data.tokenizer) else {}
        )  # else right, which folders of before all mean
        resolved = {
            "pooling": model.pooling,
            "precision": precision,
            **sides,
            **resolve_batching(config, data, ddp_model, task, context),
        }
    warm_up(ddp_model, data, task)
    plan = make_plan(config, len(data.train), resolved["microbatches_per_step"])
    optimizer, scheduler = configure_optimizers(model, config, plan.total_steps)
    scaler = build_scaler(precision, context.device)
    with phase("load"):
        state = distributed.on_all(
            lambda: restore(found, model, optimizer, scheduler, scaler) if found else TrainState()
        )[context.rank]
    distributed.on_main(lambda: open_folder(folder, config, resolved, fresh=found is None, finished=state.finished))
    if found and config.resume == state.step:
        distributed.on_main(lambda: checkpoint.set_aside(folder / "checkpoints", state.step))
    log = RunLog(
        folder,
        is_main=context.is_main,
        first_step=state.step,
        total_steps=plan.total_steps,
        validated=not state.validation_pending,
        tested=state.finished and already_finished(config) is not None,
    )
    run = Run(
        config,
        data,
        context,
        folder,
        model,
        ddp_model,
        task,
        optimizer,
        scheduler,
        scaler,
        plan,
        state,
        log,
        resolved,
        class_weights,
        np.asarray(data.train.label_index),
        used_rows,
    )
    if source != 0:  # another node had it: from now on it is where the run is written
        save(run)
    elif found:
        distributed.on_main(lambda: rotate_checkpoints(run))  # killed before or in the rotation after the last save
    return run


def make_task(
    config: Config, data: Data, precision: str, context: DistContext, loss_op: LossOp | None
) -> tuple[Task, np.ndarray]:
    """What every step needs, and the loss's weight of each class [K]."""
    loss_op = build_loss_op(resolve_class_weights(config, data)) if loss_op is None else add_loss_op(loss_op)
    class_weights = row_weights(loss_op, torch.arange(config.num_classes)).double().numpy()
    loss_op = loss_op.to(context.device) if isinstance(loss_op, nn.Module) else loss_op
    return Task(config.is_binary, loss_op, precision, context.device), class_weights


def rows_to_sum(model: MultimodalBert, context: DistContext) -> UsedRows | None:
    """Where ranks sum gradients on the CPU, and the tokens of a step are all that its encoder looks up, as a packed one does."""
    if context.device.type != "cpu" or model.text_subnetwork is None or not model.text_subnetwork.is_packed:
        return None
    return UsedRows(model.text_subnetwork.encoder.get_input_embeddings().weight)


def place_model(
    model: MultimodalBert,
    found: Checkpoint | None,
    data: Data,
    task: Task,
    context: DistContext,
    used_rows: UsedRows | None,
) -> nn.Module:
    """Collective. The model on its device with the checkpoint's weights, as training sees it."""
    model.to(context.device).train()
    if found:
        with phase("load"):
            distributed.on_all(lambda: load_weights(model, found))
    freeze_unused(model, data, task)
    return ddp.wrap_ddp(model, context, used_rows)


def resolve_batching(
    config: Config, data: Data, ddp_model: nn.Module, task: Task, context: DistContext
) -> dict[str, int]:
    """Collective. The micro-batches of a step as asked (or `auto`), and as they fit into memory."""
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
        logger.info(
            "microbatches_per_step is auto; to repeat this run on another number of processes: --microbatches_per_step %d",
            used,
        )
    return {"microbatches_asked": asked, "microbatches_per_step": used}


def freeze_unused(model: nn.Module, data: Data, task: Task) -> None:
    """Freeze parameters that no loss reaches (an encoder's unused parts): DDP would wait for their gradients for ever."""
    _, preds, _ = run_epoch(model, data.train.batch(np.arange(1)), "pred", task=task)
    preds.sum().backward()
    unused = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    if unused:
        logger.info(
            "%d parameters are not reached by the loss and stay as they are: %s",
            len(unused),
            ", ".join(list(unused)[:4]),
        )


def warm_up(ddp_model: nn.Module, data: Data, task: Task) -> None:
    """Collective. One row that weighs nothing, forward and backward: a resumed run then adds gradients in the order of a straight one.

    DDP lays out its buckets anew after its first backward, and the layout decides the order in which three and more
    ranks are summed.
    """
    if ddp_model is not getattr(ddp_model, "module", ddp_model):
        with distributed.as_peer_error():
            loss, _, _ = run_epoch(ddp_model, data.train.batch(np.arange(1)), "train", task=task, weight_sum=math.inf)
            loss.backward()
        ddp_model.zero_grad(set_to_none=True)


# ---- saving ----
