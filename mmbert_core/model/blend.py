"""A blend: the network's probabilities and those of linear members, averaged with fixed weights.

B rows, P features of the columns, K classes, S scores: 1 for two classes (of class 1), else K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmbert_core.model.bag_of_words import NUM_FEATURES, BagOfWords
from mmbert_core.model.column_features import LinearColumnFeatures


@dataclass(frozen=True)
class MemberInputs:
    """One member of a blend: its weight above 0, and what it reads; the network reads neither by itself."""

    name: str  # of its tensors
    weight: float
    reads_words: bool = False
    reads_columns: bool = False

    @property
    def is_network(self) -> bool:
        return not (self.reads_words or self.reads_columns)


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
    """log(sum of weight * probability) over the members; a softmax of it gives the blended probabilities.

    `temperature` divides the network's logits first. `words` is one bag for all members that read words, each with S of
    its scores, in the order of the members; None where none does.
    """

    def __init__(
        self,
        members: Sequence[MemberInputs],
        *,
        num_classes: int,
        temperature: float,
        column_features: LinearColumnFeatures | None,
    ) -> None:
        """`members`: their weights sum to 1. The values of their tensors are loaded later."""
        super().__init__()
        self.members, self.temperature = tuple(members), temperature
        self.num_scores = 1 if num_classes == 2 else num_classes
        num_features = 0 if column_features is None else column_features.num_features
        self.linear = nn.ModuleDict(
            {
                member.name: LinearMember(num_features if member.reads_columns else 0, self.num_scores)
                for member in members
                if not member.is_network
            }
        )
        num_word_scores = self.num_scores * sum(member.reads_words for member in members)
        has_columns = any(member.reads_columns for member in members)
        self.column_features = column_features if has_columns else None
        self.words = None
        if num_word_scores:
            self.words = BagOfWords(torch.zeros(NUM_FEATURES), torch.zeros(NUM_FEATURES, num_word_scores))

    def word_scores_of(self, name: str) -> slice:
        """Which of the words' scores are those of a member that reads words."""
        index = [member.name for member in self.members if member.reads_words].index(name)
        return slice(index * self.num_scores, (index + 1) * self.num_scores)

    def member_log_probabilities(
        self,
        logits: torch.Tensor,
        words: torch.Tensor | None,
        numbers: torch.Tensor | None,
        categories: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Log probabilities [B, K] of each member, in their order; arguments as for `forward`."""
        results = []
        for member in self.members:
            if member.is_network:
                results.append(torch.log_softmax(logits.float() / self.temperature, dim=1))
                continue
            own_words = words[:, self.word_scores_of(member.name)] if member.reads_words else None
            results.append(self.linear[member.name](own_words, self.column_features, numbers, categories))
        return results

    def forward(
        self,
        logits: torch.Tensor,
        words: torch.Tensor | None,
        numbers: torch.Tensor | None,
        categories: torch.Tensor | None,
    ) -> torch.Tensor:
        """The network's logits [B, K], all scores of the words, numbers and categories -> log probabilities [B, K]."""
        by_member = self.member_log_probabilities(logits, words, numbers, categories)
        weighted = [values + math.log(member.weight) for values, member in zip(by_member, self.members, strict=True)]
        return torch.logsumexp(torch.stack(weighted, dim=2), dim=2)  # [B, K, members] -> [B, K]
