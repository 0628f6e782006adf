"""Statistics and vocabularies of the tabular columns come from the training rows only."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbert_core.data.features import (
    MISSING,
    POOLED,
    UNSEEN,
    Features,
    add_by_column,
    out_of_range_cells,
    out_of_range_lines,
    unseen_cells,
    unseen_lines,
)
from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.table import Roles

nan = np.nan
NO_CODES = np.zeros((0, 0), dtype=np.int32)


def roles_of(numbers=(), categories=()):
    return Roles(text=(), numbers=tuple(numbers), categories=tuple(categories), label=None, id=None, group=None)


def fit(columns, **options):
    numbers = np.array(columns, dtype=np.float64).T
    return Features.fit(
        numbers,
        np.zeros((len(numbers), 0), dtype=np.int32),
        [],
        roles_of(f"n{i}" for i in range(len(columns))),
        **options,
    )


def test_median_indicator_and_statistics_of_the_outputs():
    features = fit([[1, 2, 6, nan], [3, 3, 3, 3]])
    assert features.medians == (2.0, 3.0) and features.has_indicator == (True, False) and features.num_numbers == 3
    outputs = features.transform_numbers(np.array([[nan, nan], [5, 3]]))
    assert outputs.dtype == np.float32 and outputs.tolist() == [[2, 3, 1], [5, 3, 0]]
    everything = np.array([[1, 3, 0], [2, 3, 0], [6, 3, 0], [2, 3, 1]])
    assert np.allclose(features.means, everything.mean(axis=0))
    assert np.allclose(features.stds, [everything[:, 0].std(), 1, everything[:, 2].std()])  # a constant column: 1


def test_only_the_given_rows_count():
    columns = [[1, 2, 3, 1000, nan]]
    assert fit(columns, rows=np.array([0, 1, 2])) == fit([[1, 2, 3]])


def test_extreme_numbers_have_finite_statistics():
    features = fit([[1e38, -1e38, 3e38], [1e-320, 0, 0], [1e9, 1e9 + 1, 1e9], [2**53 + 1, 0, 0]])
    assert np.isfinite(features.means).all() and np.isfinite(features.stds).all()
    assert (np.array(features.stds, dtype=np.float32) > 0).all()
    assert features.stds[2] == 1.0  # equal once they are float32: a constant column
    assert np.isfinite(features.transform_numbers(np.array([[1e38, 1e-320, 1e9, 2**53]]))).all()


def test_a_column_without_any_number():
    with pytest.raises(InputError, match="^t.csv, column 'n1': expected numbers, found no value in any of 2 rows$"):
        fit([[1, 2], [nan, nan]], source="t.csv")


def test_categories_are_those_of_the_training_rows():
    vocabulary = ["", "b", "a", "c"]
    codes = np.array([[1], [2], [0], [3]], dtype=np.int32)
    features = Features.fit(np.zeros((4, 0)), codes, [vocabulary], roles_of(categories=["k"]), rows=np.array([0, 1, 2]))
    assert features.categories == (("a", "b"),) and features.cardinalities == (4,)
    [lookup] = features.category_lookup([["", "c", "b", "new", "a", " a"]])
    assert lookup.tolist() == [MISSING, UNSEEN, 3, UNSEEN, 2, UNSEEN]


def test_no_columns_at_all():
    features = Features.fit(np.zeros((3, 0)), np.zeros((3, 0), dtype=np.int32), [], roles_of())
    assert features.num_numbers == 0 and features.cardinalities == ()
    assert features.transform_numbers(np.zeros((2, 0))).shape == (2, 0)


def test_json_round_trip_is_exact():
    codes = np.array([[1], [1]], dtype=np.int32)
    features = Features.fit(np.array([[0.1, nan], [1 / 3, 2]]), codes, [["", "ü"]], roles_of(["x", "y"], ["k"]))
    assert Features.from_json(json.loads(json.dumps(features.to_json()))) == features


def test_categories_are_normal_forms_and_one_for_all_spellings():
    vocabulary = ["", "True", "true", "FALSE", "1.0", "1", "007", "pre\u0301cis", "précis"]
    codes = np.arange(len(vocabulary), dtype=np.int32)[:, None]
    features = Features.fit(np.zeros((len(codes), 0)), codes, [vocabulary], roles_of(categories=["k"]))
    assert features.categories == (("007", "1", "false", "précis", "true"),)
    [lookup] = features.category_lookup([[*vocabulary, "TRUE", "1.00", "7", "tRUE"]])
    assert lookup.tolist() == [MISSING, 6, 6, 4, 3, 3, 2, 5, 5, 6, 3, UNSEEN, UNSEEN]


def test_categories_of_an_older_folder_match_exactly_first():
    """Its indices, and so its predictions, stay; cells in another spelling are found too."""
    features = Features((), (), (), (), (), ("k",), (("1", "1.0", "True", "pre\u0301cis", "true"),))
    [lookup] = features.category_lookup(
        [["", "1", "1.0", "1.00", "True", "true", "TRUE", "précis", "pre\u0301cis", "x"]]
    )
    assert lookup.tolist() == [MISSING, 2, 3, 2, 4, 6, 4, 5, 5, UNSEEN]


def test_a_column_of_true_and_false_reads_1_and_0():
    features = Features((), (), (), (), (), ("k", "flag"), (("false", "true"), ("0", "1")))
    lookups = features.category_lookup([["", "1", "0", "1.0", "True"], ["", "True", "false", "1"]])
    assert [lookup.tolist() for lookup in lookups] == [[MISSING, 3, 2, 3, 3], [MISSING, 3, 2, 3]]


def test_unseen_cells_are_counted_with_examples():
    features = Features((), (), (), (), (), ("k", "other"), (("1", "2", "3", "4"), ()))
    vocabularies = [["", "1.50", "2", "x" * 100, "2.50", "3.50"], ["", "a"]]
    lookups = features.category_lookup(vocabularies)
    few = np.array([[1, 0]] + [[2, 0]] * 4, dtype=np.int32)
    many = np.array([[3, 1], [1, 0], [4, 0], [5, 0], [0, 0]], dtype=np.int32)

    def unseen(codes):
        return {
            name: unseen_cells(lookups[k], codes[:, k], vocabularies[k])
            for k, name in enumerate(features.category_names)
        }

    assert unseen_lines("input", unseen(few), features) == [
        "input: 1 cells of column 'k' hold a value that no training row has"
    ]
    first, second = unseen_lines("val", add_by_column(add_by_column({}, unseen(few)), unseen(many)), features)
    examples = f"such as '1.50', '{'x' * 76}..., '2.50'; training rows have '1', '2', '3', ..."
    assert first == f"val: 5 of 10 cells of column 'k' hold a value that no training row has, {examples}"
    assert second == "val: 1 cells of column 'other' hold a value that no training row has"
    [alone] = unseen_lines("val", {"other": unseen(many[:1])["other"]}, features)
    assert alone.endswith(
        "1 of 1 cells of column 'other' hold a value that no training row has, such as 'a'; training rows have none"
    )


# ---- numbers outside the training range ----

FLOAT32_MAX = float(np.finfo(np.float32).max)
numbers = st.one_of(
    st.floats(-FLOAT32_MAX, FLOAT32_MAX),
    st.sampled_from([nan, 0.0, -0.0, 1.0, 20.0, 1e-320, 1.6e9, FLOAT32_MAX, -FLOAT32_MAX]),
)


def as_before(features: Features, raw: np.ndarray) -> np.ndarray:
    """The model's input without limits."""
    missing = np.isnan(raw)
    return np.concatenate(
        [np.where(missing, features.medians, raw), missing[:, np.array(features.has_indicator)]], axis=1
    ).astype(np.float32)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(numbers, min_size=1, max_size=8).filter(lambda column: not np.isnan(column).all()),
    st.lists(numbers, max_size=8),
)
def test_training_rows_keep_their_bits_and_others_are_limited_a_little_beyond(
    column: list[float], others: list[float]
) -> None:
    features = fit([column])
    train, new = np.array(column)[:, None], np.array([*others, nan])[:, None]
    assert features.transform_numbers(train).tobytes() == as_before(features, train).tobytes()
    low, high = np.nanmin(column), np.nanmax(column)
    lowest, highest = max(low - 0.1 * (high - low), -FLOAT32_MAX), min(high + 0.1 * (high - low), FLOAT32_MAX)
    found = features.transform_numbers(new)
    assert (
        np.isfinite(found).all()
        and found[:, 0].min() >= np.float32(lowest)
        and found[:, 0].max() <= np.float32(highest)
    )
    inside = (new[:, 0] >= low) & (new[:, 0] <= high)
    assert found[inside].tobytes() == as_before(features, new)[inside].tobytes()
    assert (found[:, 1:] == np.isnan(new)).all()  # limits do not change the indicators
    limited = found[:, 0] != as_before(features, new)[:, 0]
    assert (
        out_of_range_cells(features, 0, new[:, 0]).count >= limited.sum()
    )  # one beyond by less than float32 holds is counted too


def test_the_limits_are_a_tenth_of_the_range_beyond_and_a_constant_stays_one() -> None:
    features = fit([[0, 20, nan, 5], [7, 7, 7, 7], [0, 1, 1, 0], [1.6e9, 1.6e9 + 100, 1.6e9, 1.6e9]])
    assert features.minimums == (0, 7, 0, 1.6e9) and features.maximums == (20, 7, 1, 1.6e9 + 100)
    raw = np.array([[100, 8, 3, 0], [-100, -8, -3, 2e9], [21, 7, 1.05, 1.6e9 + 105], [nan, nan, nan, nan]])
    expected = np.array(
        [
            [22, 7, 1.1, 1.6e9 - 10, 0],
            [-2, 7, -0.1, 1.6e9 + 110, 0],
            [21, 7, 1.05, 1.6e9 + 105, 0],
            [5, 7, 0.5, 1.6e9, 1],
        ]
    )
    assert features.transform_numbers(raw).tolist() == expected.astype(np.float32).tolist()


def test_numbers_outside_are_counted_by_column_over_all_windows() -> None:
    features = fit([[0, 20, 5], [7, 7, 7], [1, 2, 3]])
    windows = [np.array([[100, 7, 2], [21, 7, nan]]), np.array([[nan, 8, 2], [-3, 6, 2]])]
    outside: dict = {}
    for window in windows:
        outside = add_by_column(
            outside, {f"n{index}": out_of_range_cells(features, index, window[:, index]) for index in range(3)}
        )
    assert out_of_range_lines("input", outside, features) == [
        "input: column 'n0': 2 of 3 numbers lie outside the training range 0 to 20 and were limited to -2 to 22",
        "input: column 'n1': 2 of 4 numbers lie outside the training range 7 to 7 and were limited to 7",
    ]


def test_without_a_training_range_nothing_is_limited_and_far_numbers_are_reported() -> None:
    values = json.loads(json.dumps(fit([[0, 20, 5], [1, 2, 3]]).to_json()))
    known = Features.from_json(values)
    older = Features.from_json({name: value for name, value in values.items() if name not in ("minimums", "maximums")})
    raw = np.array([[30.0, 2], [1e6, 2]])
    assert known.limits is not None and older.limits is None and older.minimums is None
    assert older.transform_numbers(raw).tolist() == [[30, 2], [1e6, 2]]
    outside = {f"n{index}": out_of_range_cells(older, index, raw[:, index]) for index in range(2)}
    [line] = out_of_range_lines("input", outside, older)
    far = "1 of 2 numbers lie more than 20 standard deviations from the training mean 8.33333"
    assert line.startswith(f"input: column 'n0': {far}; they were not limited")
    assert Features.from_json(json.loads(json.dumps(older.to_json()))) == older


# ---- fields of the encoding ----


def test_edges_are_fitted_on_the_training_rows_and_stored_only_where_asked_for():
    columns = [[1.0, 2, 6, nan, 900], [3, 3, 3, 3, 3]]
    rows = np.array([0, 1, 2, 3])
    plain, encoded = fit(columns, rows=rows), fit(columns, rows=rows, with_edges=True)
    assert plain.edges is None and not {"scales", "edges"} & set(plain.to_json())
    assert encoded.edges == ((1, 6), ()) and encoded.scales == (1 / 2.5, 0)
    stored = json.loads(json.dumps(encoded.to_json()))
    assert Features.from_json(stored) == encoded
    assert {name: value for name, value in stored.items() if name in plain.to_json()} == json.loads(
        json.dumps(plain.to_json())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": [[1.0, 1.0], []]}, "edges: expected up to 65 ascending numbers for each column"),
        ({"edges": [[1.0], []]}, "edges: expected up to 65 ascending"),
        ({"edges": [list(range(66)), []]}, "edges: expected up to 65 ascending"),
        ({"edges": [[0, 3.4e38], []]}, "edges: expected up to 65 ascending"),
        ({"edges": [[0, 1]]}, "scales and edges: expected 2 entries each, or neither"),
        ({"scales": []}, "scales and edges: expected 2 entries each, or neither"),
    ],
)
def test_edges_that_no_run_has_written_are_refused(changes, message):
    stored = fit([[1.0, 2, 6], [3, 3, 3]], with_edges=True).to_json()
    with pytest.raises(InputError, match=message):
        Features.from_json(stored | changes)


# ---- pooled categories ----


def test_rare_values_share_the_index_of_unseen_ones_but_are_not_counted_as_unseen():
    vocabulary = ["", "a", "b", "1", "1.0", "c"]
    codes = np.array([1, 1, 1, 2, 3, 3, 4, 5, 0], dtype=np.int32)[:, None]
    rows, roles = np.arange(8), roles_of(categories=["k"])
    features = Features.fit(np.zeros((9, 0)), codes, [vocabulary], roles, rows=rows, min_category_count=3)
    assert features.categories == (("1", "a"),) and features.pooled == (("b", "c"),)  # 1 and 1.0 count together
    assert features.cardinalities == (4,)
    cells = ["", "a", "b", "c", "new", "1.0"]
    [lookup] = features.category_lookup([cells])
    assert lookup.tolist() == [MISSING, 3, UNSEEN, UNSEEN, UNSEEN, 2]
    [told] = features.category_lookup([cells], pooled_index=POOLED)
    assert unseen_cells(told, np.arange(6), cells).examples == ("new",)
    stored = json.loads(json.dumps(features.to_json()))
    assert Features.from_json(stored) == features
    with pytest.raises(InputError, match="pooled: expected an entry for each of 1 columns"):
        Features.from_json(stored | {"pooled": [[], []]})
    assert "pooled" not in Features.fit(np.zeros((9, 0)), codes, [vocabulary], roles).to_json()
