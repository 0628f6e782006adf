"""What the text encoder gives the rest of the model: one entry per row, so that rows can be selected and joined.

B rows, D hidden_common_dim, S scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TextFeatures:
    """The texts of B rows as the layers after the encoder read them. The first axis of every tensor is the row."""

    vectors: torch.Tensor  # [B, D], one vector per text
    words: torch.Tensor | None = None  # float32 [B, S], scores of a blend's bag of words; None without one

    def float(self) -> "TextFeatures":
        """The same in float32, whatever precision the encoder computed in."""
        return TextFeatures(self.vectors.float(), self.words)

    def select(self, rows: torch.Tensor) -> "TextFeatures":
        """The texts of these row indices (int64, on the same device), in their order."""
        return TextFeatures(self.vectors[rows], None if self.words is None else self.words[rows])

    @staticmethod
    def cat(batches: Sequence["TextFeatures"]) -> "TextFeatures":
        """The rows of several batches, in order."""
        words = [batch.words for batch in batches if batch.words is not None]
        return TextFeatures(torch.cat([batch.vectors for batch in batches]), torch.cat(words) if words else None)
