"""Fusion by attention: the columns of a row attend to the words of its text, and the words to the columns.

B rows, L tokens of the longest text, F columns, W values of all columns, V values of the widest column, h heads,
D hidden_common_dim, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mmbert_core.model.dropout import Dropout
from mmbert_core.model.text_features import TextFeatures

MAX_HEADS = 4


class CrossAttention(nn.Module):
    """`fusion: cross_attention`. Attention both ways, each with residual and LayerNorm, then an MLP.

    The original author's `bimodal_cross_attn` (ViLBERT's co-attention, Lu et al. 2019), in which each side was one
    vector, so that every attention weight was 1. Here the sides are sequences: the word tokens of all chunks of the
    text, and one token per column. The MLP reads their means after attention, the text vector and a column vector.
    """

    def __init__(self, width: int, column_widths: Sequence[int], num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.column_tokens = ColumnTokens(column_widths, width)
        self.column_vector = nn.Linear(sum(column_widths), width)
        self.columns_to_words = Attention(width, dropout)
        self.words_to_columns = Attention(width, dropout)
        self.linear_layer_hidden = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)
        self.linear_layer_final = nn.Linear(width, num_classes)

    def forward(self, text: TextFeatures, columns: torch.Tensor) -> torch.Tensor:
        """Text features with tokens, values of the columns [B, W] -> [B, C]"""
        column_tokens = self.column_tokens(columns)  # [B, F, D]
        columns_after = self.columns_to_words(column_tokens, text.tokens, text.is_token)  # [B, F, D]
        words_after = self.words_to_columns(text.tokens, column_tokens)  # [B, L, D]
        is_token = text.is_token.unsqueeze(2).to(words_after.dtype)  # [B, L, 1]
        word_mean = (words_after * is_token).sum(dim=1) / is_token.sum(dim=1)  # [B, D]
        vectors = [text.vectors, word_mean, columns_after.mean(dim=1), self.column_vector(columns)]
        hidden = torch.relu(self.linear_layer_hidden(torch.cat(vectors, dim=1)))  # [B, D]
        return self.linear_layer_final(self.dropout(hidden))


class ColumnTokens(nn.Module):
    """The values of a row's columns as one token per column, with a linear layer for each column.

    As the feature tokenizer of FT-Transformer (Gorishniy et al. 2021), for columns of several values too.
    """

    def __init__(self, column_widths: Sequence[int], width: int) -> None:
        super().__init__()
        widest, num_values = max(column_widths), sum(column_widths)
        # position of each column's values in a row of W values and one zero, which fills narrow columns up: [F, V]
        index = torch.full((len(column_widths), widest), num_values)
        start = 0
        for column, count in enumerate(column_widths):
            index[column, :count] = torch.arange(start, start + count)
            start += count
        self.register_buffer("index", index, persistent=False)
        bounds = torch.tensor([count**-0.5 for count in column_widths])[:, None, None]
        self.weight = nn.Parameter(bounds * torch.empty(len(column_widths), widest, width).uniform_(-1, 1))  # [F, V, D]
        self.bias = nn.Parameter(bounds[:, 0] * torch.empty(len(column_widths), width).uniform_(-1, 1))  # [F, D]

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        """[B, W] -> [B, F, D]"""
        values = functional.pad(columns, (0, 1))[:, self.index]  # [B, F, V]
        return torch.einsum("bfv,fvd->bfd", values, self.weight) + self.bias


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, with dropout, residual and LayerNorm (Vaswani et al. 2017)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = math.gcd(MAX_HEADS, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor, is_other: torch.Tensor | None = None) -> torch.Tensor:
        """`tokens` [B, Q, D] attend to `others` [B, K, D] where `is_other` [B, K] is true, None: to all -> [B, Q, D]"""
        query, key, value = (
            states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, h, Q or K, D / h]
            for states in (self.query(tokens), self.key(others), self.value(others))
        )
        mask = None if is_other is None else is_other[:, None, None, :]  # [B, 1, 1, K]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self.output(attended.transpose(1, 2).flatten(2))  # [B, Q, D]
        return self.norm(tokens + self.dropout(attended))
