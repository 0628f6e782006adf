"""Row losses over row weights is torch's own weighted mean.   pytest tests/model/test_losses.py"""

import pytest
import torch
from torch import nn

from mmbert_core.model.losses import add_loss_op, build_loss_op, row_losses, row_weights

LOGITS = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.randint(0, 3, (23,), generator=torch.Generator().manual_seed(1))


def mean(loss_op, logits=LOGITS, labels=LABELS):
    return row_losses(loss_op, logits, labels).sum() / row_weights(loss_op, labels).sum()


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (0.2, 5.0, 1.7)])
def test_equals_torchs_mean(weights):
    expected = nn.CrossEntropyLoss(weight=None if weights is None else torch.tensor(weights))(LOGITS, LABELS)
    torch.testing.assert_close(mean(build_loss_op(weights)), expected, rtol=1e-6, atol=1e-7)


def test_micro_batches_of_a_step_add_up():
    loss_op = build_loss_op((0.2, 5.0, 1.7))
    micro_batches = [slice(0, 9), slice(9, 10), slice(10, 23)]
    loss_sum = sum(row_losses(loss_op, LOGITS[rows], LABELS[rows]).sum() for rows in micro_batches)
    weight_sum = sum(row_weights(loss_op, LABELS[rows]).sum() for rows in micro_batches)
    torch.testing.assert_close(loss_sum / weight_sum, mean(loss_op), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "loss_op",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 5.0, 1.7]), label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 5.0, 1.7]), ignore_index=2),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.MultiMarginLoss(weight=torch.tensor([0.2, 5.0, 1.7])),
    ],
)
def test_added_loss_keeps_its_own_mean_and_is_copied(loss_op):
    expected = loss_op(LOGITS, LABELS)
    torch.testing.assert_close(mean(add_loss_op(loss_op)), expected, rtol=1e-6, atol=1e-7)
    assert loss_op.reduction == "mean"


def test_added_function_must_return_a_loss_per_row():
    squared = lambda logits, labels: (logits.gather(1, labels[:, None])[:, 0] - 1) ** 2  # noqa: E731
    assert row_losses(add_loss_op(squared), LOGITS, LABELS).shape == (23,)
    assert torch.equal(row_weights(squared, LABELS), torch.ones(23))
    with pytest.raises(ValueError, match=r"one loss per row, shape \(23,\), found \(\)"):
        row_losses(add_loss_op(lambda logits, labels: logits.mean()), LOGITS, LABELS)


def test_half_precision_logits_are_scored_in_float32():
    losses = row_losses(build_loss_op(), LOGITS.to(torch.bfloat16), LABELS)
    assert losses.dtype == torch.float32
