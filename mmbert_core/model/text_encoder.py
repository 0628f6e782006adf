"""The text encoder: a pretrained encoder, its pooling and a projection.

B rows, C chunks of a row, N chunks of the batch that have tokens, T tokens of a chunk, S tokens of all chunks,
L tokens of the row with the most,
H hidden size of the encoder, D hidden_common_dim.
"""

import inspect
import logging

import torch
from torch import nn

from mmbert_core.model import packed_attention, packing
from mmbert_core.model.dropout import Dropout, replace_dropouts
from mmbert_core.model.positions import position_offset
from mmbert_core.model.text_features import TextFeatures
from mmbert_core.runtime.errors import InputError

logger = logging.getLogger(__name__)

POOLINGS = ("auto", "pooler", "cls", "mean", "last")
# Equal vectors may differ by rounding, as in mixtures of experts: relative to the largest value, or to 1 if smaller.
CAUSAL_TOLERANCE = 5e-7
NUM_CAUSAL_TOKENS = 4  # of each of the two texts that `is_causal` compares


def resolve_pooling(asked: str, encoder: nn.Module, has_stored_pooler: bool, trained: str | None = None) -> str:
    """The pooling to use, "pooler", "cls", "mean" or "last", for the config's setting `asked`.

    "auto" is the pooling the encoder was `trained` with as a sentence encoder, else last for a causal encoder, else the
    pooler if its weights were stored with the encoder, else cls; the choice is logged.
    Raises `InputError` for an unknown setting, and for "pooler" where the encoder has none.
    """
    if asked not in POOLINGS:
        raise InputError(f"pooling: expected one of {', '.join(POOLINGS)}, found {asked!r}")
    name = type(encoder).__name__
    if asked == "auto" and trained:
        logger.info("pooling: %s (how %s was trained to make sentence vectors)", trained, name)
        return trained
    if asked == "auto" and is_causal(encoder):
        logger.info("pooling: last (%s reads forward only: its last token alone has seen the whole text)", name)
        return "last"
    if asked == "auto":
        pooling = "pooler" if has_stored_pooler else "cls"
        logger.info("pooling: %s (%s has %s stored pooler)", pooling, name, "a" if has_stored_pooler else "no")
        return pooling
    if asked == "pooler":
        if getattr(encoder, "pooler", None) is None:
            raise InputError(
                f"pooling: expected an encoder with a pooler, found {name} without (use cls, mean or last)"
            )
        if not has_stored_pooler:
            logger.warning("pooling: the pooler of %s was not stored with it: its weights are random", name)
    return asked


def is_causal(encoder: nn.Module) -> bool:
    """Whether the first token's vector ignores the tokens after it, as in decoders.

    Encodes two texts that differ in their last token; draws from no generator. The encoder must be in eval mode and on
    the CPU. False for an encoder that fails for these texts: the checks before training (model/probe.py) report why.
    """
    try:
        rows = encoder.get_input_embeddings().weight.shape[0]
        ids = torch.arange(max(0, rows - NUM_CAUSAL_TOKENS), rows)[None]  # [1, T]
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)  # with another last token
        mask = torch.ones_like(ids)
        with torch.no_grad():
            first, second = (
                encoder(input_ids=each, attention_mask=mask, return_dict=True).last_hidden_state[:, 0]  # [1, H]
                for each in (ids, other)
            )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    return bool((first - second).abs().max() <= CAUSAL_TOLERANCE * first.abs().max().clamp(min=1.0))


def reinitialise(encoder: nn.Module, *, pooler: bool, layers: int) -> None:
    """Re-draw the pooler and the last `layers` layers in place, with the encoder's own initialiser.

    Draws from torch's global generator. `pooler` for an encoder without one is logged as a warning.
    Raises `InputError` when the encoder has fewer layers, or no list of separate layers (ALBERT shares one among all).
    """
    targets: list[tuple[str, nn.Module]] = []
    if pooler:
        module = getattr(encoder, "pooler", None)
        if module is None:
            logger.warning("reinit_pooler: %s has no pooler in use; nothing to re-draw", type(encoder).__name__)
        else:
            targets.append(("pooler", module))
    if layers:
        stack = _encoder_layers(encoder)
        if not 0 < layers <= len(stack):
            name = type(encoder).__name__
            raise InputError(f"reinit_layers: expected 0 to {len(stack)} (layers of {name}), found {layers}")
        targets += [(f"layer {index}", stack[index]) for index in range(len(stack) - layers, len(stack))]
    for name, module in targets:
        _redraw(encoder, module, name=name)


def _redraw(encoder: nn.Module, module: nn.Module, *, name: str) -> None:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    before = [matrix.detach().clone() for matrix in matrices]
    # transformers 5 marks loaded tensors, and its initialisers skip those silently
    for tensor in (*module.parameters(), *module.buffers()):
        tensor._is_hf_initialized = False
    with torch.no_grad():
        module.apply(encoder._init_weights)
    if matrices and all(torch.equal(old, new) for old, new in zip(before, matrices, strict=True)):
        raise RuntimeError(f"{type(encoder).__name__}: {name} was not re-drawn by this version of transformers")


def _encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's separate layers in order."""
    count = getattr(encoder.config, "num_hidden_layers", None)
    stack = _largest_stack(encoder, count)
    if stack is None:
        raise InputError(
            f"reinit_layers: {type(encoder).__name__} has no list of {count} separate layers "
            "(it shares weights between layers); expected 0"
        )
    return stack


def _largest_stack(encoder: nn.Module, count: int | None = None) -> nn.ModuleList | None:
    """Of the lists of `count` modules (None: of any number) the one with the most parameters; None without any."""
    stacks = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == (len(module) if count is None else count)
    ]
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()), default=None)


def layers_above(encoder: nn.Module) -> dict[str, int]:
    """How many layers are above each parameter of the encoder, by name: 0 for the last layer and what follows it.

    What comes before the first layer (embeddings) has all layers above it. Layers that share their weights (ALBERT)
    count as one; so does all that is not an embedding, in an encoder without a list of layers.
    """
    stack = _largest_stack(encoder, getattr(encoder.config, "num_hidden_layers", None))
    layers = list(_largest_stack(encoder) or []) if stack is None else list(stack)
    count = max(1, len(layers))
    of_layer = {parameter: count - 1 - index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    if not layers:
        embeddings = set(encoder.get_input_embeddings().parameters())
        return {name: int(parameter in embeddings) for name, parameter in encoder.named_parameters()}
    above, outside = {}, count  # of parameters outside of the list: those before its first, those after it
    for name, parameter in encoder.named_parameters():
        if parameter in of_layer:
            outside = 0
        above[name] = of_layer.get(parameter, outside)
    return above


class TextBertBase(nn.Module):
    """Token ids to one vector of `hidden_common_dim` per row: encoder, pooling, mean over chunks, Dropout, Linear.

    `pooling` is what `resolve_pooling` returned. An unused pooler is removed: parameters without a gradient would stop
    DDP at the second step. The encoder keeps its train or eval mode. `reads_tokens`: `features` has the tokens, too.

    Attributes: `encoder`, `dropout`, `linear`, `output_text_dim`, `is_packed`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        pooling: str,
        hidden_common_dim: int,
        dropout: float = 0.1,
        reads_tokens: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS[1:]:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS[1:])}, found {pooling!r}")
        has_pooler = getattr(encoder, "pooler", None) is not None
        if pooling == "pooler" and not has_pooler:
            raise ValueError(f"pooling: {type(encoder).__name__} has no pooler")
        if pooling != "pooler" and has_pooler:
            encoder.pooler = None
        self.encoder = encoder
        self.pooling = pooling
        replace_dropouts(encoder)
        self.is_packed = packed_attention.use_packed_attention(encoder)
        self.position_offset = position_offset(encoder)
        reads_first_tokens = pooling in ("pooler", "cls") and not reads_tokens
        self.ends_at_first_tokens = (
            self.is_packed and reads_first_tokens and packed_attention.end_at_first_tokens(encoder)
        )
        # such as Longformer: the token from which the text's vector is read must attend to the whole text
        self.has_global_attention = "global_attention_mask" in inspect.signature(encoder.forward).parameters
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(encoder.config.hidden_size, hidden_common_dim)
        self.token_linear = nn.Linear(encoder.config.hidden_size, hidden_common_dim) if reads_tokens else None
        self.output_text_dim = hidden_common_dim

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`input_ids`, `attention_mask` int64 [B, T], or [B, C, T] for rows of several chunks -> [B, D]."""
        return self.project(self.pool_rows(input_ids, attention_mask))

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TextFeatures:
        """Ids and mask as in `forward` -> what the rest of the model reads of the texts."""
        if self.token_linear is None:
            return TextFeatures(self(input_ids, attention_mask))
        is_chunk = None
        if input_ids.ndim == 3:
            is_chunk = attention_mask.any(dim=2)  # [B, C]
            input_ids, attention_mask = input_ids[is_chunk], attention_mask[is_chunk]  # [N, T]
        pooled, hidden, layout = self._encode(input_ids, attention_mask)
        vectors = self.project(pooled if is_chunk is None else _means_of_rows(pooled, is_chunk))
        return TextFeatures(vectors, *_tokens_of_rows(self.token_linear(hidden), attention_mask, layout, is_chunk))

    def features_of_pooled(self, pooled: torch.Tensor) -> TextFeatures:
        """Vectors of `pool_rows` [B, H] -> the features; where tokens are read, the vector is the text's one token."""
        if self.token_linear is None:
            return TextFeatures(self.project(pooled))
        is_token = torch.ones(len(pooled), 1, dtype=torch.bool, device=pooled.device)
        return TextFeatures(self.project(pooled), self.token_linear(pooled).unsqueeze(1), is_token)

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """Vectors of `pool_rows` [B, H] -> [B, D]: dropout and the linear layer."""
        return self.linear(self.dropout(pooled))

    def pool_rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask [B, T] or [B, C, T] -> [B, H], the encoder's vector of each row: the mean over its chunks.

        A chunk without tokens is padding: it is not encoded and does not count in the mean. Both may be on any device;
        on the CPU they are packed there, without waiting for the GPU.
        """
        if input_ids.ndim == 2:
            return self.pool(input_ids, attention_mask)
        is_chunk = attention_mask.any(dim=2)  # [B, C]
        return _means_of_rows(self.pool(input_ids[is_chunk], attention_mask[is_chunk]), is_chunk)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask [N, T] -> [N, H], the encoder's vector of each text (chunk), before the projection."""
        return self._encode(input_ids, attention_mask)[0]

    def _encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, packing.Packing | None]:
        """[N, T] -> vectors [N, H], and the tokens: packed [S, H] with their layout, or padded [N, T, H] and None."""
        if self.is_packed:
            return self._encode_packed(input_ids, attention_mask)
        device = self.linear.weight.device
        input_ids, attention_mask = (tensor.to(device, non_blocking=True) for tensor in (input_ids, attention_mask))
        extra = {}
        if self.has_global_attention:
            is_global = torch.zeros_like(attention_mask)
            is_global[:, 0] = 1
            if self.pooling == "last":
                is_global = is_global.scatter(1, _last_index(attention_mask)[:, None], 1)  # [N, T]
            extra["global_attention_mask"] = is_global
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
        hidden = outputs.last_hidden_state  # [N, T, H]
        if self.pooling == "pooler":
            return outputs.pooler_output, hidden, None
        if self.pooling == "cls":
            return hidden[:, 0], hidden, None
        if self.pooling == "last":
            index = _last_index(attention_mask)[:, None, None].expand(-1, 1, hidden.shape[2])
            return hidden.gather(1, index).squeeze(1), hidden, None
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), hidden, None

    def _encode_packed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, packing.Packing]:
        """As `_encode`; the tokens are the first ones only, [N, H], where the last layer computes no others."""
        arguments, layout = packing.pack(self.encoder, input_ids, attention_mask, position_offset=self.position_offset)
        # [S, H], or [N, H] where the last layer computes first tokens only
        hidden = self.encoder(**arguments, return_dict=True).last_hidden_state.squeeze(0)
        if self.pooling == "mean":
            return layout.means(hidden), hidden, layout
        if self.pooling == "last":
            return layout.last_tokens(hidden), hidden, layout
        first = hidden if self.ends_at_first_tokens else layout.first_tokens(hidden)  # [N, H]
        return first if self.pooling == "cls" else self.encoder.pooler(first[:, None]), hidden, layout


def _means_of_rows(chunks: torch.Tensor, is_chunk: torch.Tensor) -> torch.Tensor:
    """Vectors of the chunks [N, H], which of a row's C slots hold one [B, C] -> [B, H]"""
    counts = packing.to_device(is_chunk.sum(dim=1, keepdim=True).clamp(min=1), chunks.device)  # [B, 1]
    return _chunks_of_rows(chunks, is_chunk).sum(dim=1) / counts


def _chunks_of_rows(chunks: torch.Tensor, is_chunk: torch.Tensor) -> torch.Tensor:
    """[N, ...], which of a row's C slots hold a chunk [B, C] -> [B, C, ...], zeros where there is none"""
    index = packing.to_device(is_chunk.flatten().nonzero()[:, 0], chunks.device)  # [N], in the flat [B C]
    # index_copy rather than index_add: each slot is written once, so the order of the sum is fixed
    by_slot = chunks.new_zeros(is_chunk.numel(), *chunks.shape[1:]).index_copy(0, index, chunks)  # [B C, ...]
    return by_slot.unflatten(0, is_chunk.shape)


def _tokens_of_rows(
    tokens: torch.Tensor, attention_mask: torch.Tensor, layout: packing.Packing | None, is_chunk: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of N chunks, packed [S, D] or padded [N, T, D] -> of B rows, [B, L, D], and which are no padding [B, L].

    `is_chunk`: which of a row's C slots hold a chunk, [B, C]; None where each row is one. Packed, the tokens of a row
    follow each other; padded, there may be padding between its chunks.
    """
    if layout is None:
        is_first = torch.arange(attention_mask.shape[1], device=attention_mask.device) == 0  # [T]
        is_token = packing.to_device(attention_mask.bool() | is_first, tokens.device)  # a text without tokens keeps one
        if is_chunk is None:
            return tokens, is_token
        return tuple(_chunks_of_rows(values, is_chunk).flatten(1, 2) for values in (tokens, is_token))
    if is_chunk is not None:
        row_of_chunk = is_chunk.nonzero()[:, 0].cpu()  # [N]
        lengths = torch.zeros(len(is_chunk), dtype=torch.long).index_add(0, row_of_chunk, torch.tensor(layout.lengths))
        layout = packing.Packing(tuple(lengths.tolist()), tokens.device)
    return layout.pad(tokens), layout.is_token


def _last_index(attention_mask: torch.Tensor) -> torch.Tensor:
    """[N, T], padded on the right -> [N]: index of the last token, 0 for a text without one."""
    return (attention_mask.sum(dim=1) - 1).clamp(min=0)
