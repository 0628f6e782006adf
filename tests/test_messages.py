"""Messages: all missing columns in one line, counted warnings, advice that can be followed, the time left."""

import csv
import json
import random
from pathlib import Path

import pytest

from mmbert_core import cli
from mmbert_core.runtime.progress import Progress
from mmbert_core.tables.readers import lengths_of
from mmbert_core.tables.table import read_chunks
from tests.support import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.settings(folder)
    return folder


def check(files: Path, capsys, **changes) -> tuple[int, str]:
    path = files / "run.json"
    path.write_text(json.dumps(tiny.settings(files, model_path=str(files / "run")) | changes))
    capsys.readouterr()
    return cli.main(["train", str(path), "--check"]), capsys.readouterr().err


def without(path: Path, target: Path, *columns: str) -> str:
    """A copy of a table without some columns."""
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in rows[0] if name not in columns]
    with open(target, "w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(target)


def test_all_missing_columns_of_all_files_and_wrong_classes_are_one_line(files, tmp_path, capsys):
    val = without(files / "val.csv", tmp_path / "val.csv", "kind")
    test = without(files / "test.csv", tmp_path / "test.csv", "age", "kind")
    changes = {"val_path": [val], "test_path": [test], "tab_field_list": ["age", "amounts"]}
    code, printed = check(files, capsys, is_binary=False, num_classes=3, **changes)
    [line] = printed.splitlines()
    assert code == 2
    for words in (
        f"{files / 'train.csv'}: column 'amounts' not found; nearest is 'amount'",
        f"{val}: column 'amounts' not found; nearest is 'amount'; column 'kind' not found",
        f"{test}: column 'age' not found",
        "column 'label': expected 3 classes (num_classes) in the training rows, found 2",
    ):
        assert words in line, words


def test_the_same_column_missing_from_all_files_is_named_once(files, capsys):
    code, printed = check(files, capsys, id_name="rowid")
    assert code == 2 and printed.count("column 'rowid' not found; nearest is 'row_id'") == 1
    assert all(str(files / f"{name}.csv") in printed for name in ("train", "val", "test"))


def test_the_check_counts_its_warnings(files, tmp_path, capsys):
    code, printed = check(files, capsys)
    num_warnings = sum(line.startswith("warning: ") for line in printed.splitlines())
    last = printed.splitlines()[-1]
    assert code == 0 and num_warnings > 1 and last == f"the check found nothing wrong; {num_warnings} warnings above"


def test_nearly_unique_categories_are_a_warning(files, tmp_path, capsys):
    rng = random.Random(0)
    with open(tmp_path / "train.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "date", "town", "label"])
        dates = (
            [f"2026-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d} {row}" for row in range(196)]
            + ["2026-01-01"] * 4
            + [""] * 40
        )
        writer.writerows(["pay now", date, rng.choice("abcd"), row % 2] for row, date in enumerate(dates))
    changes = {
        "train_path": [str(tmp_path / "train.csv")],
        "val_path": [],
        "val_fraction": 0,
        "test_path": [],
        "id_name": None,
        "tab_field_list": [],
        "cat_field_list": ["date", "town"],
    }
    code, printed = check(files, capsys, **changes)
    assert (
        code == 0
        and "column 'date': 197 different values in 200 training rows" in printed
        and "column 'town'" not in printed
    )


def test_an_encoder_that_cannot_be_fetched_gets_advice_for_no_network(files, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("some-encoder", str(files / "nowhere")):
        code, printed = check(files, capsys, encoder=name)
        assert code == 2 and "without a network, copy a folder with config.json, model.safetensors" in printed


def test_the_time_left_does_not_count_line_breaks_in_cells_as_rows(tmp_path):
    for name, cell in (("a.csv", "one line"), ("b.csv", "five\n\n\n\nlines")):
        with open(tmp_path / name, "w", newline="") as stream:
            csv.writer(stream).writerows([["text"], *([cell] for _ in range(1000))])
    paths = [str(tmp_path / "b.csv"), str(tmp_path / "a.csv")]
    progress = Progress("rows scored", lengths_of(paths[:1]))
    for number, window in enumerate(read_chunks(paths[:1], ["text"], chunk_rows=250), start=1):
        assert progress.seconds_left(int(window.file_index[-1]), int(window.line[-1]), 10.0 * number) == pytest.approx(
            10.0 * (4 - number), abs=0.5
        )
    progress = Progress("rows scored", lengths_of(paths))
    *_, last = read_chunks(paths, ["text"], chunk_rows=250)
    assert progress.seconds_left(int(last.file_index[-1]), int(last.line[-1]), 60.0) == pytest.approx(0, abs=0.5)
    assert lengths_of([str(tmp_path / "c.csv.gz")]) is None
