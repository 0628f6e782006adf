"""Signs that figures will be too good: rows on both sides of a split, columns that know the label, columns that are ids.

N rows. Each finding is a line with a count; nothing is changed or refused.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from mmbert_core.data.dataset import Dataset
from mmbert_core.data.labels import Labels
from mmbert_core.data.splits import select_rows

TRAINING_ROWS, OTHER_ROWS, COLUMN_ROWS = 1_000_000, 100_000, 100_000  # that are looked at, at most
CHUNK_ROWS = 8_192
MIN_TOKENS = 8  # of a text that is no coincidence
NEARLY = 0.98  # AUROC of a column alone
MIN_OF_A_CLASS = 10  # rows in each half of those looked at
NEARLY_UNIQUE = 0.95  # different values of a category per row
FEW_NUMBERS = 100  # different ones in a column
MIN_DIFFERENT = 50  # rows from which a value of its own in each is no coincidence
KINDS = {"train": "training", "val": "validation", "test": "test"}


def find_leaks(train: Dataset, val: Dataset | None, test: Dataset | None, labels: Labels) -> list[str]:
    """One line for each finding, the most serious kind first."""
    parts = [part for part in (train, val, test) if part is not None]
    pairs = [(part, earlier) for place, part in enumerate(parts) for earlier in parts[:place]]
    lines = [line for part, earlier in pairs for line in _shared_groups(part, earlier)]
    hashes = (
        {id(part): text_hashes(part, TRAINING_ROWS if part is train else OTHER_ROWS) for part in parts}
        if train.encoded.tokens is not None
        else {}
    )
    lines += [
        line
        for part, earlier in pairs
        if hashes
        for line in _shared_texts(part, earlier, hashes[id(part)], hashes[id(earlier)])
    ]
    return [*lines, *_columns(train, labels)]


# ---- rows on both sides ----


def _shared_groups(part: Dataset, earlier: Dataset) -> Iterator[str]:
    if part.encoded.group_codes is None or earlier.encoded.group_codes is None:
        return
    shared = shared_places(*(select_rows(each.encoded.group_codes, each.rows) for each in (part, earlier)))
    if len(shared):
        yield f"{part.name}: {len(shared)} of {len(part)} rows are of a group that has {KINDS[earlier.name]} rows, first {part.row_location(int(shared[0]))}"


def shared_places(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Places of `codes` [N] that are among `others`; a code below 0 stands for an empty cell, and is shared with none."""
    if len(codes) < len(others):
        others = others[_is_in(others, codes)]
    return np.flatnonzero(_is_in(codes, others) & (codes >= 0))


def _is_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """np.isin [N] bool, by a hash table of `others` alone: among ten million hashes numpy's own takes ten seconds."""
    return pd.Series(values).isin(others).to_numpy()


def _shared_texts(part: Dataset, earlier: Dataset, hashes: np.ndarray, others: np.ndarray) -> Iterator[str]:
    shared = np.flatnonzero(_is_in(hashes, others) & (part.lengths[: len(hashes)] >= MIN_TOKENS))
    if len(shared):
        count = f"{len(shared)} of {len(hashes)} texts"
        yield f"{part.name}: {count} are those of {KINDS[earlier.name]} rows (texts of {MIN_TOKENS} tokens or more), first {part.row_location(int(shared[0]))}"


def text_hashes(dataset: Dataset, most_rows: int) -> np.ndarray:
    """uint64 [N] of the token ids of the first rows, in their order; equal texts have equal ones."""
    hashes = [np.zeros(0, np.uint64)]
    for start in range(0, min(len(dataset), most_rows), CHUNK_ROWS):
        ids, offsets = dataset.token_ids(np.arange(start, min(start + CHUNK_ROWS, len(dataset), most_rows)))
        place = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ (
            place.astype(np.uint64) + np.uint64(1)
        ) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        hashes.append(np.add.reduceat(mixed, offsets[:-1]))  # every text has a token
    return np.concatenate(hashes)


# ---- columns ----


def _columns(train: Dataset, labels: Labels) -> Iterator[str]:
    rows = np.random.default_rng(0).choice(len(train), min(len(train), COLUMN_ROWS), replace=False)
    classes = train.label_index[rows]
    for name, cells in train.cells(rows).items():
        is_number = isinstance(cells, np.ndarray)
        codes, values = pd.factorize(cells if is_number else np.array(cells, dtype=object), use_na_sentinel=False)
        if len(values) == 1:
            yield f"column {name!r}: the same value in all {len(rows)} training rows looked at, nothing can be learned from it"
            continue
        if len(values) == len(rows) >= MIN_DIFFERENT and not (is_number and (cells % 1 != 0).any()):
            yield f"column {name!r}: another value in each of {len(rows)} training rows: is it an id?"
        elif not is_number and (line := _nearly_unique(name, cells)):
            yield line
        ways = [(cells, True)] if is_number else [(codes, False)]
        if is_number and len(values) <= FEW_NUMBERS:  # may be codes, whose order says nothing
            ways.append((codes, False))
        index, area = max(
            (_best_class(way, classes, len(labels.names), is_number=ordered) for way, ordered in ways),
            key=lambda found: found[1],
        )
        if area >= NEARLY:
            yield f"column {name!r} alone tells class {labels.names[index]!r} from the rest with an AUROC of {area:.4f}: is it known before the label is?"


def _nearly_unique(name: str, cells: Sequence[str]) -> str | None:
    """A line about a category whose values nearly all differ, such as ids with a few repeats, or dates; empty cells are not looked at."""
    values = [cell for cell in cells if cell]
    num_values = len(set(values))
    if len(values) < MIN_DIFFERENT or num_values <= NEARLY_UNIQUE * len(values):
        return None
    return f"column {name!r}: {num_values} different values in {len(values)} training rows, so that few can be learned: is it an id or a date?"


def _best_class(cells: np.ndarray, classes: np.ndarray, num_classes: int, *, is_number: bool) -> tuple[int, float]:
    """The class that this column alone tells best, and its AUROC; classes with few rows are left out, for they are told by chance."""
    fitted, tried = slice(0, None, 2), slice(1, None, 2)  # of rows in random order
    scored = cells if is_number else cells[tried]
    ranks = pd.Series(np.where(np.isnan(cells), -np.inf, cells)).rank().to_numpy() if is_number else None
    best = (0, 0.5)
    for index in range(1 if num_classes == 2 else 0, num_classes):
        is_class = classes == index
        if (
            min(is_class[fitted].sum(), is_class[tried].sum(), (~is_class[fitted]).sum(), (~is_class[tried]).sum())
            < MIN_OF_A_CLASS
        ):
            continue
        if ranks is not None:
            area = _area(ranks, is_class)
            area = max(area, 1 - area)
        else:  # the share of the class in each category on one half of the rows, tried on the other
            counts, hits = (
                np.bincount(cells[fitted], weights, cells.max() + 1) for weights in (None, is_class[fitted])
            )
            area = auroc(((hits + is_class.mean()) / (counts + 1))[scored], is_class[tried])
        best = max(best, (index, area), key=lambda item: item[1])
    return best


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Share of pairs of a positive and a negative row in the right order, ties count half (Mann and Whitney)."""
    return _area(pd.Series(scores).rank().to_numpy(), is_positive)


def _area(ranks: np.ndarray, is_positive: np.ndarray) -> float:
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    return min(
        1.0, max(0.0, float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)))
    )
