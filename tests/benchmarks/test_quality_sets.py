"""The rows that every candidate reads: divided without a row lost, groups whole, classes in proportion."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality_sets import FILES, ID, divide, read_sets, write_rows
from tests.benchmarks.support import LIMITS, rows_of_set, write_set


def test_a_small_set_is_pooled_and_divided_again(tmp_path: Path) -> None:
    _, divisions = rows_of_set(tmp_path, num_classes=3)
    assert len(divisions) == LIMITS.resamples
    tests = []
    for rows in divisions:
        cells = {name: rows.cells(name) for name in FILES}
        assert [len(cells[name][ID]) for name in FILES] == [120, 40, 40]
        ids = [row for name in FILES for row in cells[name][ID]]
        assert len(set(ids)) == len(ids) == 200
        files_of = Counter(group for name in FILES for group in set(cells[name]["customer"]))
        assert set(files_of.values()) == {1}
        shares = [np.bincount(rows.labels(name), minlength=3) / len(cells[name][ID]) for name in FILES]
        assert np.abs(shares[0] - shares[2]).max() < 0.06
        tests.append(frozenset(cells["test"][ID]))
    assert len(set(tests)) == LIMITS.resamples


def test_groups_of_one_row_are_stratified_to_the_row() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [170, 20, 10]))
    divided = divide(labels, [str(row) for row in range(200)], [120, 40, 40], seed=1)
    assert [np.bincount(labels[rows]).tolist() for rows in divided] == [[102, 12, 6], [34, 4, 2], [34, 4, 2]]


def test_of_a_larger_set_the_training_rows_are_sampled_and_the_others_stay(tmp_path: Path) -> None:
    table_set, divisions = rows_of_set(tmp_path, rows=(900, 60, 60))
    assert [rows.seed for rows in divisions] == [0, 1]
    first, second = ({name: rows.cells(name)[ID] for name in FILES} for rows in divisions)
    assert first["val"] == second["val"] and first["test"] == second["test"] == [f"test-{row}" for row in range(1, 61)]
    assert (
        len(first["train"]) == len(set(first["train"])) == LIMITS.max_train_rows and first["train"] != second["train"]
    )
    written = divisions[0].path("train").stat().st_mtime_ns
    assert write_rows(table_set, LIMITS, tmp_path / "rows")[0].path("train").stat().st_mtime_ns == written
    (tmp_path / "val.csv").write_bytes((tmp_path / "test.csv").read_bytes())
    with pytest.raises(SystemExit, match="choose another output"):
        write_rows(table_set, LIMITS, tmp_path / "rows")


def test_the_same_text_stays_in_one_file_where_there_are_no_groups(tmp_path: Path) -> None:
    _, divisions = rows_of_set(tmp_path, group=[], text=["kind"], categories=[])
    for rows in divisions:
        kinds = [set(rows.cells(name)["kind"]) - {""} for name in FILES]
        assert sum(len(each) for each in kinds) == len(set.union(*kinds)) == 3


@pytest.mark.parametrize(
    "changes, message",
    [({"lable": "label"}, "unknown"), ({"classes": ["0"]}, "two classes"), ({"label": "kind"}, "no class")],
)
def test_a_wrong_set_is_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_set(tmp_path, **({"categories": []} | changes))
    with pytest.raises(SystemExit, match=message):
        write_rows(read_sets(path)["tiny"], LIMITS, tmp_path / "rows")
