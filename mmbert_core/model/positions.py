"""The learned position embeddings of an encoder: how many tokens they allow, and the position of a text's first."""

from torch import nn


def _position_tables(encoder: nn.Module) -> list[nn.Embedding]:
    return [
        module
        for name, module in encoder.named_modules()
        if name.split(".")[-1] == "position_embeddings" and isinstance(module, nn.Embedding)
    ]


def position_offset(encoder: nn.Module) -> int:
    """Position of a text's first token: 0, or `padding_idx` + 1 in RoBERTa's families.

    Those reserve the row `padding_idx` of their position embeddings for padding.
    """
    tables = _position_tables(encoder)
    return 0 if not tables or tables[-1].padding_idx is None else tables[-1].padding_idx + 1


def max_tokens(encoder: nn.Module) -> int | None:
    """The longest text, in tokens, that the encoder has positions for; None where its config gives no limit."""
    num_positions = getattr(encoder.config, "max_position_embeddings", None)
    if num_positions is None or num_positions < 1:  # -1: XLNet, which has relative positions
        return None
    num_positions = min([num_positions, *(table.num_embeddings for table in _position_tables(encoder))])
    return num_positions - position_offset(encoder)
