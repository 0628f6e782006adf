"""Texts as concatenated token ids, in chunks of bounded length.

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

# Truncating characters before tokenising bounds the time of a long text; English has 4 to 5 characters a token.
CHARACTERS_PER_TOKEN = 20
SAMPLE_LENGTH, NUM_SAMPLE_WORDS = 64, 64  # tokens of a text and ordinary tokens in `sample_tokens`
MAX_ERROR_CHARACTERS = 200  # of another library's message in ours
ENCODED_AT_ONCE = 1024  # texts; a Rust encoding takes a few hundred bytes a token


@dataclass
class Tokens:
    """Chunk q is `ids[chunk_offsets[q] : chunk_offsets[q + 1]]`; row n has chunks row_chunks[n]..row_chunks[n + 1]."""

    ids: np.ndarray  # [L] int32
    chunk_offsets: np.ndarray  # [Q + 1] int64
    row_chunks: np.ndarray  # [N + 1] int64
    num_truncated: int  # rows whose text was longer than its chunks


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a pretrained encoder, from a folder or by name.

    Raises `InputError` (one line) when there is none, or when loading it would run the author's code.
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
        raise InputError(f"encoder: expected a fast tokenizer (tokenizer.json), found a slow one in {name!r}")
    # transformers loads a folder without vocabulary files as a tokenizer with only special tokens
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"encoder: expected a tokenizer with a vocabulary, found {len(tokenizer)} tokens in {name!r}")
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
    """Hex hash of everything that its token ids depend on; not of the lengths, which every call sets."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    if keeps_end(tokenizer):
        state["truncation_side"] = "left"
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def sample_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Token ids from which sample texts can be built.

    `prefix` and `suffix`: special tokens around a text; `words`: ordinary tokens; `pad`; `highest`: the largest id.
    """
    vocabulary = tokenizer.get_vocab()
    encoding = _encode_first_possible(tokenizer, ["a", *vocabulary])
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


def _encode_first_possible(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Any:
    """The encoding of the first text that can be encoded: some tokenizers have no token for unknown words."""
    with _truncating(tokenizer.backend_tokenizer, SAMPLE_LENGTH) as backend:
        for text in texts:
            with suppress(Exception):  # the Rust tokenizer raises a bare Exception
                return backend.encode(text)
    raise InputError("encoder: its tokenizer cannot encode a word of its own vocabulary")


def always_used_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the special tokens that every text or batch has."""
    named = (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    return {*tokenizer.backend_tokenizer.encode("").ids, *(index for index in named if index is not None)}


def keeps_end(tokenizer: PreTrainedTokenizerFast | None) -> bool:
    """Whether a long text is truncated at its beginning: `truncation_side: left` in tokenizer_config.json."""
    return tokenizer is not None and tokenizer.truncation_side == "left"


def characters_read(max_length: int, max_chunks: int) -> int:
    """Characters of a text that are tokenised: its first ones, or its last ones where the end is kept."""
    return CHARACTERS_PER_TOKEN * max_length * max_chunks


def join_texts(cells: Mapping[str, list[str]], columns: Sequence[str]) -> list[str]:
    """The text of each row: its non-empty cells in `columns`, joined by a space."""
    if len(columns) == 1:
        return cells[columns[0]]
    return [" ".join(filter(None, row)) for row in zip(*(cells[column] for column in columns), strict=True)]


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, max_length: int, max_chunks: int) -> Tokens:
    """Token ids of each text in at most `max_chunks` chunks of at most `max_length` tokens, with the special tokens.

    The ids are those of `tokenizer(text, truncation=True, max_length=..., return_overflowing_tokens=True)`; its Rust
    tokenizer is called directly, which is parallel and builds no Python lists. An empty text is one chunk.
    Where the end of a text is kept, chunks are counted from its end, but stay in the text's order.
    Raises `InputError` when `max_length` is not larger than the number of special tokens.
    """
    if max_length <= tokenizer.num_special_tokens_to_add():
        expected = f"expected more than {tokenizer.num_special_tokens_to_add()} (the special tokens)"
        raise InputError(f"max_length: {expected}, found {max_length}")
    max_characters, is_end_kept = characters_read(max_length, max_chunks), keeps_end(tokenizer)
    kept = _kept_characters(max_characters, is_end_kept)
    empty = [tokenizer.pad_token_id or 0]  # ids of an empty text where the tokenizer adds no special tokens
    ids: list[np.ndarray] = []
    chunk_lengths: list[int] = []
    chunk_counts: list[int] = []  # of each row
    num_truncated = 0
    with _truncating(tokenizer.backend_tokenizer, max_length, keep_end=is_end_kept) as backend:
        groups = [texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE)]
        encoded = ((group, _encode(backend.encode_batch_fast, [text[kept] for text in group])) for group in groups)
        for group, encodings in prefetch_one(encoded) if len(groups) > 1 else encoded:
            chunks = [encoding.ids or empty for encoding in encodings]
            overflow = [
                encoding.overflowing if len(first) == max_length else []  # only a full chunk overflows
                for encoding, first in zip(encodings, chunks, strict=True)
            ]
            num_truncated += sum(
                len(others) > max_chunks - 1 or len(text) > max_characters
                for others, text in zip(overflow, group, strict=True)
            )
            if max_chunks > 1 and any(overflow):
                by_row = (
                    [first, *(other.ids for other in others[: max_chunks - 1])]
                    for first, others in zip(chunks, overflow, strict=True)
                )
                chunks = [chunk for row in by_row for chunk in (reversed(row) if is_end_kept else row)]
            chunk_counts.extend(min(len(others) + 1, max_chunks) for others in overflow)
            sizes = list(map(len, chunks))
            chunk_lengths += sizes
            ids.append(np.fromiter(chain.from_iterable(chunks), dtype=np.int32, count=sum(sizes)))
    return Tokens(
        ids=np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
        chunk_offsets=np.cumsum([0, *chunk_lengths], dtype=np.int64),
        row_chunks=np.cumsum([0, *chunk_counts], dtype=np.int64),
        num_truncated=num_truncated,
    )


def token_spans(
    tokenizer: PreTrainedTokenizerFast, text: str, *, max_length: int, max_chunks: int
) -> tuple[list[tuple[int, int]], str]:
    """(first character, one after the last) of each token of `tokenise`, chunk by chunk, and the text they refer to.

    That text ends, or begins, where the given one was truncated. The span of a special token is empty. A character of
    several tokens is in several spans.
    """
    is_end_kept = keeps_end(tokenizer)
    read = text[_kept_characters(characters_read(max_length, max_chunks), is_end_kept)]
    with _truncating(tokenizer.backend_tokenizer, max_length, keep_end=is_end_kept) as backend:
        encoding = _encode(backend.encode_batch, [read])[0]  # encode_batch_fast has no offsets
    overflow = encoding.overflowing
    chunks = [encoding, *overflow[: max_chunks - 1]]
    spans = [span for chunk in (reversed(chunks) if is_end_kept else chunks) for span in chunk.offsets or [(0, 0)]]
    if len(overflow) > max_chunks - 1 and is_end_kept:
        skipped = min((start for start, end in spans if start < end), default=0)
        return [(start - skipped, end - skipped) if start < end else (0, 0) for start, end in spans], read[skipped:]
    if len(overflow) > max_chunks - 1:
        read = read[: max(end for _, end in spans)]
    return spans, read


def _encode(encode_batch: Callable[[list[str]], list[Any]], texts: list[str]) -> list[Any]:
    """The encodings. Raises `InputError` for a word that a tokenizer without an unknown token cannot encode."""
    try:
        return encode_batch(texts)
    except Exception as error:  # the Rust tokenizer raises a bare Exception
        problem = f"its tokenizer cannot encode a text ({shorten(str(error), MAX_ERROR_CHARACTERS)})"
        raise InputError(f"encoder: {problem}: choose an encoder with an unknown token") from None


def _kept_characters(count: int, is_end_kept: bool) -> slice:
    return slice(-count, None) if is_end_kept else slice(count)


@contextmanager
def _truncating(backend: Any, max_length: int, *, keep_end: bool = False) -> Iterator[Any]:
    """The Rust tokenizer set to chunks of `max_length` tokens, counted from the text's end with `keep_end`.

    Its settings are restored, because they are saved with the model.
    """
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
