"""Fusions of the text vector and the column vector into one vector of the same width: a gate, and two experts.

B rows, D hidden_common_dim, C classes.
"""

import torch
from torch import nn

from mmbert_core.model.text_features import TextFeatures


class Gate(nn.Module):
    """`fusion: gate`. For each element the share of the text, from both vectors; then ReLU and one linear layer.

    g = sigmoid(LayerNorm(W [t; c])), fused g t + (1 - g) c: the original author's `bimodal_gate_fusion` (a gated
    multimodal unit, Arevalo et al. 2017).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.gate_layer = nn.Linear(2 * width, width)
        self.gate_norm = nn.LayerNorm(width)
        self.linear_layer_final = nn.Linear(width, num_classes)

    def forward(self, text: TextFeatures, columns: torch.Tensor) -> torch.Tensor:
        """Text features, column vectors [B, D] -> [B, C]"""
        share = torch.sigmoid(self.gate_norm(self.gate_layer(torch.cat([text.vectors, columns], dim=1))))  # [B, D]
        return self.linear_layer_final(torch.relu(columns + share * (text.vectors - columns)))


class TwoExperts(nn.Module):
    """`fusion: moe`. A weighted sum of the two vectors; then ReLU and one linear layer.

    The weights are a softmax over two experts, text and columns, computed from both vectors: the original author's
    `bimodal_moe` (mixture of experts, Jacobs et al. 1991).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.expert_weights = nn.Linear(2 * width, 2)
        self.linear_layer_final = nn.Linear(width, num_classes)

    def forward(self, text: TextFeatures, columns: torch.Tensor) -> torch.Tensor:
        """Text features, column vectors [B, D] -> [B, C]"""
        joined = torch.cat([text.vectors, columns], dim=1)  # [B, 2 D]
        of_text, of_columns = torch.softmax(self.expert_weights(joined), dim=1).split(1, dim=1)  # [B, 1] each
        return self.linear_layer_final(torch.relu(of_text * text.vectors + of_columns * columns))
