"""Run the matrix of faults and bad inputs and put what was measured into docs/reliability.md.

    python -m tests.faults.report                      small counts, as pytest runs them; prints the table
    python -m tests.faults.report --full --write       the full counts, into the document (1.5 hours on 2 cores)
    python -m tests.faults.report --only F2,D6         some rows

The document keeps its words; only what stands between its `measured` marks is replaced.
"""

import argparse
import importlib
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers

from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, ROWS, Figures, Row

DOCUMENT = tiny.ROOT / "docs/reliability.md"
MODULES = sorted(path for folder in ("faults", "gpu") for path in (tiny.ROOT / "tests" / folder).glob("test_*.py"))
FIRST_LANE = frozenset(
    {*(f"F{number}" for number in range(1, 12)), "F16"}
)  # the others are the second: about half of the time each
Measured = dict[str, tuple[list[Row], Figures | None]]  # by name; no figures: not tried on this machine


@lru_cache
def load_rows() -> list[Row]:
    """All rows, in the matrix's order: F1, F2, ... F10, D1, ..."""
    for path in MODULES:
        importlib.import_module(".".join(path.relative_to(tiny.ROOT).with_suffix("").parts))
    return sorted(ROWS, key=lambda row: ("FDSE".index(row.name[0]), int(re.sub(r"\D", "", row.name))))


def run_row(number: int, *, full: bool) -> tuple[int, Figures | None, float]:
    """Number, figures (None if this machine cannot try the row), seconds. An exception counts as a problem."""
    row, started = load_rows()[number], time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"mmbert-{row.name}-"))
    figures: Figures | None = None
    try:
        figures = row.measure(folder, **(row.full if full else {}))
    except pytest.skip.Exception as skipped:
        print(f"{row.name}: not tried: {skipped}", flush=True)
    except Exception as error:
        traceback.print_exc()
        figures = Figures()
        figures.count(False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return number, figures, time.monotonic() - started


def holds(figures: Figures) -> bool:
    return (
        max(figures.seconds, default=0.0) <= MAX_SECONDS
        and figures.held == figures.tried
        and not (figures.rows_lost or figures.rows_repeated or figures.wrongly_accepted or figures.problems)
    )


def total_of(figures: list[Figures]) -> Figures:
    """The sum over several tests of one row."""
    total = Figures()
    for each in figures:
        for name in ("tried", "held", "rows_lost", "rows_repeated", "wrongly_accepted"):
            setattr(total, name, getattr(total, name) + getattr(each, name))
        for name in ("seconds", "problems", "notes"):
            getattr(total, name).extend(getattr(each, name))
    return total


def list_item(text: str, indent: str = "") -> str:
    """One item of a Markdown list, wrapped; no continued line may look like an item or heading of its own."""
    text = " ".join(text.split())
    lines = textwrap.wrap(text, 118 - len(indent), break_long_words=False, break_on_hyphens=False)
    lines = [lines[0], *(re.sub(r"^([-+*#>]|\d+[.)])(?=\s|$)", r"\\\1", line) for line in lines[1:])]
    return f"{indent}* " + f"\n{indent}  ".join(lines)


def counts_table(measured: Measured) -> str:
    """Markdown: the counts of each row. A row without figures needs a device that was not there."""
    lines = [
        "| row | tried | held | rows lost | rows repeated | wrongly accepted | longest time to the end, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (rows, figures) in measured.items():
        if figures is None:
            reason = "needs a GPU: `pytest -m gpu tests/gpu`" if rows[0].marker == "gpu" else ""
            cells = ["not run", *["-"] * 4, reason]
        else:
            counts = [figures.tried, figures.held, figures.rows_lost, figures.rows_repeated, figures.wrongly_accepted]
            cells = [*map(str, counts), f"{max(figures.seconds):.1f}" if figures.seconds else ""]
        lines.append("| " + " | ".join([f"[{name}](#{name.lower()})", *cells]) + " |")
    return "\n".join(lines) + "\n"


def details(measured: Measured) -> str:
    """Markdown: a section for each row, with what was injected, what must happen, and other figures."""
    sections = []
    for name, (rows, figures) in measured.items():
        items = []
        for title, texts in (
            ("Injected", [row.injected for row in rows]),
            ("Required", [row.required for row in rows]),
        ):
            items.append(list_item(f"{title}: {'; '.join(dict.fromkeys(texts))}."))
        notes = [] if figures is None else list(dict.fromkeys(figures.notes))
        notes += (
            [] if figures is None else [f"**did not hold**: {problem}" for problem in dict.fromkeys(figures.problems)]
        )
        if len(notes) == 1:
            items.append(list_item(f"Measured: {notes[0]}."))
        elif notes:
            items += ["* Measured:", *(list_item(note, "  ") for note in notes)]
        sections.append("\n".join([f"### {name}", "", *items]))
    return "\n\n".join(sections) + "\n\n"


def summary(measured: Measured, *, full: bool, seconds: float) -> str:
    total = total_of([figures for _, figures in measured.values() if figures is not None])
    counts = "full" if full else "small"
    longest = max(total.seconds, default=0.0)
    text = (
        f"One run of the {counts} counts, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {seconds / 60:.0f} minutes on 2 cores: {total.tried} tried, "
        f"{total.held} held, {total.rows_lost} rows lost, {total.rows_repeated} rows repeated, "
        f"{total.wrongly_accepted} bad inputs wrongly accepted, longest time to the end of a job after its fault "
        f"{longest:.1f} s."
    )
    return "\n".join(textwrap.wrap(text, 120)) + "\n\n"


def replace_between(text: str, name: str, content: str) -> str:
    """The text with the lines between `<!-- measured: name -->` and `<!-- end -->` replaced."""
    pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"{DOCUMENT.name} has no mark {name!r}"
    return pattern.sub(lambda match: match.group(1) + content + match.group(2), text)


def measure(rows: list[int], *, full: bool) -> Iterator[tuple[int, Figures | None, float]]:
    """Number, figures and seconds of each row, as they finish: in two parallel processes, the last rows first."""
    with ExitStack() as stack:
        pending = []
        for is_first in (True, False):
            lane = stack.enter_context(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
            pending += [
                lane.submit(run_row, number, full=full)
                for number in reversed(rows)
                if (load_rows()[number].name in FIRST_LANE) == is_first
            ]
        for done in as_completed(pending):
            yield done.result()


def by_name(rows: list[Row], chosen: list[int], found: dict[int, Figures]) -> Measured:
    """The rows of each name, and the sum of their figures."""
    measured: Measured = {}
    for name in dict.fromkeys(rows[number].name for number in chosen):
        same = [number for number in chosen if rows[number].name == name]
        figures = [found[number] for number in same if number in found]
        measured[name] = ([rows[number] for number in same], total_of(figures) if figures else None)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the matrix's counts")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(tiny.ROOT)}")
    parser.add_argument("--json", type=Path, help="also write every figure to this file, after each row")
    arguments = parser.parse_args()
    started = time.monotonic()
    rows = load_rows()
    chosen = [number for number, row in enumerate(rows) if not arguments.only or row.name in arguments.only.split(",")]
    can_run = [number for number in chosen if rows[number].marker != "gpu" or torch.cuda.is_available()]
    found: dict[int, Figures] = {}
    for number, figures, seconds in measure(can_run, full=arguments.full):
        row = rows[number]
        if figures is None:
            continue
        found[number] = figures
        held = "held" if holds(figures) else "DID NOT HOLD"
        print(
            f"{row.name:4} {row.measure.__name__:60} {figures.held}/{figures.tried} {held}, {seconds:.0f} s",
            *figures.problems,
            sep="\n     ",
            flush=True,
        )
        if arguments.json:
            by_test = {f"{rows[n].name} {rows[n].measure.__name__}": asdict(found[n]) for n in sorted(found)}
            arguments.json.write_text(json.dumps(by_test, indent=2))
    measured = by_name(rows, chosen, found)
    head = summary(measured, full=arguments.full, seconds=time.monotonic() - started)
    content = f"{head}{counts_table(measured)}\n{details(measured)}"
    if arguments.write:
        DOCUMENT.write_text(replace_between(DOCUMENT.read_text(encoding="utf-8"), "matrix", content), encoding="utf-8")
    else:
        print(content)
    return 0 if all(holds(figures) for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
