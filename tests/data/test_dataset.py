"""From a config to batches: right rows and shapes, fitted on the training rows only, errors of one line."""

import logging
import time

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.data.dataset import encode_for_prediction
from mmbert_core.data.features import UNSEEN, UnseenCells
from mmbert_core.data.prepare import prepare
from mmbert_core.data.splits import sample_rows
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import Roles, frame_to_chunk

HEADER = ["id", "text", "price", "kind", "y", "g"]


def rows_of(num_rows, seed=0, classes=("no", "yes")):
    generator = np.random.default_rng(seed)
    words = ["item", "late", "refund", "please", "never"]
    return [
        [
            f"{seed}-{row:03d}",
            " ".join(generator.choice(words, size=generator.integers(0, 20))),
            generator.choice(["", "1.5", "200", "7"]),
            generator.choice(["", "a", "b"]),
            classes[row % len(classes)],
            f"g{row // 3}",
        ]
        for row in range(num_rows)
    ]


@pytest.fixture
def config_of(tmp_path, write_table, encoder_folder):
    """config_of(train=rows, test=rows, header={"test": names}, **settings) -> Config over fresh files."""

    def config_of(train=None, val=None, test=None, header=None, **changes):
        tables = {"train": rows_of(40) if train is None else train, "val": val, "test": test}
        paths = {
            f"{name}_path": (write_table(f"{name}.csv", (header or {}).get(name, HEADER), rows),)
            for name, rows in tables.items()
            if rows is not None
        }
        settings = {
            "text_name": ("text",),
            "label_name": "y",
            "id_name": "id",
            "tab_field_list": ("price",),
            "cat_field_list": ("kind",),
            "encoder": encoder_folder,
            "model_path": str(tmp_path / "run"),
            "max_length": 12,
        }
        return Config(**(settings | paths | changes))

    return config_of


def changed(rows, index, column, cell):
    rows = [list(row) for row in rows]
    rows[index][HEADER.index(column)] = cell
    return rows


def error_of(config):
    with pytest.raises(InputError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- batches ----


def test_a_batch_holds_the_rows_it_is_asked_for(config_of, tokenizer):
    data = prepare(config_of(test=rows_of(11, seed=1)))
    source = rows_of(11, seed=1)
    positions = np.array([7, 2, 2, 10])
    batch = data.test.batch(positions)
    assert batch.row_index.tolist() == positions.tolist()
    assert batch.ids == [source[row][0] for row in positions]
    encoded = [tokenizer(source[row][1], truncation=True, max_length=12)["input_ids"] for row in positions]
    longest = max(map(len, encoded))
    assert batch.input_ids.tolist() == [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in encoded]
    assert batch.attention_mask.tolist() == [[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded]
    assert batch.labels.tolist() == [["no", "yes"].index(source[row][4]) for row in positions]
    assert (
        int(batch.attention_mask.sum()) == sum(map(len, encoded))
        and data.test.cost(positions) == batch.input_ids.numel()
    )
    assert data.test.lengths[positions].tolist() == list(map(len, encoded))
    median = data.features.medians[0]
    numbers = [
        [median if source[row][2] == "" else float(source[row][2]), float(source[row][2] == "")] for row in positions
    ]
    assert batch.numbers.tolist() == numbers
    assert batch.categories.tolist() == [[["", "?", "a", "b"].index(source[row][3])] for row in positions]
    dtypes = [
        batch.input_ids.dtype,
        batch.attention_mask.dtype,
        batch.categories.dtype,
        batch.labels.dtype,
        batch.numbers.dtype,
    ]
    assert dtypes == [torch.int64] * 4 + [torch.float32]
    assert data.test.label_strings(positions) == [source[row][4] for row in positions]
    moved = batch.to("meta")
    assert (
        moved.numbers.is_meta
        and moved.labels.is_meta
        and not moved.row_index.is_meta
        and not moved.input_ids.is_meta
        and moved.ids == batch.ids
    )


def test_chunks_of_a_long_text_are_an_axis_only_when_there_may_be_several(config_of, tokenizer):
    rows = rows_of(20)
    rows[0][1], rows[1][1], rows[2][1] = "item " * 25, "late", ""
    data = prepare(config_of(train=rows, max_chunks=3, val_fraction=0))
    batch = data.train.batch([0, 1, 2])
    assert batch.input_ids.shape == (3, 3, 12)
    assert batch.attention_mask.sum(dim=2).tolist() == [[12, 12, 7], [3, 0, 0], [2, 0, 0]]
    assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
    assert (batch.input_ids[batch.attention_mask.bool()] == tokenizer.cls_token_id).sum() == 5  # special tokens in each
    assert data.train.batch([1, 2]).input_ids.shape == (2, 1, 3)
    assert data.train.lengths[:3].tolist() == [31, 3, 2]
    assert [data.train.cost(rows) for rows in ([0, 1, 2], [1, 2], [2])] == [
        5 * 12,
        2 * 3,
        1 * 2,
    ]  # empty chunks are not encoded


def test_columns_only(config_of):
    data = prepare(config_of(text_name=(), encoder="no/such-encoder", max_chunks=2))
    batch = data.train.batch(range(4))
    assert data.tokenizer is None and batch.input_ids.shape == batch.attention_mask.shape == (4, 0)
    assert (data.train.lengths == 1).all() and batch.input_ids.numel() == 0


def test_text_only_and_no_ids(config_of):
    batch = prepare(config_of(tab_field_list=(), cat_field_list=(), id_name=None)).train.batch([0, 1])
    assert batch.numbers.shape == (2, 0) and batch.categories.shape == (2, 0) and batch.ids is None


def test_a_batch_takes_microseconds(config_of):
    train = prepare(config_of(train=rows_of(400))).train
    positions = [np.random.default_rng(seed).integers(0, len(train), 32) for seed in range(20)]
    times = []
    for some in positions:
        started = time.perf_counter()
        train.batch(some)
        times.append(time.perf_counter() - started)
    assert np.median(times) < 0.005  # ten times what it takes, for a busy machine


# ---- prepare ----


def test_train_and_val_share_no_row_and_hold_them_all(config_of):
    data = prepare(config_of(val_fraction=0.25))
    ids = data.train.ids(range(len(data.train))) + data.val.ids(range(len(data.val)))
    assert sorted(ids) == sorted(row[0] for row in rows_of(40)) and len(data.val) == 10
    assert np.bincount(data.val.label_index).tolist() == [5, 5]


def test_groups_stay_whole(config_of):
    data = prepare(config_of(val_fraction=0.3, group_name="g"))
    group_of = {row[0]: row[5] for row in rows_of(40)}
    groups = [{group_of[name] for name in split.ids(range(len(split)))} for split in (data.train, data.val)]
    assert groups[1] and not groups[0] & groups[1]


def test_only_the_table_that_is_split_needs_the_group_column(config_of):
    without = [row[:5] for row in rows_of(8, seed=1)]
    data = prepare(config_of(group_name="g", test=without, header={"test": HEADER[:5]}))
    assert len(data.test) == 8
    assert "column 'g' not found" in error_of(config_of(train=without, header={"train": HEADER[:5]}, group_name="g"))


def test_max_train_rows_and_val_path(config_of):
    data = prepare(config_of(val=rows_of(9, seed=2), max_train_rows=20))
    assert len(data.train) == 20 and len(data.val) == 9
    again = prepare(config_of(val=rows_of(9, seed=2), max_train_rows=20, seed=1))
    assert not np.array_equal(again.train.rows, data.train.rows)


def test_no_validation(config_of):
    assert prepare(config_of(val_fraction=0)).val is None
    assert prepare(config_of(train=rows_of(2))).val is None


def test_changing_only_test_rows_changes_nothing_fitted(config_of):
    before = prepare(config_of(test=rows_of(9, seed=1)))
    test = changed(changed(rows_of(9, seed=3), 0, "price", "1e30"), 1, "kind", "never seen")
    after = prepare(config_of(test=test))
    assert after.features == before.features and after.labels == before.labels
    assert np.array_equal(after.train.rows, before.train.rows) and np.array_equal(after.val.rows, before.val.rows)
    positions = np.arange(len(after.train))
    assert torch.equal(after.train.batch(positions).numbers, before.train.batch(positions).numbers)
    assert torch.equal(after.train.batch(positions).input_ids, before.train.batch(positions).input_ids)


def test_validation_rows_of_the_training_file_are_not_fitted_on(config_of):
    rows = rows_of(40)
    config = config_of(train=rows)
    before = prepare(config)
    for position in before.val.rows:
        rows[position][2], rows[position][3] = "12345", "only here"
    after = prepare(config_of(train=rows))
    assert np.array_equal(after.val.rows, before.val.rows)
    assert after.features == before.features
    assert (after.val.batch(range(len(after.val))).categories == UNSEEN).all()


def test_test_rows_with_and_without_labels_or_rows(config_of):
    without = prepare(config_of(test=[row[:4] for row in rows_of(3)], header={"test": HEADER[:4]})).test
    assert not without.has_labels and without.label_index is None and without.batch([0, 1]).labels is None
    empty = prepare(config_of(test=[])).test
    assert len(empty) == 0 and empty.has_labels


def test_reordered_columns_are_the_same_data(config_of):
    order = [4, 2, 0, 1, 3, 5]
    before = prepare(config_of(test=rows_of(7, seed=1))).test.batch(range(7))
    moved = [[row[index] for index in order] for row in rows_of(7, seed=1)]
    after = prepare(config_of(test=moved, header={"test": [HEADER[index] for index in order]})).test.batch(range(7))
    for name in ("input_ids", "numbers", "categories", "labels"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


def test_fingerprints_name_every_file(config_of):
    config = config_of(val=rows_of(4, seed=1), test=rows_of(4, seed=2))
    data = prepare(config)
    assert set(data.fingerprints) == {*config.train_path, *config.val_path, *config.test_path, "the tokenizer"}


def test_the_cache_is_under_the_model_path_or_in_cache_path(config_of, tmp_path):
    prepare(config_of())
    assert (tmp_path / "run" / "cache").is_dir()
    prepare(config_of(cache_path=str(tmp_path / "elsewhere"), model_path=str(tmp_path / "other")))
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "other").exists()


def test_warnings_about_the_data_are_logged_once(config_of, caplog):
    test = changed(changed(rows_of(9, seed=1), 0, "kind", "new"), 4, "id", "0-000")
    with caplog.at_level(logging.INFO):
        prepare(config_of(test=test, val_fraction=0, max_length=4))
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("mmbert_core")]
    truncated = "texts are longer than 1 x 4 tokens (max_chunks x max_length) and were truncated"
    assert any(truncated in message for message in messages)
    assert "test: 1 cells of column 'kind' hold a value that no training row has" in messages
    assert any(
        message.startswith("test: 1 rows have an id of a training row, first ") and "row 5" in message
        for message in messages
    )
    assert any("classes have fewer than 50 training rows" in message for message in messages)
    assert len(messages) == 4


# ---- mistakes ----


def test_invalid_labels(config_of):
    rows = rows_of(40)
    assert "train.csv row 3 (line 4), column 'y': expected a label, found an empty cell" in error_of(
        config_of(train=changed(rows, 2, "y", ""))
    )
    found = error_of(config_of(train=changed(rows, 5, "y", "maybe")))
    expected = "train.csv row 6 (line 7), column 'y': expected 2 classes (num_classes) in the training rows"
    assert f"{expected}, found 3: 'maybe', 'no', 'yes'; 'maybe' is" in found
    assert "all training rows have the label 'no'" in error_of(config_of(train=rows_of(10, classes=["no"])))
    assert "expected 3 classes" in error_of(config_of(is_binary=False, num_classes=3))
    for name in ("val", "test"):
        found = error_of(config_of(**{name: changed(rows_of(9, seed=1), 4, "y", "maybe")}))
        assert f"{name}.csv row 5 (line 6), column 'y': expected one of the labels 'no', 'yes', found 'maybe'" in found
        found = error_of(config_of(**{name: changed(rows_of(9, seed=1), 4, "y", "")}))
        assert (
            f"{name}.csv row 5 (line 6), column 'y': expected one of the labels 'no', 'yes', found an empty cell"
            in found
        )
    assert error_of(config_of(positive_label="maybe")).startswith(
        "positive_label: expected one of the labels 'no', 'yes', found 'maybe'"
    )


def test_an_id_column_that_the_prediction_file_would_have_twice(config_of):
    header = ["prob_yes", *HEADER[1:]]
    assert "id_name: 'prob_yes' is a column that the prediction file has already" in error_of(
        config_of(header={"train": header}, id_name="prob_yes", is_binary=False)
    )
    assert prepare(config_of(header={"train": header}, id_name="prob_yes")).labels.names == (
        "no",
        "yes",
    )  # two classes have one `prob`


def test_a_class_without_sampled_training_rows(config_of):
    rows = rows_of(60, classes=["no"])
    missed = next(row for row in range(60) if row not in sample_rows(60, 5, 0))
    rows[missed][4] = "yes"
    assert "max_train_rows: expected rows of every class, found none of class 'yes' among 5" in error_of(
        config_of(train=rows, max_train_rows=5)
    )


def test_invalid_files(config_of, tmp_path):
    train = str(tmp_path / "train.csv")
    for key in ("test_path", "val_path"):
        assert f"{key}: {train} is in train_path too" in error_of(config_of(**{key: (train,)}))
    (tmp_path / "link.csv").symlink_to(train)
    assert "is in train_path too" in error_of(config_of(test_path=(str(tmp_path / "link.csv"),)))
    assert "is in train_path too" in error_of(config_of(test_path=(str(tmp_path / "tr*.csv"),)))
    assert "train.csv: expected rows, found a header only" in error_of(config_of(train=[]))
    assert "val.csv: expected rows, found a header only" in error_of(config_of(val=[]))
    assert "there is no such file" in error_of(config_of(test_path=(str(tmp_path / "none.csv"),)))
    assert error_of(config_of(train_path=())).startswith("train_path: expected at least one file")


@pytest.mark.parametrize("column", ["id", "text", "price", "kind", "y"])
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_missing_column_is_named_with_its_file(config_of, name, column):
    header = ["other" if cell == column else cell for cell in HEADER]
    config = config_of(**{name: rows_of(6, seed=1)}, header={name: header})
    if (name, column) == ("test", "y"):
        assert not prepare(config).test.has_labels
    else:
        assert f"{name}.csv: column {column!r} not found" in error_of(config)


def test_invalid_numbers(config_of):
    rows = rows_of(12)
    assert "train.csv, column 'price': expected numbers, found no value in any of" in error_of(
        config_of(train=[[*row[:2], "NA", *row[3:]] for row in rows])
    )
    for name in ("train", "val", "test"):
        found = error_of(config_of(**{name: changed(rows_of(12, seed=1), 3, "price", "1,5")}))
        assert f"{name}.csv row 4 (line 5), column 'price': expected a finite number" in found and found.endswith(
            "found '1,5'"
        )


def test_a_missing_tokenizer(config_of, tmp_path):
    assert error_of(config_of(encoder=str(tmp_path / "none"))).startswith("encoder")


# ---- prediction ----


def test_prediction_in_memory_equals_the_cache(config_of):
    data = prepare(config_of(test=rows_of(9, seed=1)))
    frame = pd.DataFrame(rows_of(9, seed=1), columns=HEADER).drop(columns="y")
    roles = Roles.from_config(config_of())
    options = {"max_length": 12, "max_chunks": 1}
    dataset = encode_for_prediction(
        frame_to_chunk(frame, roles.inputs(), ["y"]), roles, data.tokenizer, data.features, data.labels, **options
    )
    positions = np.array([8, 0, 3])
    mine, stored = dataset.batch(positions), data.test.batch(positions)
    assert torch.equal(mine.input_ids, stored.input_ids) and torch.equal(mine.numbers, stored.numbers)
    assert (
        torch.equal(mine.categories, stored.categories)
        and mine.ids == stored.ids
        and mine.labels is None
        and not dataset.has_labels
    )


def test_prediction_accepts_unknown_labels_and_odd_rows(config_of):
    data = prepare(config_of())
    frame = pd.DataFrame(
        [["=1+1", "", "", "never seen", "may\tbe"], ["", "item", None, None, ""], ["7", "late", 3, "a", "yes"]],
        columns=HEADER[:5],
    )
    roles = Roles.from_config(config_of())
    chunk = frame_to_chunk(frame, roles.inputs(), ["y"])
    dataset = encode_for_prediction(
        chunk, roles, data.tokenizer, data.features, data.labels, max_length=12, max_chunks=1
    )
    assert dataset.label_index.tolist() == [-1, -1, 1] and dataset.label_strings(range(3)) == ["may\tbe", "", "yes"]
    batch = dataset.batch(range(3))
    assert (
        batch.ids == ["=1+1", "", "7"]
        and batch.categories[:, 0].tolist() == [1, 0, 2]
        and torch.isfinite(batch.numbers).all()
    )
    assert batch.attention_mask.sum(dim=1).tolist() == [2, 3, 3]
    assert (
        dataset.unseen() == {"kind": UnseenCells(1, 3, ("never seen",))}
        and dataset.row_location(1) == "data frame row 2"
    )
