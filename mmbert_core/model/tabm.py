"""Fusion by an ensemble of MLPs that share their weights: TabM-mini (Gorishniy et al. 2024).

B rows, k members, I values of a row, D hidden_common_dim, W values of all columns, C classes.
"""

import torch
from torch import nn
from torch.nn import functional

from mmbert_core.model.dropout import Dropout
from mmbert_core.model.text_features import TextFeatures

NUM_MEMBERS = 16
WIDTH = 256
NUM_LAYERS = 2


class TabM(nn.Module):
    """`fusion: tabm`. The text vector and the columns' values through one MLP, in k versions; logits of each.

    "TabM: Advancing Tabular Deep Learning with Parameter-Efficient Ensembling": a member has its own scale of every
    input value, which starts at +1 or -1 at random, and its own last layer; the MLP between them is shared. In training
    the loss is the mean of the members' losses, in evaluation the probability is the mean of theirs.

    `text_width`, `num_values`: 0 for a side that the model lacks. The text vector is normalised (LayerNorm without
    weights): the columns are scaled already, and its own scale depends on the encoder.
    """

    def __init__(
        self,
        text_width: int,
        num_values: int,
        num_classes: int,
        *,
        num_members: int = NUM_MEMBERS,
        width: int = WIDTH,
        num_layers: int = NUM_LAYERS,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.text_width = text_width
        num_inputs = text_width + num_values
        self.member_scales = nn.Parameter(torch.randint(0, 2, (num_members, num_inputs)) * 2.0 - 1.0)  # [k, I]
        sizes = [num_inputs] + [width] * num_layers
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.dropout = Dropout(dropout)
        bound = width**-0.5
        self.head_weight = nn.Parameter(torch.empty(num_members, width, num_classes).uniform_(-bound, bound))
        self.head_bias = nn.Parameter(torch.empty(num_members, num_classes).uniform_(-bound, bound))

    def forward(self, text: TextFeatures | None, columns: torch.Tensor | None) -> torch.Tensor:
        """Text features, values of the columns [B, W] -> [B, k, C]"""
        inputs = [] if text is None else [functional.layer_norm(text.vectors, (self.text_width,))]
        inputs += [] if columns is None else [columns]
        hidden = torch.cat(inputs, dim=1).unsqueeze(1) * self.member_scales  # [B, k, I]
        for linear in self.linears:
            hidden = self.dropout(torch.relu(linear(hidden)))  # [B, k, width]
        return torch.einsum("bkw,kwc->bkc", hidden, self.head_weight) + self.head_bias
