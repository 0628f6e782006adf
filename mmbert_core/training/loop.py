"""The training loop, top to bottom: when things happen. What happens is in `hooks`. Floor 3; imports floors below.

B rows of a step are cut into micro-batches, dealt to the ranks; every rank knows the whole plan.
"""

import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbert_core import distributed
from mmbert_core.config import Config
from mmbert_core.data.batches import deal, epoch_order, micro_batch_seed, micro_batches, step_rows
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.distributed import DistContext
from mmbert_core.files import write_json
from mmbert_core.model.losses import LossOp
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model_folder import save_model_folder
from mmbert_core.training import checkpoint, hooks
from mmbert_core.training.optim import optimizer_step
from mmbert_core.training.setup import RESULTS, Run, already_finished, save, start_run

logger = logging.getLogger(__name__)

LOWER_IS_BETTER = ("val_loss", "val/log_loss", "val/ece")


def fit(
    config: Config, data: Data, model: MultimodalBert, pooling: str | None, context: DistContext, *, loss_op: LossOp | None = None
) -> dict[str, Any]:
    """Collective. Train, keep the best step, write the model folder, score the test rows; returns train_results.json.

    `model` and `pooling` come from `setup.prepare_model`. Goes on from a checkpoint in `config.model_path` unless told
    otherwise; a finished run is left as it is. `loss_op(logits, labels)` replaces the weighted cross entropy
    (`losses.add_loss_op`); it is code, so no checkpoint knows it: give the same one to resume.
    """
    run = start_run(config, data, model, pooling, context, loss_op=loss_op)
    try:
        if run.state.finished and (results := already_finished(config)):
            run.log.say(f"{config.model_path}: this run is finished at step {run.state.step}; nothing to do")
            return results
        order, order_epoch = np.zeros(0, np.int64), -1
        while not run.state.finished:
            if order_epoch != run.state.epoch:
                order, order_epoch = epoch_order(len(data.train), config.seed, run.state.epoch), run.state.epoch
            figures = train_one_step(run, order)
            improved = validate(run) if is_validation_due(run) else False
            run.state.finished = run.state.finished or run.state.step == run.plan.total_steps
            log_step(run, figures)
            if improved or run.state.finished or run.state.step % config.save_every == 0:
                save(run)
        return finish(run)
    finally:
        run.log.close()


# ---- one optimizer step ----


def train_one_step(run: Run, order: np.ndarray) -> dict[str, float]:
    """Collective. One optimizer step over the step's micro-batches; moves `run.state` on and returns its figures."""
    started = time.perf_counter()
    state, config, dataset = run.state, run.config, run.data.train
    rows = step_rows(order, state.rows_consumed // config.batch_size, config.batch_size)
    lengths = dataset.lengths[rows]
    parts = micro_batches(rows, lengths, run.plan.micro_batches)
    areas = [dataset.area(part) for part in parts]
    hand = deal(areas, run.context.world_size)[run.context.rank]
    # the step's weights, known to every rank without asking; an all-zero step has zero losses over any divisor
    weight_sum = float(run.class_weights[run.train_labels[rows]].sum()) or 1.0

    loss_sum = torch.zeros((), dtype=torch.float64, device=run.context.device)
    for position, index in enumerate(hand):
        torch.manual_seed(micro_batch_seed(config.seed, state.step, index))
        loss_sum += backward(run, dataset.batch(parts[index]), index, weight_sum, is_last=position == len(hand) - 1)
    if not hand:  # fewer micro-batches than ranks: take part in the synchronisation with a row that weighs nothing
        backward(run, dataset.batch(parts[0][:1]), 0, math.inf, is_last=True)

    [train_loss] = distributed.all_reduce_sum([float(loss_sum)])
    if not math.isfinite(train_loss):
        raise FloatingPointError(f"the loss is {train_loss} at step {state.step + 1}; stopped before the optimizer step")
    lr = run.scheduler.get_last_lr()[0]
    try:
        stepped, grad_norm = optimizer_step(run.model.parameters(), run.optimizer, run.scheduler, run.scaler, max_norm=config.gradient_clip_val)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} at step {state.step + 1}; stopped before the optimizer step") from None
    state.skipped_steps += not stepped
    seconds = time.perf_counter() - started
    advance(run, len(rows), seconds)
    return {
        "train_loss": train_loss, "lr": lr, "grad_norm": grad_norm, "rows": len(rows), "tokens": int(lengths.sum()), "padded": sum(areas),
        "seconds": seconds,
    }  # fmt: skip


def backward(run: Run, batch: Batch, index: int, weight_sum: float, *, is_last: bool) -> torch.Tensor:
    """Gradients of one micro-batch; the rank's last one synchronises. Returns its share of the step's loss, detached."""
    with distributed.no_sync(run.ddp_model, enabled=not is_last):
        loss = hooks.training_step(run.ddp_model, batch, index, task=run.task, weight_sum=weight_sum)["loss"]
        run.scaler.scale(loss * run.context.world_size).backward()  # DDP takes the mean over ranks; the step wants the sum
    return loss.detach().double()


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
    """Every `log_every` steps and at the end: a line of metrics.jsonl. Rates and padding are of the steps since the last line."""
    window, state = run.window, run.state
    for name in ("rows", "tokens", "padded", "seconds"):
        window[name] = window.get(name, 0) + figures[name]
    rate = window["rows"] / window["seconds"]
    left = (run.plan.total_steps - state.step) * window["seconds"] / window["rows"] * run.config.batch_size
    shown = f"epoch {min(state.epoch + 1, run.config.max_epochs)}  train_loss {figures['train_loss']:.4f}  lr {figures['lr']:.2e}  {rate:.1f} rows/s  {format_seconds(left)} left"
    run.log.progress(state.step, shown)
    if state.step % run.config.log_every == 0 or state.finished:
        run.log.record({
            "step": state.step, "epoch": state.epoch, "train_loss": figures["train_loss"], "lr": figures["lr"],
            "grad_norm": figures["grad_norm"] if math.isfinite(figures["grad_norm"]) else None,
            "rows_per_second": rate, "tokens_per_second": window["tokens"] / window["seconds"], "padding_share": 1 - window["tokens"] / window["padded"],
        })  # fmt: skip
        window.clear()


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


# ---- validation: the best step and the early stop, decided from figures that are the same on all ranks ----


def is_validation_due(run: Run) -> bool:
    """After this many steps, counted from the epoch's start for shares of an epoch, and after the last step of all."""
    if run.data.val is None:
        return False
    step, plan = run.state.step, run.plan
    in_epoch = (step - 1) % plan.steps_per_epoch + 1
    due = in_epoch % plan.validate_every == 0 if plan.validate_by_epoch else step % plan.validate_every == 0
    return due or step == plan.total_steps


def validate(run: Run) -> bool:
    """Collective. Score the validation rows; True when this step is the best so far. May end the run early."""
    outputs = hooks.on_validation_epoch_start()
    evaluate(run, run.data.val, lambda batch, index: hooks.validation_step(run.model, batch, index, outputs, task=run.task))
    values = hooks.on_validation_epoch_end(outputs, len(run.data.val), config=run.config, class_names=run.data.labels.names)
    run.log.record({"step": run.state.step, **values})
    improved = judge(run, values)
    shown = "  ".join(f"{name} {'undefined' if value is None else format(value, '.4f')}" for name, value in values.items())
    run.log.say(f"step {run.state.step}/{run.plan.total_steps}  {shown}{'  (best so far)' if improved else ''}")
    return improved


def judge(run: Run, values: dict[str, float | None]) -> bool:
    """Compare with the best validation so far; count the ones in a row that were not better."""
    state, name = run.state, run.config.early_stop_metric
    if values[name] is None and name != "val_loss":
        logger.warning("%s is undefined on these validation rows: val_loss decides", name)
        name = "val_loss"
    value = values[name]
    if value is None:
        better = False
    elif state.best_value is None or state.best_metric != name:
        better = True
    else:
        better = value < state.best_value if name in LOWER_IS_BETTER else value > state.best_value
    if better:
        state.best_metric, state.best_value, state.best_step, state.bad_validations = name, value, state.step, 0
        return True
    state.bad_validations += 1
    if state.bad_validations >= run.config.early_stop_patience and state.step < run.plan.total_steps:
        state.finished = True
        run.log.say(f"early stop: {state.bad_validations} validations in a row without a better {name} than {state.best_value} at step {state.best_step}")
    return False


def evaluate(run: Run, dataset: Dataset, step: Any) -> None:
    """Run `step(batch, index)` on this rank's share of whole batches, on the raw module, without gradients."""
    run.model.eval()
    with torch.no_grad():  # not inference_mode: an encoder may keep a table it makes here for training steps
        for index, batch in hooks.own_batches(dataset, run.context):
            step(batch, index)
    run.model.train()


# ---- the end ----


def finish(run: Run) -> dict[str, Any]:
    """Collective. The best step's weights -> model folder -> test rows -> train_results.json."""
    best = run.state.best_step or run.state.step
    if best != run.state.step:
        run.model.load_state_dict(weights_for_all(run, best))
    distributed.on_main(lambda: save_model_folder(
        run.folder, checkpoint.weights_of(run.model), config=run.config, model=run.model, features=run.data.features,
        labels=run.data.labels, tokenizer=run.data.tokenizer, resolved=run.resolved,
    ))  # fmt: skip
    run.log.say(f"model of step {best} written to {run.folder}")
    test_figures, test_folder = test(run) if run.data.test is not None else (None, None)
    state = run.state
    results = {
        "steps": state.step, "epochs": state.rows_trained / len(run.data.train), "best_step": best, "best_metric": state.best_metric,
        "best_value": state.best_value, "rows": state.rows_trained, "train_rows": len(run.data.train), "skipped_steps": state.skipped_steps,
        "train_seconds": state.train_seconds, "train_rows_per_second": state.rows_trained / state.train_seconds,
        "peak_memory_mb": peak_memory_mb(run.context.device), "world_size": run.context.world_size, **run.resolved,
        "test_folder": str(test_folder) if test_folder else None, "test_metrics": test_figures,
    }  # fmt: skip
    distributed.on_main(lambda: write_json(run.folder / RESULTS, results))
    return results


def weights_for_all(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Collective. Rank 0 reads a step's weights, the others receive them."""
    kept: dict[str, torch.Tensor] = {}
    distributed.on_main(lambda: kept.update(checkpoint.read_weights(run.checkpoints, step)))
    return distributed.broadcast_tensors(kept)


def test(run: Run) -> tuple[dict[str, Any], Path]:
    """Collective. Score the test rows with the model as it is; returns the figures and the folder they are in."""
    dataset = run.data.test
    outputs, folder = hooks.on_test_epoch_start(run.folder)
    has_labels = dataset.has_labels
    evaluate(run, dataset, lambda batch, index: hooks.test_step(run.model, batch, index, outputs, task=run.task, has_labels=has_labels))
    figures = hooks.on_test_epoch_end(outputs, dataset, folder, config=run.config, class_names=run.data.labels.names)
    run.log.record({"step": run.state.step, **{name: value for name, value in figures.items() if name != "undefined"}})
    run.log.say(f"{len(dataset)} test rows scored: {folder / 'test_result_0.tsv'}")
    return figures, folder


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held: of the GPU where there is one, else resident memory (bytes on macOS, else KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
