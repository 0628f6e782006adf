"""Roles of columns and the task of a label, as a careful person would give them, from frames and files alike."""

import numpy as np
import pandas as pd
import pytest

from mmbert_core.data.column_names import follows_label_by_name, is_about_label, is_identifier, words_of_name
from mmbert_core.data.column_roles import ProposedRoles, propose_roles
from mmbert_core.data.column_statistics import gather_statistics
from mmbert_core.data.label_column import find_label, task_of
from mmbert_core.demo import sample
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import frame_to_chunk, read_chunks
from tests.support.tiny import WORDS

NUM_ROWS = 400


def table() -> pd.DataFrame:
    """A column of each kind; the label is drawn, so that only the leaking columns predict it."""
    rng = np.random.default_rng(0)
    label = rng.choice(["fine", "abuse"], NUM_ROWS, p=[0.8, 0.2])
    is_abuse = label == "abuse"
    days = rng.integers(0, 365, NUM_ROWS)
    columns: dict[str, object] = {
        "row": range(NUM_ROWS),
        "order_id": [f"o-{value:06d}" for value in rng.permutation(NUM_ROWS)],
        "customer_id": rng.integers(1000, 1090, NUM_ROWS),
        "shop_id": rng.integers(1, 9, NUM_ROWS),
        "subject": [" ".join(rng.choice(WORDS, 3)) for _ in range(NUM_ROWS)],
        "message": [" ".join(rng.choice(WORDS, 25)) for _ in range(NUM_ROWS)],
        "amount": np.round(rng.gamma(2, 40, NUM_ROWS), 2),
        "past_refunds": rng.integers(0, 5, NUM_ROWS),
        "zip_code": [f"{value:05d}" for value in rng.integers(100, 140, NUM_ROWS)],
        "country": rng.choice(["DE", "FR", ""], NUM_ROWS),
        "ordered": [str(np.datetime64("2024-01-01") + day) for day in days],
        "currency": "EUR",
        "note": "",
        "email": [f"a{row // 2}@example.org" for row in range(NUM_ROWS)],
        "token": [f"{value:016x}a1" for value in rng.integers(0, 2**60, NUM_ROWS)],
        "verdict_text": np.where(is_abuse, "A", "F"),
        "score": is_abuse + rng.normal(0, 0.2, NUM_ROWS),
        "reviewer_remark": [" ".join(rng.choice(WORDS, 20)) if abuse else "" for abuse in is_abuse],
        "resolution": rng.choice(["a", "b"], NUM_ROWS),
        "message_copy": None,
        "weight": [*map(str, rng.integers(1, 30, NUM_ROWS - 1)), "12 kg"],
        "shipped": [f"{day % 11 + 1:02d}/{day % 12 + 1:02d}/2024" for day in days],
        "is_abuse": label,
    }
    frame = pd.DataFrame(columns)
    frame["message_copy"] = frame["message"]
    return frame


def roles_of(frame: pd.DataFrame, label: str | None) -> ProposedRoles:
    return propose_roles(gather_statistics([frame_to_chunk(frame, list(frame.columns))]), label)


EXPECTED = {
    "row": "left out",  # order_id is the id, by its name
    "order_id": "id",
    "customer_id": "group",
    "shop_id": "category",
    "subject": "text",
    "message": "text",
    "amount": "number",
    "past_refunds": "number",
    "zip_code": "category",
    "country": "category",
    "ordered": "date",
    "currency": "left out",
    "note": "left out",
    "email": "left out",  # could be the group, but there are fewer customers
    "token": "left out",  # another id
    "verdict_text": "left out",
    "score": "left out",
    "reviewer_remark": "left out",  # empty for one class
    "resolution": "left out",
    "message_copy": "left out",
    "weight": "left out",  # a cell that is not a number
    "shipped": "left out",  # day and month could be either
    "is_abuse": "label",
}


def test_every_kind_of_column(tmp_path):
    frame = table()
    proposed = roles_of(frame, "is_abuse")
    assert {name: found.role for name, found in proposed.roles.items()} == EXPECTED
    left_out = proposed.columns("left out")
    for name, words in {
        "row": "another id than 'order_id'",
        "currency": "constant: 'EUR'",
        "email": "could be group_name instead of 'customer_id'",
        "score": "alone separates the class 'abuse' from the rest with an AUROC of",
        "reviewer_remark": "whether it is empty alone separates the class 'abuse'",
        "resolution": "by its name it may be known only after the label",
        "message_copy": "the same cells as column 'message'",
        "weight": "first '12 kg' in data frame row 400",
        "shipped": "day or month may be first",
    }.items():
        assert words in left_out[name], name
    frame.to_csv(tmp_path / "a.csv", index=False)
    from_file = propose_roles(
        gather_statistics(read_chunks([str(tmp_path / "a.csv")], list(frame.columns))), "is_abuse"
    )
    assert {name: found.role for name, found in from_file.roles.items()} == EXPECTED


def test_without_a_label_nothing_leaks():
    roles = roles_of(table()[["score", "message", "resolution"]], None).roles
    assert [roles[name].role for name in ("score", "message")] == ["number", "text"]


def test_a_column_that_follows_from_one_of_several_classes():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 500)
    frame = pd.DataFrame({"rating": label, "is_good": label > 1, "age": rng.integers(18, 90, 500)})
    roles = roles_of(frame, "rating").roles
    assert roles["is_good"].role == "left out" and roles["age"].role == "number"
    assert "follows from the label" in roles["is_good"].reason


def test_date_order_is_that_of_the_dates_that_show_it():
    days = [f"{day:02d}/03/2024" for day in range(1, 29)] * 3
    proposed = roles_of(pd.DataFrame({"sent": days, "seen": ["03/04/2024", "05/04/2024", "04/03/2024"] * 28}), None)
    assert proposed.date_order == "day_first"
    assert {found.role for found in proposed.roles.values()} == {"date"}


def test_the_sample_of_the_demo():
    frame = sample.sample_table(1_000, seed=0)
    proposed = roles_of(frame, sample.LABEL_COLUMN)
    assert list(proposed.columns("text")) == [sample.TEXT_COLUMN]
    assert tuple(proposed.columns("number")) == sample.NUMBER_COLUMNS
    assert tuple(proposed.columns("category")) == sample.CATEGORY_COLUMNS
    assert list(proposed.columns("id")) == [sample.ID_COLUMN] and not proposed.columns("left out")


# ---- names ----


def test_names():
    assert words_of_name("Clothing ID") == words_of_name("clothingId") == ["clothing", "id"]
    assert all(map(is_identifier, ["order_id", "userId", "tweetid", "uuid", "thread", "index"]))
    assert not any(map(is_identifier, ["valid", "paid", "price_index", "period", "account_age_days"]))
    assert is_about_label("airline_sentiment:confidence", "airline_sentiment")
    assert not is_about_label("airline", "airline_sentiment") and not is_about_label("donated_before", "donated")
    assert follows_label_by_name("Company response to consumer") and not follows_label_by_name("past_refunds")


# ---- the label ----


def label_error(values: list[object]) -> str:
    frame = pd.DataFrame({"target": values})
    with pytest.raises(InputError) as error:
        task_of(gather_statistics([frame_to_chunk(frame, ["target"])]).columns["target"], source="a.csv")
    return str(error.value)


def test_a_task_that_is_not_supported_is_named():
    rng = np.random.default_rng(0)
    assert "regression is not supported yet" in label_error(list(rng.normal(size=200)))
    assert "different numbers from 18 to 89" in label_error([*rng.integers(18, 90, 2000), 18, 89])
    lists = ["a|b", "b", "a", "c", "a|c", "b|c", "a|b|c"] * 20
    assert "several labels per row are not supported yet" in label_error(lists)
    assert "every row has 'a'" in label_error(["a", "a", ""])
    assert "every cell is empty" in label_error(["", ""])
    assert "expected classes, found about" in label_error([f"x{row}" for row in range(5000)])


def test_tasks():
    def task(values: list[object]):
        frame = pd.DataFrame({"target": values})
        return task_of(gather_statistics([frame_to_chunk(frame, ["target"])]).columns["target"], source="a.csv")

    assert task(["a", "b", "b"]).is_binary and task(["a", "b", "b"]).rarest == "a"
    assert task([0, 1]).rarest == "1"
    assert task(list(range(60)) * 3).counts == {str(label): 3 for label in range(60)}  # numbered classes
    assert task(["True", "true", "False"]).counts == {"True": 2, "False": 1}
    assert len(task(["New York, NY", "Albany, NY", "Austin, TX", "Dallas, TX", "Reno, NV"] * 9).counts) == 5


def test_the_label_is_named_or_clear():
    frame = table()
    statistics = gather_statistics([frame_to_chunk(frame, list(frame.columns))])
    assert find_label(statistics, "is_abuse", source="a.csv") == "is_abuse"
    with pytest.raises(InputError, match="label column 'abuse' not found"):
        find_label(statistics, "abuse", source="a.csv")
    with pytest.raises(InputError, match=r"could be it: 'verdict_text' \(2 values\).*'is_abuse' \(2 values\)"):
        find_label(statistics, None, source="a.csv")
    renamed = frame.rename(columns={"is_abuse": "Label"})
    assert find_label(gather_statistics([frame_to_chunk(renamed, list(renamed.columns))]), None, source="a") == "Label"
