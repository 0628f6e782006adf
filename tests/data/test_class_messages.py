"""Messages about class 1, about the order of two labels, and about classes with few rows."""

import pytest
import yaml

from mmbert_core.data.class_messages import few_rows_warning, positive_class_line, positive_class_warning


def test_class_1_and_its_share():
    assert (
        positive_class_line(("fraud", "legit"), 0.91)
        == "class 1 (prob, F1, threshold): 'legit', 91.0 % of the training rows"
    )
    assert positive_class_line(("fraud", "legit"), None) == "class 1 (prob, F1, threshold): 'legit'"


@pytest.mark.parametrize(
    "names",
    [
        ("fraud", "legit"),
        ("abuse", "fine"),
        ("no", "yes please"),
        ("A", "B"),
        ("1a", "b"),
        ("null", "x"),
        ("on: x", "z"),
        ("yes", "z"),
        ("#1", "ok"),
        ("12 ", "x"),
    ],
)
def test_the_line_to_add_is_the_label_that_was_rare(names):
    [line] = positive_class_warning(names, (9, 91), None)
    words, _, setting = line.rpartition("add: ")
    assert yaml.safe_load(setting) == {"positive_label": names[0]} and "91.0 %" in words and len(line) <= 160
    assert positive_class_warning(names, (9, 91), names[0]) == positive_class_warning(names, (9, 91), names[1]) == []
    assert positive_class_warning(names, (91, 9), None) == positive_class_warning(names, (50, 50), None) == []


@pytest.mark.parametrize(
    "names",
    [
        ("0", "1"),
        ("-1", "1"),
        ("0.0", "1.0"),
        ("1", "2"),
        ("false", "true"),
        ("False", "True"),
        ("no", "yes"),
        ("N", "Y"),
        ("class_0", "class_1"),
        ("LABEL_0", "LABEL_1"),
        ("negative", "positive"),
    ],
)
def test_an_order_that_is_the_meaning_needs_no_warning(names):
    assert positive_class_warning(names, (9, 91), None) == []


def test_several_classes_have_no_class_1():
    assert positive_class_warning(("a", "b", "c"), (1, 2, 3), None) == []


def test_classes_of_few_rows_are_one_line():
    assert few_rows_warning(("a", "b"), (50, 500)) == []
    [one] = few_rows_warning(("fraud", "legit"), (49, 500))
    assert "class 'fraud' has 49 training rows" in one
    counts = [3 if index == 7 else 20 if index < 12 else 60 for index in range(40)]
    [many] = few_rows_warning([f"c{index}" for index in range(40)], counts)
    assert many.startswith("12 of 40 classes have fewer than 50 training rows, the fewest 'c7' with 3")
    assert all(len(line) <= 160 for line in (one, many))
