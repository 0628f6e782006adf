"""Helpers for the tests of bad inputs: trained runs, commands run in this process, counting of refusals."""

import atexit
import csv
import io
import json
import logging
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmbert_core import cli
from tests.support import tiny
from tests.support.bad_tables import Rows, read_rows
from tests.support.fault_matrix import Figures

HEADER = ["row_id", "text", "age", "amount", "kind", "label"]


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def command(*words: Any) -> Done:
    """Run a command line in this process; an exception that it raises counts as exit code 1, as in a process."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("mmbert_core")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except Exception:  # in a process it would be a traceback and exit code 1
            traceback.print_exc()
            code = 1
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    return Done(code, out.getvalue(), err.getvalue())


# ---- trained runs ----


@lru_cache
def trained(num_classes: int = 2) -> Path:
    """train.csv, val.csv, test.csv, encoder/, and the finished run `run`, trained once in a process. Read only."""
    folder = Path(tempfile.mkdtemp(prefix="mmbert-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = command("train", write_config(folder, folder, num_classes=num_classes, is_binary=num_classes == 2))
    assert done.code == 0, done.err
    return folder


def write_config(folder: Path, tables: Path, **changes: Any) -> Path:
    """A config file in `folder` for the tables and the run of `tables`; one epoch. A change to `...` omits the key."""
    values = tiny.settings(tables, max_epochs=1, num_classes=changes.get("num_classes", 2))
    values |= {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    (folder / "run.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder / "run.json"


# ---- tables ----


def write_rows(path: Path, rows: Rows) -> Path:
    """A CSV file; unlike `as_csv`, cells with any line break are quoted."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\r\n").writerows(rows)
    return path


def rows_of(name: str, num_classes: int = 2) -> Rows:
    """The cells of one of the tables, header first: train, val or test."""
    return read_rows(trained(num_classes) / f"{name}.csv")


def table_of(**columns: list[str]) -> Rows:
    """A table with the given columns; the others have the same plain cell in each row."""
    plain = {"text": "refund now", "age": "30", "amount": "1.5", "kind": "a", "label": "1"}
    length = len(next(iter(columns.values())))
    cells = {
        name: columns.get(name)
        or ([plain[name]] * length if name in plain else [f"r{index}" for index in range(length)])
        for name in HEADER
    }
    return [HEADER, *map(list, zip(*cells.values(), strict=True))]


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def predictions_of(run: Path) -> Path:
    """The prediction file of a run's own test stage."""
    [found] = run.glob("multimodal_bert-*/test_result_0.tsv")
    return found


# ---- counting ----


def count_refusal(figures: Figures, case: str, done: Done, *expected: str) -> None:
    """A bad input is refused: exit code 2; the last line on stderr is the only error and has the expected words."""
    lines = done.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    lacking = [words for words in expected if errors and words not in errors[0]]
    if done.code == 0:
        figures.refused(False, f"{case}: accepted")
    elif done.code != 2 or errors != lines[-1:] or "Traceback" in done.err or done.out:
        figures.count(False, f"{case}: exit code {done.code}, expected 2 and one line, found {done.err[-600:]!r}")
    elif lacking:
        figures.count(False, f"{case}: expected {lacking} in {errors[0]!r}")
    else:
        figures.refused(True)


def training_refuses(
    figures: Figures, case: str, folder: Path, expected: Sequence[str], *, tables: Path | None = None, **changes: Any
) -> None:
    """`--check` and the training itself refuse a config, and the finished run in its folder is not changed."""
    tables = tables or trained()
    config = write_config(folder, tables, **changes)
    before = tiny.file_hashes(tables)
    for check in ("--check",), ():
        count_refusal(figures, f"{case} {' '.join(check) or 'training'}", command("train", config, *check), *expected)
    left = [path.name for path in (*folder.rglob(".tmp-*"), *tables.rglob(".tmp-*"))]
    figures.count(
        tiny.file_hashes(tables) == before and not left, f"{case}: the earlier run was changed, or {left} left"
    )


def prediction_refuses(
    figures: Figures, case: str, source: Path, expected: Sequence[str], *, model: Path | None = None
) -> None:
    """`predict` refuses; an older file at the output's path and the model folder are not changed."""
    model = model or trained() / "run"
    output = source.parent / "refused.tsv"
    output.write_text("an older prediction\n")
    before = tiny.file_hashes(model)
    count_refusal(figures, f"{case} predict", command("predict", model, source, output), *expected)
    left = [path.name for path in source.parent.glob(".tmp-*")]
    figures.count(
        output.read_text() == "an older prediction\n" and tiny.file_hashes(model) == before and not left,
        f"{case}: older files were changed, or {left} left",
    )


def count_prediction(
    figures: Figures, case: str, source: Path, output: Path, *, num_rows: int, model: Path | None = None
) -> list[dict[str, str]]:
    """`predict` accepts: exit code 0, every row once with probabilities in [0, 1]. Returns the output's rows."""
    done = command("predict", model or trained() / "run", source, output, "--num_threads", 1)
    if not figures.count(done.code == 0, f"{case}: exit code {done.code}: {done.err[-600:]}"):
        return []
    rows = read_tsv(output)
    figures.rows_lost += max(0, num_rows - len(rows))
    figures.rows_repeated += max(0, len(rows) - num_rows)
    numbers = [
        [float(cell) for name, cell in row.items() if name.startswith("prob") and name != "prob_calibrated"]
        for row in rows
    ]
    sums_hold = all(abs(sum(row) - 1) <= 1e-6 for row in numbers if len(row) > 1)
    figures.count(
        sums_hold and all(0 <= value <= 1 for row in numbers for value in row), f"{case}: probabilities {numbers[:3]}"
    )
    return rows


def train_run(figures: Figures, case: str, config: Path, *words: str) -> Done:
    """A training (or its `--check`) that must succeed."""
    done = command("train", config, *words)
    figures.count(done.code == 0, f"{case}: exit code {done.code}: {done.err[-600:]}")
    return done
