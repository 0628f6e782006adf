"""`mmbert report` of a report.json by others: a page, or one line that says what is wrong with the file."""

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmbert_core import cli
from mmbert_core.report.build import render_again
from mmbert_core.report.report_schema import check_report
from mmbert_core.runtime.errors import InputError
from tests.support import reports

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2.5,
    1e308,
    -1e308,
    5e-324,
    10**30,
    2**63,
    2**63 - 1,
    -(2**63),
    "",
    "x",
    "\u202e",
    "1e5",
    "x" * 5_000,
    [],
    {},
    [[]],
    [None],
    [1, 2],
    [1e308, -1e308],
    ["a"],
    {"reason": "x"},
    {"reason": 3},
    {"value": "x"},
    [{}],
    {"": {}},
    [0] * 300,
    [[0, 1, 2]],
    [["x", 1e308]],
)


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def many_classes() -> dict[str, Any]:
    """The sections that a report of many classes has in another form."""
    report = copy.deepcopy(reports.binary_report())
    names = [f"c{index}" for index in range(40)]
    report |= {"class_names": names, "task": "multiclass", "threshold": {"reason": "several classes"}}
    report["confusion"] = {
        "right": [1] * 40,
        "labelled": [2] * 40,
        "predicted": [2] * 40,
        "mistakes": [[0, 1, 1], [39, 2, 1]],
    }
    report["metrics"]["classes_left_out"] = 20
    for row in report["slices"]["rows"]:
        del row["share_of_classes"]
        row["largest_classes"] = [[3, 0.5], [39, 0.25]]
    return report


BASES: dict[str, Callable[[], dict[str, Any]]] = {**reports.EXAMPLES, "many classes": many_classes}
BASES.pop("big", None)


def nodes_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside; of a long list some."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items if len(items) < 30 else items[:: len(items) // 30]:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from nodes_of(inner)


def mutated(base: dict[str, Any], seed: int) -> str:
    """One report.json with a few values replaced, removed, repeated or renamed, or its text damaged."""
    rng, report = random.Random(seed), copy.deepcopy(base)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice(list(nodes_of(report)))
        how = rng.randrange(10)
        if how < 7:
            container[key] = copy.deepcopy(rng.choice((*HOSTILE, deep(40), deep(60))))
        elif how == 7:
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[rng.choice(("x", "", "reason", "\u202e"))] = container.pop(key)
    content = json.dumps(report, ensure_ascii=False)
    if rng.random() < 0.15:
        at = rng.randrange(len(content))
        content = (
            content[:at]
            + rng.choice(("", "[" * 5_000, "9" * 5_000, "NaN", '"', "1e999", "\\ud800", "\0", "}"))
            + content[at + rng.randrange(3) :]
        )
    return content


def outcome_of(folder: Path, content: str) -> str:
    """The error's line; "" where a page was written."""
    (folder / "report.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    (folder / "report.html").unlink(missing_ok=True)
    started = time.monotonic()
    try:
        page = render_again(folder).read_text()
    except InputError as error:
        line = str(error)
        assert line.startswith(str(folder / "report.json")) and "\n" not in line and len(line) < 700, line
        assert not (folder / "report.html").exists()
    else:
        line = ""
        assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert time.monotonic() - started < 20
    return line


def fuzz(folder: Path, seeds: range) -> tuple[int, int]:
    """Pages and errors of so many mutations."""
    bases = [make() for make in BASES.values()]
    bases = [json.loads(json.dumps(base, ensure_ascii=False).encode("utf-8", "replace")) for base in bases]
    lines = [outcome_of(folder, mutated(bases[seed % len(bases)], seed)) for seed in seeds]
    return lines.count(""), len(lines) - lines.count("")


@pytest.mark.parametrize("name", BASES)
def test_every_report_of_ours_is_as_declared(name: str) -> None:
    check_report(json.loads(json.dumps(BASES[name](), ensure_ascii=False)))


def test_mutated_reports_give_a_page_or_one_line(tmp_path: Path) -> None:
    pages, errors = fuzz(tmp_path, range(400))
    assert pages > 20 and errors > 200


@pytest.mark.fault
def test_six_thousand_mutated_reports_give_a_page_or_one_line(tmp_path: Path) -> None:
    pages, errors = fuzz(tmp_path, range(1_000, 7_000))
    assert pages > 300 and errors > 3_000


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"metrics": {"names": "auroc", "model": {}}}, "metrics.names: expected a list, found the text 'auroc'"),
        ({"num_rows": 10**30}, "not a JSON file (expected whole numbers below 2**63"),
        ({"title": deep(200)}, "not a JSON file (expected lists and objects at most 50 deep"),
        ({"class_names": ["a", "b", "c"]}, "confusion.counts: expected a list of 3, found a list of 2"),
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"scores": {"edges": [0, 1e200], "counts": {}}}, "scores.edges[1]: expected a finite number"),
    ],
)
def test_the_line_names_the_key_what_was_expected_and_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], line: str
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(reports.binary_report() | change))
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and f"{tmp_path / 'report.json'}: {line}" in said


def test_counts_by_class_must_fit_the_classes(tmp_path: Path) -> None:
    for key, value, expected in (
        ("right", [1] * 39, "confusion.right: expected a list of 40"),
        ("mistakes", [[0, 40, 1]], "at most 39"),
        ("mistakes", [[0, 1]], "expected a list of 3"),
        ("labelled", [0] * 40, "expected a label that has rows, found 0"),
    ):
        report = many_classes()
        report["confusion"][key] = value
        assert expected in outcome_of(tmp_path, json.dumps(report))
    report = many_classes()
    report["slices"]["rows"][0]["largest_classes"] = [[40, 0.5]]
    assert "slices.rows[0].largest_classes[0]: expected a whole number of at least 0 and of at most 39" in outcome_of(
        tmp_path, json.dumps(report)
    )
