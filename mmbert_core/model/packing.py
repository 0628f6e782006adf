"""Texts stored end to end instead of padded, so that the encoder's linear layers compute real tokens only.

N texts, T tokens of the longest, S tokens of all, H hidden size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Families of transformers whose packed output equals the padded one (tests/model/test_packing.py).
FAMILIES = frozenset("bert distilbert electra modernbert roberta xlm-roberta camembert".split())


@dataclass(frozen=True)
class Group:
    """Neighbouring texts of the same length."""

    start: int  # index of the first token
    count: int  # texts
    length: int  # tokens of each

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def num_pairs(self) -> int:
        """Attention scores of one head."""
        return self.count * self.length**2


@dataclass(frozen=True)
class Packing:
    """Which of the S packed tokens belong to which text."""

    lengths: tuple[int, ...]
    device: torch.device  # of the tensors below

    @cached_property
    def groups(self) -> list[Group]:
        groups: list[Group] = []
        start = 0
        for length in self.lengths:
            if groups and groups[-1].length == length:
                groups[-1] = Group(groups[-1].start, groups[-1].count + 1, length)
            else:
                groups.append(Group(start, 1, length))
            start += length
        return groups

    @cached_property
    def offsets(self) -> torch.Tensor:
        """[N + 1] int32: index of each text's first token, then S."""
        return to_device(F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int(), self.device)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """[N] int64: the lengths."""
        return to_device(torch.tensor(self.lengths), self.device)

    @cached_property
    def is_token(self) -> torch.Tensor:
        """[N, T] bool: the attention mask of the padded batch."""
        return to_device(torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None], self.device)

    @cached_property
    def padded_index(self) -> torch.Tensor:
        """[S] int64: index of each token in the flattened padded batch [N x T]."""
        longest = max(self.lengths)
        indices = [torch.arange(length) + row * longest for row, length in enumerate(self.lengths)]
        return to_device(torch.cat(indices), self.device)

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """[S, ...] -> [N, T, ...], zeros after the end of each text"""
        flat = states.new_zeros(self.is_token.numel(), *states.shape[1:]).index_copy(0, self.padded_index, states)
        return flat.unflatten(0, self.is_token.shape)

    def first_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H]"""
        return hidden.index_select(0, self.offsets[:-1])

    def last_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H]"""
        return hidden.index_select(0, self.offsets[1:] - 1)

    def means(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H] float32, the mean over each text."""
        # without unsafe=True the lengths are checked, for which the CPU would wait for the GPU
        return torch.segment_reduce(hidden.float(), "mean", lengths=self.sizes, axis=0, unsafe=True)


def pack(
    encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, position_offset: int
) -> tuple[dict[str, Any], Packing]:
    """Arguments of the encoder's forward for a padded batch [N, T] and its mask, and the layout of the packed tokens.

    `position_offset`: of the encoder (model/positions.py). The lengths are read on the CPU: for a batch on a GPU this
    waits for the GPU.
    """
    device = encoder.get_input_embeddings().weight.device
    is_token = attention_mask != 0  # [N, T]
    is_token[:, 0] |= ~is_token.any(1)  # a text without tokens keeps its first one, as it needs a vector
    packing = Packing(tuple(is_token.sum(1).tolist()), device)
    is_counted = is_token
    if position_offset:  # RoBERTa's families give a pad token inside a text the position of padding
        is_counted = is_token & (input_ids != encoder.config.pad_token_id)
    positions = is_counted.cumsum(1) * is_counted + position_offset - 1  # [N, T]
    arguments = {
        "input_ids": to_device(input_ids[is_token][None], device),  # [1, S]
        "position_ids": to_device(positions[is_token][None], device),  # [1, S]
        "packing": packing,
    }
    if encoder.config.model_type == "modernbert":  # otherwise it builds masks [S, S]
        arguments["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    return arguments, packing


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a copy from the CPU to a GPU does not wait for the GPU's running work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
