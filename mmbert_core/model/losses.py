"""One loss and one weight per row: the mean is taken once, over all rows of an optimizer step.

B rows, M members of an ensemble, K classes.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

LossOp = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss_op(class_weights: Sequence[float] | None = None) -> nn.CrossEntropyLoss:
    """Cross entropy with one loss per row; `class_weights`: one positive weight per class, in class order."""
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
    return nn.CrossEntropyLoss(weight=weight, reduction="none")


def add_loss_op(loss_op: LossOp) -> LossOp:
    """A user's `loss_op(logits [B, K], labels [B])` that returns one loss per row, [B].

    A loss with a `reduction` (torch's own have one) is copied with reduction "none". Any other must return [B] itself,
    which `row_losses` checks in every call.
    """
    if not hasattr(loss_op, "reduction"):
        return loss_op
    loss_op = copy.deepcopy(loss_op)
    loss_op.reduction = "none"
    return loss_op


def row_losses(loss_op: LossOp, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [B] in float32, class weights included, of logits [B, K] or [B, M, K]: then the mean of the members'.

    Raises `ValueError` when the loss op returns another shape.
    """
    if logits.ndim == 3:
        member_labels = labels.repeat_interleave(logits.shape[1])  # [B M]
        return row_losses(loss_op, logits.flatten(0, 1), member_labels).unflatten(0, logits.shape[:2]).mean(dim=1)
    losses = loss_op(logits.float(), labels)
    if losses.shape != labels.shape:
        expected, found = tuple(labels.shape), tuple(losses.shape)
        raise ValueError(f"loss_op: expected one loss per row, shape {expected}, found {found}")
    return losses


def mean_over_members(logits: torch.Tensor) -> torch.Tensor:
    """Logits [B, M, K] -> [B, K], whose softmax is the mean of the members' probabilities; [B, K] as they are."""
    if logits.ndim == 2:
        return logits
    return torch.logsumexp(torch.log_softmax(logits.float(), dim=2), dim=1) - math.log(logits.shape[1])


def row_weights(loss_op: LossOp, labels: torch.Tensor) -> torch.Tensor:
    """Weights [B] float32: the sum of losses is divided by their sum, as torch's reduction "mean" does.

    The "mean" of CrossEntropyLoss and NLLLoss is weighted: the weight is that of the row's class, 0 for the label
    `ignore_index`. Every other loss has weight 1 for each row.
    """
    weights = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    if not isinstance(loss_op, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return weights
    ignored = labels == loss_op.ignore_index
    if loss_op.weight is not None:
        weights = loss_op.weight.to(labels.device).float()[labels.masked_fill(ignored, 0)]
    return weights.masked_fill(ignored, 0.0)
