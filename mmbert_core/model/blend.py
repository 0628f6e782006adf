"""A blend: the network's probabilities and those of linear members, averaged with fixed weights.

B rows, P features of the columns, K classes, S scores: 1 for two classes (of class 1), else K.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from mmbert_core.model.bag_of_words import NUM_FEATURES, BagOfWords
from mmbert_core.model.column_features import LinearColumnFeatures


class LinearMember(nn.Module):
    """A logistic regression on the columns' features, and on the words' scores where the member reads words.

    Buffers: `bias` [S], and `weight` [P, S] where it reads columns.
    """

    def __init__(self, num_features: int, num_scores: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_scores))
        self.register_buffer("weight", torch.zeros(num_features, num_scores) if num_features else None)

    def forward(
        self,
        words: torch.Tensor | None,
        features: LinearColumnFeatures | None,
        numbers: torch.Tensor,
        categories: torch.Tensor | None,
    ) -> torch.Tensor:
        """Scores of the words [B, S], numbers and categories of B rows -> log probabilities [B, K]."""
        logits = self.bias.expand(1, -1)
        if words is not None:
            logits = logits + words
        if self.weight is not None:
            logits = logits + features(numbers, categories, self.weight)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return torch.log_softmax(logits, dim=1)


class Blend(nn.Module):
    """log(sum of weight * probability) over the network, the words and columns, and the columns alone.

    A member without weight does not exist: `words` (BagOfWords), `with_words` (the member that reads its scores) and
    `columns` may be None. `temperature` divides the network's logits first. A softmax of the result gives the blended
    probabilities.
    """

    def __init__(
        self,
        weights: Sequence[float],
        *,
        num_classes: int,
        temperature: float,
        column_features: LinearColumnFeatures | None,
    ) -> None:
        """`weights`: of the network, the words and columns, and the columns alone; they sum to 1.

        The values of the members' tensors are loaded later.
        """
        super().__init__()
        num_scores = 1 if num_classes == 2 else num_classes
        num_features = 0 if column_features is None else column_features.num_features
        of_network, of_words, of_columns = weights
        self.weights, self.temperature = (of_network, of_words, of_columns), temperature
        self.words = self.with_words = self.columns = None
        if of_words:
            self.words = BagOfWords(torch.zeros(NUM_FEATURES), torch.zeros(NUM_FEATURES, num_scores))
            self.with_words = LinearMember(num_features, num_scores)
        if of_columns:
            self.columns = LinearMember(num_features, num_scores)
        self.column_features = column_features if of_words or of_columns else None

    def member_log_probabilities(
        self,
        logits: torch.Tensor,
        words: torch.Tensor | None,
        numbers: torch.Tensor | None,
        categories: torch.Tensor | None,
    ) -> list[tuple[float, torch.Tensor]]:
        """Weight and log probabilities [B, K] of each member that has one; arguments as for `forward`."""
        inputs = (self.column_features, numbers, categories)
        of_network, of_words, of_columns = self.weights
        members = []
        if of_network:
            members.append((of_network, torch.log_softmax(logits.float() / self.temperature, dim=1)))
        if self.with_words is not None:
            members.append((of_words, self.with_words(words, *inputs)))
        if self.columns is not None:
            members.append((of_columns, self.columns(None, *inputs)))
        return members

    def forward(
        self,
        logits: torch.Tensor,
        words: torch.Tensor | None,
        numbers: torch.Tensor | None,
        categories: torch.Tensor | None,
    ) -> torch.Tensor:
        """The network's logits [B, K], the words' scores [B, S], numbers and categories -> log probabilities [B, K]."""
        members = self.member_log_probabilities(logits, words, numbers, categories)
        weighted = [values + math.log(weight) for weight, values in members]
        return torch.logsumexp(torch.stack(weighted, dim=2), dim=2)  # [B, K, members] -> [B, K]
