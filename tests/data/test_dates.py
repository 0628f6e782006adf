"""Dates: which cells are read, age, month, weekday and hour of them.   pytest tests/data/test_dates.py"""

import json
import math
from datetime import datetime

import numpy as np
import pytest

from mmbert_core.data.dates import UNITS, AmbiguousDate, DateColumns, seconds_of, unit_of
from mmbert_core.data.encoding import encode_chunk
from mmbert_core.data.features import Features, out_of_range_cells, out_of_range_lines
from mmbert_core.export import example
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import Roles, records_to_chunk

nan = math.nan
SEPTEMBER_24 = (datetime(2019, 9, 24) - datetime(1970, 1, 1)).total_seconds()
MORNING = SEPTEMBER_24 + 10 * 3600 + 15 * 60
DATES = {
    **dict.fromkeys(["2019-09-24", "2019/9/24", "2019.09.24", "20190924", " 2019-09-24 ", "24/09/2019"], SEPTEMBER_24),
    **dict.fromkeys(["9/24/2019", "24.9.2019", "24 Sep 2019", "24-SEP-2019", "Sept 24, 2019"], SEPTEMBER_24),
    **dict.fromkeys(["2019-09-24 10:15", "2019-09-24T10:15:00Z", "2019-09-24T10:15:00.250+02:00"], MORNING),
    **dict.fromkeys(["Tue, 24 Sep 2019 10:15:00 +0000", "9/24/2019 10:15 AM", "20190924T10:15:00"], MORNING),
    "9/24/2019 12:15:00 AM": SEPTEMBER_24 + 15 * 60,
    "24/9/2019 12:15 pm": SEPTEMBER_24 + 12 * 3600 + 15 * 60,
    "1969-12-31T23:59:59": -1.0,
    "04/04/2019": (datetime(2019, 4, 4) - datetime(1970, 1, 1)).total_seconds(),
}
NO_DATES = ["x", "1569312000", "2019-13-01", "2019-02-29", "24/09/19", "2019-09", "24 foo 2019", "2019-09-24T24:00"]
NO_DATES += ["2019-9/24", "13:00", "0000-01-01", "13/13/2019", "9/24/2019 13:00 PM", "２０１９-09-24"]


def of_example(cell: str, order: str = "unambiguous") -> float:
    return example.seconds_of(cell, "sent", ["nat"], order)


@pytest.mark.parametrize("read", [seconds_of, of_example])
def test_usual_ways_to_write_a_date(read):
    assert {cell: read(cell) for cell in DATES} == DATES
    assert [read("03/04/2019", order) - read("2019-01-01") for order in ("month_first", "day_first")] == [
        62 * 86400,
        92 * 86400,
    ]


@pytest.mark.parametrize("read", [seconds_of, of_example])
def test_what_is_no_date_is_refused(read):
    for cell in NO_DATES:
        with pytest.raises(ValueError, match=r"."):
            read(cell)
    for cell, order in (("03/04/2019", "unambiguous"), ("9/24/2019", "day_first"), ("24.9.2019", "month_first")):
        with pytest.raises(ValueError, match=r"."):
            read(cell, order)
    with pytest.raises(AmbiguousDate):
        seconds_of("03/04/2019")


@pytest.mark.parametrize("of", [unit_of, example.unit_of])
def test_age_month_weekday_and_hour(of):
    seconds = np.array([MORNING, nan, seconds_of("1960-02-29"), seconds_of("2020-01-01T23:59:59")])
    found = [of(seconds, unit, seconds_of("2019-10-01")).tolist() for unit in UNITS]
    expected = [
        [7 - 10.25 / 24, nan, 21764, -92 - 86399 / 86400],
        [9, nan, 2, 1],
        [1, nan, 0, 2],  # a Tuesday, a Monday, a Wednesday
        [10, nan, 0, 23],
    ]
    np.testing.assert_allclose(found, expected)


def fit(cells: list[str], rows: list[int] | None = None) -> tuple[Features, np.ndarray]:
    roles = Roles((), ("n",), (), None, None, None, dates=("sent",))
    records = [{"n": index, "sent": cell} for index, cell in enumerate(cells)]
    encoded = encode_chunk(records_to_chunk(records, ["n", "sent"]), roles, None, max_length=8, max_chunks=1)
    fitted = Features.fit(
        encoded.numbers, encoded.category_codes, [], roles, rows=None if rows is None else np.array(rows)
    )
    return fitted, encoded.numbers


def test_units_become_numeric_inputs_with_the_statistics_of_the_training_rows():
    features, numbers = fit(["2019-09-24", "NaT", "2019-09-20", "2030-01-01"], rows=[0, 1, 2])
    assert features.number_names == ("n", "sent (age in days)", "sent (month)", "sent (weekday)")
    assert features.plain_number_names == ("n",) and features.dates.newest == ("2019-09-24T00:00:00",)
    assert features.maximums[1] == 4 and features.has_indicator == (False, True, True, True)
    assert features.transform_numbers(numbers[1:3]).tolist() == [[1, 2, 9, 2.5, 1, 1, 1], [2, 4, 9, 4, 0, 0, 0]]
    outside = {"sent (age in days)": out_of_range_cells(features, 1, features.number_column(numbers, 1, np.arange(4)))}
    assert out_of_range_lines("val", outside, features) == [
        "val: column 'sent (age in days)': 1 of 3 numbers lie outside the training range 0 to 4 and were limited to "
        "-0.4 to 4.4"
    ]
    stored = json.loads(json.dumps(features.to_json()))
    assert Features.from_json(stored) == features
    with_time, _ = fit(["2019-09-24 10:00", "2019-09-20"])
    assert with_time.number_names[-1] == "sent (hour)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["sent", "more"]}, "expected 2 entries of newest and units"),
        ({"newest": ["2019-13-01T00:00:00"]}, "newest: month must be in 1..12"),
        ({"units": [[]]}, "expected units of each column"),
        ({"units": [["month"]]}, "expected their units as the last of number_names"),
    ],
)
def test_fields_that_no_run_has_written_are_refused(changes, message):
    stored = fit(["2019-09-24"])[0].to_json()
    with pytest.raises(InputError, match=f"^dates: {message}"):
        Features.from_json(stored | {"dates": stored["dates"] | changes})


def test_messages_name_row_column_and_what_to_do():
    with pytest.raises(
        InputError, match="data row 2, column 'sent': .*found '03/04/2019': write the year first, or train with"
    ):
        fit(["2019-09-24", "03/04/2019"])
    with pytest.raises(InputError, match="data row 1, column 'sent': expected a date .* found 'yesterday'$"):
        fit(["yesterday"])
    with pytest.raises(InputError, match="column 'sent': expected dates, found no value in any of 2 rows"):
        fit(["", "NA"])


def test_columns_are_those_of_the_expanded_table():
    columns = DateColumns(("a", "b"), ("2019-09-24T00:00:00", "2020-01-01T12:00:00"), (UNITS[:3], UNITS))
    numbers = np.array([[1.0, MORNING, nan], [2.0, nan, MORNING]])
    expanded = columns.expand(numbers)
    assert expanded.shape == (2, 8) and columns.unit_names[-1] == "b (hour)"
    for index in range(8):
        np.testing.assert_array_equal(columns.column(numbers, index, np.array([1])), expanded[1:, index])
