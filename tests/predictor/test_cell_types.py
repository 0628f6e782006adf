"""Equal cells of any format and type give equal predictions."""

import json
import unicodedata
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core import cli
from mmbert_core.predictor import Predictor
from tests.predictor.tables import predict, train_in


def same_cells(num_rows: int, seed: int) -> pd.DataFrame:
    """Booleans, integers, dates and letters that formats and frames write in different ways; the label follows them."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"row_id": np.arange(num_rows), "vip": rng.random(num_rows) < 0.5, "zone": rng.integers(1, 5, num_rows)}
    )
    frame["day"] = pd.Timestamp("2026-01-31") + pd.to_timedelta(rng.integers(0, 3, num_rows), unit="D")
    frame["city"] = rng.choice(["Zürich", "Genève"], num_rows)
    frame["flag"] = rng.random(num_rows) < 0.5
    return frame.assign(
        label=(frame["vip"].astype(int) * 2 + frame["zone"] + (frame["city"] == "Zürich") > 4).astype(int)
    )


@pytest.fixture(scope="module")
def alike(tmp_path_factory) -> Path:
    """A columns-only model trained on a CSV of such cells; new rows in `frame.csv`."""
    folder = tmp_path_factory.mktemp("alike")
    same_cells(64, 0).to_csv(folder / "alike.csv", index=False)
    same_cells(24, 1).to_csv(folder / "frame.csv", index=False)
    changes = {
        "text_name": (),
        "tab_field_list": ("flag",),
        "cat_field_list": ("vip", "zone", "day", "city"),
        "val_path": (),
        "test_path": (),
    }
    train_in(folder, folder, train_path=(str(folder / "alike.csv"),), val_fraction=0.0, **changes)
    return folder


def test_every_format_and_type_of_frame_gives_the_csvs_answers(alike, tmp_path, capsys):
    torch.set_num_threads(1)  # as the command has
    frame = same_cells(24, 1)
    expected = [
        (row["prob"], row["pred"], row["prob_calibrated"])
        for row in predict(alike / "run", alike / "frame.csv", tmp_path / "out.tsv")
    ]
    typed = frame.assign(
        label=frame["label"].astype(float),
        zone=frame["zone"].astype(float),
        city=[unicodedata.normalize("NFD", name) for name in frame["city"]],
    )
    typed.to_parquet(tmp_path / "typed.parquet", index=False)
    typed.assign(day=typed["day"].astype(str)).to_json(tmp_path / "typed.jsonl", orient="records", lines=True)
    typed.to_csv(tmp_path / "typed.csv", index=False)
    for name in ("typed.parquet", "typed.jsonl", "typed.csv"):
        rows = predict(alike / "run", tmp_path / name, tmp_path / "out.tsv")
        assert [(row["prob"], row["pred"], row["prob_calibrated"]) for row in rows] == expected, name
    predictor = Predictor.from_folder(alike / "run")
    kinds = {
        "as read": frame,
        "typed": typed,
        "nullable": frame.convert_dtypes(),
        "objects": frame.astype(object),
        "categories": frame.astype("category"),
        "decimals": frame.assign(zone=[Decimal(int(zone)) for zone in frame["zone"]]),
        "numpy": frame.assign(vip=frame["vip"].to_numpy().astype("O")),
        "texts": pd.read_csv(alike / "frame.csv", dtype=str, keep_default_na=False),
    }
    for name, rows in kinds.items():
        found = predictor.predict(rows)
        assert (
            list(map(tuple, found[["prob", "pred", "prob_calibrated"]].astype(str).to_numpy().tolist())) == expected
        ), name
    found = predictor.predict(typed.to_dict("records"))
    assert [(str(np.float32(row["prob"])), row["pred"]) for row in found] == [row[:2] for row in expected]
    assert "no training row has" not in capsys.readouterr().err


def test_missing_values_of_every_type_are_missing(alike, caplog):
    predictor, row = Predictor.from_folder(alike / "run"), same_cells(1, 1).astype(object).to_dict("records")[0]
    empty = predictor.predict({**row, "vip": "", "flag": ""})
    for missing in (
        None,
        float("nan"),
        np.float32("nan"),
        Decimal("NaN"),
        pd.NaT,
        pd.NA,
        np.datetime64("NaT"),
        np.timedelta64("NaT"),
    ):
        assert predictor.predict({**row, "vip": missing, "flag": missing}) == empty
        frame = predictor.predict(
            pd.DataFrame(
                {
                    name: pd.Series([value], dtype=object)
                    for name, value in {**row, "vip": missing, "flag": missing}.items()
                }
            )
        )
        assert frame["prob"].tolist() == [np.float32(empty["prob"])]
    assert not caplog.records


def test_a_column_of_unseen_values_is_a_loud_warning_with_examples(alike, tmp_path, capsys):
    frame = same_cells(24, 1).assign(zone=lambda rows: rows["zone"] + 0.5)
    frame.to_csv(tmp_path / "new.csv", index=False)
    expected = "24 of 24 cells of column 'zone' hold a value that no training row has, such as "
    examples = ", ".join(f"'{zone}'" for zone in dict.fromkeys(frame["zone"]))
    predict(alike / "run", tmp_path / "new.csv", tmp_path / "out.tsv")
    said = capsys.readouterr().err
    assert (
        f"warning: input: {expected}" in said
        and "; training rows have '1', '2', '3', ..." in said
        and examples[:12] in said
    )
    assert (
        cli.main(
            ["evaluate", str(alike / "run"), str(tmp_path / "new.csv"), "--output", str(tmp_path), "--num_threads", "1"]
        )
        == 0
    )
    assert f"warning: input: {expected}" in capsys.readouterr().err
    [report] = tmp_path.glob("*/report.json")
    assert any(expected in line for line in json.loads(report.read_text())["warnings"])
