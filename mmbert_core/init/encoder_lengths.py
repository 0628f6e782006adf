"""The encoder of a first config: how many tokens its texts have, and which folders could be one."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmbert_core.config_recipe import RECOMMENDED_VALUES
from mmbert_core.data.tokens import load_tokenizer, tokenise
from mmbert_core.model.positions import max_tokens
from mmbert_core.model.pretrained import load_pretrained_encoder
from mmbert_core.storage.encoder_files import CONFIG, TOKENIZER, VOCABULARY_FILES, WEIGHTS, WEIGHTS_INDEX

MAX_TEXTS, MAX_COUNTED_TOKENS = 2_000, 16_384
MAX_LONG_SHARE = 0.05  # of the texts; if more are longer than max_length, the comments say what would read them whole
MAX_PROPOSED_LENGTH = 2_048
SEARCHED = (".", "models", "encoders")  # folders whose folders are looked at for an encoder
MAX_LOOKED_AT, MAX_FOUND = 1_000, 5


@dataclass(frozen=True)
class TextLengths:
    """Tokens of the sampled texts, special tokens included, and what the encoder can read."""

    num_texts: int
    median: int
    high: int  # 95 % of the texts have at most so many
    longer: float  # share of the texts that are longer than `max_length`
    limit: int | None  # tokens that the encoder has positions for; None: its config gives no limit
    max_length: int  # proposed


def measure_lengths(encoder: str, texts: Sequence[str]) -> TextLengths:
    """Count the tokens of at most MAX_TEXTS of the `texts` and propose `max_length`: the recipe's, where it suits.

    Another one is proposed where the encoder has fewer positions, and where it has more and many texts are longer.
    Raises `InputError` for an encoder that cannot be loaded.
    """
    tokenizer = load_tokenizer(encoder)
    limit = max_tokens(load_pretrained_encoder(encoder)[0])
    texts = texts[:: max(1, len(texts) // MAX_TEXTS)][:MAX_TEXTS]
    tokens = tokenise(tokenizer, texts, max_length=MAX_COUNTED_TOKENS, max_chunks=1)
    lengths = np.diff(tokens.chunk_offsets)
    median, high = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.95))
    recipe: int = RECOMMENDED_VALUES["max_length"]
    proposed = min(recipe, limit or recipe)
    if float((lengths > recipe).mean()) > MAX_LONG_SHARE and (limit is None or limit > recipe):
        proposed = min(64 * math.ceil(high / 64), MAX_PROPOSED_LENGTH, limit or MAX_PROPOSED_LENGTH)
    return TextLengths(len(texts), median, high, float((lengths > proposed).mean()), limit, proposed)


def encoder_folders(table: str) -> list[str]:
    """Folders of encoders near the working folder and the table: at most MAX_FOUND, as paths for a config."""
    found: dict[str, str] = {}  # real path -> path
    for path in _folders_near(table):
        has_weights = any((path / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))
        has_tokenizer = any((path / name).is_file() for name in (TOKENIZER, *VOCABULARY_FILES))
        if has_weights and has_tokenizer and (path / CONFIG).is_file():
            found.setdefault(os.path.realpath(path), str(path))
            if len(found) == MAX_FOUND:
                break
    return list(found.values())


def _folders_near(table: str) -> Iterator[Path]:
    """Folders in SEARCHED and next to the table, and the folders in those, without hidden ones."""
    num_looked_at = 0
    for start in dict.fromkeys([*map(Path, SEARCHED), Path(table).parent]):
        for level in ("*", "*/*"):
            for path in sorted(start.glob(level)) if start.is_dir() else ():
                num_looked_at += 1
                if num_looked_at > MAX_LOOKED_AT:
                    return
                if path.is_dir() and not path.name.startswith("."):
                    yield path
