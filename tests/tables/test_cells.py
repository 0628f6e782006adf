"""One normal form for cells that mean the same, one text for every missing value."""

import datetime
import unicodedata
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbert_core.export import example as export_example
from mmbert_core.tables.cells import index_by_form, normal_form, text_of

MISSING = [
    None,
    float("nan"),
    np.float32("nan"),
    Decimal("NaN"),
    Decimal("sNaN"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    np.timedelta64("NaT"),
]
STAY = [
    "007",
    "1e5",
    "1_0",
    "1.5",
    "01.0",
    "+1.0",
    "1.",
    ".0",
    "tRUE",
    " true",
    "1.0 ",
    "yes",
    "",
    "NA",
    "2026-01-31 00:00:01",
    "1.0.0",
    "٣.0",
]


@pytest.mark.parametrize(
    "cell, form",
    [
        ("True", "true"),
        ("TRUE", "true"),
        ("false", "false"),
        ("False", "false"),
        ("1.0", "1"),
        ("-3.00", "-3"),
        ("-0.0", "0"),
        ("1.000", "1"),
        ("123456789012345678901.0", "123456789012345678901"),
        ("pre\u0301cis", "précis"),
        ("2026-01-31 00:00:00", "2026-01-31"),
        ("2026-01-31T00:00:00.000", "2026-01-31"),
        ("2026-01-31T10:00:00.500Z", "2026-01-31 10:00:00.5+00:00"),
        ("2026-01-31 10:00:00.000", "2026-01-31 10:00:00"),
        ("-1 days +23:00:00.250000", "-1 days +23:00:00.25"),
        ("3 days 00:00:00", "3 days"),
    ],
)
def test_cells_that_mean_the_same_have_one_form(cell, form):
    assert normal_form(cell) == form == normal_form(form)


@pytest.mark.parametrize("cell", STAY)
def test_other_cells_stay(cell):
    assert normal_form(cell) == cell


@given(
    st.one_of(
        st.text(),
        st.from_regex(r"-?[0-9]{1,3}\.?0{0,3}", fullmatch=True),
        st.sampled_from([*STAY, "True", "2026-01-31 00:00:00"]),
        st.from_regex(r"2026-01-31[ T](00:00:00|10:02:03)(\.[0-9]{1,3})?(Z|[+]01:00)?", fullmatch=True),
        st.from_regex(r"-?[0-9] days( \+?(00:00:00|10:02:03)(\.[0-9]{1,3})?)?", fullmatch=True),
    )
)
def test_normal_form_is_idempotent_and_the_same_in_the_export(cell):
    assert normal_form(normal_form(cell)) == normal_form(cell) == export_example.normal_form(cell)
    assert unicodedata.is_normalized("NFC", normal_form(cell))


@pytest.mark.parametrize(
    "values, cells, indices",
    [
        (["false", "true"], ["1", "0", "1.0", "True", "2"], [1, 0, 1, 1, None]),
        (["0", "1"], ["true", "FALSE", "1", "2"], [1, 0, 1, None]),
        (["True", "unknown"], ["1", "0"], [0, None]),
        (["0", "1", "n/a"], ["true"], [1]),
        (["0", "1", "2"], ["true", "false"], [None, None]),
        (["true", "1"], ["false", "0", "True", "1.0"], [None, None, 0, 1]),
    ],
)
def test_true_and_false_match_1_and_0_where_a_column_has_one_of_the_pairs(values, cells, indices):
    index_of = {value: index for index, value in enumerate(values)}
    for function in (index_by_form, export_example.index_by_form):
        assert [function(index_of).get(normal_form(cell)) for cell in cells] == indices


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_every_kind_of_missing_value_is_the_empty_text(value):
    assert text_of(value) == ""


def test_typed_values_read_as_the_csv_has_them():
    frame = pd.DataFrame(
        {
            "b": [True],
            "f": [1.0],
            "d": [Decimal("1.50")],
            "t": [pd.Timestamp("2026-01-31 10:00")],
            "day": [datetime.date(2026, 1, 31)],
            "late": [pd.Timestamp("2026-01-31")],
        }
    )
    written = frame.to_csv(index=False, header=False).strip().split(",")
    assert [normal_form(cell) for cell in written] == [
        normal_form(text_of(value)) for value in frame.astype(object).iloc[0]
    ]
    frame = pd.DataFrame(
        {
            "part": pd.to_datetime(["2026-01-31 10:00", "2026-01-31 10:00:00.5"], format="ISO8601"),
            "days": pd.to_timedelta([1, 2], unit="D"),
        }
    )
    for column in frame:  # the CSV's cells depend on the other rows of the column
        written = frame[column].to_csv(index=False, header=False).splitlines()
        assert [normal_form(cell) for cell in written] == [
            normal_form(text_of(value)) for value in frame[column].astype(object)
        ]
    assert (
        text_of(np.datetime64("2026-01-31T10:00"))
        == text_of(datetime.datetime(2026, 1, 31, 10))
        == "2026-01-31 10:00:00"
    )
    assert text_of(np.timedelta64(90, "s")) == text_of(datetime.timedelta(seconds=90)) == "0 days 00:01:30"
    assert text_of(np.str_("x")) == "x" and text_of(datetime.datetime(9999, 12, 31)) == "9999-12-31 00:00:00"
