"""The training loop, top to bottom: when things happen. What happens is in `hooks`.

B rows of a step are cut into micro-batches, dealt to the ranks; every rank knows the whole plan.
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
from mmbert_core.training.finish import finish
from mmbert_core.training.memory import return_freed_memory
from mmbert_core.training.optim import optimizer_step
from mmbert_core.training.results import Results
from mmbert_core.training.run import Run, save
from mmbert_core.training.run_folder import already_finished, locked_folder
from mmbert_core.training.start import start_run
from mmbert_core.training.validation import is_validation_due, validate

logger = logging.getLogger(__name__)
STEPS_BETWEEN_TRIMS = 100  # sizes differ from step to step, and the holes that they leave in the heap add up: after 1,000 steps to twice what one needs


def fit(
    config: Config,
    data: Data,
    model: MultimodalBert,
    context: DistContext,
    *,
    loss_op: LossOp | None = None,
) -> Results:
    """Collective. Train, keep the best step, write the model folder, score the test rows.

    `model` comes from `start.prepare_model`. Goes on from a checkpoint in `config.model_path` unless told
    otherwise; a finished run is left as it is. Raises `Stopped` when a signal asked for it and a checkpoint is written. `loss_op(logits, labels)` replaces the weighted cross entropy
    (`losses.add_loss_op`); it is code, so no checkpoint knows it: give the same one to resume.
    """
    with locked_folder(config) as folder_lock, signals.deferred():
        run = start_run(config, data, model, context, loss_op=loss_op)
        run.folder_lock = folder_lock
        try:
            if run.state.finished and (record := already_finished(config)):
                run.log.say(f"{config.model_path}: this run is finished at step {run.state.step}; nothing to do")
                return Results.from_record(run.folder, record)
            train_to_the_end(run)
            return Results.from_record(run.folder, finish(run))
        finally:
            run.log.close()


def train_to_the_end(run: Run) -> None:
    """Collective. Steps, validations and checkpoints until the run is finished. Raises `Stopped` after a checkpoint."""
    order, order_epoch, state = np.zeros(0, np.int64), -1, run.state
    while not state.finished:
        if not state.validation_pending:
            if order_epoch != state.epoch:
                order, order_epoch = epoch_order(len(run.data.train), run.config.seed, state.epoch), state.epoch
            figures = train_one_step(run, order)
            state.validation_pending = is_validation_due(run)
            log_step(run, figures)
        improved = False
        if state.validation_pending and not run.stopping:
            improved = validate(run)
        state.finished = state.finished or (state.step == run.plan.total_steps and not state.validation_pending)
        if (
            state.finished and run.data.test is not None
        ):  # known before the last checkpoint: a test that is killed and done again has one folder
            state.test_folder = hooks.choose_test_folder(run.folder)
        if run.stopping:
            stop(run, improved=improved)
        if is_save_due(run, improved=improved):
            save(run)


def is_save_due(run: Run, *, improved: bool) -> bool:
    """Whether the run has a checkpoint of this step, signals aside: after every `save_every` steps, a better validation, the last step."""
    state = run.state
    return not state.validation_pending and (improved or state.finished or state.step % run.config.save_every == 0)


def stop(run: Run, *, improved: bool) -> NoReturn:
    """Collective. All ranks have agreed on it: a checkpoint, and out."""
    save(run, is_due=is_save_due(run, improved=improved))
    signals.ignore()
    how = "the same command" if run.config.resume == "auto" else "with resume: auto the same command"
    raise Stopped(
        f"stopped by a signal; the checkpoint of step {run.state.step} is written, and {how} goes on from there"
    )


# ---- one optimizer step ----


def train_one_step(run: Run, order: np.ndarray) -> dict[str, float]:
    """Collective. One optimizer step over the step's micro-batches; moves `run.state` on and returns its figures."""
    started = time.perf_counter()
    state, config, dataset = run.state, run.config, run.data.train
    rows = step_rows(order, state.rows_consumed // config.batch_size, config.batch_size)
    lengths = dataset.lengths[rows]
    parts = micro_batches(rows, lengths, run.plan.micro_batches, packed=dataset.packed)
    costs = [dataset.cost(part) for part in parts]
    hand = assign_to_ranks(costs, run.context.world_size)[run.context.rank]
    # the step's weights, known to every rank without asking; an all-zero step has zero losses over any divisor
    weight_sum = float(run.class_weights[run.train_labels[rows]].sum()) or 1.0

    if run.used_rows is not None:
        run.used_rows.rows = torch.from_numpy(dataset.used_token_ids(rows))
    losses = []
    for position, index in enumerate(hand):
        torch.manual_seed(micro_batch_seed(config.seed, state.step, index))
        losses.append(backward(run, parts[index], index, weight_sum, is_last=position == len(hand) - 1))
    if not hand:  # fewer micro-batches than ranks: take part in the synchronisation with a row that weighs nothing
        backward(run, parts[0][:1], 0, math.inf, is_last=True)

    train_loss, sound = check_step_on_all_ranks(
        run, [parts[index] for index in hand], torch.stack(losses).tolist() if losses else [], len(rows)
    )
    lr = run.scheduler.get_last_lr()[0]
    stepped, grad_norm = step_optimizer(run) if sound else (False, math.nan)
    state.skipped_steps += not stepped
    if (state.step + 1) % STEPS_BETWEEN_TRIMS == 0:
        return_freed_memory()
    seconds = time.perf_counter() - started
    advance(run, len(rows), seconds)
    return {
        "train_loss": train_loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "rows": len(rows),
        "tokens": int(lengths.sum()),
        "padded": sum(costs),
        "seconds": seconds,
    }


def backward(run: Run, rows: np.ndarray, index: int, weight_sum: float, *, is_last: bool) -> torch.Tensor:
    """Gradients of one micro-batch; the rank's last one synchronises. Returns its share of the step's loss, detached."""
    with phase(f"the data of step {run.state.step + 1}"):
        batch = run.data.train.batch(rows)
    with ddp.no_sync(run.ddp_model, enabled=not is_last), distributed.as_peer_error():
        with phase(f"the forward pass of step {run.state.step + 1}"):
            loss = hooks.training_step(run.ddp_model, batch, index, task=run.task, weight_sum=weight_sum)["loss"]
        with phase(f"the backward pass of step {run.state.step + 1}"):
            run.scaler.scale(
                loss * run.context.world_size
            ).backward()  # DDP takes the mean over ranks; the step wants the sum
    return loss.detach().double()


def check_step_on_all_ranks(
    run: Run, parts: list[np.ndarray], losses: list[float], num_rows: int
) -> tuple[float, bool]:
    """Collective, once a step, before the optimizer moves: (the step's loss, whether it is sound on every rank).

    `losses` are those of this rank's micro-batches `parts`. All ranks learn in one sum what they must decide alike: rows
    counted, losses that are no numbers, wishes to stop. Raises `RunError` on the rank with such a loss, `PeerError` on
    the others, unless the config says to skip the step.
    """
    step, bad = run.state.step + 1, [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    figures = [sum(losses), sum(map(len, parts)), bool(bad), signals.requested() is not None]
    train_loss, rows_counted, num_bad, num_stopping = distributed.all_reduce_sum(figures)
    run.stopping = num_stopping > 0
    if rows_counted != num_rows:
        raise RuntimeError(f"step {step}: expected {num_rows} rows over all ranks, counted {rows_counted:.0f}")
    if not num_bad:
        return train_loss, True
    if bad:
        rows = parts[bad[0]]
        where = f"the loss of a micro-batch of step {step} is {losses[bad[0]]}, of {len(rows)} rows, first {run.data.train.row_location(int(rows[0]))}"
        if run.config.on_nonfinite == "stop":
            raise RunError(f"{where}; stopped before the optimizer step (on_nonfinite: skip would leave the step out)")
        logger.error("%s; the step is left out on all ranks", where)
    elif run.config.on_nonfinite == "stop":
        raise PeerError(f"a loss of step {step} is not finite on another rank")
    run.optimizer.zero_grad(set_to_none=True)
    return train_loss, False


def step_optimizer(run: Run) -> tuple[bool, float]:
    """Whether the optimizer moved, and the gradient norm. The gradients are the same on all ranks, and so is what happens."""
    with phase(f"the optimizer step {run.state.step + 1}"):
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
                raise RunError(f"{error} at step {run.state.step + 1}; stopped before the optimizer step") from None
            raise PeerError(str(error)) from None
    if not stepped and not run.scaler.is_enabled():
        run.log.say(f"the gradient norm of step {run.state.step + 1} is {grad_norm}; the step is left out")
    return stepped, grad_norm


def advance(run: Run, num_rows: int, seconds: float) -> None:
    """Count the step; the sampler's whole state is seed, epoch and rows consumed."""
    state = run.state
    state.step += 1
    state.rows_trained += num_rows
    state.rows_consumed += num_rows
    state.train_seconds += seconds
    if state.rows_consumed >= len(run.data.train):
        state.epoch, state.rows_consumed = state.epoch + 1, 0


def log_step(run: Run, figures: dict[str, float]) -> None:
    """Every `log_every` steps and at the last: a line of metrics.jsonl. Rates and padding are of the steps since the last line."""
    window, state = run.window, run.state
    for name in ("rows", "tokens", "padded", "seconds"):
        window[name] = window.get(name, 0) + figures[name]
    rate = window["rows"] / window["seconds"]
    left = (run.plan.total_steps - state.step) * window["seconds"] / window["rows"] * run.config.batch_size
    shown = f"epoch {min(state.epoch + 1, run.config.max_epochs)}  train_loss {figures['train_loss']:.4f}  lr {figures['lr']:.2e}  {rate:.1f} rows/s  {format_seconds(left)} left"
    run.log.progress(state.step, shown)
    if state.step % run.config.log_every == 0 or state.step == run.plan.total_steps:
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


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- validation: the best step and the early stop, decided from figures that are the same on all ranks ----


# ---- the end ----
