"""`mmbert ablate`: text only, columns only and both, several seeds each."""

import json

import numpy as np
import pytest

from mmbert_core import cli
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ablate(tmp_path, capsys):
    values = tiny.settings(tmp_path, max_epochs=1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert cli.main(["ablate", str(tmp_path / "config.json"), "--seeds", "0", "1"]) == 0
    results = json.loads((tmp_path / "run/ablation.json").read_text())
    assert list(results["parts"]) == ["text only", "columns only", "both"]
    assert [row["seed"] for row in results["parts"]["both"]] == [0, 1]
    values = [row["auroc"] for row in results["parts"]["both"]]
    expected = {"mean": pytest.approx(np.mean(values)), "spread": pytest.approx(np.std(values, ddof=1))}
    assert results["summary"]["both"]["auroc"] == expected
    assert "+-" in capsys.readouterr().out
    before = (tmp_path / "run/ablation.json").read_bytes()
    assert cli.main(["ablate", str(tmp_path / "config.json"), "--seeds", "0", "1"]) == 0  # all six runs are finished
    assert (tmp_path / "run/ablation.json").read_bytes() == before
    assert cli.main(["ablate", str(tmp_path / "config.json"), "--text_name"]) == 2


def test_ablate_finds_a_wrong_column_before_it_trains(tmp_path, capsys):
    values = tiny.settings(tmp_path, max_epochs=1, tab_field_list=["age", "amuont"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert cli.main(["ablate", str(tmp_path / "config.json")]) == 2
    assert "column 'amuont' not found" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*-seed-*/checkpoints"))
