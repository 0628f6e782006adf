"""Texts to token ids, flat, in chunks of a bounded length.

N rows, Q chunks over all rows (one or more a row), L tokens over all chunks.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmbert_core.data.prefetch import prefetch_one
from mmbert_core.runtime.errors import InputError, shorten
from mmbert_core.runtime.hub import check_hub_answers, check_hub_name
from mmbert_core.storage.encoder_files import check_encoder_files

# Cutting before tokenising bounds the time of a text of any size; English has 4 to 5 characters a token.
CHARACTERS_PER_TOKEN = 20
SAMPLE_LENGTH, NUM_SAMPLE_WORDS = 64, 64  # tokens
MAX_ERROR_CHARACTERS = 200  # of another library's message in ours
ENCODED_AT_ONCE = 1024  # texts; their Rust encodings take a few hundred bytes a token


@dataclass
class Tokens:
    """Chunk q is `ids[chunk_offsets[q]:chunk_offsets[q + 1]]`; row n has the chunks `row_chunks[n]` to `row_chunks[n + 1]`."""

    ids: np.ndarray  # [L] int32
    chunk_offsets: np.ndarray  # [Q + 1] int64
    row_chunks: np.ndarray  # [N + 1] int64
    num_truncated: int  # rows whose text did not fit


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a pretrained encoder, from a folder or by name.

    Raises `InputError` (one line) when there is none or it cannot be loaded without running code of its author.
    """
    name = str(name_or_folder)
    if os.path.isdir(name):
        check_encoder_files(name)
    try:
        tokenizer = _load(name, local_files_only=True)
    except InputError:
        if os.path.isdir(name):
            raise
        check_hub_name(name)
        check_hub_answers(name)
        tokenizer = _load(name, local_files_only=False)
    if not tokenizer.is_fast:
        raise InputError(
            f"encoder: expected a fast tokenizer (tokenizer.json), found a slow one in {str(name_or_folder)!r}"
        )
    # A folder without vocabulary files loads as a tokenizer that knows nothing but its special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"encoder: expected a tokenizer with a vocabulary, found {len(tokenizer)} tokens in {str(name_or_folder)!r}"
        )
    return tokenizer


def _load(name: str, *, local_files_only: bool) -> PreTrainedTokenizerFast:
    try:
        return AutoTokenizer.from_pretrained(
            name, use_fast=True, trust_remote_code=False, local_files_only=local_files_only
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, and tokenizers a bare Exception
        raise InputError(
            f"encoder: no tokenizer could be loaded from {name!r} ({shorten(str(error), MAX_ERROR_CHARACTERS)})"
        ) from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex hash of all that decides its token ids; lengths set by an earlier call do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    if keeps_end(tokenizer):
        state["truncation_side"] = "left"
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sample_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Token ids to make texts of: `prefix` and `suffix` (special tokens around a text), ordinary `words`, `pad`, and the `highest` id there is."""
    vocabulary = tokenizer.get_vocab()
    encoding = _encode_any(tokenizer, ["a", *vocabulary])
    is_special = np.array(encoding.special_tokens_mask, dtype=bool)
    ordinary = np.flatnonzero(~is_special)
    start, end = (ordinary[0], ordinary[-1] + 1) if len(ordinary) else (len(is_special), len(is_special))
    prefix, suffix = tuple(encoding.ids[:start]), tuple(encoding.ids[end:])
    specials = {*tokenizer.all_special_ids, *prefix, *suffix}
    by_id = [
        (index, token) for token, index in sorted(vocabulary.items(), key=lambda item: item[1]) if index not in specials
    ]
    words = (
        [index for index, token in by_id if token.strip("▁Ġ#").isalpha()]
        or [index for index, _ in by_id]
        or [max(specials, default=0)]
    )
    words = words[:: -(-len(words) // NUM_SAMPLE_WORDS)]
    highest = max(*vocabulary.values(), *specials, *words)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return {"prefix": prefix, "words": tuple(words), "suffix": suffix, "pad": pad, "highest": highest}


def _encode_any(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Any:
    """The encoding of the first text that has one: a tokenizer without an unknown token fails at words that it does not know."""
    with _truncating(tokenizer.backend_tokenizer, SAMPLE_LENGTH) as backend:
        for text in texts:
            with suppress(Exception):  # the Rust tokenizer raises a bare Exception
                return backend.encode(text)
    raise InputError("encoder: its tokenizer cannot encode a word of its own vocabulary")


def always_used_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the special tokens that stand in every text or batch."""
    named = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    return {*tokenizer.backend_tokenizer.encode("").ids, *(index for index in named if index is not None)}


def keeps_end(tokenizer: PreTrainedTokenizerFast | None) -> bool:
    """Whether a text that is too long keeps its end and loses its beginning, as `truncation_side: left` in tokenizer_config.json asks."""
    return tokenizer is not None and tokenizer.truncation_side == "left"


def characters_read(max_length: int, max_chunks: int) -> int:
    """Characters of a text that are tokenised: its first ones, or its last where the end is kept."""
    return CHARACTERS_PER_TOKEN * max_length * max_chunks


def join_texts(cells: Mapping[str, list[str]], columns: Sequence[str]) -> list[str]:
    """The text columns of each row, in order, non-empty cells joined by one space."""
    if len(columns) == 1:
        return cells[columns[0]]
    return [" ".join(filter(None, parts)) for parts in zip(*(cells[column] for column in columns), strict=True)]


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, max_length: int, max_chunks: int) -> Tokens:
    """Token ids of each text in at most `max_chunks` chunks of at most `max_length` tokens, special tokens in every chunk.

    The ids are those of `tokenizer(text, truncation=True, max_length=..., return_overflowing_tokens=True)`, taken from the
    Rust tokenizer below it, which works in parallel and without that call's Python lists. An empty text is one chunk.
    Where the end of a text is kept, its chunks are counted from the end, and are still in the text's order.
    Raises `InputError` when `max_length` has no room for a token beside the special ones.
    """
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise InputError(
            f"max_length: expected more than {tokenizer.num_special_tokens_to_add()} (the special tokens), found {max_length}"
        )
    most_characters = characters_read(max_length, max_chunks)
    lengths: list[int] = []  # of every chunk
    counts: list[int] = []  # chunks of every row
    ids: list[np.ndarray] = []
    num_truncated = 0
    empty = [
        tokenizer.pad_token_id or 0
    ]  # a tokenizer without special tokens gives an empty text nothing to encode: one pad (or first) token
    is_end_kept = keeps_end(tokenizer)
    kept_characters = _characters_kept(most_characters, is_end_kept)
    with _truncating(tokenizer.backend_tokenizer, max_length, keep_end=is_end_kept) as backend:
        parts_of_texts = [texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE)]
        encoded = (
            (some, _encode(backend.encode_batch_fast, [text[kept_characters] for text in some]))
            for some in parts_of_texts
        )
        for some, encodings in prefetch_one(encoded) if len(parts_of_texts) > 1 else encoded:
            chunks = [encoding.ids or empty for encoding in encodings]
            more = [
                encoding.overflowing if len(first) == max_length else []
                for encoding, first in zip(encodings, chunks, strict=True)
            ]
            num_truncated += sum(
                len(parts) > max_chunks - 1 or len(text) > most_characters
                for parts, text in zip(more, some, strict=True)
            )
            if max_chunks > 1 and any(more):
                by_row = (
                    [first, *(part.ids for part in parts[: max_chunks - 1])]
                    for first, parts in zip(chunks, more, strict=True)
                )
                chunks = [ids for row in by_row for ids in (reversed(row) if is_end_kept else row)]
            counts.extend(min(len(parts) + 1, max_chunks) for parts in more)
            sizes = list(map(len, chunks))
            lengths += sizes
            ids.append(np.fromiter(chain.from_iterable(chunks), dtype=np.int32, count=sum(sizes)))
    chunk_offsets, row_chunks = (
        np.concatenate([[0], np.cumsum(np.array(each, dtype=np.int64))]).astype(np.int64) for each in (lengths, counts)
    )
    return Tokens(
        ids=np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
        chunk_offsets=chunk_offsets,
        row_chunks=row_chunks,
        num_truncated=num_truncated,
    )


def token_spans(
    tokenizer: PreTrainedTokenizerFast, text: str, *, max_length: int, max_chunks: int
) -> tuple[list[tuple[int, int]], str]:
    """Where the tokens of `tokenise` stand in the part of the text that is read, and that part: first character and the one after the last, chunk after chunk.

    A special token stands nowhere: its two places are equal. A character of several tokens has several spans.
    """
    is_end_kept = keeps_end(tokenizer)
    read = text[_characters_kept(characters_read(max_length, max_chunks), is_end_kept)]
    with _truncating(tokenizer.backend_tokenizer, max_length, keep_end=is_end_kept) as backend:
        encoding = _encode(backend.encode_batch, [read])[0]  # the fast one knows no places
    more = encoding.overflowing
    chunks = [encoding, *more[: max_chunks - 1]]
    spans = [span for chunk in (reversed(chunks) if is_end_kept else chunks) for span in chunk.offsets or [(0, 0)]]
    if len(more) > max_chunks - 1 and is_end_kept:
        skipped = min((start for start, end in spans if start < end), default=0)
        return [(start - skipped, end - skipped) if start < end else (0, 0) for start, end in spans], read[skipped:]
    if len(more) > max_chunks - 1:
        read = read[: max(end for _, end in spans)]
    return spans, read


def _encode(encode_batch: Callable[[list[str]], list[Any]], texts: list[str]) -> list[Any]:
    """The encodings. Raises `InputError` where a tokenizer without an unknown token meets a word that it does not know."""
    try:
        return encode_batch(texts)
    except Exception as error:  # the Rust tokenizer raises a bare Exception
        raise InputError(
            f"encoder: its tokenizer cannot encode a text ({shorten(str(error), MAX_ERROR_CHARACTERS)}): choose an encoder with an unknown token"
        ) from None


def _characters_kept(count: int, is_end_kept: bool) -> slice:
    return slice(-count, None) if is_end_kept else slice(count)


@contextmanager
def _truncating(backend: Any, max_length: int, *, keep_end: bool = False) -> Iterator[Any]:
    """The Rust tokenizer set to chunks of `max_length`, counted from the text's end with `keep_end`; left as it was, because it is saved with the model."""
    truncation, padding = backend.truncation, backend.padding
    try:
        backend.no_padding()
        backend.enable_truncation(
            max_length=max_length, stride=0, strategy="longest_first", direction="left" if keep_end else "right"
        )
        yield backend
    finally:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()
