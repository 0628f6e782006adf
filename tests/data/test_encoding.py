"""Numeric cells are accepted or named; codes and hashes stand for texts."""

import numpy as np
import pandas as pd
import pytest

from mmbert_core.data.encoding import CodeBook, StringColumn, encode_chunk
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import Roles, frame_to_chunk, read_chunks

ROLES = Roles(text=(), numbers=("n",), categories=("k",), label="y", id="i", group="g")


def encode(cells, name="n"):
    columns = {key: [""] * len(cells) for key in "nkiyg"} | {name: cells}
    return encode_chunk(frame_to_chunk(pd.DataFrame(columns), list("nkiyg")), ROLES, None, max_length=8, max_chunks=1)


@pytest.mark.parametrize(
    "cell, number",
    [
        ("1", 1),
        (" 3.5 ", 3.5),
        ("1e5", 1e5),
        ("+.5", 0.5),
        ("-0", 0),
        ("1e-320", 1e-320),
        ("3.4028234663852886e38", 3.4028234663852886e38),
    ],
)
def test_numbers_as_python_writes_them(cell, number):
    assert encode([cell]).numbers.tolist() == [[number]]


@pytest.mark.parametrize("cell", ["", "NA", "n/a", "#N/A", "NaN", "NULL", "None", "<NA>", " na "])
def test_words_that_mean_missing(cell):
    assert np.isnan(encode([cell]).numbers).all()


@pytest.mark.parametrize(
    "cell", ["abc", "1,5", "1_000", "inf", "-Infinity", "1e308", "3.5e38", "0x10", "-", "1 2", "yes"]
)
def test_text_and_infinity_in_a_numeric_column(write_table, cell):
    path = write_table("t.csv", list("nkiyg"), [("1", "", "a\nb", "", ""), (cell, "", "", "", "")])
    [chunk] = read_chunks([path], list("nkiyg"))
    with pytest.raises(InputError) as caught:
        encode_chunk(chunk, ROLES, None, max_length=8, max_chunks=1)
    assert str(caught.value).startswith(f"{path} row 2 (line 4), column 'n': expected a finite number")
    assert str(caught.value).endswith(f"found {cell!r}")


def test_a_long_cell_is_truncated_in_a_message():
    with pytest.raises(InputError) as caught:
        encode(["x\ny" * 1000])
    assert len(str(caught.value)) < 220 and "\n" not in str(caught.value)


def test_codes_count_texts_by_first_appearance_and_0_is_missing():
    book = CodeBook()
    assert book.encode(["b", "", "a", "b"]).tolist() == [1, 0, 2, 1]
    assert book.encode(["c", "a"]).tolist() == [3, 2]
    assert book.values() == ["", "b", "a", "c"]


def test_only_the_empty_cell_is_a_missing_category():
    rows = encode(["NA", "", " ", "NA"], name="k")
    assert [rows.vocabularies[0][code] for code in rows.category_codes[:, 0]] == ["NA", "", " ", "NA"]


def test_groups_are_equal_where_their_text_is_and_a_missing_one_is_alone():
    codes = encode(["x", "y", "x", "", ""], name="g").group_codes
    assert codes[0] == codes[2] and len(set(codes.tolist())) == 4
    assert encode(["x"], name="g").group_codes[0] == codes[0]


def test_label_and_group_columns_may_be_absent():
    frame = pd.DataFrame({"n": ["1"], "k": ["x"], "i": ["7"]})
    rows = encode_chunk(frame_to_chunk(frame, ["n", "k", "i"]), ROLES, None, max_length=8, max_chunks=1)
    assert rows.label_codes is None and rows.group_codes is None and rows.tokens is None and rows.num_truncated == 0


def test_strings_are_kept_byte_for_byte():
    texts = ["007", "", "NA", "=1+1", "a\tb\r\n", "漢🙂", "x" * 300]
    column = StringColumn.of(texts)
    assert column.take(np.arange(len(texts))) == texts
    assert column.take(np.array([5, 0])) == ["漢🙂", "007"]


def test_true_and_false_are_numbers():
    assert encode(["True", "false", "TRUE", "", "2"]).numbers[:, 0].tolist()[:3] == [1, 0, 1]
    assert encode([True, False, None, np.bool_(True)]).numbers[[0, 1, 3], 0].tolist() == [1, 0, 1]
