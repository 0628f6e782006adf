"""The classification head over the text and the tabular vector."""

from torch import nn


def build_merge_subnetwork(input_merge_dim: int, output_merge_dim: int) -> nn.Sequential:
    """`relu_layer_final`, then `linear_layer_final`: [B, input_merge_dim] -> [B, output_merge_dim], logits.

    The original's network, with its names of the layers.
    """
    network = nn.Sequential()
    network.add_module("relu_layer_final", nn.ReLU())
    network.add_module("linear_layer_final", nn.Linear(input_merge_dim, output_merge_dim))
    return network
