"""Promises: the same run on any number of processes, every row exactly once, bit-equal resume. Real gloo processes."""

import csv
import json
from pathlib import Path

import pytest

from tests.promises.worker import HEAD_FIRST_KILLS, KILLED_STEPS
from tests.support import tiny

WORKER = str(tiny.ROOT / "tests/promises/worker.py")
PROCESSES = (1, 2, 3, 4)
TABLE_SIZES = (1, 2, 3, 5, 97)


def launch(num_processes: int, *arguments: str) -> None:
    """One process runs without torchrun, with the same code."""
    start = (
        tiny.run_command
        if num_processes == 1
        else lambda command, **options: tiny.torchrun(num_processes, command, **options)
    )
    done = start([WORKER, *arguments], timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.settings(folder, num_rows=501)
    for seed, num_rows in enumerate(TABLE_SIZES):
        tiny.write_table(folder / f"rows{num_rows}.csv", num_rows, seed=seed, labels=False)
    for num_processes in PROCESSES:
        launch(num_processes, str(folder), "steps", "score")
    return folder


def read_steps(runs: Path, num_processes: int) -> dict:
    return json.loads((runs / f"steps{num_processes}.json").read_text())


@pytest.mark.parametrize("num_processes", PROCESSES)
def test_every_training_row_is_learned_from_once_in_the_same_step(runs, num_processes):
    expected, found = read_steps(runs, 1)["rows"], read_steps(runs, num_processes)["rows"]
    assert found == expected
    assert sorted(row for rows in found for row in rows) == list(range(501))
    assert [len(rows) for rows in found] == [25] * 20 + [1]


@pytest.mark.parametrize("num_processes", PROCESSES[1:])
def test_losses_do_not_depend_on_the_number_of_processes(runs, num_processes):
    expected, found = read_steps(runs, 1)["losses"], read_steps(runs, num_processes)["losses"]
    assert len(expected) == 21
    worst = max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
    print(f"largest relative difference of a loss, 1 and {num_processes} processes: {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("num_processes", PROCESSES[1:])
def test_test_file_of_one_model_is_the_same_bytes_on_any_number_of_processes(runs, num_processes):
    def files(count: int) -> tuple[bytes, bytes]:
        [folder] = (runs / f"again{count}").glob("multimodal_bert-*")
        return (folder / "test_result_0.tsv").read_bytes(), (folder / "test_metrics.json").read_bytes()

    assert files(num_processes) == files(1)
    assert files(1)[0].count(b"\n") == 38


@pytest.mark.parametrize("num_rows", TABLE_SIZES)
@pytest.mark.parametrize("num_processes", PROCESSES)
def test_every_row_is_predicted_once_in_order(runs, num_processes, num_rows):
    produced = runs / f"rows{num_rows}-by{num_processes}.tsv"
    with open(produced, newline="") as stream:
        ids = [row["row_id"] for row in csv.DictReader(stream, delimiter="\t")]
    assert ids == [f"{row:05d}" for row in range(num_rows)]
    assert produced.read_bytes() == (runs / f"rows{num_rows}-by1.tsv").read_bytes()


@pytest.mark.parametrize("num_processes", (1, 2))
def test_resume_after_any_step_is_bit_equal(tmp_path, num_processes):
    tiny.settings(tmp_path, num_rows=27)
    launch(num_processes, str(tmp_path), "resume")
    digests = json.loads((tmp_path / f"resume{num_processes}.json").read_text())
    assert set(digests) == {str(step) for step in range(KILLED_STEPS + 1)}
    for killed_after, digest in digests.items():
        assert digest == digests["0"], f"killed after step {killed_after}"


def test_a_head_that_is_fitted_first_is_the_same_on_any_number_of_processes_and_after_kills(tmp_path):
    tiny.settings(tmp_path, num_rows=27)
    digests = {}
    for num_processes in (1, 2, 3):
        launch(num_processes, str(tmp_path), "head_first")
        digests[num_processes] = json.loads((tmp_path / f"head_first{num_processes}.json").read_text())
    one = digests[1][""]
    assert len(one["head"]) > 5 and [step for step, _ in one["validations"]] == [0, 2, 4, 6, 8]
    for num_processes, by_kill in digests.items():
        found = by_kill[""]
        assert (found["step 0"], found["head"]) == (one["step 0"], one["head"]), num_processes
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        for kill, digest in by_kill.items():
            assert digest == found, f"{num_processes} processes, killed {kill}"
    assert list(digests[2]) == list(HEAD_FIRST_KILLS)
