"""The benchmark as a command: killed and continued, no run twice, the same rows for all, table and picture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import quality
from benchmarks.peers import Vectors
from benchmarks.quality_runs import Candidate, Setup, config_of, key_of, load_predictions, read_run
from benchmarks.quality_scores import Predictions, scores
from benchmarks.quality_sets import Limits
from mmbert_core.config_reader import read_config
from tests.benchmarks import support
from tests.benchmarks.support import rows_of_set
from tests.support import tiny

CHEAP = ("words, LR", "columns, LR", "words + columns, LR")
FAST = {"max_epochs": 1, "max_length": 32, "hidden_common_dim": 8, "lr": 1e-3}  # of a config of ours


def test_a_killed_benchmark_continues_and_runs_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "benchmarks.quality", *support.arguments(tmp_path, "--candidates", *CHEAP)]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(quality.read_runs(output)) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = output.read_text().splitlines(keepends=True)[:2]
    output.write_text("".join(first) + '{"set": "tiny", "resam')  # a line that the kill left unfinished

    runs = support.run(tmp_path, "--candidates", *CHEAP)
    assert output.read_text().startswith("".join(first))
    assert [(each["resample"], each["candidate"]) for each in runs] == [(n, name) for n in (0, 1) for name in CHEAP]
    assert support.run(tmp_path, "--candidates", *CHEAP) == runs


def test_time_is_limited_and_settings_make_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    configs = tmp_path / "candidates.yaml"
    configs.write_text("ours: {max_epochs: 1}\n")
    monkeypatch.setattr(quality, "run", fake_run)
    options = ("--candidates", "ours", "--configs", str(configs))
    assert quality.main(support.arguments(tmp_path, *options, "--max_minutes", "1e-9")) == quality.UNFINISHED
    assert len(support.run(tmp_path, *options)) == 2
    configs.write_text("ours: {max_epochs: 2}\n")
    runs = support.run(tmp_path, *options)
    assert [each["overrides"]["max_epochs"] for each in runs] == [1, 1, 2, 2]
    with pytest.raises(SystemExit, match="several configs under one name"):
        quality.main(["table", str(tmp_path / "runs.jsonl")])
    with pytest.raises(SystemExit, match="expected one of peers"):
        quality.main(support.arguments(tmp_path, "--candidates", "theirs"))


def fake_run(candidate: Candidate, rows, setup: Setup, finished: list) -> dict:
    """A record without the work."""
    record = {"set": "tiny", "resample": rows.resample, "seed": rows.seed, "candidate": candidate.name}
    record |= {"config": candidate.sha(setup), "rows": rows.sha, "overrides": candidate.overrides, "version": ""}
    return record | {"auroc": 0.5, "log_loss": 0.7, "f1_macro": 0.5, "seconds": 0.0, "is_peer": False}


def test_ours_reads_the_rows_of_the_peers_and_the_table_compares_them(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    configs = tmp_path / "candidates.yaml"
    configs.write_text(yaml.safe_dump({"ours": FAST, "wrong": {"max_epochs": 0}}))
    options = ("--configs", str(configs), "--resamples", "1")
    assert quality.main(support.arguments(tmp_path, "--candidates", "wrong", *options)) == 1
    runs = support.run(tmp_path, "--candidates", *CHEAP, "ours", *options)
    assert [each["candidate"] for each in runs] == [*CHEAP, "ours"]  # what failed is not stored
    stored = [load_predictions(each, tmp_path / "runs.jsonl.files") for each in runs]
    assert len({each["rows"] for each in runs}) == 1 and len({len(each["test"]) for each in stored}) == 1
    assert all((each["labels"] == stored[0]["labels"]).all() for each in stored)
    assert len({key_of(each) for each in runs}) == 4 and not list((tmp_path / "runs.jsonl.files/work").iterdir())

    table = tmp_path / "table.md"
    assert quality.main(["table", str(tmp_path / "runs.jsonl"), "--draws", "50", "--write", str(table)]) == 0
    text = table.read_text()
    assert "120 / 40 / 40 rows" in text and "**ours** minus the best peer" in text
    best = max((each for each in runs if each["is_peer"]), key=lambda each: each["auroc"])
    assert f"| {best['candidate']} | {runs[-1]['auroc'] - best['auroc']:+.4f} (" in text
    options = ("--draws", "50", "--candidate", CHEAP[0], "--against", CHEAP[1], "--write", str(table))
    assert quality.main(["table", str(tmp_path / "runs.jsonl"), *options]) == 0
    assert f"| {CHEAP[1]} | {runs[0]['auroc'] - runs[1]['auroc']:+.4f} (" in table.read_text()
    pytest.importorskip("matplotlib")
    assert quality.main(["plot", str(tmp_path / "runs.jsonl"), str(tmp_path / "runs.png")]) == 0
    assert (tmp_path / "runs.png").stat().st_size > 5000


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_figures_of_a_run_are_those_that_it_reports(tmp_path: Path, num_classes: int) -> None:
    _, [rows] = rows_of_set(tmp_path, Limits(small=1000, resamples=1), num_classes=num_classes)
    encoder = str(tiny.write_encoder(tmp_path / "encoder"))
    setup = Setup(encoder, 1, tiny.ROOT, tmp_path, Vectors(tmp_path / "vectors", encoder, num_threads=1))
    wanted = {"metric_choices": ["auroc", "f1_macro", "log_loss"], "early_stop_metric": "val_loss"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(rows, FAST | wanted, setup, tmp_path / "run")))
    tiny.train(read_config(str(path)))
    result, more = read_run(tmp_path / "run", rows)
    labels = rows.labels("test")
    found = scores(Predictions(result["test"], result["predicted"], labels, labels))
    [reported] = (tmp_path / "run").glob("multimodal_bert-*/test_metrics.json")
    values = json.loads(reported.read_text())
    assert found == pytest.approx({name: values[f"test/{name}"] for name in found}, abs=1e-5)
    assert more["log_loss_calibrated"] > 0
