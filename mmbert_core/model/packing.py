"""Texts end to end instead of padded: the encoder's linear layers see real tokens only.dropout.

N texts, T tokens of the longest, S tokens of all, h heads, d size of a head, P = sum of squared lengths.

transformers' encoders take `[1, S]` tokens with positions of their own and hand `packing=...` through to the attention
function that is registered here; each text attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmbert_core.model.dropout import apply_kept, draw_kept

ATTENTION = "mmbert_packed"
# Families whose packed output equals the padded one (tests/model/test_packing.py) -> whether positions start behind the padding's.
FAMILIES = {
    "bert": False,
    "distilbert": False,
    "electra": False,
    "modernbert": False,
    "roberta": True,
    "xlm-roberta": True,
    "camembert": True,
}
BERT_LAYERS = (
    "bert",
    "electra",
    "roberta",
    "xlm-roberta",
    "camembert",
)  # families whose layers have BERT's parts under BERT's names


@dataclass(frozen=True)
class Group:
    """Neighbouring texts of one length."""

    start: int  # first token
    count: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def num_pairs(self) -> int:
        return self.count * self.length**2


@dataclass(frozen=True)
class Packing:
    """Where each text lies among the packed tokens."""

    lengths: tuple[int, ...]
    device: torch.device

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
        """[N + 1] int32: first token of each text, and S."""
        return moved(F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int(), self.device)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """[N] int64"""
        return moved(torch.tensor(self.lengths), self.device)

    @cached_property
    def is_token(self) -> torch.Tensor:
        """[N, T] bool, as a padded batch has it."""
        return moved(torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None], self.device)

    @cached_property
    def padded_places(self) -> torch.Tensor:
        """[S] int64: place of each token in the padded batch, flattened."""
        longest = max(self.lengths)
        return moved(
            torch.cat([torch.arange(length) + row * longest for row, length in enumerate(self.lengths)]), self.device
        )

    def first_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H]"""
        return hidden.index_select(0, self.offsets[:-1])

    def last_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H]"""
        return hidden.index_select(0, self.offsets[1:] - 1)

    def means(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [N, H] float32, the mean over each text."""
        return torch.segment_reduce(
            hidden.float(), "mean", lengths=self.sizes, axis=0, unsafe=True
        )  # safe: a GPU would be waited for


def use_packed_attention(encoder: nn.Module) -> bool:
    """Let the encoder attend through this file; False where packing is not exact. Plain padded calls go on to mean what they did."""
    config = encoder.config
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        return False
    config.output_attentions = False  # which only eager attention has, and nobody reads
    encoder.set_attn_implementation(ATTENTION)
    return config._attn_implementation == ATTENTION  # transformers only warns where it cannot switch


def end_at_first_tokens(encoder: nn.Module) -> bool:
    """Let the last layer compute each text's first token alone, packed texts' only one that a pooler or cls reads; False where it cannot.

    The other tokens are its keys and values still. Saves most of a layer, forward and backward; the same vectors come out.
    """
    if encoder.config.model_type not in BERT_LAYERS or encoder.config.num_hidden_layers == 0:
        return False
    last = encoder.encoder.layer[-1]
    last.__class__ = type(f"FirstTokens{type(last).__name__}", (_FirstTokens, type(last)), {})
    return True


class _FirstTokens(nn.Module):
    """What `end_at_first_tokens` puts before a BERT layer's class."""

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, packing: Packing | None = None, **others: Any
    ) -> torch.Tensor:
        """Packed [1, S, H] -> [1, N, H]"""
        if packing is None:
            return super().forward(hidden_states, *arguments, **others)
        attention = self.attention.self
        first = packing.first_tokens(hidden_states.squeeze(0))  # [N, H]
        heads = (attention.num_attention_heads, attention.attention_head_size)
        key, value = (
            part(hidden_states).squeeze(0).unflatten(-1, heads) for part in (attention.key, attention.value)
        )  # [S, h, d]
        query = attention.query(first).unflatten(-1, heads)  # [N, h, d]
        dropout = attention.dropout.p if self.training else 0.0
        context = _attend_first(query, key, value, packing, attention.scaling, dropout).flatten(1)
        return self.feed_forward_chunk(self.attention.output(context, first))[None]


def pack(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[dict[str, Any], Packing]:
    """Arguments for the encoder from a padded batch [N, T] and its mask, which should lie on the CPU: elsewhere it is waited for."""
    device = encoder.get_input_embeddings().weight.device
    is_token = attention_mask != 0
    is_token[:, 0] |= ~is_token.any(1)  # a text without a token would have no vector
    lengths = is_token.sum(1)
    packing = Packing(tuple(lengths.tolist()), device)
    if FAMILIES[encoder.config.model_type]:  # fairseq's way: a pad token within a text stays at the padding's position
        pad = encoder.config.pad_token_id
        counts = is_token & (input_ids != pad)
        positions = counts.cumsum(1) * counts + pad
    else:
        positions = is_token.cumsum(1) - 1
    arguments = {
        "input_ids": moved(input_ids[is_token][None], device),
        "position_ids": moved(positions[is_token][None], device),
        "packing": packing,
    }
    if encoder.config.model_type == "modernbert":  # else it makes a mask of S x S
        arguments["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    return arguments, packing


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without a wait for what it computes now."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and tensor.device.type == "cpu"
        else tensor.to(device)
    )


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

    `sliding_window`: a token sees those nearer than that, as transformers counts it.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    query, key, value = (
        states.squeeze(0).transpose(0, 1) for states in (query, key, value)
    )  # [S, h, d]; `[0]` would copy in the backward pass
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        if dropout:
            return _AttentionWithDropout.apply(query, key, value, packing, scaling, dropout, sliding_window)[None], None
        return _attend_by_group(query, key, value, packing, scaling, sliding_window)[None], None
    if not dropout and takes_varlen(query):
        return _attend_varlen(query, key, value, packing, scaling, sliding_window)[None], None
    return _attend_padded(query, key, value, packing, scaling, dropout, sliding_window)[None], None


def takes_varlen(query: torch.Tensor) -> bool:
    """Whether flash attention knows this precision, head size, device and version of torch; [S, h, d]."""
    size = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256 and _has_varlen(query.device)
    )


@cache
def _has_varlen(device: torch.device) -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= set(signature(varlen_attn).parameters) and torch.cuda.get_device_capability(
        device
    ) >= (8, 0)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# ---- ways to attend: [S, h, d] three times -> [S, h, d] ----


def _attend_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, window: int | None
) -> torch.Tensor:
    """One call for the texts of one length; without dropout torch's fused kernel for the CPU is the fastest."""
    parts = []
    for group in packing.groups:
        states = [_heads_first(tensor, group) for tensor in (query, key, value)]
        made = F.scaled_dot_product_attention(
            *states, attn_mask=_band(group.length, window, query.device), scale=scaling
        )
        parts.append(made.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, window: int | None
) -> torch.Tensor:
    """Flash attention over texts of different lengths; CUDA, half precision, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    reach = (-1, -1) if window is None else (window - 1, window - 1)
    longest = max(packing.lengths)
    return varlen_attn(
        query, key, value, packing.offsets, packing.offsets, longest, longest, scale=scaling, window_size=reach
    )


def _attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Only the attention is padded."""
    mask = packing.is_token[:, None, None, :]
    band = _band(max(packing.lengths), window, query.device)
    if band is not None:  # a place of padding that sees nothing would be a softmax over nothing
        mask = (mask & band) | ~packing.is_token[:, None, :, None]
    query, key, value = (_padded(states, packing) for states in (query, key, value))
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return made.transpose(1, 2).flatten(0, 1).index_select(0, packing.padded_places)


def _attend_first(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float, dropout: float
) -> torch.Tensor:
    """First tokens [N, h, d] attend to all of their text: so little work that padding the keys costs nothing."""
    mask = packing.is_token[:, None, None, :]
    key, value = (_padded(states, packing) for states in (key, value))
    return F.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    ).squeeze(2)


def _padded(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[S, h, d] -> [N, h, T, d]"""
    num_texts, longest = packing.is_token.shape
    flat = states.new_zeros(num_texts * longest, *states.shape[1:]).index_copy(0, packing.padded_places, states)
    return flat.unflatten(0, (num_texts, longest)).transpose(1, 2)


class _AttentionWithDropout(torch.autograd.Function):
    """Attention written out, group by group, with one draw of masks for all groups (Vaswani et al. 2017; gradients by hand)."""

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
        weights = query.new_empty(
            num_heads * sum(group.num_pairs for group in packing.groups)
        )  # [h P], group after group
        kept = draw_kept(weights.shape, rate)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group, part, part_kept in _split_pairs(
            packing, num_heads, weights, kept
        ):  # a group's passes meet in the processor's caches
            torch.baddbmm(
                part, _batch(query, group), _batch(key, group).transpose(1, 2), beta=0, alpha=scaling, out=part
            )
            if (band := _band(group.length, window, query.device)) is not None:
                part.masked_fill_(~band, -torch.inf)
            torch.softmax(part, -1, out=part)
            _write(output, group, torch.bmm(apply_kept(part, part_kept, rate), _batch(value, group)))
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.packing, ctx.scaling, ctx.rate = packing, scaling, rate
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, kept = ctx.saved_tensors
        d_query, d_key, d_value = (
            torch.empty_like(states, memory_format=torch.contiguous_format) for states in (query, key, value)
        )
        for group, part, part_kept in _split_pairs(ctx.packing, query.shape[1], weights, kept):
            d_output = _batch(gradient, group)
            dropped = apply_kept(part, part_kept, ctx.rate)
            _write(d_value, group, torch.bmm(dropped.transpose(1, 2), d_output))
            d_weights = apply_kept(torch.bmm(d_output, _batch(value, group).transpose(1, 2)), part_kept, ctx.rate)
            d_scores = torch._softmax_backward_data(d_weights, part, -1, part.dtype).mul_(ctx.scaling)
            _write(d_query, group, torch.bmm(d_scores, _batch(key, group)))
            _write(d_key, group, torch.bmm(d_scores.transpose(1, 2), _batch(query, group)))
        return d_query, d_key, d_value, None, None, None, None


def _heads_first(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[S, h, d] -> a group's [count, h, length, d]"""
    return states[group.tokens].unflatten(0, (group.count, group.length)).transpose(1, 2)


def _batch(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[S, h, d] -> a group's [count x h, length, d]"""
    return _heads_first(states, group).flatten(0, 1)


def _write(target: torch.Tensor, group: Group, batch: torch.Tensor) -> None:
    """A group's [count x h, length, d] into its tokens of [S, h, d]."""
    _heads_first(target, group).copy_(batch.unflatten(0, (group.count, -1)))


def _split_pairs(packing: Packing, num_heads: int, *flat: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """[h P] each -> every group with its [count x h, length, length] of each, as views."""
    parts = [tensor.split([num_heads * group.num_pairs for group in packing.groups]) for tensor in flat]
    for group, *of_group in zip(packing.groups, *parts, strict=True):
        yield group, *(part.view(-1, group.length, group.length) for part in of_group)


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[T, T] bool, which tokens see each other; None: all do."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    return (place[:, None] - place).abs() < window
