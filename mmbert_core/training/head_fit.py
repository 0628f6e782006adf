"""Everything but the encoder, fitted to convergence on the encoder's vectors: the first half of LP-FT.

Kumar et al. (2022, arXiv 2202.10054): an encoder that is tuned from step 1 against a random head loses features that a
fitted head would have used. N rows, H hidden size of the encoder, F numbers, K categorical columns.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from mmbert_core.config import Config
from mmbert_core.data.batches import epoch_order
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import Data
from mmbert_core.inference.model_folder import ENCODER_PREFIX
from mmbert_core.model.fusion import READ_TOKENS
from mmbert_core.model.losses import LossOp, row_losses, row_weights
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.runtime.errors import InputError
from mmbert_core.training.optim import names_without_decay

logger = logging.getLogger(__name__)

MIN_TRAIN_ROWS = 50  # of head_first: auto
LR = 1e-3
WEIGHT_DECAYS = (0.0, 1.0, 3.0)  # each is tried, the lowest validation loss wins
MIN_BATCH, STEPS_PER_EPOCH = 32, 100  # rows of a batch: at least 32, more where an epoch would have more steps
MAX_EPOCHS, PATIENCE = 100, 8  # and at least so many steps, where an epoch has few:
MAX_STEPS, PATIENCE_STEPS = 3_000, 200
MIN_GAIN = 1e-4  # of the validation loss, relative, that counts as a better epoch
# Without validation rows
EPOCHS_WITHOUT_VALIDATION, DECAY_WITHOUT_VALIDATION = 5, 1.0
MAX_UPDATES = 2e11  # parameters x steps of one fit, some minutes; fewer epochs where a model is that large
ROWS_AT_ONCE = 4096  # when the loss of many rows is computed
STREAM = 0x4EAD  # of the random numbers, which training steps must not repeat


@dataclass(frozen=True)
class HeadRows:
    """Rows as input of everything but the encoder, on the model's device."""

    pooled: torch.Tensor | None  # [N, H] the encoder's vectors; None for a columns-only model
    numbers: torch.Tensor  # [N, F]
    categories: torch.Tensor  # [N, K]
    labels: torch.Tensor  # [N]

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, positions: np.ndarray, pooled: np.ndarray | None, device: torch.device
    ) -> "HeadRows":
        numbers, categories = dataset.columns(positions)
        labels = torch.from_numpy(dataset.label_index[positions])
        vectors = None if pooled is None else torch.from_numpy(pooled).to(device)
        columns = (torch.from_numpy(values).to(device) for values in (numbers, categories))
        return cls(vectors, *columns, labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: torch.Tensor | slice) -> "HeadRows":
        pooled = None if self.pooled is None else self.pooled[rows]
        return HeadRows(pooled, self.numbers[rows], self.categories[rows], self.labels[rows])


@dataclass(frozen=True)
class HeadFit:
    """How a fit went. The losses are weighted means over the validation rows; None without validation rows."""

    loss_before: float | None
    loss: float | None  # of the weights that were kept
    epoch: int  # after which they were; 0: before the first
    weight_decay: float
    train_losses: list[float]  # by epoch, of the chosen weight decay
    val_losses: list[float]


class StoppedFit(Exception):
    """A signal has stopped the fit."""


# ---- whether ----


def check_head_first(config: Config) -> None:
    """Raise `InputError` where the config demands the fit of a fusion that cannot have it."""
    if config.head_first == "always" and config.fusion in READ_TOKENS:
        advice = "set it to auto or never, or choose another fusion"
        raise InputError(f"head_first is always, but {_reads_tokens(config)}: {advice}")


def wants_head_first(config: Config, data: Data) -> bool:
    """Whether a new run fits the head first; the reason is logged where `auto` does not."""
    if config.head_first != "auto":
        return config.head_first == "always"
    if config.fusion in READ_TOKENS:
        reason = _reads_tokens(config)
    elif data.val is None:
        reason = "there are no validation rows"
    elif len(data.train) < MIN_TRAIN_ROWS:
        reason = f"there are fewer than {MIN_TRAIN_ROWS} training rows"
    else:
        return True
    logger.info("head_first is auto: the head is not fitted before fine-tuning: %s", reason)
    return False


def _reads_tokens(config: Config) -> str:
    return f"fusion {config.fusion} reads the text's tokens, not only its vector"


# ---- the fit ----


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters of everything but the encoder, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(ENCODER_PREFIX)
    }


def fit_head(
    model: MultimodalBert,
    train: HeadRows,
    val: HeadRows | None,
    *,
    loss_op: LossOp,
    seed: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> HeadFit:
    """Fit everything but the encoder, in place. Uses no other process, so the result does not depend on their number.

    AdamW on mini-batches with dropout, for each of WEIGHT_DECAYS from the same weights; an epoch without a lower
    validation loss for PATIENCE epochs ends it, and the best epoch's weights of all are kept. The weights before the
    fit are a candidate too. Raises `StoppedFit`, the weights as they were, when `is_stopped()` after an epoch.
    """
    parameters = head_parameters(model)
    before = _copy(parameters)
    was_training = model.training
    try:
        with _one_thread(train.labels.device), torch.random.fork_rng(_cuda_devices(train.labels.device)):
            if val is None:
                fits = [_fit(model, train, None, DECAY_WITHOUT_VALIDATION, loss_op, seed, is_stopped)]
            else:
                fits = []
                for weight_decay in WEIGHT_DECAYS:
                    _restore(parameters, before)
                    fits.append(_fit(model, train, val, weight_decay, loss_op, seed, is_stopped))
        fit, weights = fits[0] if val is None else min(fits, key=lambda item: item[0].loss)
        _restore(parameters, weights)
        return fit
    except StoppedFit:
        _restore(parameters, before)
        raise
    finally:
        model.train(was_training)


def _fit(
    model: MultimodalBert,
    train: HeadRows,
    val: HeadRows | None,
    weight_decay: float,
    loss_op: LossOp,
    seed: int,
    is_stopped: Callable[[], bool],
) -> tuple[HeadFit, dict[str, torch.Tensor]]:
    """One fit from the model's current weights, and the weights of its best epoch; without `val` those of the last."""
    parameters = head_parameters(model)
    optimizer = _optimizer(model, parameters, weight_decay)
    batch_size = max(MIN_BATCH, -(-len(train) // STEPS_PER_EPOCH))
    steps = -(-len(train) // batch_size)
    loss_before = mean_loss(model, val, loss_op) if val is not None else None
    best_loss, best_epoch, best = loss_before, 0, _copy(parameters)
    train_losses: list[float] = []
    val_losses: list[float] = []
    for epoch in range(_num_epochs(parameters, steps, has_validation=val is not None)):
        train_losses.append(_train_one_epoch(model, optimizer, train, batch_size, epoch, loss_op, seed))
        if is_stopped():
            raise StoppedFit
        if not math.isfinite(train_losses[-1]):
            break
        if val is None:
            best_epoch, best = epoch + 1, _copy(parameters)
            continue
        loss = mean_loss(model, val, loss_op)
        val_losses.append(loss)
        if loss < (best_loss if math.isinf(best_loss) else best_loss - MIN_GAIN * abs(best_loss)):
            best_loss, best_epoch, best = loss, epoch + 1, _copy(parameters)
        elif epoch + 1 - best_epoch >= max(PATIENCE, -(-PATIENCE_STEPS // steps)):
            break
    return HeadFit(loss_before, best_loss, best_epoch, weight_decay, train_losses, val_losses), best


def _train_one_epoch(
    model: MultimodalBert,
    optimizer: AdamW,
    rows: HeadRows,
    batch_size: int,
    epoch: int,
    loss_op: LossOp,
    seed: int,
) -> float:
    """One pass over the rows; returns the weighted mean loss, with dropout."""
    model.train()
    torch.manual_seed(int(np.random.SeedSequence([seed, STREAM, epoch]).generate_state(1, np.uint32)[0]))
    order = torch.from_numpy(epoch_order(len(rows), seed, epoch)).to(rows.labels.device)
    loss_sum = weight_sum = torch.zeros((), dtype=torch.float64, device=rows.labels.device)
    for start in range(0, len(rows), batch_size):
        batch = rows.select(order[start : start + batch_size])
        logits = model.logits_from_pooled(batch.pooled, batch.numbers, batch.categories)
        losses, weights = row_losses(loss_op, logits, batch.labels), row_weights(loss_op, batch.labels)
        total = weights.sum()
        (losses.sum() / total.clamp(min=1e-12)).backward()  # all weights may be 0: so are the losses
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum, weight_sum = loss_sum + losses.detach().double().sum(), weight_sum + total.double()
    return float(loss_sum / weight_sum)


@torch.no_grad()
def mean_loss(model: MultimodalBert, rows: HeadRows, loss_op: LossOp) -> float:
    """The weighted mean loss of all rows in eval mode; infinite where it is not finite."""
    model.eval()
    loss_sum = weight_sum = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows.select(slice(start, start + ROWS_AT_ONCE))
        logits = model.logits_from_pooled(batch.pooled, batch.numbers, batch.categories)
        loss_sum += float(row_losses(loss_op, logits, batch.labels).double().sum())
        weight_sum += float(row_weights(loss_op, batch.labels).double().sum())
    loss = loss_sum / weight_sum if weight_sum > 0 else math.inf
    return loss if math.isfinite(loss) else math.inf


def _optimizer(model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float) -> AdamW:
    undecayed = names_without_decay(model)
    groups = [
        {"params": [p for name, p in parameters.items() if (name in undecayed) == is_undecayed], "weight_decay": decay}
        for is_undecayed, decay in ((False, weight_decay), (True, 0.0))
    ]
    return AdamW([group for group in groups if group["params"]], lr=LR, fused=True)


def _num_epochs(parameters: dict[str, nn.Parameter], steps: int, *, has_validation: bool) -> int:
    """Epochs at most, of `steps` each. A function of sizes, not of time: a repeated fit must be the same."""
    updates = sum(parameter.numel() for parameter in parameters.values()) * steps
    affordable = max(1, int(MAX_UPDATES / len(WEIGHT_DECAYS) / max(1, updates)))
    if not has_validation:
        return min(affordable, EPOCHS_WITHOUT_VALIDATION)
    return min(affordable, max(MAX_EPOCHS, MAX_STEPS // steps))


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _restore(parameters: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU, one thread: a process has fewer threads the more processes there are, and sums depend on them."""
    num_threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
