"""Each peer learns something from a set whose label depends on words and on a number."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import MEAN, PEERS, Vectors, numbers_of
from benchmarks.quality_runs import Candidate, Setup, load_predictions, run
from benchmarks.quality_sets import Limits, Rows, TableSet, read_cells
from tests.benchmarks.support import rows_of_set
from tests.support import tiny

pytest.importorskip("sklearn")

BETTER_THAN = {"words, LR": 0.6, "columns, LR": 0.55, "columns, LightGBM": 0.55}  # AUROC; the others read both


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Rows]:
    folder = tmp_path_factory.mktemp("peers")
    encoder = str(tiny.write_encoder(folder / "encoder"))
    _, [rows] = rows_of_set(folder, Limits(small=1000, resamples=1), rows=(400, 100, 100))
    vectors = Vectors(folder / "vectors", encoder, num_threads=1)
    return Setup(encoder, 1, folder, folder, vectors), rows


@pytest.fixture(scope="module")
def finished(setup: tuple[Setup, Rows]) -> list[dict]:
    return []


@pytest.mark.parametrize("name", PEERS)
def test_it_is_better_than_chance(setup: tuple[Setup, Rows], finished: list[dict], name: str) -> None:
    if "LightGBM" in name:
        pytest.importorskip("lightgbm", exc_type=ImportError)
    record = run(Candidate(name, None), setup[1], setup[0], finished)
    finished.append(record)
    assert record["auroc"] > BETTER_THAN.get(name, 0.8) and record["log_loss"] < np.log(2)
    found = load_predictions(record, setup[0].folder)
    assert found["test"].shape == (100, 2) and found["test"].sum(axis=1) == pytest.approx(1)


def test_the_mean_is_of_the_four_with_the_lowest_validation_log_loss(
    setup: tuple[Setup, Rows], finished: list[dict]
) -> None:
    if len(finished) < 4:
        pytest.skip("needs the runs of the test above")
    mean = run(Candidate(MEAN, None), setup[1], setup[0], finished)
    best = sorted(finished, key=lambda record: record["val_log_loss"])[:4]
    assert mean["members"] == [record["candidate"] for record in best]
    expected = np.mean([load_predictions(record, setup[0].folder)["test"] for record in best], axis=0)
    assert load_predictions(mean, setup[0].folder)["test"] == pytest.approx(expected)


def test_vectors_are_unit_length_independent_of_padding_and_kept(setup: tuple[Setup, Rows], tmp_path: Path) -> None:
    texts = ["refund please", "my order is late again and the item is broken", ""]
    vectors = Vectors(tmp_path, setup[0].encoder, num_threads=1)
    together = vectors.of(texts)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-6)
    alone = Vectors(tmp_path / "alone", setup[0].encoder, num_threads=1).of(texts[:1])
    assert alone == pytest.approx(together[:1], abs=1e-5)
    again = Vectors(tmp_path, setup[0].encoder, num_threads=1)
    again._encode = None  # every text is known
    assert np.array_equal(again.of(texts[::-1]), together[::-1])


def test_dates_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("when,label\n2024-03-01 06:30,a\n,b\nsoon,a\n")
    table_set = TableSet("dated", *3 * [str(path)], label="label", classes=("a", "b"), dates=("when",))
    rows = Rows(table_set, resample=0, seed=0, folder=tmp_path, sha="")
    numbers = numbers_of(rows, read_cells(path, ["when"])).to_numpy()
    assert numbers[0].tolist() == [19783 + 6.5 / 24, 3, 4, 6] and np.isnan(numbers[1:]).all()
