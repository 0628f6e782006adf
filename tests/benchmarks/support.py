"""A small set with groups, its set file, and a call of the benchmark."""

import csv
from pathlib import Path
from typing import Any

import yaml

from benchmarks import quality
from benchmarks.quality_sets import Limits, Rows, TableSet, read_sets, write_rows
from tests.support import tiny

LIMITS = Limits(small=1000, resamples=3, seeds=2, max_train_rows=50)


def write_set(
    folder: Path, *, num_classes: int = 2, rows: tuple[int, int, int] = (120, 40, 40), **changes: Any
) -> Path:
    """A set file with one set, `tiny`: three rows in a row are of one customer."""
    for seed, (name, count) in enumerate(zip(("train", "val", "test"), rows)):
        path = tiny.write_table(folder / f"{name}.csv", count, seed=seed, num_classes=num_classes)
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        with open(path, "w", newline="", encoding="utf-8") as stream:
            extra = ["customer", *(f"{name}-{row // 3}" for row in range(count))]
            csv.writer(stream).writerows([*line, cell] for line, cell in zip(lines, extra))
    declared = {
        "train": "train.csv",
        "val": "val.csv",
        "test": "test.csv",
        "text": "text",
        "numbers": ["age", "amount"],
        "categories": ["kind"],
        "label": "label",
        "classes": [str(label) for label in range(num_classes)],
        "group": "customer",
    }
    path = folder / "sets.yaml"
    path.write_text(yaml.safe_dump({"tiny": declared | changes}))
    return path


def rows_of_set(folder: Path, limits: Limits = LIMITS, **changes: Any) -> tuple[TableSet, list[Rows]]:
    table_set = read_sets(write_set(folder, **changes))["tiny"]
    return table_set, write_rows(table_set, limits, folder / "rows")


def arguments(folder: Path, *more: str) -> list[str]:
    """Of `run`, with a tiny encoder: a set of 200 rows, divided twice."""
    if not (folder / "encoder").exists():
        tiny.write_encoder(folder / "encoder")
        write_set(folder)
    output, encoder = str(folder / "runs.jsonl"), str(folder / "encoder")
    return ["run", str(folder / "sets.yaml"), output, "--encoder", encoder, "--resamples", "2", *more]


def run(folder: Path, *more: str) -> list[dict[str, Any]]:
    """All finished runs after a call."""
    assert quality.main(arguments(folder, *more)) == 0
    return quality.read_runs(folder / "runs.jsonl")
