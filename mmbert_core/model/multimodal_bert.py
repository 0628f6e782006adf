"""Text and columns to logits.text_encoder, model.tabular_encoder and model.fusion."""

# B rows, C chunks, T tokens, F numeric inputs, K categorical columns

from __future__ import annotations

import contextlib

import torch
from torch import nn

from mmbert_core.model.fusion import build_merge_subnetwork
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase


class MultimodalBert(nn.Module):
    """The classifier: either half may be absent (None), both absent is a ValueError.

    Attributes: ``text_subnetwork``, ``tab_subnetwork``, ``final_merge_network``, ``num_classes``.
    """

    build_merge_subnetwork = staticmethod(build_merge_subnetwork)

    def __init__(self, text_subnetwork: TextBertBase | None, tab_subnetwork: TabAE | None, num_classes: int) -> None:
        super().__init__()
        if text_subnetwork is None and tab_subnetwork is None:
            raise ValueError("MultimodalBert: expected a text part, a tabular part or both, found neither")
        self.text_subnetwork = text_subnetwork
        self.tab_subnetwork = tab_subnetwork
        self.num_classes = num_classes
        output_text_dim = 0 if text_subnetwork is None else text_subnetwork.output_text_dim
        output_tab_dim = 0 if tab_subnetwork is None else tab_subnetwork.output_tab_dim
        self.final_merge_network = self.build_merge_subnetwork(output_text_dim + output_tab_dim, num_classes)

    @property
    def pooling(self) -> str | None:
        """How the vectors of a text's tokens become one; None without text."""
        return None if self.text_subnetwork is None else self.text_subnetwork.pooling

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        tab_data: torch.Tensor | None = None,
        cat_data: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids and mask [B, T] or [B, C, T], numbers [B, F], categories [B, K] -> logits float32 [B, num_classes].

        What an absent half would read is ignored and may be None.
        """
        text_vectors = None if self.text_subnetwork is None else self.text_subnetwork(input_ids, attention_mask)
        return self.merge(text_vectors, tab_data, cat_data)

    def merge(
        self, text_vectors: torch.Tensor | None, tab_data: torch.Tensor | None, cat_data: torch.Tensor | None
    ) -> torch.Tensor:
        """The text half's vectors [B, D] and the columns -> logits: all that comes behind the encoder, next to nothing beside it.

        It stays in float32: a standardised outlier of 1e4 would overflow fp16 in the two linear layers.
        """
        parts = [] if text_vectors is None else [text_vectors.float()]
        with _without_autocast(self.final_merge_network.linear_layer_final.weight.device.type):
            if self.tab_subnetwork is not None:
                parts.append(self.tab_subnetwork(tab_data, cat_data))
            return self.final_merge_network(torch.cat(parts, dim=1))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
