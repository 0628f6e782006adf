"""The classifier: text and columns to logits.

B rows, C chunks, T tokens, H hidden size of the encoder, F numeric inputs, K categorical columns, D hidden_common_dim.
"""

import contextlib
from dataclasses import replace

import torch
from torch import nn

from mmbert_core.model.auxiliary import AuxiliaryHeads
from mmbert_core.model.blend import Blend
from mmbert_core.model.fusion import build_fusion, build_merge_subnetwork
from mmbert_core.model.losses import mean_over_members
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase
from mmbert_core.model.text_features import TextFeatures
from mmbert_core.model.wide_columns import WideColumns


class MultimodalBert(nn.Module):
    """Text encoder, tabular encoder and head. One of the encoders may be None; both None is a ValueError.

    `fusion`: the kind of head, see `model.fusion`. `wide_columns`, a linear path from the columns, adds its logits to
    those of the head.

    `auxiliary_heads`, where training has set them, give `forward` two more logits in training mode.

    Attributes: `text_subnetwork`, `tab_subnetwork`, `wide_columns`, `final_merge_network`, `num_classes`, `pooling`,
    `fusion`.
    """

    build_merge_subnetwork = staticmethod(build_merge_subnetwork)

    def __init__(
        self,
        text_subnetwork: TextBertBase | None,
        tab_subnetwork: TabAE | None,
        num_classes: int,
        *,
        fusion: str = "concat",
        wide_columns: WideColumns | None = None,
    ) -> None:
        super().__init__()
        if text_subnetwork is None and tab_subnetwork is None:
            raise ValueError("MultimodalBert: expected a text encoder, a tabular encoder or both, found neither")
        self.text_subnetwork = text_subnetwork
        self.tab_subnetwork = tab_subnetwork
        self.wide_columns = wide_columns
        self.auxiliary_heads: AuxiliaryHeads | None = None
        self.blend: Blend | None = None  # fitted after training; in eval mode the logits are then the blend's
        self.num_classes = num_classes
        output_text_dim = 0 if text_subnetwork is None else text_subnetwork.output_text_dim
        column_widths = [] if tab_subnetwork is None else tab_subnetwork.output_widths
        self.fusion = fusion
        self.final_merge_network = build_fusion(fusion, output_text_dim, column_widths, num_classes)

    @property
    def pooling(self) -> str | None:
        """How a text's token vectors become one vector; None without a text encoder."""
        return None if self.text_subnetwork is None else self.text_subnetwork.pooling

    def forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        tab_data: torch.Tensor | None = None,
        cat_data: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Token ids and mask [B, T] or [B, C, T], numbers [B, F], categories [B, K] -> logits float32 [B, num_classes].

        Inputs of an encoder that the model lacks are ignored and may be None. In training mode a fusion of several
        members returns [B, members, num_classes], and a model with `auxiliary_heads` a tuple, their logits last.
        """
        text = self.encode_text(input_ids, attention_mask)
        logits = self.merge(text, tab_data, cat_data)
        if self.auxiliary_heads is None or not self.training:
            return logits
        with _without_autocast(logits.device.type):
            return logits, *self.auxiliary_heads(text.float().vectors, self.tab_subnetwork(tab_data, cat_data))

    def add_auxiliary_heads(self) -> None:
        """Draws their weights from torch's global generator. A model of text or of columns alone gets none."""
        if self.text_subnetwork is not None and self.tab_subnetwork is not None:
            dims = self.text_subnetwork.output_text_dim, self.tab_subnetwork.output_tab_dim
            self.auxiliary_heads = AuxiliaryHeads(*dims, self.num_classes)

    def encode_text(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> TextFeatures | None:
        """Token ids and mask [B, T] or [B, C, T] -> what `merge` reads of the texts; None without a text encoder."""
        if self.text_subnetwork is None:
            return None
        text = self.text_subnetwork.features(input_ids, attention_mask)
        if self.training or self.blend is None or self.blend.words is None:
            return text
        return replace(text, words=self.blend.words(input_ids, attention_mask))

    def logits_from_pooled(
        self, pooled: torch.Tensor | None, tab_data: torch.Tensor | None, cat_data: torch.Tensor | None
    ) -> torch.Tensor:
        """Vectors of `TextBertBase.pool_rows` [B, H], numbers, categories -> logits: all layers but the encoder's."""
        text = None if self.text_subnetwork is None else self.text_subnetwork.features_of_pooled(pooled)
        return self.merge(text, tab_data, cat_data)

    def merge(
        self, text: TextFeatures | None, tab_data: torch.Tensor | None, cat_data: torch.Tensor | None
    ) -> torch.Tensor:
        """Features of the texts, numbers [B, F], categories [B, K] -> logits float32, as `forward`.

        Everything after the text encoder; cheap. Computed in float32 even inside autocast: a standardised outlier of
        1e4 would overflow fp16 in the linear layers.
        """
        text = None if text is None else text.float()
        with _without_autocast(next(self.final_merge_network.parameters()).device.type):
            columns = None if self.tab_subnetwork is None else self.tab_subnetwork(tab_data, cat_data)
            if self.fusion == "concat":
                vectors = ([] if text is None else [text.vectors]) + ([] if columns is None else [columns])
                logits = self.final_merge_network(torch.cat(vectors, dim=1))  # [B, D] or [B, 2 D] -> [B, num_classes]
            else:
                logits = self.final_merge_network(text, columns)
            if self.wide_columns is not None:
                wide = self.wide_columns(tab_data, cat_data)  # [B, num_classes]
                logits = logits + (wide if logits.ndim == 2 else wide.unsqueeze(1))
            if self.training:
                return logits
            logits = mean_over_members(logits)
            if self.blend is None:
                return logits
            return self.blend(logits, None if text is None else text.words, tab_data, cat_data)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
