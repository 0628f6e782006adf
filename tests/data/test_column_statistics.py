"""Statistics of columns: the same for any chunks, exact up to a number of distinct values, in bounded memory."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mmbert_core.data import column_statistics
from mmbert_core.data.column_statistics import MAX_KEPT_VALUES, ColumnStatistics, TableStatistics, gather_statistics
from mmbert_core.tables.table import Chunk, frame_to_chunk, read_chunks


def gathered(frame: pd.DataFrame) -> TableStatistics:
    return gather_statistics([frame_to_chunk(frame, list(frame.columns))])


def facts(column: ColumnStatistics) -> tuple[object, ...]:
    counts = column.values.counts_by_text()
    return (
        column.num_rows,
        column.num_empty,
        column.num_distinct,
        counts and sorted(counts.items()),
        replace(column.numbers),
        replace(column.dates),
        column.fingerprint,
        column.sample,
    )


def test_chunks_do_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "number": [rng.choice(["", "3.5", "-2", "1e3", "true"]) for _ in range(100)],
            "whole": [str(value) for value in range(100)],
            "nearly": ["7"] * 50 + ["seven"] + ["8"] * 49,
            "date": [f"{day:02d}/09/2019" for day in rng.integers(1, 31, 100)],
            "text": [" ".join(rng.choice(["a", "b c", "déjà"], 3)) for _ in range(100)],
        },
        dtype=object,
    )
    path = str(tmp_path / "a.csv")
    frame.to_csv(path, index=False)
    whole = gather_statistics(read_chunks([path], list(frame.columns)))
    pieces = gather_statistics(read_chunks([path], list(frame.columns), chunk_rows=7))
    assert {name: facts(column) for name, column in whole.columns.items()} == {
        name: facts(column) for name, column in pieces.columns.items()
    }
    columns = whole.columns
    assert columns["number"].numbers.maximum == 1000 and columns["number"].num_empty == (frame["number"] == "").sum()
    assert columns["whole"].numbers.are_increasing and columns["whole"].numbers.are_whole
    bad = columns["nearly"].numbers.bad
    assert (bad.count, bad.first, bad.first_row) == (1, "seven", f"{path} row 51 (line 52)")
    dates = columns["date"].dates
    assert dates.num_dates == 100 and dates.num_day_first > 0 and dates.num_month_first == 0 and dates.ambiguous.count
    assert columns["text"].numbers.is_refuted and columns["text"].values.is_exact


def test_many_distinct_values_are_estimated_and_repeats_counted():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "unique": [f"v{row}" for row in range(60_000)],
            "twice": [f"v{row // 2}" for row in range(60_000)],
            "few": rng.integers(0, 9, 60_000).astype(str),
        },
        dtype=object,
    )
    columns = gathered(frame).columns
    assert columns["unique"].num_distinct == pytest.approx(60_000, rel=0.05)
    assert columns["twice"].num_distinct == pytest.approx(30_000, rel=0.05)
    assert columns["unique"].values.num_repeated == 0
    assert columns["twice"].values.num_repeated == MAX_KEPT_VALUES == columns["twice"].values.counts.sum() / 2
    assert columns["few"].values.counts_by_text() == frame["few"].value_counts().to_dict()


def test_the_sample_is_uniform_and_bounded(monkeypatch):
    monkeypatch.setattr(column_statistics, "MAX_SAMPLE_ROWS", 1_000)
    chunks = [
        frame_to_chunk(pd.DataFrame({"row": range(start, start + 500)}), ["row"]) for start in range(0, 20_000, 500)
    ]
    rows = [int(cell) for cell in gather_statistics(chunks).columns["row"].sample]
    assert len(rows) == 1_000 and rows == sorted(rows)
    assert np.histogram(rows, bins=4, range=(0, 20_000))[0].min() > 200
    monkeypatch.setattr(column_statistics, "MAX_SAMPLE_CHARACTERS", 5_000)
    long = Chunk({"text": ["x" * 100] * 200}, ["a"], np.zeros(200, int), np.arange(200), np.zeros(200, int))
    assert 10 <= len(gather_statistics([long, long]).columns["text"].sample) <= 50


def test_no_rows():
    assert gather_statistics([]) == TableStatistics(0, {})
