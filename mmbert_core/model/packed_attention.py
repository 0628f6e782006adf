"""Attention over packed texts: a token attends only to tokens of its own text.

N texts, T tokens of the longest, S tokens of all, h heads, d size of a head, H = h x d, P = sum of squared lengths.
A group's tensors: g texts of l tokens each.

`packed_attention` is registered with transformers. Its encoders pass the argument `packing` of their forward on to the
attention function. The implementations below give the same result; which one is fastest depends on the device, the
precision and dropout.
"""

from collections.abc import Iterator
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmbert_core.model.dropout import apply_keep_mask, draw_keep_mask
from mmbert_core.model.packing import FAMILIES, Group, Packing

ATTENTION = "mmbert_packed"  # name of the attention function in transformers' registry
BERT_LAYERS = frozenset("bert electra roberta xlm-roberta camembert".split())  # families with BERT's layers and names


# ---- switching an encoder to packed attention ----


def use_packed_attention(encoder: nn.Module) -> bool:
    """Make the encoder use `packed_attention`; False where packing would not be exact or cannot be set.

    Calls of the encoder without `packing` compute the same as before.
    """
    config = encoder.config
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        return False
    config.output_attentions = False  # only eager attention can return them
    encoder.set_attn_implementation(ATTENTION)
    return config._attn_implementation == ATTENTION  # transformers only warns where it cannot switch


def end_at_first_tokens(encoder: nn.Module) -> bool:
    """Make the last layer compute only the first token of each packed text; False for other layers than BERT's.

    Exact for the poolings that read only that token: the keys and values are still those of all tokens. Saves most of
    a layer, forward and backward.
    """
    if encoder.config.model_type not in BERT_LAYERS or encoder.config.num_hidden_layers == 0:
        return False
    last = encoder.encoder.layer[-1]
    last.__class__ = type(f"FirstTokens{type(last).__name__}", (_FirstTokens, type(last)), {})
    return True


class _FirstTokens(nn.Module):
    """Mixin for the class of a BERT layer, added by `end_at_first_tokens`."""

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, packing: Packing | None = None, **others: Any
    ) -> torch.Tensor:
        """Packed [1, S, H] -> [1, N, H]"""
        if packing is None:
            return super().forward(hidden_states, *arguments, **others)
        attention = self.attention.self
        heads = (attention.num_attention_heads, attention.attention_head_size)
        first = packing.first_tokens(hidden_states.squeeze(0))  # [N, H]
        key, value = (
            linear(hidden_states).squeeze(0).unflatten(-1, heads)  # [S, h, d]
            for linear in (attention.key, attention.value)
        )
        query = attention.query(first).unflatten(-1, heads)  # [N, h, d]
        dropout = attention.dropout.p if self.training else 0.0
        context = attend_first_tokens(query, key, value, packing, attention.scaling, dropout).flatten(1)  # [N, H]
        return self.feed_forward_chunk(self.attention.output(context, first))[None]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query, key, value [1, h, S, d] -> [1, S, h, d].

    `sliding_window`: tokens see each other where their distance is smaller, as transformers counts it.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    # [S, h, d]; the backward pass of `states[0]` would copy, that of `squeeze` does not
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and dropout:
        output = AttentionWithDropout.apply(query, key, value, packing, scaling, dropout, sliding_window)
    elif query.device.type == "cpu":
        output = attend_by_group(query, key, value, packing, scaling, sliding_window)
    elif not dropout and takes_varlen(query):
        output = attend_varlen(query, key, value, packing, scaling, sliding_window)
    else:
        output = attend_padded(query, key, value, packing, scaling, dropout, sliding_window)
    return output[None], None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# ---- implementations: query, key, value [S, h, d] -> [S, h, d] ----


def attend_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, window: int | None
) -> torch.Tensor:
    """One call of torch's fused kernel for each group of texts: the fastest on the CPU without dropout."""
    outputs = []
    for group in packing.groups:
        states = [_heads_first(tensor, group) for tensor in (query, key, value)]  # [g, h, l, d]
        mask = _window_mask(group.length, window, query.device)
        output = F.scaled_dot_product_attention(*states, attn_mask=mask, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [g l, h, d]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, window: int | None
) -> torch.Tensor:
    """Flash attention over texts of different lengths; CUDA, half precision, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    reach = (-1, -1) if window is None else (window - 1, window - 1)  # tokens to the left and right; -1: all
    longest = max(packing.lengths)
    return varlen_attn(
        query, key, value, packing.offsets, packing.offsets, longest, longest, scale=scaling, window_size=reach
    )


def takes_varlen(query: torch.Tensor) -> bool:
    """Whether flash attention supports the precision, head size and device of a query [S, h, d], and torch has it."""
    size = query.shape[-1]
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return is_half and size % 8 == 0 and size <= 256 and _has_varlen(query.device)


@cache
def _has_varlen(device: torch.device) -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    has_options = {"scale", "window_size"} <= set(signature(varlen_attn).parameters)
    return has_options and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Pads query, key and value, for the attention only."""
    mask = packing.is_token[:, None, None, :]  # [N, 1, 1, T]
    window_mask = _window_mask(max(packing.lengths), window, query.device)
    if window_mask is not None:
        # padding tokens attend to everything: a softmax over no token would be NaN
        mask = (mask & window_mask) | ~packing.is_token[:, None, :, None]  # [N, 1, T, T]
    query, key, value = (_pad(states, packing) for states in (query, key, value))  # [N, h, T, d]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, packing.padded_index)  # [S, h, d]


def attend_first_tokens(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, dropout: float
) -> torch.Tensor:
    """Queries [N, h, d] of the first tokens, keys and values [S, h, d] of all -> [N, h, d]. Pads keys and values."""
    mask = packing.is_token[:, None, None, :]  # [N, 1, 1, T]
    key, value = (_pad(states, packing) for states in (key, value))  # [N, h, T, d]
    return F.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    ).squeeze(2)


def _pad(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[S, h, d] -> [N, h, T, d]"""
    return packing.pad(states).transpose(1, 2)


class AttentionWithDropout(torch.autograd.Function):
    """Attention with dropout (Vaswani et al. 2017), one group at a time; the masks of all groups are one draw.

    torch's fused kernels for the CPU have no dropout. The gradients are derived by hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packing: Packing,
        scaling: float,
        rate: float,
        window: int | None,
    ) -> torch.Tensor:
        num_heads = query.shape[1]
        weights = query.new_empty(num_heads * sum(group.num_pairs for group in packing.groups))  # [h P], by group
        keep_mask = draw_keep_mask(weights.shape, rate)  # [h P]
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        # one group after the other, so that a group's tensors stay in the processor's caches
        for group, group_weights, group_mask in _split_by_group(packing, num_heads, weights, keep_mask):
            keys = _group_batch(key, group).transpose(1, 2)  # [g h, d, l]
            # scores [g h, l, l]; beta=0: the old content is ignored
            torch.baddbmm(group_weights, _group_batch(query, group), keys, beta=0, alpha=scaling, out=group_weights)
            if (window_mask := _window_mask(group.length, window, query.device)) is not None:
                group_weights.masked_fill_(~window_mask, -torch.inf)
            torch.softmax(group_weights, -1, out=group_weights)
            dropped = apply_keep_mask(group_weights, group_mask, rate)
            _write_group(output, group, torch.bmm(dropped, _group_batch(value, group)))
        ctx.save_for_backward(query, key, value, weights, keep_mask)
        ctx.packing, ctx.scaling, ctx.rate = packing, scaling, rate
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, keep_mask = ctx.saved_tensors
        d_query, d_key, d_value = (
            torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value)
        )
        for group, group_weights, group_mask in _split_by_group(ctx.packing, query.shape[1], weights, keep_mask):
            d_output = _group_batch(gradient, group)  # [g h, l, d]
            dropped = apply_keep_mask(group_weights, group_mask, ctx.rate)  # [g h, l, l]
            _write_group(d_value, group, torch.bmm(dropped.transpose(1, 2), d_output))
            d_dropped = torch.bmm(d_output, _group_batch(value, group).transpose(1, 2))
            d_weights = apply_keep_mask(d_dropped, group_mask, ctx.rate)
            d_scores = torch._softmax_backward_data(d_weights, group_weights, -1, group_weights.dtype)
            d_scores.mul_(ctx.scaling)
            _write_group(d_query, group, torch.bmm(d_scores, _group_batch(key, group)))
            _write_group(d_key, group, torch.bmm(d_scores.transpose(1, 2), _group_batch(query, group)))
        return d_query, d_key, d_value, None, None, None, None


# ---- tensors of a group ----


def _heads_first(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[S, h, d] -> the group's [g, h, l, d], a view."""
    return states[group.tokens].unflatten(0, (group.count, group.length)).transpose(1, 2)


def _group_batch(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[S, h, d] -> the group's [g h, l, d]"""
    return _heads_first(states, group).flatten(0, 1)


def _write_group(target: torch.Tensor, group: Group, batch: torch.Tensor) -> None:
    """Write the group's [g h, l, d] into its tokens of [S, h, d]."""
    _heads_first(target, group).copy_(batch.unflatten(0, (group.count, -1)))


def _split_by_group(packing: Packing, num_heads: int, *flat: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """For each group: the group, and of each tensor [h P] in `flat` a view of the group's elements, [g h, l, l]."""
    sizes = [num_heads * group.num_pairs for group in packing.groups]
    for group, *views in zip(packing.groups, *(tensor.split(sizes) for tensor in flat), strict=True):
        yield group, *(view.view(-1, group.length, group.length) for view in views)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[l, l] bool, which tokens of a text see each other; None: all do."""
    if window is None or length <= window:
        return None
    index = torch.arange(length, device=device)
    return (index[:, None] - index).abs() < window
