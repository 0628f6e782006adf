"""Leaks are found, with their count; clean data give no warning."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mmbert_core.config import Config
from mmbert_core.data import leaks
from mmbert_core.data.prepare import prepare
from tests.support import tiny

WORDS = tiny.WORDS
OTHER_WARNINGS = ("that no training row has", "fewer than 50", "outside the training range")  # not about leaks


def write(path: Path, rows: list[dict[str, object]]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def table(num_rows: int, seed: int) -> list[dict[str, object]]:
    """Rows without any leak; the same group for two neighbours."""
    rng = np.random.default_rng(seed)
    return [
        {
            "row_id": f"{seed}-{row}",
            "text": " ".join(rng.choice(WORDS, 14)),
            "age": int(rng.integers(0, 90)),
            "amount": round(float(rng.normal()), 3),
            "kind": str(rng.choice(list("abc"))),
            "thread": f"{seed}/{row // 2}",
            "label": row % 2,
        }
        for row in range(num_rows)
    ]


def found(folder: Path, train: list[dict[str, object]], test: list[dict[str, object]], **changes: object) -> list[str]:
    values = tiny.settings(folder)
    values |= {
        "train_path": (write(folder / "a.csv", train),),
        "val_path": (),
        "test_path": (write(folder / "b.csv", test),),
        "group_name": "thread",
    } | changes
    return [line for line in prepare(Config(**values)).warnings if not any(words in line for words in OTHER_WARNINGS)]


def test_clean_data_give_no_warning(tmp_path: Path) -> None:
    assert found(tmp_path, table(120, 1), table(40, 2)) == []


def test_groups_and_texts_in_two_splits(tmp_path: Path) -> None:
    train, test = table(120, 1), table(40, 2)
    for row in (3, 8, 9):
        test[row]["text"] = train[2 * row]["text"]
    test[5]["thread"] = test[20]["thread"] = train[0]["thread"]
    train[0]["text"] = test[30]["text"] = "short"  # too short to tell
    groups, *texts = found(tmp_path, train, test)
    assert groups.startswith("test: 2 of 40 rows are of a group that has ") and "b.csv row 6 " in groups
    assert sum(int(line.split()[1]) for line in texts) == 3 and all("are those of" in line for line in texts)


def test_validation_rows_of_their_own_file_are_compared_both_ways(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each pair of splits has its own lines, with counts, and each line is a warning."""
    train, val, test = table(120, 1), table(50, 2), table(40, 3)
    for row in range(4):
        val[row]["thread"] = train[0]["thread"]
    for row in range(3):
        test[10 + row]["text"] = val[20 + row]["text"]
    test[30]["text"], val[7]["text"] = train[30]["text"], train[70]["text"]
    lines = found(tmp_path, train, test, val_path=(write(tmp_path / "v.csv", val),))
    assert [line.split(", first ")[0] for line in lines] == [
        "val: 4 of 50 rows are of a group that has training rows",
        "val: 1 of 50 texts are those of training rows (texts of 8 tokens or more)",
        "test: 1 of 40 texts are those of training rows (texts of 8 tokens or more)",
        "test: 3 of 40 texts are those of validation rows (texts of 8 tokens or more)",
    ]
    assert [line.split("/")[-1] for line in lines] == [
        "v.csv row 1 (line 2)",
        "v.csv row 8 (line 9)",
        "b.csv row 31 (line 32)",
        "b.csv row 11 (line 12)",
    ]
    assert [message for message in caplog.messages if message in lines] == lines


def test_a_column_that_separates_one_of_several_classes(tmp_path: Path) -> None:
    """Each class is compared with all others; the best separated one is named, classes with few rows are ignored."""
    train = table(180, 1)
    for row, cells in enumerate(train):
        cells["label"] = ("red", "green", "blue")[row % 3]
        cells["kind"] = "x" if row % 3 == 1 else str(row % 2)  # separates green, not red from blue
        cells["age"] = 5 + row % 4 if row % 3 == 2 else 20 + row % 40  # small for blue
    test = [cells | {"label": "red"} for cells in table(40, 2)]
    several = {"is_binary": False, "num_classes": 3}
    separates = "from the rest with an AUROC of 1.0000: is it known before the label is?"
    assert found(tmp_path, train, test, **several) == [
        f"column 'age' alone separates class 'blue' {separates}",
        f"column 'kind' alone separates class 'green' {separates}",
    ]
    for row, cells in enumerate(train):
        # three rows of green are too few
        cells["label"] = "green" if row in (1, 4, 7) else "blue" if row % 3 == 2 else "red"
        cells["kind"] = "x" if cells["label"] == "green" else str(row % 2)
    assert [line.split(" from")[0] for line in found(tmp_path, train, test, **several)] == [
        "column 'age' alone separates class 'blue'"
    ]


def test_columns_that_leak_the_label_or_have_one_value(tmp_path: Path) -> None:
    train = table(120, 1)
    for row, cells in enumerate(train):
        cells["age"], cells["kind"], cells["amount"] = 7, "yes" if cells["label"] else "no", row
    lines = found(tmp_path, train, table(40, 2))
    assert [line.split(":")[0] for line in lines] == [
        "column 'age'",
        "column 'amount'",
        "column 'kind' alone separates class '1' from the rest with an AUROC of 1.0000",
    ]
    assert "the same value in all" in lines[0] and "is it an id?" in lines[1]
    for cells in train:
        cells["amount"] = "" if cells["label"] else 3.5  # missing for one class
    assert any(
        line.startswith("column 'amount' alone separates class '1'") for line in found(tmp_path, train, table(40, 2))
    )


def test_numbers_may_be_codes_without_an_order(tmp_path: Path) -> None:
    train = table(400, 1)
    for row, cells in enumerate(train):
        cells["amount"] = 2 * (row * 7 % 5) + (1 - cells["label"])  # even: class 1
    [line] = found(tmp_path, train, table(40, 2))
    assert line.startswith("column 'amount' alone separates class '1' from the rest with an AUROC of 1.0000")


def test_repeated_ids_are_also_warnings_of_the_report(tmp_path: Path) -> None:
    train, test = table(120, 1), table(40, 2)
    test[3]["row_id"] = train[7]["row_id"]
    test[20]["row_id"] = test[21]["row_id"] = "same"
    lines = found(tmp_path, train, test, id_name="row_id")
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        "1 of 40 ids repeat one of an earlier row",
        "1 rows have an id of a training row",
    ]


def test_many_categories_do_not_separate_classes_by_chance(tmp_path: Path) -> None:
    train = table(300, 1)
    for row, cells in enumerate(train):
        cells["kind"] = f"k{row // 2}"
    assert found(tmp_path, train, table(40, 2)) == []


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns(seed: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 9, 200), rng.random(200) < 0.3
    assert leaks.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
