"""SIGKILLs of real processes in the stage before step 1, and right after it."""

from pathlib import Path

import pytest

from tests.faults.kills import PlannedKill, run_with_kills
from tests.faults.runs import count_rows, differences, reference_run

pytestmark = pytest.mark.fault
KILLS = [
    PlannedKill("head first", 0.01, rank=1),
    PlannedKill("head first", 0.3, rank=0),
    PlannedKill("validation", 0.03, rank=1),  # of step 0: the stage is not saved yet
    PlannedKill("save", 0.0, rank=0),  # of step 0
    PlannedKill("step", 0.05, rank=1, nth=2),
    PlannedKill("finish", 0.1, rank=0),
]


@pytest.mark.parametrize("num_processes", (2, 3))
def test_kills_in_and_after_the_stage_change_nothing(tmp_path: Path, num_processes: int):
    outcome = run_with_kills(tmp_path, num_processes, KILLS, head_first="always")
    assert outcome.code == 0, outcome.output[-6000:]
    assert [sent.phase for sent in outcome.kills][:3] == ["head first", "head first", "validation"]
    assert outcome.restarts == len(outcome.kills) >= 5
    assert differences(tmp_path, reference_run(num_processes, head_first="always")) == []
    assert count_rows(tmp_path) == (0, 0)
