"""The classification head over the text and the columns, chosen by name.

D hidden_common_dim, W values of all columns, C classes.
"""

from collections.abc import Sequence

from torch import nn

from mmbert_core.model.cross_attention import CrossAttention
from mmbert_core.model.tabm import TabM
from mmbert_core.model.vector_fusion import Gate, TwoExperts

READ_TOKENS = frozenset({"cross_attention"})  # fusions that read the text's tokens, not only its vector
READ_VALUES = frozenset(
    {"cross_attention", "tabm"}
)  # fusions that read the columns' values [B, W], not a vector [B, D]


def build_merge_subnetwork(input_merge_dim: int, output_merge_dim: int) -> nn.Sequential:
    """`relu_layer_final`, then `linear_layer_final`: [B, input_merge_dim] -> [B, output_merge_dim], logits.

    `fusion: concat`, the original's network, with its names of the layers.
    """
    network = nn.Sequential()
    network.add_module("relu_layer_final", nn.ReLU())
    network.add_module("linear_layer_final", nn.Linear(input_merge_dim, output_merge_dim))
    return network


def build_fusion(fusion: str, text_width: int, column_widths: Sequence[int], num_classes: int) -> nn.Module:
    """The head of this name, with random weights: of `concat` [B, D or 2 D] -> [B, C], see `build_merge_subnetwork`.

    Of others (TextFeatures | None, columns | None) -> [B, C], of `tabm` [B, k, C]. `column_widths`: of what the head
    reads of the columns, [D] or the widths of their values; empty without columns. `text_width`: D, 0 without text.
    Raises `ValueError` for another name, or where text or columns are missing that the fusion needs.
    """
    if fusion == "concat":
        return build_merge_subnetwork(text_width + sum(column_widths), num_classes)
    if fusion == "tabm":
        return TabM(text_width, sum(column_widths), num_classes)
    if not (text_width and column_widths):
        raise ValueError(f"fusion {fusion}: expected text and columns, found one of them only")
    if fusion == "gate":
        return Gate(text_width, num_classes)
    if fusion == "moe":
        return TwoExperts(text_width, num_classes)
    if fusion == "cross_attention":
        return CrossAttention(text_width, column_widths, num_classes)
    raise ValueError(f"fusion: expected concat, gate, cross_attention, moe or tabm, found {fusion!r}")
