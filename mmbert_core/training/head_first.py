"""Before step 1 of a new run: everything but the encoder is fitted on the encoder's vectors (`head_first`).

Fine-tuning starts from there, and what it starts from, step 0, is validated and kept like every other step.
N rows of a dataset, S rows of a sample, H hidden size of the encoder.
"""

import logging
import time
from functools import partial

import numpy as np
import torch

from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.inference.precision import autocast
from mmbert_core.runtime import distributed, signals
from mmbert_core.runtime.errors import Stopped, phase
from mmbert_core.runtime.progress import Progress, slow_step
from mmbert_core.training.head_fit import HeadFit, HeadRows, StoppedFit, fit_head, head_parameters
from mmbert_core.training.run import Run, save
from mmbert_core.training.run_log import finite_or_none
from mmbert_core.training.validation import evaluate

logger = logging.getLogger(__name__)

STAGE = "head_first"  # in metrics.jsonl
# Rows that are encoded: encoding one costs about a third of training on it, and fine-tuning takes `max_epochs` passes.
SHARE_OF_TRAINED_ROWS, SHARE_OF_VALIDATION = 0.2, 0.25  # the second one relative to the sample of training rows
ALWAYS_TRAIN_ROWS, ALWAYS_VALIDATION_ROWS = 2_000, 1_000  # so many in any case
MAX_ROWS = 50_000
NOTHING_LOST = "stopped by a signal before step 1, with nothing to save; the same command begins again"


def fit_head_first(run: Run) -> None:
    """Collective. Fit everything but the encoder; leave step 0 to be validated, or saved without validation rows.

    The result does not depend on the number of ranks. Raises `Stopped` after a signal; a repeated stage gives the same.
    """
    started = time.perf_counter()
    config, data = run.config, run.data
    num_train = min(max(ALWAYS_TRAIN_ROWS, int(SHARE_OF_TRAINED_ROWS * config.max_epochs * len(data.train))), MAX_ROWS)
    num_val = max(ALWAYS_VALIDATION_ROWS, int(SHARE_OF_VALIDATION * num_train))
    train = head_rows(run, data.train, sample_rows(len(data.train), num_train, config.seed))
    val = None if data.val is None else head_rows(run, data.val, sample_rows(len(data.val), num_val, config.seed))

    with phase("the fit of the head before step 1"):
        fit = distributed.on_main(partial(fit_on_main, run, train, val), share=False, long_timeout=True)
        stop_if_asked()
        parameters = head_parameters(run.model)
        weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        weights = distributed.broadcast_tensors(weights if run.context.is_main else None)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
    if fit is not None and train is not None:
        record(run, fit, len(train), 0 if val is None else len(val), time.perf_counter() - started)
    if data.val is None:
        save(run)
    else:
        run.state.validation_pending = True  # the loop validates it, as every step


def sample_rows(num_rows: int, at_most: int, seed: int) -> np.ndarray:
    """Positions of all rows, or of a random sample; ascending, [S] int64."""
    if num_rows <= at_most:
        return np.arange(num_rows)
    generator = np.random.default_rng([seed, num_rows])
    return np.sort(generator.choice(num_rows, size=at_most, replace=False))


def head_rows(run: Run, dataset: Dataset, positions: np.ndarray) -> HeadRows | None:
    """Collective. The rows at `positions` as input of everything but the encoder, on rank 0; None on the others."""
    pooled = None
    if run.model.text_subnetwork is not None:
        pooled = pooled_vectors(run, dataset, positions, if_stopped=NOTHING_LOST)
    return HeadRows.from_dataset(dataset, positions, pooled, run.context.device) if run.context.is_main else None


def pooled_vectors(run: Run, dataset: Dataset, positions: np.ndarray, *, if_stopped: str) -> np.ndarray | None:
    """Collective. The encoder's vectors of the rows at `positions` (distinct, ascending), before the projection.

    [S, H] float32 on rank 0, None on the others; the same on any number of ranks. Raises `Stopped(if_stopped)` after a
    signal, and `RuntimeError` unless every row has exactly one vector.
    """
    encoder, task = run.model.text_subnetwork, run.task
    assert encoder is not None, "a columns-only model has no encoder"
    outputs: list[tuple[np.ndarray, np.ndarray]] = []  # of each batch: positions [B], vectors [B, H]
    per_rank = max(1, len(positions) // run.context.world_size)
    progress = Progress(f"of about {per_rank:,} {dataset.name} rows encoded", [per_rank])

    def step(batch: Batch, index: int) -> None:
        with autocast(task.precision, task.device):
            vectors = encoder.pool_rows(batch.input_ids, batch.attention_mask)  # [B, H]
        outputs.append((batch.row_index.numpy(), vectors.float().numpy(force=True)))
        progress.advance(len(batch.row_index), position=progress.num_done + len(batch.row_index))

    if not evaluate(run, dataset, step, positions):
        signals.ignore()
        raise Stopped(if_stopped)
    gathered = distributed.gather_objects(outputs)
    if gathered is None:
        return None
    batches = [batch for of_rank in gathered for batch in of_rank]
    found = np.concatenate([rows for rows, _ in batches])
    order = np.argsort(found)
    if not np.array_equal(found[order], positions):
        raise RuntimeError(f"expected one vector for each of {len(positions)} rows, found {len(found)}")
    return np.concatenate([vectors for _, vectors in batches])[order]


def fit_on_main(run: Run, train: HeadRows, val: HeadRows | None) -> HeadFit | None:
    """Rank 0 only. None after a signal to this rank."""
    try:
        with slow_step("head first"):
            return fit_head(
                run.model,
                train,
                val,
                loss_op=run.task.loss_op,
                seed=run.config.seed,
                is_stopped=lambda: signals.requested() is not None,
            )
    except StoppedFit:
        return None


def stop_if_asked() -> None:
    """Collective. Raise `Stopped` on all ranks after a signal to any of them."""
    [num_asked] = distributed.all_reduce_sum([signals.requested() is not None])
    if num_asked:
        signals.ignore()
        raise Stopped(NOTHING_LOST)


def record(run: Run, fit: HeadFit, num_train: int, num_val: int, seconds: float) -> None:
    """Rank 0 only. The lines of metrics.jsonl, and one for the user."""
    for index, train_loss in enumerate(fit.train_losses):
        val_loss = fit.val_losses[index] if index < len(fit.val_losses) else None
        losses = {"head_train_loss": finite_or_none(train_loss), "head_val_loss": finite_or_none(val_loss)}
        run.log.record({"step": 0, "stage": STAGE, "head_epoch": index + 1, **losses})
    run.log.record(
        {
            "step": 0,
            "stage": STAGE,
            "head_rows": num_train,
            "head_val_rows": num_val,
            "head_seconds": seconds,
            "head_weight_decay": fit.weight_decay,
            "head_best_epoch": fit.epoch,
            "head_val_loss_before": finite_or_none(fit.loss_before),
            "head_val_loss_after": finite_or_none(fit.loss),
        }
    )
    passes = f"{fit.epoch} pass{'' if fit.epoch == 1 else 'es'} over {num_train:,} training rows"
    line = f"head first: {passes}, {seconds:.1f} seconds"
    if fit.loss_before is not None and fit.loss is not None:
        line += f"; loss of {num_val:,} validation rows {fit.loss_before:.4f} before, {fit.loss:.4f} after"
    run.log.say(line)
