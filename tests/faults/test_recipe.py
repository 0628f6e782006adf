"""SIGKILLs of real processes in every stage of a run of the recommended recipe with everything on."""

from pathlib import Path

import pytest

from mmbert_core.config_recipe import RECOMMENDED_VALUES
from tests.faults.kills import PlannedKill, run_with_kills
from tests.faults.runs import count_rows, differences, reference_run

pytestmark = pytest.mark.fault
OTHERWISE = ("max_length", "max_epochs")  # of a tiny encoder and a short test
EVERYTHING = {key: value for key, value in RECOMMENDED_VALUES.items() if key not in OTHERWISE}
EVERYTHING |= {"head_first": "always", "fusion": "gate", "ema_decay": 0.9, "layer_decay": 0.9}
KILLS = [
    PlannedKill("data", 0.2, rank=0),
    PlannedKill("head first", 0.1, rank=1),
    PlannedKill("validation", 0.03, rank=0),
    PlannedKill("save", 0.0, rank=0),
    PlannedKill("step", 0.05, rank=1, nth=2),
    PlannedKill("validation", 0.03, rank=1, step=6),
    PlannedKill("finish", 0.05, rank=0),
    PlannedKill("finish", 0.5, rank=1),
    PlannedKill("finish", 1.5, rank=0),
]


@pytest.mark.parametrize("num_processes", (2, 3))
def test_kills_in_every_stage_change_nothing(tmp_path: Path, num_processes: int):
    outcome = run_with_kills(tmp_path, num_processes, KILLS, **EVERYTHING)
    assert outcome.code == 0, outcome.output[-6000:]
    assert {"data", "head first", "validation", "save", "step", "finish"} <= {sent.phase for sent in outcome.kills}
    assert outcome.restarts == len(outcome.kills)
    assert differences(tmp_path, reference_run(num_processes, **EVERYTHING)) == []
    assert count_rows(tmp_path) == (0, 0)
    assert (tmp_path / "run" / "blend.json").exists() == (
        reference_run(num_processes, **EVERYTHING) / "run" / "blend.json"
    ).exists()
