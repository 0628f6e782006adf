"""What the text encoder gives the rest of the model: one entry per row, so that rows can be selected and joined.

B rows, L tokens of the row with the most, D hidden_common_dim, S scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class TextFeatures:
    """The texts of B rows as the layers after the encoder read them. The first axis of every tensor is the row."""

    vectors: torch.Tensor  # [B, D], one vector per text
    # of the tokens of all chunks of a text; only for a fusion that attends to them
    tokens: torch.Tensor | None = None  # [B, L, D]
    is_token: torch.Tensor | None = None  # [B, L] bool, false for padding; at least one true in each row
    words: torch.Tensor | None = None  # float32 [B, S], scores of a blend's bag of words; None without one

    def float(self) -> "TextFeatures":
        """The same in float32, whatever precision the encoder computed in."""
        return self._map(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.float())

    def select(self, rows: torch.Tensor) -> "TextFeatures":
        """The texts of these row indices (int64, on the same device), in their order."""
        return self._map(lambda tensor: tensor[rows])

    @staticmethod
    def cat(batches: Sequence["TextFeatures"]) -> "TextFeatures":
        """The rows of several batches, in order; tokens are padded to the longest text of all."""

        def joined(name: str) -> torch.Tensor | None:
            tensors = [getattr(batch, name) for batch in batches]
            if tensors[0] is None:
                return None
            if name in ("tokens", "is_token"):
                longest = max(tensor.shape[1] for tensor in tensors)
                after = [(0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
                tensors = [F.pad(tensor, padding) for tensor, padding in zip(tensors, after, strict=True)]
            return torch.cat(tensors)

        return TextFeatures(**{field.name: joined(field.name) for field in fields(TextFeatures)})

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TextFeatures":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return TextFeatures(**{name: None if tensor is None else function(tensor) for name, tensor in tensors.items()})
