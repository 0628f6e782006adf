"""The model in a form that torch.export can trace: padded batches to probabilities.

B rows, C chunks, T tokens, L tokens of all chunks, F numeric inputs, K categorical columns, D hidden_common_dim.
"""

import copy

import torch
from torch import nn

from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.text_features import TextFeatures


class PaddedModel(nn.Module):
    """A copy of the model without packing: the shapes of packed tensors depend on the texts' lengths.

    `limits`: lowest and highest number of each numeric input, [F] each; numbers are clipped to them. None: no clipping.
    """

    def __init__(
        self,
        model: MultimodalBert,
        *,
        is_binary: bool,
        max_chunks: int,
        limits: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("lowest", None if limits is None else limits[0].float())
        self.register_buffer("highest", None if limits is None else limits[1].float())
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        self.is_binary = is_binary
        text_encoder = self.model.text_subnetwork
        if text_encoder is not None and text_encoder.is_packed:
            text_encoder.is_packed = False
            text_encoder.encoder.set_attn_implementation("sdpa")
        if text_encoder is not None and max_chunks > 1:
            self.model.text_subnetwork = AllChunks(text_encoder)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        categories: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids and mask [B, T] or [B, C, T], numbers [B, F], categories [B, K] -> probabilities float32.

        Of class 1, [B], when binary, else of all classes, [B, num_classes]. None for inputs that the model does not
        have.
        """
        if numbers is None and categories is not None:
            numbers = torch.zeros_like(categories[:, :0], dtype=torch.float32)  # [B, 0]
        if self.lowest is not None:
            numbers = torch.minimum(torch.maximum(numbers, self.lowest), self.highest)
        probabilities = torch.softmax(self.model(input_ids, attention_mask, numbers, categories).float(), dim=1)
        return probabilities[:, 1] if self.is_binary else probabilities


class AllChunks(nn.Module):
    """The text encoder without shapes that depend on the data: chunks of padding are encoded, but not in the mean."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TextFeatures:
        """[B, C, T] twice -> as `TextBertBase.features`"""
        num_rows, num_chunks, num_tokens = attention_mask.shape
        # by an index, not a reshape: a graph with that reshape is refused where all texts have one chunk
        slots = torch.arange(num_rows)[:, None] * num_chunks + torch.arange(num_chunks)  # [B, C], in the flat [B C]
        is_chunk = attention_mask.any(dim=2)  # [B, C]
        is_first = torch.arange(num_tokens) == 0  # [T]; padding gets one token: attention over none would be NaN
        mask = torch.where(is_first, 1, attention_mask)
        chunks = self.text.features(input_ids.flatten(0, 1), mask.flatten(0, 1))
        vectors = chunks.vectors[slots]  # [B, C, D]
        weights = is_chunk / is_chunk.sum(dim=1, keepdim=True).clamp(min=1)  # [B, C]
        # TextBertBase projects after the mean; the result is the same, as the projection is linear and weights sum to 1
        vectors = (vectors * weights.unsqueeze(2)).sum(dim=1)  # [B, D]
        if chunks.tokens is None:
            return TextFeatures(vectors)
        is_token = chunks.is_token[slots] & is_chunk.unsqueeze(2)  # [B, C, T]
        return TextFeatures(vectors, chunks.tokens[slots].flatten(1, 2), is_token.flatten(1, 2))
