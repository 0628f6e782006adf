"""Validation: the best step and the early stop. All ranks have the same metrics, so they decide the same."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmbert_core import hooks
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.evaluation.metrics import lower_is_better
from mmbert_core.inference import scoring
from mmbert_core.runtime import distributed, signals
from mmbert_core.runtime.errors import phase
from mmbert_core.training.average import averaged_weights
from mmbert_core.training.run import Run

logger = logging.getLogger(__name__)


def is_validation_due(run: Run) -> bool:
    """Every `validate_every` steps, counted from the epoch's start for a share of an epoch, and after the last step."""
    if run.data.val is None:
        return False
    step, plan = run.state.step, run.plan
    in_epoch = (step - 1) % plan.steps_per_epoch + 1
    due = in_epoch % plan.validate_every == 0 if plan.validate_by_epoch else step % plan.validate_every == 0
    return due or step == plan.total_steps


def validate(run: Run) -> bool:
    """Collective. Evaluate the validation rows; True when this step is the best so far.

    May set `run.state.finished` (early stop). After a signal it returns False and the validation stays pending.
    """
    outputs = hooks.on_validation_epoch_start()

    def step(batch: Batch, index: int) -> None:
        hooks.validation_step(run.model, batch, index, outputs, task=run.task)

    with averaged_weights(run.optimizer):
        is_complete = evaluate(run, run.data.val, step)
    if not is_complete:
        return False
    run.state.validation_pending = False
    values, result = hooks.on_validation_epoch_end(
        outputs, len(run.data.val), config=run.config, class_names=run.data.labels.names
    )
    run.log.record({"step": run.state.step, **values})
    improved = update_best_step(run, values)
    if improved:
        run.best_validation = result.preds
    metrics = {name: value for name, value in values.items() if name != "undefined"}
    figures = "  ".join(
        f"{name} {'undefined' if value is None else format(value, '.4f')}" for name, value in metrics.items()
    )
    run.log.say(f"step {run.state.step}/{run.plan.total_steps}  {figures}{'  (best so far)' if improved else ''}")
    return improved


def update_best_step(run: Run, values: dict[str, Any]) -> bool:
    """Compare with the best validation so far; True when better. Counts consecutive validations without a new best."""
    state, name = run.state, run.config.early_stop_metric
    if values[name] is None and values["val_loss"] is not None:
        reason = values.get("undefined", {}).get(name)
        logger.warning("%s is undefined on these validation rows (%s): val_loss decides", name, reason)
        name = "val_loss"
    value = values[name]
    if value is None:
        logger.warning("step %d has no defined validation metric to compare: it cannot be the best", state.step)
        better = False
    elif state.best_value is None:
        better = True
    elif state.best_metric != name:  # two metrics: the configured one is better than val_loss
        better = name == run.config.early_stop_metric
    elif value == state.best_value:
        better = has_lower_loss(values["val_loss"], state.best_val_loss)
    else:
        better = value < state.best_value if lower_is_better(name) else value > state.best_value
    if better:
        state.best_metric, state.best_value, state.best_step, state.bad_validations = name, value, state.step, 0
        state.best_val_loss = values["val_loss"]
        return True
    state.bad_validations += 1
    if state.bad_validations >= run.config.early_stop_patience and state.step < run.plan.total_steps:
        state.finished = True
        than = "" if state.best_step is None else f" than {state.best_value} at step {state.best_step}"
        run.log.say(f"early stop: {state.bad_validations} validations in a row without a better {name}{than}")
    return False


def has_lower_loss(val_loss: float | None, best_val_loss: float | None) -> bool:
    """Of two steps with equal values of the metric: whether the new one has the lower loss.

    A best step without a loss (not finite, or from an older checkpoint) stays the best.
    """
    return val_loss is not None and best_val_loss is not None and val_loss < best_val_loss


def evaluate(
    run: Run, dataset: Dataset, step: Callable[[Batch, int], None], positions: np.ndarray | None = None
) -> bool:
    """Collective. Call `step(batch, index)` for every batch assigned to this rank, in eval mode, without gradients.

    `step` uses the raw module: DDP's forward is a collective, and ranks may have different numbers of batches.
    Returns False, with `run.stopping` set, when a signal to any rank has stopped it before the last batch.
    `positions`: of these rows only.
    """
    stop_flag = distributed.AsyncFlag()
    run.model.eval()
    # not inference_mode: an encoder may cache a tensor here and use it in training steps
    with torch.no_grad(), phase(f"the evaluation at step {run.state.step}"):
        for item in scoring.own_batches(dataset, run.context, positions):
            run.stopping = stop_flag.any_rank(signals.requested() is not None)
            if run.stopping:
                break
            if item is not None:
                index, batch = item
                step(batch, index)
    stop_flag.close()
    run.model.train()
    return not run.stopping
