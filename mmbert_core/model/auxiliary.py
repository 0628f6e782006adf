"""Auxiliary heads: the text alone and the columns alone predict the label too, in training only.

Their losses, weighted by `aux_loss_weight`, keep either part from resting on the other. B rows, D hidden_common_dim.
"""

import torch
from torch import nn


class AuxiliaryHeads(nn.Module):
    """A linear layer on the text vector and one on the column vector. Not part of the saved model."""

    def __init__(self, text_dim: int, column_dim: int, num_classes: int) -> None:
        super().__init__()
        self.text = nn.Linear(text_dim, num_classes)
        self.columns = nn.Linear(column_dim, num_classes)

    def forward(self, text_vectors: torch.Tensor, column_vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text vectors [B, D], after ReLU as in the head, and column vectors [B, D] -> two logits [B, num_classes]."""
        return self.text(text_vectors.relu()), self.columns(column_vectors.relu())
