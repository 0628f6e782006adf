"""Warnings about leakage: rows in several splits, columns that leak the label, columns that are ids.

N rows. Each finding is a line with a count; nothing is changed or refused.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from mmbert_core.data.dataset import Dataset
from mmbert_core.data.labels import Labels
from mmbert_core.data.splits import select_rows

# Examined rows at most: texts of the training rows and of the other splits, cells of the training rows.
MAX_TRAINING_TEXTS, MAX_OTHER_TEXTS, MAX_COLUMN_ROWS = 1_000_000, 100_000, 100_000
CHUNK_ROWS = 8_192
MIN_TOKENS = 8  # of a text; shorter ones are often equal by chance
MIN_AUROC = 0.98  # of a column alone, from which it is reported
MIN_CLASS_ROWS = 10  # rows of a class, and of the others, in each half of the examined rows
MIN_UNIQUE_SHARE = 0.95  # distinct values per row; a column with more is reported
MAX_CODES = 100  # distinct numbers of a column that may be codes
MIN_ROWS_UNIQUE = 50  # rows; in fewer, all values of a column may differ by chance
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def find_leaks(train: Dataset, val: Dataset | None, test: Dataset | None, labels: Labels) -> list[str]:
    """One line for each finding, the most serious kind first."""
    splits = [split for split in (train, val, test) if split is not None]
    pairs = list(combinations(range(len(splits)), 2))  # earlier, later
    lines = [line for first, second in pairs for line in _shared_groups(splits[second], splits[first])]
    if train.encoded.tokens is not None:
        hashes = [text_hashes(split, MAX_TRAINING_TEXTS if split is train else MAX_OTHER_TEXTS) for split in splits]
        for first, second in pairs:
            lines += _shared_texts(splits[second], splits[first], hashes[second], hashes[first])
    return [*lines, *_column_findings(train, labels)]


# ---- rows in several splits ----


def _shared_groups(split: Dataset, earlier: Dataset) -> Iterator[str]:
    """A line if rows of `split` are of a group that `earlier` has too."""
    if split.encoded.group_codes is None or earlier.encoded.group_codes is None:
        return
    shared = shared_positions(*(select_rows(each.encoded.group_codes, each.rows) for each in (split, earlier)))
    if len(shared):
        rows = f"{len(shared)} of {len(split)} rows are of a group that has {SPLIT_NAMES[earlier.name]} rows"
        yield f"{split.name}: {rows}, first {split.row_location(int(shared[0]))}"


def shared_positions(codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Positions in `codes` [N] of values that `others` has too; a code below 0 is an empty cell and never shared."""
    if len(codes) < len(others):
        others = others[_is_in(others, codes)]
    return np.flatnonzero(_is_in(codes, others) & (codes >= 0))


def _is_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """np.isin [N] bool by a hash table: for ten million values np.isin takes ten seconds."""
    return pd.Series(values).isin(others).to_numpy()


def _shared_texts(split: Dataset, earlier: Dataset, hashes: np.ndarray, others: np.ndarray) -> Iterator[str]:
    """A line if long texts of `split` are also in `earlier`; `hashes` and `others` are those of `text_hashes`."""
    shared = np.flatnonzero(_is_in(hashes, others) & (split.lengths[: len(hashes)] >= MIN_TOKENS))
    if len(shared):
        texts = f"{len(shared)} of {len(hashes)} texts are those of {SPLIT_NAMES[earlier.name]} rows"
        first = f"first {split.row_location(int(shared[0]))}"
        yield f"{split.name}: {texts} (texts of {MIN_TOKENS} tokens or more), {first}"


def text_hashes(dataset: Dataset, max_rows: int) -> np.ndarray:
    """A hash uint64 [N] of the token ids of each of the first `max_rows` rows; equal texts have equal hashes."""
    hashes = [np.zeros(0, np.uint64)]
    num_rows = min(len(dataset), max_rows)
    for start in range(0, num_rows, CHUNK_ROWS):
        ids, offsets = dataset.token_ids(np.arange(start, min(start + CHUNK_ROWS, num_rows)))
        position = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))  # of a token in its text
        id_bits = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        position_bits = (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed = id_bits ^ position_bits
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        hashes.append(np.add.reduceat(mixed, offsets[:-1]))  # every text has at least one token
    return np.concatenate(hashes)


# ---- columns ----


def _column_findings(train: Dataset, labels: Labels) -> Iterator[str]:
    """Lines about columns that are constant, have a different value in nearly every row, or alone separate a class."""
    rows = np.random.default_rng(0).choice(len(train), min(len(train), MAX_COLUMN_ROWS), replace=False)
    classes = train.label_index[rows]
    for name, cells in train.cells(rows).items():
        is_number = isinstance(cells, np.ndarray)
        codes, values = pd.factorize(cells if is_number else np.array(cells, dtype=object), use_na_sentinel=False)
        if len(values) == 1:
            same = f"the same value in all {len(rows)} examined training rows"
            yield f"column {name!r}: {same}, nothing can be learned from it"
            continue
        if len(values) == len(rows) >= MIN_ROWS_UNIQUE and not (is_number and (cells % 1 != 0).any()):
            yield f"column {name!r}: a different value in each of {len(rows)} training rows: is it an id?"
        elif not is_number and (line := _nearly_unique(name, cells)):
            yield line
        index, area = most_separated_class(cells, codes, len(values), classes, len(labels.names))
        if area >= MIN_AUROC:
            separated = f"class {labels.names[index]!r} from the rest with an AUROC of {area:.4f}"
            yield f"column {name!r} alone separates {separated}: is it known before the label is?"


def _nearly_unique(name: str, cells: Sequence[str]) -> str | None:
    """A line about a categorical column with nearly as many values as non-empty cells, such as dates or ids."""
    values = [cell for cell in cells if cell]
    num_values = len(set(values))
    if len(values) < MIN_ROWS_UNIQUE or num_values <= MIN_UNIQUE_SHARE * len(values):
        return None
    different = f"{num_values} different values in {len(values)} training rows"
    return f"column {name!r}: {different}, too rare to learn from: is it an id or a date?"


def most_separated_class(
    cells: Sequence[str] | np.ndarray, codes: np.ndarray, num_codes: int, classes: np.ndarray, num_classes: int
) -> tuple[int, float]:
    """The class [0, num_classes) that a column alone separates best from the others, and the AUROC.

    `cells` are numbers [N] float64, or else categories, whose order says nothing; `codes` [N] number their `num_codes`
    distinct values, and `classes` [N] is the label. Numbers of few values are also compared as categories.
    """
    is_number = isinstance(cells, np.ndarray) and cells.dtype.kind == "f"
    found = [_separation(cells if is_number else codes, classes, num_classes, is_number=is_number)]
    if is_number and num_codes <= MAX_CODES:
        found.append(_separation(codes, classes, num_classes, is_number=False))
    return max(found, key=lambda item: item[1])


def _separation(cells: np.ndarray, classes: np.ndarray, num_classes: int, *, is_number: bool) -> tuple[int, float]:
    """The class that this column alone separates best from the others, and the AUROC.

    A category's score is the share of the class among its rows in one half of the rows; the AUROC is computed on the
    other half. Classes with few rows are ignored: a column may separate them by chance.
    """
    fit_half, test_half = slice(0, None, 2), slice(1, None, 2)  # of rows in random order
    ranks = pd.Series(np.where(np.isnan(cells), -np.inf, cells)).rank().to_numpy() if is_number else None
    best = (0, 0.5)
    for index in range(1 if num_classes == 2 else 0, num_classes):
        is_class = classes == index
        counts = [group[half].sum() for group in (is_class, ~is_class) for half in (fit_half, test_half)]
        if min(counts) < MIN_CLASS_ROWS:
            continue
        if ranks is not None:
            area = _area(ranks, is_class)
            area = max(area, 1 - area)
        else:
            num_rows = np.bincount(cells[fit_half], minlength=cells.max() + 1)  # of each category
            num_class_rows = np.bincount(cells[fit_half], is_class[fit_half], cells.max() + 1)
            shares = (num_class_rows + is_class.mean()) / (num_rows + 1)  # smoothed towards the overall share
            area = auroc(shares[cells[test_half]], is_class[test_half])
        best = max(best, (index, area), key=lambda item: item[1])
    return best


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Share of pairs of a positive and a negative row in the right order, ties count half (Mann and Whitney)."""
    return _area(pd.Series(scores).rank().to_numpy(), is_positive)


def _area(ranks: np.ndarray, is_positive: np.ndarray) -> float:
    """AUROC from the ranks [N] of the scores, where ties have their mean rank."""
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    area = float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
    return min(1.0, max(0.0, area))
