"""Which column is the label, and which task its cells are: two classes or several."""

from dataclasses import dataclass

from mmbert_core.data.class_messages import format_share
from mmbert_core.data.column_names import is_label_name
from mmbert_core.data.column_statistics import ColumnStatistics, TableStatistics
from mmbert_core.runtime.errors import InputError, format_for_message, list_for_message
from mmbert_core.tables.cells import normal_form

MAX_CANDIDATES, MAX_CANDIDATE_CLASSES, MAX_EMPTY_SHARE = 10, 20, 0.05  # of columns that could be the label
MAX_NUMBER_CLASSES = 20  # different numbers, above which a label is a continuous number
LIST_SEPARATORS = "|;,"
MIN_LIST_SHARE = 0.02  # of the cells that have a separator in a label of lists


@dataclass(frozen=True)
class Task:
    """Classes of a label column, with the training rows of each, the most frequent first."""

    counts: dict[str, int]

    @property
    def is_binary(self) -> bool:
        return len(self.counts) == 2

    @property
    def rarest(self) -> str:
        """The class of the fewest rows; of two with equal numbers, the second in order of their names."""
        return min(reversed(sorted(self.counts)), key=lambda name: self.counts[name])

    def share(self, name: str) -> float:
        """Of the labelled rows."""
        return self.counts[name] / sum(self.counts.values())


def find_label(table: TableStatistics, asked: str | None, *, source: str) -> str:
    """The label column: the one asked for, or the only one that is clearly called a label.

    Raises `InputError`, which lists the columns that could be it; `source` is the table's path.
    """
    if asked is not None:
        if asked not in table.columns:
            names = list_for_message(list(table.columns), 40)
            raise InputError(f"{source}: label column {format_for_message(asked)} not found; columns are {names}")
        return asked
    named = [name for name in table.columns if is_label_name(name)]
    if len(named) == 1:
        return named[0]
    candidates = [column for column in table.columns.values() if _could_be_label(column)]
    candidates.sort(key=lambda column: (column.num_distinct != 2, column.name not in named))
    some = [f"{format_for_message(column.name)} ({column.num_distinct} values)" for column in candidates]
    listed = ", ".join(some[:MAX_CANDIDATES]) + (", ..." if len(some) > MAX_CANDIDATES else "") or "none"
    found = f"found {len(named)} in {source}" if named else f"found none in {source}"
    problem = f"expected the name of the label column, or one column that is called label or target, {found}"
    raise InputError(f"--label: {problem}; columns of few values, which could be it: {listed}")


def _could_be_label(column: ColumnStatistics) -> bool:
    has_classes = 2 <= column.num_distinct <= MAX_CANDIDATE_CLASSES and column.num_distinct < column.num_present
    return has_classes and column.num_empty <= MAX_EMPTY_SHARE * column.num_rows


def task_of(label: ColumnStatistics, *, source: str) -> Task:
    """The task of a label column.

    Raises `InputError` for a label that is no class: a continuous number, a list of labels, one value, or more
    values than can be counted. `source` is the table's path.
    """
    prefix = f"{source}, label column {format_for_message(label.name)}"
    if is_continuous(label):
        numbers = label.numbers
        found = f"{label.num_distinct:,} different numbers from {numbers.minimum:g} to {numbers.maximum:g}"
        raise InputError(
            f"{prefix}: it looks like a continuous number ({found}); regression is not supported yet: "
            "name a label of classes, or write ranges of it as texts into a column of their own"
        )
    if (separator := list_separator(label)) is not None:
        found = f"cells such as {format_for_message(next(cell for cell in label.present_sample if separator in cell))}"
        raise InputError(
            f"{prefix}: it looks like lists of labels ({found}); several labels per row are not supported yet: "
            "write one column of 0 and 1 for each, and train on one of them"
        )
    counts = label.values.counts_by_text()
    if counts is None:
        raise InputError(f"{prefix}: expected classes, found about {label.num_distinct:,} different values")
    spelling: dict[str, str] = {}  # normal form -> the first spelling, as far as the sample shows it
    for value in [*dict.fromkeys(label.present_sample), *counts]:
        spelling.setdefault(normal_form(value), value)
    merged: dict[str, int] = {}
    for value, count in counts.items():
        name = spelling[normal_form(value)]
        merged[name] = merged.get(name, 0) + count
    if len(merged) < 2:
        value = format_for_message(next(iter(merged), ""))
        found = f"every row has {value}" if merged else "every cell is empty"
        raise InputError(f"{prefix}: expected two classes or more, {found}")
    return Task(dict(sorted(merged.items(), key=lambda item: -item[1])))


def is_continuous(label: ColumnStatistics) -> bool:
    """Whether a label is a number to predict: many different numbers that do not number classes from 0 or 1."""
    numbers = label.numbers
    if numbers.is_refuted or numbers.bad.count or label.num_distinct <= MAX_NUMBER_CLASSES:
        return False
    number_classes = numbers.are_whole and numbers.minimum in (0, 1)
    return not (number_classes and numbers.maximum - numbers.minimum == label.num_distinct - 1)


def list_separator(label: ColumnStatistics) -> str | None:
    """The separator of a label whose cells are lists: pieces that occur alone or in several cells; else None."""
    cells = set(label.present_sample)
    for separator in LIST_SEPARATORS:
        with_separator = sum(separator in cell for cell in label.present_sample)
        if with_separator <= MIN_LIST_SHARE * len(label.present_sample):
            continue
        pieces = [{piece.strip() for piece in cell.split(separator)} for cell in cells]
        if len(cells) > 3 and len(set().union(*pieces)) < 0.8 * len(cells):
            return separator
    return None


def imbalance_words(task: Task) -> str:
    """Such as: 'fine' 92.1 %, 'abuse' 7.9 %; of many classes the first and the last."""
    names = list(task.counts)
    shares = [f"{format_for_message(name)} {format_share(task.share(name))}" for name in names]
    return ", ".join(shares if len(shares) <= 6 else [*shares[:4], "...", shares[-1]])
