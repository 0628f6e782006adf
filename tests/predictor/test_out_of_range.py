"""Numbers outside the training range are limited and counted everywhere, and the threshold of every row."""

import json
import shutil

import numpy as np
import pytest

from mmbert_core import cli
from mmbert_core.inference import new_rows
from mmbert_core.predictor import Predictor
from tests.predictor.tables import predict, read_csv
from tests.support import tiny


def test_a_number_far_outside_is_limited_and_counted_everywhere(tables, tmp_path, capsys, caplog, monkeypatch):
    """A cell of 1e6 has the probability of one at the limit: in files, windows, dicts, attributions and a report."""
    rows = read_csv(tables / "test.csv")
    model = Predictor.from_folder(tables / "run")
    features = model.loaded.features
    (lowest, _), (highest, _) = features.minimums, features.maximums  # of age, amount
    at_limit = rows.assign(age=repr(float(features.limits[1][0])))
    far = rows.assign(age="1e6")
    far.to_csv(tmp_path / "far.csv", index=False)
    assert model.predict(far.iloc[0].to_dict())["prob"] == pytest.approx(
        model.predict(at_limit.iloc[0].to_dict())["prob"], abs=1e-6
    )
    assert caplog.text.count("column 'age': 1 of 1 numbers lie outside") == 1
    monkeypatch.setattr(new_rows, "WINDOW", 10)
    line = (
        f"column 'age': 37 of 37 numbers lie outside the training range {lowest:g} to {highest:g} and were limited to "
    )
    found = predict(tables / "run", tmp_path / "far.csv", tmp_path / "far.tsv")
    margin = 0.1 * (highest - lowest)
    told = [text for text in capsys.readouterr().err.splitlines() if "outside the training" in text]
    assert told == [f"warning: input: {line}{lowest - margin:.12g} to {highest + margin:.12g}"]
    expected = model.predict(at_limit)
    np.testing.assert_allclose([float(row["prob"]) for row in found], expected["prob"], atol=1e-6)  # other batches
    assert len(set(expected["prob"])) > 10
    assert model.predict(far)["prob"].tolist() == expected["prob"].tolist()
    cells = [model.explain(frame.iloc[3].to_dict()) for frame in (far, at_limit)]
    assert cells[0] == cells[1]

    assert (
        cli.main(
            [
                "evaluate",
                str(tables / "run"),
                str(tmp_path / "far.csv"),
                "--output",
                str(tmp_path / "out"),
                "--num_threads",
                "1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().err.count(f"input: {line}") == 1
    [report] = (tmp_path / "out").glob("*/report.json")
    assert [text for text in json.loads(report.read_text())["warnings"] if line in text]


def test_the_check_counts_numbers_outside_in_validation_and_test_rows(tmp_path, capsys):
    settings = tiny.settings(tmp_path)
    for name in ("val", "test"):
        frame = read_csv(tmp_path / f"{name}.csv")
        frame["amount"] = ["1e9", "-1e9", *frame["amount"][2:]]
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert cli.main(["train", str(tmp_path / "config.json"), "--check"]) == 0
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "column 'amount'" in line and "outside the training range" in line
    ]
    assert [line.split(" numbers")[0] for line in lines] == [
        "warning: val: column 'amount': 2 of 23",
        "warning: test: column 'amount': 2 of 37",
    ]


def test_an_older_folder_limits_what_its_cache_knows_and_else_says_so(tables, tmp_path, caplog):
    """Predictions of the rows in range do not change with it."""
    tiny.without_manifest(shutil.copytree(tables / "run", tmp_path / "run"))
    shutil.copytree(tables / "cache", tmp_path / "run" / "cache")
    rows = read_csv(tables / "test.csv")
    expected = Predictor.from_folder(tables / "run").predict(rows)
    values = json.loads((tmp_path / "run" / "features.json").read_text())
    (tmp_path / "run" / "features.json").write_text(
        json.dumps({key: value for key, value in values.items() if key not in ("minimums", "maximums")})
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["cache_path"] = None
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    known = Predictor.from_folder(tmp_path / "run")
    assert list(known.loaded.features.minimums) == values["minimums"] and known.predict(rows).equals(expected)
    shutil.rmtree(tmp_path / "run" / "cache")
    unknown = Predictor.from_folder(tmp_path / "run")
    assert unknown.loaded.features.limits is None and unknown.predict(rows).equals(expected)
    caplog.clear()
    unknown.predict(rows.assign(age="1e6"))
    assert (
        "input: " not in caplog.text
        and "column 'age': 37 of 37 numbers lie more than 20 standard deviations from the training mean" in caplog.text
    )


def test_a_stored_threshold_of_every_row_is_the_same_everywhere(tables, tmp_path, capsys):
    """Predictions, figures, report, card and inspect say that all rows are class 1. A given threshold is 0 to 1."""
    run = tiny.without_manifest(shutil.copytree(tables / "run", tmp_path / "run"))
    record = json.loads((run / "thresholds.json").read_text())
    record["threshold"] = {
        "value": -1.0,
        "rule": "precision_at_recall=1.0",
        "precision": 0.5,
        "recall": 1.0,
        "f1": 0.6,
        "alerts_per_1000": 1000.0,
        "rows": 40,
        "reason": None,
    }
    (run / "thresholds.json").write_text(json.dumps(record))
    rows = predict(run, tables / "test.csv", tmp_path / "out.tsv")
    assert {row["pred"] for row in rows} == {"1"}
    assert (
        cli.main(
            ["evaluate", str(run), str(tables / "test.csv"), "--output", str(tmp_path / "out"), "--num_threads", "1"]
        )
        == 0
    )
    [folder] = (tmp_path / "out").iterdir()
    figures, report = (json.loads((folder / name).read_text()) for name in ("test_metrics.json", "report.json"))
    assert figures["test/recall"] == 1.0 and figures["threshold"] == report["threshold"]["value"] == -1.0
    assert "Every row counts as class" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", str(run)]) == 0
    assert (
        "Every row counts as `1`, also those with a probability of exactly 0, by the rule `precision_at_recall=1.0`"
        in capsys.readouterr().out
    )
    assert (
        cli.main(["predict", str(run), str(tables / "test.csv"), str(tmp_path / "out.tsv"), "--threshold", "-1"]) == 2
    )
