"""Checks before a run that an encoder fits its tokenizer and settings, made by encoding texts of chosen token ids.

N texts, T tokens, H hidden size. For a model on the CPU; draws from no generator and leaves the model unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mmbert_core.model.text_encoder import TextBertBase, is_causal
from mmbert_core.runtime.errors import InputError, shorten

# Differences of text vectors, relative to their largest absolute value, or to 1 where that is smaller.
TOLERANCE = 1e-5  # the largest difference of two vectors of the same text
SAME = 1e-7  # vectors of different texts differ by more: those of a narrow MobileBERT by 3e-7
CERTAIN = 1e-3  # more than rounding in float32; smaller differences are computed again in float64
NOT_FINITE = "its values are not finite"
# Raised by encoders for settings or token ids that do not fit them; NotImplementedError is a RuntimeError.
ENCODER_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AssertionError, AttributeError, KeyError)
SHORT_WORDS, LONG_WORDS = (1, 3), 28  # ordinary tokens of the short texts, and of the long one in the same batch


@dataclass(frozen=True)
class ProbeTokens:
    """Token ids from which the texts are built."""

    prefix: tuple[int, ...]  # special tokens before a text
    words: tuple[int, ...]  # ordinary tokens, at least one
    suffix: tuple[int, ...]  # special tokens after a text
    pad: int
    highest: int  # the largest id of the tokenizer

    def text(self, num_words: int, *, first: int | None = None, last: int | None = None) -> list[int]:
        """Ids of a text of `num_words` (at least 1) ordinary tokens between the special ones.

        `first` and `last`, if given, replace the first and the last ordinary token.
        """
        words = [self.words[index % len(self.words)] for index in range(num_words)]
        words[:1] = words[:1] if first is None else [first]
        words[-1:] = words[-1:] if last is None else [last]
        return [*self.prefix, *words, *self.suffix]

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)


def check_text_encoder(text: TextBertBase, tokens: ProbeTokens, *, max_length: int, name: str) -> None:
    """Raise `InputError`, one line, where the encoder `name` fails for a text or gives wrong vectors.

    Every token id must have an embedding and a text of `max_length` tokens must be encoded. A text's vector must be the
    same alone, next to a longer text, packed and padded. Texts that differ only in their last word must have different
    vectors.
    """
    check_token_ids(text.encoder, tokens.highest, name=name)
    max_words = max(1, max_length - tokens.num_special)
    *short, long = (tokens.text(min(max_words, count)) for count in (*SHORT_WORDS, LONG_WORDS))
    with _unchanged(text):
        _check_runs(text, tokens, name=name)
        _check_positions(text, tokens, max_length=max_length, name=name)
        for ids in short:
            _check_mask(text, ids, long, tokens.pad, name=name)
        if len(tokens.words) > 1:
            _check_last_word(text, tokens, min(max_words, SHORT_WORDS[-1]), name=name)


def check_token_ids(encoder: nn.Module, highest: int, *, name: str) -> None:
    """Raise `InputError` where the tokenizer gives ids (up to `highest`) that the input embedding has no rows for."""
    rows = num_embedding_rows(encoder)
    if rows is not None and highest >= rows:
        raise InputError(
            f"encoder {name!r}: its tokenizer has token ids up to {highest}, its embedding has {rows} rows "
            f"(ids up to {rows - 1}): resize and save the encoder first, with "
            f"model.resize_token_embeddings({highest + 1}), which is len(tokenizer) where ids have no gaps"
        )


def check_runs_once(text: TextBertBase, ids: Sequence[int], *, name: str) -> None:
    """Raise `InputError` where the encoder `name` of a model folder raises an error for a text of these token ids.

    Vectors that are not finite are accepted: such a model loads, and each of its predictions is refused.
    """
    with _unchanged(text):
        reason = _failure(text, ids)
    if reason and not reason.startswith(NOT_FINITE):
        raise InputError(
            f"{name}: the encoder cannot compute a text of {len(ids)} tokens with this config.json ({reason})"
        )


def num_embedding_rows(encoder: nn.Module) -> int | None:
    """Token ids that the encoder has an embedding for; None for an encoder without an input embedding."""
    try:
        return encoder.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        return None


# ---- single probes ----


def _check_runs(text: TextBertBase, tokens: ProbeTokens, *, name: str) -> None:
    """A text of one word, then one with the highest token id; packed if the encoder can be, and padded."""
    for ids, description in (
        (tokens.text(1), "a text of one word"),
        (tokens.text(1, first=tokens.highest), f"a text with the token id {tokens.highest}"),
    ):
        reason = _failure(text, ids) or _failure(text, ids, is_packed=False)
        if reason:
            encoder = type(text.encoder).__name__
            raise InputError(f"encoder {name!r}: {encoder} gives no vector of {description}: {reason}")


def _check_positions(text: TextBertBase, tokens: ProbeTokens, *, max_length: int, name: str) -> None:
    """A text of `max_length` tokens; where it fails, the message gives the largest length that does not."""

    def runs(length: int) -> bool:
        return not _failure(text, tokens.text(max(1, length - tokens.num_special)))

    reason = _failure(text, tokens.text(max(1, max_length - tokens.num_special)))
    if not reason:
        return
    largest = _largest(runs, tokens.num_special + 1, max_length)
    raise InputError(
        f"max_length: expected at most {largest} tokens, as encoder {name!r} ({type(text.encoder).__name__}) takes, "
        f"found {max_length} ({reason})"
    )


def _largest(runs: Callable[[int], bool], low: int, high: int) -> int:
    """By bisection the largest length that runs; `low` does, `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low


def _check_mask(text: TextBertBase, short: Sequence[int], long: Sequence[int], pad: int, *, name: str) -> None:
    """A text's vector is the same alone and next to a longer one, and the same packed and padded."""
    encoder = type(text.encoder).__name__
    alone, again = (_vectors(text, [short], pad, is_packed=False) for _ in range(2))  # [1, H]
    if _difference(alone, again) > TOLERANCE:
        raise InputError(
            f"encoder {name!r}: {encoder} gives a text another vector at every call (it draws random numbers): "
            "choose another encoder"
        )

    def vectors_alone_and_next_to_another() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(_vectors(text, texts, pad, is_packed=False)[0] for texts in ([short], [short, long]))

    difference = _certain_difference(text, vectors_alone_and_next_to_another)
    if difference > TOLERANCE:
        raise InputError(
            f"encoder {name!r}: {encoder} does not heed the attention mask: a text's vector differs by "
            f"{difference:.1e} alone and next to a longer text, so predictions would depend on the other rows: "
            "choose another encoder"
        )
    if text.is_packed:
        difference = _certain_difference(
            text, lambda: (_vectors(text, [short, long], pad), _vectors(text, [short, long], pad, is_packed=False))
        )
        if difference > TOLERANCE:
            raise InputError(
                f"encoder {name!r}: {encoder} gives other vectors for packed than for padded texts "
                f"(difference {difference:.1e}): choose another encoder"
            )


def _check_last_word(text: TextBertBase, tokens: ProbeTokens, num_words: int, *, name: str) -> None:
    """Two texts that differ in their last word have different vectors.

    Each is encoded in its own call, so that both are computed by the same operations in the same order.
    """
    first, second = (
        _vectors(text, [tokens.text(num_words, last=word)], tokens.pad) for word in (tokens.words[0], tokens.words[-1])
    )
    if _difference(first, second) > SAME:
        return
    encoder = type(text.encoder).__name__
    reason = (
        "reads forward only and this vector is that of its first token"
        if text.pooling in ("cls", "pooler") and is_causal(text.encoder)
        else "gives both the same vector"
    )
    other = "last" if text.pooling in ("cls", "pooler") else "mean"
    raise InputError(
        f"pooling: {text.pooling} of encoder {name!r} cannot tell texts apart that differ in their last word: "
        f"{encoder} {reason}: set pooling to {other}"
    )


# ---- vectors and their differences ----


def _vectors(
    text: TextBertBase, texts: Sequence[Sequence[int]], pad: int, *, is_packed: bool | None = None
) -> torch.Tensor:
    """Ids of N texts -> [N, H]; `is_packed` None: as the model is set."""
    longest = max(map(len, texts))
    input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in texts])  # [N, T]
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts])
    before = text.is_packed
    text.is_packed = before if is_packed is None else is_packed
    try:
        return text.pool(input_ids, mask)
    finally:
        text.is_packed = before


def _failure(text: TextBertBase, ids: Sequence[int], *, is_packed: bool | None = None) -> str:
    """Why a text of these ids has no finite vector; "" where it has one."""
    try:
        vectors = _vectors(text, [ids], ids[0], is_packed=is_packed)
    except ENCODER_ERRORS as error:
        if "allocate memory" in str(error):
            raise
        return f"{type(error).__name__}: {shorten(str(error), 120)}"
    return "" if torch.isfinite(vectors).all() else f"{NOT_FINITE}: are the weights whole?"


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest absolute difference of two elements, relative to the largest element, or to 1 if that is smaller."""
    return float((first - second).abs().max() / second.abs().max().clamp(min=1.0))


def _certain_difference(text: TextBertBase, pair: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The difference of the two vectors of `pair`; computed in float64 where rounding in float32 could explain it."""
    difference = _difference(*pair())
    if not TOLERANCE < difference < CERTAIN:
        return difference
    try:
        text.double()
        return _difference(*pair())
    finally:
        text.float()


@contextmanager
def _unchanged(text: TextBertBase) -> Iterator[None]:
    """Eval mode and no gradients inside; the modules' modes and the CPU's generator are restored after it."""
    modes = [(module, module.training) for module in text.modules()]
    text.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training
