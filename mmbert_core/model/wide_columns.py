"""A linear path from the columns to the logits, in addition to the network: wide and deep (Cheng et al. 2016)."""

import torch
from torch import nn

from mmbert_core.model.column_features import LinearColumnFeatures


class WideColumns(nn.Module):
    """Numbers [B, F] and categories [B, K] -> logits [B, num_classes]: a logistic regression without a bias.

    Its weights start at zero, so that a new model is the one without it. An unseen category adds nothing, unless
    rare ones of the training rows have its index.
    """

    def __init__(self, features: LinearColumnFeatures, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.zeros(features.num_features, num_classes))

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor | None) -> torch.Tensor:
        return self.features(numbers, categories, self.weight)
