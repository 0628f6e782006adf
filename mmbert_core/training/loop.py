"""The training loop: steps, validations and checkpoints. It calls the functions in `hooks`.

The B rows of an optimizer step are split into micro-batches, which are assigned to the ranks. Every rank computes the
plan of the whole step from the same numbers, without communication. N training rows.
"""

import logging
import math
import time
from typing import NoReturn

import numpy as np
import torch

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.data.batches import assign_to_ranks, epoch_order, micro_batch_seed, micro_batches, step_rows
from mmbert_core.data.prepare import Data
from mmbert_core.model.losses import LossOp
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.runtime import ddp, distributed, signals
from mmbert_core.runtime.errors import PeerError, RunError, Stopped, phase
from mmbert_core.runtime.progress import format_seconds
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.average import update_average
from mmbert_core.training.finish import finish
from mmbert_core.training.head_first import fit_head_first
from mmbert_core.training.head_fit import wants_head_first
from mmbert_core.training.memory import return_freed_memory
from mmbert_core.training.optim import optimizer_step
from mmbert_core.training.results import Results
from mmbert_core.training.run import Run, save
from mmbert_core.training.run_folder import already_finished, locked_folder
from mmbert_core.training.run_log import finite_or_none
from mmbert_core.training.start import start_run
from mmbert_core.training.validation import is_validation_due, validate

logger = logging.getLogger(__name__)
# Batch sizes differ from step to step and fragment the heap: without trims it is twice as large after 1,000 steps.
STEPS_BETWEEN_TRIMS = 100


def fit(
    config: Config, data: Data, model: MultimodalBert, context: DistContext, *, loss_op: LossOp | None = None
) -> Results:
    """Collective. Train, keep the best step, write the model folder, evaluate the test rows.

    `model` comes from `start.prepare_model`. Resumes from a checkpoint in `config.model_path` unless `resume` says
    otherwise; a finished run is left as it is. `loss_op(logits, labels)` replaces the weighted cross entropy
    (`losses.add_loss_op`); no checkpoint contains it, so a resume needs the same one.
    Raises `Stopped` after a signal, once a checkpoint is written.
    """
    with locked_folder(config) as folder_lock, signals.deferred():
        run = start_run(config, data, model, context, loss_op=loss_op)
        run.folder_lock = folder_lock
        try:
            if run.state.finished and (record := already_finished(config)):
                run.log.say(f"{config.model_path}: this run is finished at step {run.state.step}; nothing to do")
                return Results.from_record(run.folder, record)
            if not run.is_resumed and wants_head_first(config, data):
                fit_head_first(run)
            train_to_the_end(run)
            return Results.from_record(run.folder, finish(run))
        finally:
            run.log.close()


def train_to_the_end(run: Run) -> None:
    """Collective. Steps, validations and checkpoints until the run is finished. Raises `Stopped` after a signal."""
    order, order_epoch, state = np.zeros(0, np.int64), -1, run.state
    while not state.finished:
        # ---- one optimizer step, unless only the validation of the last one is still to do ----
        if not state.validation_pending:
            if order_epoch != state.epoch:
                order, order_epoch = epoch_order(len(run.data.train), run.config.seed, state.epoch), state.epoch
            figures = train_one_step(run, order)
            state.validation_pending = is_validation_due(run)
            log_step(run, figures)

        # ---- validation ----
        improved = False
        if state.validation_pending and not run.stopping:
            improved = validate(run)
        state.finished = state.finished or (state.step == run.plan.total_steps and not state.validation_pending)

        # ---- checkpoint ----
        if state.finished and run.data.test is not None:
            # now, so that the last checkpoint keeps it: a test that is killed and repeated uses the same folder
            state.test_folder = hooks.choose_test_folder(run.folder)
        if run.stopping:
            stop(run, improved=improved)
        if is_save_due(run, improved=improved):
            save(run)


def is_save_due(run: Run, *, improved: bool) -> bool:
    """Whether this step has a checkpoint without a signal: every `save_every` steps, a new best step, the last step."""
    state = run.state
    return not state.validation_pending and (improved or state.finished or state.step % run.config.save_every == 0)


def stop(run: Run, *, improved: bool) -> NoReturn:
    """Collective. Write a checkpoint and raise `Stopped`, on all ranks after the same step."""
    save(run, is_due=is_save_due(run, improved=improved))
    signals.ignore()
    command = "the same command" if run.config.resume == "auto" else "the same command with resume: auto"
    written = f"the checkpoint of step {run.state.step} is written"
    raise Stopped(f"stopped by a signal; {written}, and {command} continues from there")


# ---- one optimizer step ----


def train_one_step(run: Run, order: np.ndarray) -> dict[str, float]:
    """Collective. One optimizer step over B rows; advances `run.state` and returns the step's figures.

    `order` [N]: the rows of this epoch.
    """
    started = time.perf_counter()
    config, state, dataset = run.config, run.state, run.data.train

    # ---- the plan of the step, the same on every rank ----
    rows = step_rows(order, state.rows_consumed // config.batch_size, config.batch_size)  # [B]
    lengths = dataset.lengths[rows]
    batches = micro_batches(rows, lengths, run.plan.micro_batches, packed=dataset.packed)
    costs = [dataset.cost(micro_batch) for micro_batch in batches]
    own = assign_to_ranks(costs, run.context.world_size)[run.context.rank]  # indices of this rank's micro-batches
    # class weights of all B rows; when they are all 0, so are the losses, and any divisor will do
    weight_sum = float(run.class_weights[run.train_labels[rows]].sum()) or 1.0
    if run.used_rows is not None:
        run.used_rows.rows = torch.from_numpy(dataset.used_token_ids(rows))

    # ---- forward and backward ----
    losses = []
    for index in own:
        torch.manual_seed(micro_batch_seed(config.seed, state.step, index))  # the same dropout on any rank
        losses.append(backward(run, batches[index], index, weight_sum, is_last=index == own[-1]))
    if not own:  # fewer micro-batches than ranks: DDP needs a backward of every rank, here of a row with weight 0
        backward(run, batches[0][:1], 0, math.inf, is_last=True)

    # ---- update ----
    own_losses = torch.stack(losses).tolist() if losses else []
    train_loss, all_finite = check_step_on_all_ranks(run, [batches[index] for index in own], own_losses, len(rows))
    lr = run.scheduler.get_last_lr()[0]
    stepped, grad_norm = step_optimizer(run) if all_finite else (False, math.nan)
    state.skipped_steps += not stepped
    if stepped and config.ema_decay:
        update_average(run.optimizer, decay=config.ema_decay, num_updates=state.step + 1 - state.skipped_steps)
    if (state.step + 1) % STEPS_BETWEEN_TRIMS == 0:
        return_freed_memory()
    seconds = time.perf_counter() - started
    advance(run, len(rows), seconds)
    figures = {"train_loss": train_loss, "lr": lr, "grad_norm": grad_norm, "seconds": seconds}
    return figures | {"rows": len(rows), "tokens": int(lengths.sum()), "padded": sum(costs)}


def backward(run: Run, rows: np.ndarray, index: int, weight_sum: float, *, is_last: bool) -> torch.Tensor:
    """Add the gradients of micro-batch `index`; return its detached share of the loss.

    `is_last`: DDP sums the gradients over the ranks in the backward pass of the rank's last micro-batch.
    """
    step = run.state.step + 1
    with phase(f"the data of step {step}"):
        batch = run.data.train.batch(rows)
    with ddp.no_sync(run.ddp_model, enabled=not is_last), distributed.as_peer_error():
        with phase(f"the forward pass of step {step}"):
            loss = hooks.training_step(run.ddp_model, batch, index, task=run.task, weight_sum=weight_sum)["loss"]
        with phase(f"the backward pass of step {step}"):
            # DDP averages over the ranks, the step needs the sum
            run.scaler.scale(loss * run.context.world_size).backward()
    return loss.detach().double()


def check_step_on_all_ranks(
    run: Run, own_batches: list[np.ndarray], losses: list[float], num_rows: int
) -> tuple[float, bool]:
    """Collective, once a step, before the optimizer step: the step's loss, and whether it is finite on every rank.

    `losses` are those of this rank's micro-batches. The same all-reduce counts the rows and tells every rank of a
    signal to any of them. For a non-finite loss, unless such steps are skipped, raises `RunError` on the rank that has
    it and `PeerError` on the others.
    """
    step = run.state.step + 1
    non_finite = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]  # of `own_batches`
    addends = [sum(losses), sum(map(len, own_batches)), bool(non_finite), signals.requested() is not None]
    train_loss, rows_counted, num_ranks_non_finite, num_stopping = distributed.all_reduce_sum(addends)
    run.stopping = num_stopping > 0
    if rows_counted != num_rows:
        raise RuntimeError(f"step {step}: expected {num_rows} rows over all ranks, counted {rows_counted:.0f}")
    if not num_ranks_non_finite:
        return train_loss, True
    if non_finite:
        rows, loss = own_batches[non_finite[0]], losses[non_finite[0]]
        first = run.data.train.row_location(int(rows[0]))
        message = f"the loss of a micro-batch of step {step} is {loss}, of {len(rows)} rows, first {first}"
        if run.config.on_nonfinite == "stop":
            advice = "on_nonfinite: skip would leave the step out"
            raise RunError(f"{message}; stopped before the optimizer step ({advice})")
        logger.error("%s; the step is left out on all ranks", message)
    elif run.config.on_nonfinite == "stop":
        raise PeerError(f"a loss of step {step} is not finite on another rank")
    run.optimizer.zero_grad(set_to_none=True)
    return train_loss, False


def step_optimizer(run: Run) -> tuple[bool, float]:
    """Whether the optimizer changed the weights, and the gradient norm before clipping.

    The gradients are the same on all ranks, so all ranks take the step, skip it or raise.
    """
    step = run.state.step + 1
    with phase(f"the optimizer step {step}"):
        try:
            stepped, grad_norm = optimizer_step(
                run.model.parameters(),
                run.optimizer,
                run.scheduler,
                run.scaler,
                max_norm=run.config.gradient_clip_val,
                skip_nonfinite=run.config.on_nonfinite == "skip",
            )
        except RunError as error:
            if run.context.is_main:
                raise RunError(f"{error} at step {step}; stopped before the optimizer step") from None
            raise PeerError(str(error)) from None
    if not stepped and not run.scaler.is_enabled():
        run.log.say(f"the gradient norm of step {step} is {grad_norm}; the step is left out")
    return stepped, grad_norm


def advance(run: Run, num_rows: int, seconds: float) -> None:
    """Count the step. Seed, epoch and rows consumed are the whole state of the sampler."""
    state = run.state
    state.step += 1
    state.rows_trained += num_rows
    state.rows_consumed += num_rows
    state.train_seconds += seconds
    if state.rows_consumed >= len(run.data.train):
        state.epoch, state.rows_consumed = state.epoch + 1, 0


def log_step(run: Run, figures: dict[str, float]) -> None:
    """Show the progress, and write a line of metrics.jsonl every `log_every` steps and at the last step.

    Rates and the share of padding cover all steps since the previous line of metrics.jsonl.
    """
    window, state, config = run.window, run.state, run.config
    for name in ("rows", "tokens", "padded", "seconds"):
        window[name] = window.get(name, 0) + figures[name]
    rate = window["rows"] / window["seconds"]
    seconds_left = (run.plan.total_steps - state.step) * window["seconds"] / window["rows"] * config.batch_size
    run.log.progress(
        state.step,
        f"epoch {min(state.epoch + 1, config.max_epochs)}  train_loss {figures['train_loss']:.4f}  "
        f"lr {figures['lr']:.2e}  {rate:.1f} rows/s  {format_seconds(seconds_left)} left",
    )
    if state.step % config.log_every == 0 or state.step == run.plan.total_steps:
        run.log.record(
            {
                "step": state.step,
                "epoch": state.epoch,
                "train_loss": finite_or_none(figures["train_loss"]),
                "lr": figures["lr"],
                "grad_norm": finite_or_none(figures["grad_norm"]),
                "rows_per_second": rate,
                "tokens_per_second": window["tokens"] / window["seconds"],
                "padding_share": 1 - window["tokens"] / window["padded"],
            }
        )
        window.clear()
