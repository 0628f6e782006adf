"""Class order, and one line for every label that cannot be learned from."""

import numpy as np
import pytest

from mmbert_core.data.labels import UNKNOWN, Labels, spelling_warnings
from mmbert_core.runtime.errors import InputError


@pytest.mark.parametrize(
    "values, names",
    [
        (["10", "9", "-1"], ("-1", "9", "10")),  # whole numbers: by value
        (["b", "B", "10", "9"], ("10", "9", "B", "b")),  # else by code point
        (["1.5", "10", "2"], ("1.5", "10", "2")),
        (["é", "z", "漢"], ("z", "é", "漢")),
        (["yes", "no", "yes", "no"], ("no", "yes")),
        (["1_0", "10"], ("10", "1_0")),  # not two spellings of ten: a name and a number
    ],
)
def test_order_of_classes(values, names):
    assert Labels.fit(values, num_classes=len(names)).names == names
    assert Labels.fit(values[::-1], num_classes=len(names)).names == names


def test_positive_label_becomes_class_1():
    assert Labels.fit(["bad", "good"], num_classes=2, positive_label="bad").names == ("good", "bad")
    assert Labels.fit(["bad", "good"], num_classes=2, positive_label="good").names == ("bad", "good")
    with pytest.raises(InputError, match="positive_label: expected one of the labels 'bad', 'good', found 'Bad'"):
        Labels.fit(["bad", "good"], num_classes=2, positive_label="Bad")
    with pytest.raises(InputError, match="positive_label: expected 2 classes"):
        Labels.fit(["a", "b", "c"], num_classes=3, positive_label="b")


@pytest.mark.parametrize(
    "values, num_classes, message",
    [
        (["0", "1", ""], 2, "t.csv row 2, column 'y': expected a label, found an empty cell"),
        (["1", "1"], 2, "t.csv row 0, column 'y': all training rows have the label '1', expected 2 classes"),
        (
            ["0", "1", "2"],
            2,
            "t.csv row 2, column 'y': expected 2 classes (num_classes) in the training rows, "
            "found 3: '0', '1', '2'; '2' is in this row for the first time",
        ),
        (
            ["0", "1"],
            5,
            "t.csv row 0, column 'y': expected 5 classes (num_classes) in the training rows, found 2: '0', '1'",
        ),
        (
            ["0", "1", "1.0"],
            3,
            "t.csv row 2, column 'y': expected one spelling of a label, found '1' and '1.0' for the same number",
        ),
        (
            ["1", "01"],
            2,
            "t.csv row 1, column 'y': expected one spelling of a label, found '01' and '1' for the same number",
        ),
    ],
)
def test_invalid_labels_are_refused(values, num_classes, message):
    with pytest.raises(InputError) as caught:
        Labels.fit(values, num_classes=num_classes, column="y", row_location="t.csv row {}".format)
    assert str(caught.value) == message


def test_lookup_and_unknown_labels():
    labels = Labels(("no", "yes"))
    indices = labels.lookup(["", "yes", "maybe", "no"])
    assert indices.tolist() == [UNKNOWN, 1, UNKNOWN, 0]
    options = {"column": "y", "row_location": "t.csv row {}".format}
    labels.check_known(np.array([0, 1]), str, **options)
    with pytest.raises(InputError) as caught:
        labels.check_known(np.array([0, -1, 1, -1, -1, -1]), lambda index: "maybe", **options)
    expected = "t.csv row 1, column 'y': expected one of the labels 'no', 'yes', found 'maybe'"
    assert str(caught.value) == f"{expected} (4 such rows; also t.csv row 3, t.csv row 4)"
    with pytest.raises(InputError, match="found an empty cell$"):
        labels.check_known(np.array([-1]), lambda index: "", **options)


def test_json_round_trip():
    labels = Labels(("ü", "a\tb"))
    assert Labels.from_json(labels.to_json()) == labels


def test_labels_that_mean_the_same_are_one_class_with_the_first_spelling():
    labels = Labels.fit(["True", "False", "TRUE", "false"], num_classes=2)
    assert labels.names == ("False", "True")
    assert labels.lookup(["true", "FALSE", "2", "tRUE", "True"]).tolist() == [1, 0, UNKNOWN, UNKNOWN, 1]
    letters = Labels.fit(["b", "e\u0301", "é"], num_classes=2)
    assert letters.names == ("b", "e\u0301") and letters.lookup(["é", "e\u0301", ""]).tolist() == [1, 1, UNKNOWN]
    assert Labels.fit(["0", "1"], num_classes=2).lookup(["1.0", "0.00", "01"]).tolist() == [1, 0, UNKNOWN]
    assert Labels.fit(["b", "é"], num_classes=2, positive_label="b").names == ("é", "b")
    with pytest.raises(InputError, match=r"found 'é'; write it as in the training file: 'e\\u0301', not '\\xe9'$"):
        Labels.fit(["b", "e\u0301"], num_classes=2, positive_label="é")
    with pytest.raises(
        InputError,
        match=r"found 2: 'b', .*; the labels 'e\\u0301' and '\\xe9' are one class, written in different ways$",
    ):
        Labels.fit(["b", "e\u0301", "é"], num_classes=3)


def test_names_of_an_older_folder_match_exactly_first():
    assert Labels(("true", "True", "é")).lookup(["True", "true", "TRUE", "e\u0301"]).tolist() == [1, 0, 0, 2]


def test_a_warning_names_labels_that_look_alike():
    assert spelling_warnings(["yes", "no", "", "1", "10"], "y") == []
    assert spelling_warnings(["Yes", "no", "yes ", "é", "e\u0301"], "y") == [
        "column 'y': the labels '\\xe9' and 'e\\u0301' are one class, written in different ways",
        "column 'y': the labels 'Yes', 'yes ' differ by spaces or case only and are 2 classes: are they meant as one?",
    ]


def test_labels_stored_as_booleans_and_as_1_and_0_are_the_same_classes():
    assert Labels(("False", "True")).lookup(["0", "1", "1.0", "true", "2"]).tolist() == [0, 1, 1, 1, -1]
    assert Labels(("0", "1")).lookup(["True", "false", ""]).tolist() == [1, 0, -1]
