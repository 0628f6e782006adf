"""Which rows train and which validate: seeded samples and stratified splits.

N rows, C classes. Results depend only on the arguments: every process computes the same.
"""

import numpy as np

SAMPLE_STREAM, SPLIT_STREAM = 1, 2  # with the seed: sampling and splitting draw different numbers


def sample_rows(num_rows: int, max_rows: int | None, seed: int) -> np.ndarray:
    """A random sample without repeats of at most `max_rows` of `num_rows` rows, sorted, int64."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    generator = np.random.default_rng([seed, SAMPLE_STREAM])
    return np.sort(generator.choice(num_rows, max_rows, replace=False)).astype(np.int64)


def select_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array[rows]` for sorted, distinct `rows`; the array itself, not a copy, when these are all rows."""
    return array if len(rows) == len(array) else array[rows]


def split_rows(
    labels: np.ndarray, groups: np.ndarray | None, *, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val) into `labels` [N], each sorted int64, stratified by class.

    Rows with equal `groups` [N] stay on one side. Every class keeps a training row. With a `val_fraction` above 0 and
    more than one row, validation gets at least one row unless that would take the last training row of a class.
    """
    num_rows = len(labels)
    is_val = np.zeros(num_rows, dtype=bool)
    if val_fraction > 0 and num_rows > 1:
        classes = np.unique(labels, return_inverse=True)[1].reshape(-1)
        generator = np.random.default_rng([seed, SPLIT_STREAM])
        if groups is None:
            is_val[_stratified_rows(classes, val_fraction, generator)] = True
        else:
            is_val[_grouped_rows(classes, groups, val_fraction, generator)] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def _stratified_rows(classes: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """Positions of validation rows: about `fraction` of each class, drawn at random, never all rows of a class."""
    counts = np.bincount(classes)  # [C]
    total = max(1, round(len(classes) * fraction))
    exact = counts * fraction
    takes = np.minimum(np.floor(exact).astype(np.int64), counts - 1)  # [C] validation rows
    # round by the largest remainder, but never take the last row of a class
    order = np.lexsort((np.arange(len(counts)), -(exact - np.floor(exact))))
    while takes.sum() < total and (takes < counts - 1).any():
        for index in order:
            if takes.sum() < total and takes[index] < counts[index] - 1:
                takes[index] += 1
    shuffled = generator.permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]  # class by class, each in random order
    starts = np.cumsum(counts) - counts
    return np.concatenate([by_class[start : start + take] for start, take in zip(starts, takes, strict=True)])


def _grouped_rows(
    classes: np.ndarray, groups: np.ndarray, fraction: float, generator: np.random.Generator
) -> np.ndarray:
    """Validation rows. Greedy: groups in random order, each added if it brings the classes closer to their shares."""
    group_of = np.unique(groups, return_inverse=True)[1].reshape(-1)
    rank = generator.permutation(group_of.max() + 1)[group_of]  # [N] random rank of a row's group
    rows = np.argsort(rank, kind="stable")
    bounds = np.append(np.flatnonzero(np.diff(rank[rows], prepend=-1)), len(rows))
    num_classes = int(classes.max()) + 1
    left = np.bincount(classes, minlength=num_classes)  # [C] rows still in training
    wanted = left * fraction  # [C] rows that validation still needs
    chosen: list[np.ndarray] = []
    smallest: np.ndarray | None = None  # taken when no group fits
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if chosen and (wanted <= 0.5).all():  # no group can bring it closer
            break
        members = rows[start:end]
        counts = np.bincount(classes[members], minlength=num_classes)
        if (left[counts > 0] <= counts[counts > 0]).any():  # would take the last training rows of a class
            continue
        if np.abs(wanted - counts).sum() < np.abs(wanted).sum():
            chosen.append(members)
            left = left - counts
            wanted = wanted - counts
        elif smallest is None or len(members) < len(smallest):
            smallest = members
    if not chosen and smallest is not None:
        chosen = [smallest]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
