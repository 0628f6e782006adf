"""The training loop, top to bottom: when things happen. What happens is in `hooks`. Floor 3; imports floors below.

B rows of a step are cut into micro-batches, dealt to the ranks; every rank knows the whole plan.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from mmbert_core import distributed, signals
from mmbert_core.assessment import LOWER_IS_BETTER, listed_figures, make_judgement
from mmbert_core.card import write_card
from mmbert_core.config import Config
from mmbert_core.data.batches import deal, epoch_order, micro_batch_seed, micro_batches, step_rows
from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.distributed import DistContext
from mmbert_core.errors import PeerError, RunError, Stopped, phase
from mmbert_core.files import remove_stale_temporaries, write_json
from mmbert_core.model.losses import LossOp
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model_folder import LoadedModel, save_model_folder
from mmbert_core.report import PAGE, Scored, data_section, training_section, write_report
from mmbert_core.training import checkpoint, hooks
from mmbert_core.training.checkpoint import TrainState
from mmbert_core.training.memory import return_freed_memory
from mmbert_core.training.optim import optimizer_step
from mmbert_core.training.run_log import format_seconds
from mmbert_core.training.setup import RESULTS, Run, already_finished, claimed_folder, rotate_checkpoints, save, start_run

logger = logging.getLogger(__name__)

ROWS_TO_CHECK = 32  # training rows that stand in for validation rows where there are none
STEPS_BETWEEN_TRIMS = 100  # sizes differ from step to step, and the holes that they leave in the heap add up: after 1,000 steps to twice what one needs


def fit(
    config: Config, data: Data, model: MultimodalBert, pooling: str | None, context: DistContext, *, loss_op: LossOp | None = None
) -> dict[str, Any]:
    """Collective. Train, keep the best step, write the model folder, score the test rows; returns train_results.json.

    `model` and `pooling` come from `setup.prepare_model`. Goes on from a checkpoint in `config.model_path` unless told
    otherwise; a finished run is left as it is. Raises `Stopped` when a signal asked for it and a checkpoint is written. `loss_op(logits, labels)` replaces the weighted cross entropy
    (`losses.add_loss_op`); it is code, so no checkpoint knows it: give the same one to resume.
    """
    with claimed_folder(config) as claim, signals.deferred():
        run = start_run(config, data, model, pooling, context, loss_op=loss_op)
        run.claim = claim
        try:
            if run.state.finished and (results := already_finished(config)):
                run.log.say(f"{config.model_path}: this run is finished at step {run.state.step}; nothing to do")
                return results
            train_to_the_end(run)
            return finish(run)
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
        if state.finished and run.data.test is not None:  # known before the last checkpoint: a test that is killed and done again has one folder
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
    raise Stopped(f"stopped by a signal; the checkpoint of step {run.state.step} is written, and {how} goes on from there")


# ---- one optimizer step ----


def train_one_step(run: Run, order: np.ndarray) -> dict[str, float]:
    """Collective. One optimizer step over the step's micro-batches; moves `run.state` on and returns its figures."""
    started = time.perf_counter()
    state, config, dataset = run.state, run.config, run.data.train
    rows = step_rows(order, state.rows_consumed // config.batch_size, config.batch_size)
    lengths = dataset.lengths[rows]
    parts = micro_batches(rows, lengths, run.plan.micro_batches, packed=dataset.packed)
    costs = [dataset.cost(part) for part in parts]
    hand = deal(costs, run.context.world_size)[run.context.rank]
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

    train_loss, sound = agree(run, [parts[index] for index in hand], torch.stack(losses).tolist() if losses else [], len(rows))
    lr = run.scheduler.get_last_lr()[0]
    stepped, grad_norm = step_optimizer(run) if sound else (False, math.nan)
    state.skipped_steps += not stepped
    if (state.step + 1) % STEPS_BETWEEN_TRIMS == 0:
        return_freed_memory()
    seconds = time.perf_counter() - started
    advance(run, len(rows), seconds)
    return {
        "train_loss": train_loss, "lr": lr, "grad_norm": grad_norm, "rows": len(rows), "tokens": int(lengths.sum()), "padded": sum(costs),
        "seconds": seconds,
    }  # fmt: skip


def backward(run: Run, rows: np.ndarray, index: int, weight_sum: float, *, is_last: bool) -> torch.Tensor:
    """Gradients of one micro-batch; the rank's last one synchronises. Returns its share of the step's loss, detached."""
    with phase(f"the data of step {run.state.step + 1}"):
        batch = run.data.train.batch(rows)
    with distributed.no_sync(run.ddp_model, enabled=not is_last), distributed.lost_peers():
        with phase(f"the forward pass of step {run.state.step + 1}"):
            loss = hooks.training_step(run.ddp_model, batch, index, task=run.task, weight_sum=weight_sum)["loss"]
        with phase(f"the backward pass of step {run.state.step + 1}"):
            run.scaler.scale(loss * run.context.world_size).backward()  # DDP takes the mean over ranks; the step wants the sum
    return loss.detach().double()


def agree(run: Run, parts: list[np.ndarray], losses: list[float], num_rows: int) -> tuple[float, bool]:
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
        where = f"the loss of a micro-batch of step {step} is {losses[bad[0]]}, of {len(rows)} rows, first {run.data.train.where(int(rows[0]))}"
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
                run.model.parameters(), run.optimizer, run.scheduler, run.scaler,
                max_norm=run.config.gradient_clip_val, skip_nonfinite=run.config.on_nonfinite == "skip",
            )  # fmt: skip
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
        run.log.record({
            "step": state.step, "epoch": state.epoch, "train_loss": finite_or_none(figures["train_loss"]), "lr": figures["lr"],
            "grad_norm": finite_or_none(figures["grad_norm"]),
            "rows_per_second": rate, "tokens_per_second": window["tokens"] / window["seconds"], "padding_share": 1 - window["tokens"] / window["padded"],
        })  # fmt: skip
        window.clear()


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
    """Collective. Score the validation rows; True when this step is the best so far. May end the run early, or be stopped by a signal."""
    outputs = hooks.on_validation_epoch_start()
    if not evaluate(run, run.data.val, lambda batch, index: hooks.validation_step(run.model, batch, index, outputs, task=run.task)):
        return False
    run.state.validation_pending = False
    values, result = hooks.on_validation_epoch_end(outputs, len(run.data.val), config=run.config, class_names=run.data.labels.names)
    run.log.record({"step": run.state.step, **values})
    improved = judge(run, values)
    if improved:
        run.best_validation = result.preds
    shown = "  ".join(f"{name} {'undefined' if value is None else format(value, '.4f')}" for name, value in values.items() if name != "undefined")
    run.log.say(f"step {run.state.step}/{run.plan.total_steps}  {shown}{'  (best so far)' if improved else ''}")
    return improved


def judge(run: Run, values: dict[str, Any]) -> bool:
    """Compare with the best validation so far; count the ones in a row that were not better."""
    state, name = run.state, run.config.early_stop_metric
    if values[name] is None and values["val_loss"] is not None:
        logger.warning("%s is undefined on these validation rows (%s): val_loss decides", name, values.get("undefined", {}).get(name))
        name = "val_loss"
    value = values[name]
    if value is None:
        logger.warning("there is no figure to compare step %d by: it cannot be the best", state.step)
        better = False
    elif state.best_value is None:
        better = True
    elif state.best_metric != name:  # the one that was asked for counts more
        better = name == run.config.early_stop_metric
    elif value == state.best_value:
        better = has_lower_loss(values["val_loss"], state.best_val_loss)
    else:
        better = value < state.best_value if name in LOWER_IS_BETTER else value > state.best_value
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
    """Among equal values of the metric. A best step without a loss (not finite, or of an older checkpoint) stays the best."""
    return val_loss is not None and best_val_loss is not None and val_loss < best_val_loss


def evaluate(run: Run, dataset: Dataset, step: Callable[[Batch, int], None]) -> bool:
    """Collective. Run `step(batch, index)` on this rank's share of whole batches, on the raw module, without gradients.

    False, with `run.stopping` set, when a signal to any rank ended it before the last batch.
    """
    poll = distributed.Poll()
    run.model.eval()
    with torch.no_grad(), phase(f"the evaluation at step {run.state.step}"):  # not inference_mode: an encoder may keep a table it makes here for training steps
        for item in hooks.own_batches(dataset, run.context):
            run.stopping = poll.ask(signals.requested() is not None)
            if run.stopping:
                break
            if item is not None:
                index, batch = item
                step(batch, index)
    poll.close()
    run.model.train()
    return not run.stopping


# ---- the end ----


def finish(run: Run) -> dict[str, Any]:
    """Collective. The best step's weights -> model folder -> test rows -> train_results.json.

    Raises `RunError`, before anything of the model is written, for one that no step has moved or whose probabilities are not finite.
    """
    distributed.on_main(lambda: check_some_steps_counted(run.state))
    best = run.state.best_step or run.state.step
    if best != run.state.step:
        run.model.load_state_dict(weights_for_all(run, best))
    val_preds = validation_of_best(run)
    distributed.on_main(lambda: check_finite_predictions(run, best, val_preds))
    with phase("threshold, calibration and baselines"):
        made: list[LoadedModel] = []  # rank 0's: the others need none
        distributed.on_main(lambda: made.append(assessed_model(run, val_preds)), patient=True)
    with phase("writing the model folder"):
        distributed.on_main(lambda: save_model_folder(run.folder, checkpoint.weights_of(run.model), made[0]))
    run.log.say(f"model of step {best} written to {run.folder}")
    test_figures, test_folder = test(run, made[0] if made else None) if run.data.test is not None else (None, None)
    best_figures = {"step": best, "metric": run.state.best_metric, "value": run.state.best_value}
    distributed.on_main(lambda: write_card(run.folder, made[0], data=data_section(run.data), best=best_figures, test=test_figures))
    state = run.state
    results = {
        "steps": state.step, "epochs": state.rows_trained / len(run.data.train), "best_step": best, "best_metric": state.best_metric,
        "best_value": state.best_value, "rows": state.rows_trained, "train_rows": len(run.data.train), "skipped_steps": state.skipped_steps,
        "train_seconds": state.train_seconds, "train_rows_per_second": state.rows_trained / state.train_seconds,
        "peak_memory_mb": peak_memory_mb(run.context.device), "world_size": run.context.world_size, **run.resolved,
        "test_folder": str(test_folder) if test_folder else None, "test_metrics": test_figures,
    }  # fmt: skip
    distributed.on_main(lambda: remove_old_checkpoints(run))
    distributed.on_main(lambda: write_json(run.folder / RESULTS, results))
    return results


def validation_of_best(run: Run) -> np.ndarray | None:
    """Collective. The best step's predictions of the validation rows: as it was validated, or, in a later life of the run, once more."""
    if run.data.val is None or run.best_validation is not None:
        return run.best_validation
    outputs = hooks.on_validation_epoch_start()
    if not evaluate(run, run.data.val, lambda batch, index: hooks.validation_step(run.model, batch, index, outputs, task=run.task)):
        signals.ignore()
        raise Stopped("stopped by a signal while the validation rows were scored; the same command (resume: auto) goes on with that")
    return hooks.gather_results(outputs, len(run.data.val)).preds


def remove_old_checkpoints(run: Run) -> None:
    """Rank 0 only. Once more, for what could not be removed after the last save."""
    rotate_checkpoints(run)
    remove_stale_temporaries(run.checkpoints)


def check_some_steps_counted(state: TrainState) -> None:
    """Rank 0 only. Raise `RunError` when every step was left out; warn when some were."""
    what = "because their loss or gradient was not finite"
    if state.skipped_steps >= state.step:
        raise RunError(f"all {state.step} steps were left out {what}: nothing was trained, and no model is written; see the first of these errors")
    if state.skipped_steps:
        logger.warning("%d of %d steps were left out %s", state.skipped_steps, state.step, what)


def check_finite_predictions(run: Run, step: int, val_preds: np.ndarray | None) -> None:
    """Rank 0 only. Raise `RunError` unless the model of `step` gives every validation row, `val_preds` [N] or [N, K], finite probabilities.

    Without validation rows the first training rows are scored instead.
    """
    dataset, preds = (run.data.train, first_predictions(run)) if val_preds is None else (run.data.val, val_preds)
    non_finite_rows = hooks.broken_rows(preds)
    if len(non_finite_rows):
        raise RunError(
            f"the model of step {step} gives probabilities that are not finite: {len(non_finite_rows)} of {len(preds)} {dataset.name} rows, first "
            f"{dataset.where(int(non_finite_rows[0]))}; no model is written: choose another model_path with a lower lr, or gradient_clip_val: 1.0"
        )


def first_predictions(run: Run) -> np.ndarray:
    """Probabilities [N] or [N, K] of the first `ROWS_TO_CHECK` training rows, by the weights as they are now."""
    run.model.eval()
    with torch.no_grad():
        _, preds, _ = hooks.run_epoch(run.model, run.data.train.batch(np.arange(min(ROWS_TO_CHECK, len(run.data.train)))), "pred", task=run.task)
    run.model.train()
    return preds.numpy(force=True)


def assessed_model(run: Run, val_preds: np.ndarray | None) -> LoadedModel:
    """Rank 0 only."""
    judgement = make_judgement(run.data, run.config, val_preds)
    data = run.data
    return LoadedModel(run.model, run.config, data.features, data.labels, data.tokenizer, run.resolved, judgement)


def weights_for_all(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Collective. Rank 0 reads a step's weights, the others receive them."""
    kept: dict[str, torch.Tensor] = {}
    distributed.on_main(lambda: kept.update(checkpoint.read_weights(run.checkpoints, step)))
    return distributed.broadcast_tensors(kept)


def test(run: Run, made: LoadedModel | None) -> tuple[dict[str, Any], Path]:
    """Collective. Score the test rows with the model as it is; returns the figures and the folder they are in. `made` is rank 0's."""
    dataset = run.data.test
    outputs, folder = hooks.on_test_epoch_start(run.folder, run.state.test_folder)
    has_labels = dataset.has_labels
    if not evaluate(run, dataset, lambda batch, index: hooks.test_step(run.model, batch, index, outputs, task=run.task, has_labels=has_labels)):
        distributed.on_main(folder.rmdir)
        signals.ignore()
        raise Stopped("stopped by a signal while the test rows were scored; the model is written, and the same command (resume: auto) goes on with the test")
    judgement = made.judgement if made else None
    figures, result = hooks.on_test_epoch_end(outputs, dataset, folder, config=run.config, class_names=run.data.labels.names, judgement=judgement)
    distributed.on_main(lambda: report(run, made, result, figures, folder), patient=True)
    run.log.record({"step": run.state.step, **{name: value for name, value in listed_figures(figures, "test", run.config)[0].items() if name.startswith("test")}})
    run.log.say(f"{len(dataset)} test rows scored: {folder / 'test_result_0.tsv'}")
    return figures, folder


def report(run: Run, made: LoadedModel, result: hooks.EpochResult, figures: dict[str, Any], folder: Path) -> None:
    """Rank 0 only. The page about the test."""

    def scored() -> Scored:
        training = training_section(run.folder, run.state.best_step, run.state.best_metric)
        return Scored(
            made, run.task, run.data.test, result.preds, result.ids, figures, str(run.folder), training, data_section(run.data),
            warnings=run.data.warnings, slice_columns=run.config.slice_columns,
        )  # fmt: skip

    run.model.eval()
    if write_report(scored, folder):
        run.log.say(f"report: {folder / PAGE}")
    run.model.train()


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held: of the GPU where there is one, else resident memory (bytes on macOS, else KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
