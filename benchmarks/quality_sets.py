"""The sets of the quality benchmark, and the files of rows that every candidate reads.

A set file is YAML or JSON. Paths are relative to it; classes are in order, of two the second is class 1:

    reviews:
      train: data/reviews/train.csv
      val: data/reviews/val.csv
      test: data/reviews/test.csv
      text: [Title, Review Text]
      numbers: [Age]
      categories: [Department Name]
      dates: [Ordered]                 # optional
      label: Recommended
      classes: ["0", "1"]
      group: [customer]                # optional: rows with the same cells here stay in one file

A set of few rows is pooled and divided again several times. Of a larger one the training rows are sampled.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmbert_core.storage.files import sha256_of
from mmbert_core.tables.readers import rows_of

ID, GROUP = "benchmark_row", "benchmark_group"  # columns that are added: the row in the source files, its group
FILES = ("train", "val", "test")


@dataclass(frozen=True)
class TableSet:
    """A labelled table in three files and the role of each column."""

    name: str
    train: str
    val: str
    test: str
    label: str
    classes: tuple[str, ...]
    text: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    group: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Columns that are read, each once; one of the groups may also be an input."""
        names = [*self.text, *self.numbers, *self.categories, *self.dates, self.label, *self.group]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Limits:
    """When a set is resampled, how often, and how many training rows a larger one has."""

    small: int = 3000  # rows of all files together below which they are pooled and divided again
    resamples: int = 5
    seeds: int = 3
    max_train_rows: int = 4000


@dataclass(frozen=True)
class Rows:
    """One train/val/test division of a set, as files."""

    table_set: TableSet
    resample: int
    seed: int  # of a candidate's own randomness
    folder: Path
    sha: str  # of the set, the limits of rows and the source files

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.csv"

    def cells(self, name: str) -> dict[str, list[str]]:
        """Column -> texts, "" where missing."""
        return read_cells(self.path(name), [ID, *self.table_set.columns, GROUP])

    def labels(self, name: str) -> np.ndarray:
        """[N] indices into the classes."""
        label = self.table_set.label
        return labels_of(read_cells(self.path(name), [label]), self.table_set)


def read_cells(path: str | Path, columns: Sequence[str]) -> dict[str, list[str]]:
    rows = [cells for _, cells in rows_of(str(path), columns)]
    return {name: list(cells) for name, cells in zip(columns, zip(*rows))} if rows else {name: [] for name in columns}


def labels_of(cells: dict[str, list[str]], table_set: TableSet) -> np.ndarray:
    """[N] indices into the classes."""
    index = {label: number for number, label in enumerate(table_set.classes)}
    return np.array([index[label] for label in cells[table_set.label]], dtype=np.int64)


# ---- the set file ----


def read_sets(path: Path) -> dict[str, TableSet]:
    """Raises `SystemExit` with one line for a set that is not declared as described above."""
    declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(declared, dict) or not all(isinstance(values, dict) for values in declared.values()):
        raise SystemExit(f"{path}: expected names of sets, each with its files and columns")
    return {str(name): _table_set(path, str(name), values) for name, values in declared.items()}


def _table_set(path: Path, name: str, values: dict[str, Any]) -> TableSet:
    known = {item.name for item in fields(TableSet)} - {"name"}
    if missing := sorted({*FILES, "label", "classes"} - set(values)) or sorted(set(values) - known):
        raise SystemExit(f"{path}: {name}: expected the keys {', '.join(sorted(known))}; missing or unknown: {missing}")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in FILES:
            found[key] = str((path.parent / value).resolve())
        elif key == "label":
            found[key] = str(value)
        else:
            found[key] = tuple(str(item) for item in ([value] if isinstance(value, (str, int)) else value))
    if not any(found.get(key) for key in ("text", "numbers", "categories", "dates")) or len(found["classes"]) < 2:
        raise SystemExit(f"{path}: {name}: expected a column of text, numbers or categories, and at least two classes")
    return TableSet(name=name, **found)


# ---- the files of rows ----


def write_rows(table_set: TableSet, limits: Limits, folder: Path) -> list[Rows]:
    """The divisions of a set below `folder`, written unless they are there already."""
    sources = [getattr(table_set, name) for name in FILES]
    # Not how often: each division is the same, whether others follow it or not.
    size_limits = {"small": limits.small, "max_train_rows": limits.max_train_rows}
    sha = sha_of({**asdict(table_set), **size_limits, "files": [sha256_of(Path(path)) for path in sources]} | _NO_PATHS)
    tables = [read_cells(path, table_set.columns) for path in sources]
    sizes = [len(table[table_set.label]) for table in tables]
    ids = [f"{name}-{row}" for name, size in zip(FILES, sizes) for row in range(1, size + 1)]
    pool = {name: [cell for table in tables for cell in table[name]] for name in table_set.columns}
    if unknown := sorted(set(pool[table_set.label]) - set(table_set.classes)):
        raise SystemExit(f"{table_set.name}: labels that are no class: {', '.join(map(repr, unknown[:5]))}")
    is_small = sum(sizes) < limits.small
    found = []
    for resample in range(limits.resamples if is_small else limits.seeds):
        target = folder / table_set.name / f"resample-{resample}"
        rows = Rows(table_set, resample, 0 if is_small else resample, target, sha)
        if not _is_written(rows):
            divided = (
                divide(labels_of(pool, table_set), _groups(pool, table_set), sizes, seed=resample)
                if is_small
                else _sampled(sizes, limits.max_train_rows, seed=resample)
            )
            _write(rows, pool, ids, divided)
        found.append(rows)
    return found


_NO_PATHS = dict.fromkeys(FILES)  # the same rows elsewhere are the same rows


def sha_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def divide(labels: np.ndarray, groups: Sequence[str], sizes: Sequence[int], *, seed: int) -> list[np.ndarray]:
    """Positions of the rows of each file: `sizes` rows, each class in its share of all, a group in one file.

    Groups in random order, those of one row last. Each goes to the file that lacks most of the share of its classes;
    where no file has that many rows left, to the one with the most. The sizes are exact up to the last such groups.
    """
    order, members = np.random.default_rng(seed), {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    shuffled = list(members.values())
    order.shuffle(shuffled)
    shuffled.sort(key=lambda rows: len(rows) == 1)
    shares = np.bincount(labels) / len(labels)
    lacking = target = np.outer(sizes, shares)  # [files, classes] rows
    left = np.array(sizes, dtype=np.int64)
    divided: list[list[int]] = [[] for _ in sizes]
    for rows in shuffled:
        counts = np.bincount(labels[rows], minlength=len(shares))
        wanted = (lacking / np.maximum(target, 1e-9)) @ counts
        chosen = int(np.argmax(np.where(left >= len(rows), wanted, -np.inf))) if left.max() >= len(rows) else -1
        chosen = int(np.argmax(left)) if chosen < 0 else chosen
        divided[chosen] += rows
        left[chosen] -= len(rows)
        lacking = lacking.copy()
        lacking[chosen] -= counts
    return [np.sort(np.array(rows, dtype=np.int64)) for rows in divided]


def _sampled(sizes: Sequence[int], max_train_rows: int, *, seed: int) -> list[np.ndarray]:
    """Positions: a random sample of the training rows, all validation and test rows."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    train = np.random.default_rng(seed).permutation(sizes[0])[:max_train_rows]
    return [np.sort(train), *(np.arange(starts[index], starts[index + 1]) for index in (1, 2))]


def _groups(pool: dict[str, list[str]], table_set: TableSet) -> list[str]:
    """The group of each row; without group columns, rows with the same text are one group."""
    columns = table_set.group or table_set.text
    num_rows = len(pool[table_set.label])
    joined = ["\x1f".join(cells) for cells in zip(*(pool[name] for name in columns))] if columns else [""] * num_rows
    return [text if text.strip("\x1f") else f"row {row}" for row, text in enumerate(joined)]


def _is_written(rows: Rows) -> bool:
    record = rows.folder / "rows.json"
    if not record.exists():
        return False
    if json.loads(record.read_text())["sha"] != rows.sha:
        raise SystemExit(f"{rows.folder}: these rows are of another set file, data or limits: choose another output")
    return True


def _write(rows: Rows, pool: dict[str, list[str]], ids: list[str], divided: Iterable[np.ndarray]) -> None:
    """All files of one division, or none."""
    temporary = rows.folder.with_name(f".{rows.folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    groups = [hashlib.sha256(group.encode()).hexdigest()[:16] for group in _groups(pool, rows.table_set)]
    sizes = {}
    for name, positions in zip(FILES, divided):
        sizes[name] = len(positions)
        with open(temporary / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow([ID, *rows.table_set.columns, GROUP])
            writer.writerows(
                [ids[row], *(pool[column][row] for column in rows.table_set.columns), groups[row]] for row in positions
            )
    (temporary / "rows.json").write_text(json.dumps({"sha": rows.sha, "rows": sizes}) + "\n")
    os.replace(temporary, rows.folder)
