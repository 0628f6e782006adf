"""From a table to a model folder to a prediction file, through the command line and `Predictor`."""

import csv
import gzip
import json
import os
import shutil
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.data import encoding
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.inference import new_rows
from mmbert_core.inference.new_rows import encode_chunk
from mmbert_core.predictor import Predictor
from mmbert_core.report import results
from mmbert_core.tables import table
from mmbert_core.tables.table import Roles, read_chunks
from mmbert_core.training.results import Results
from tests.support import tiny

COLUMNS = ["row_id", "text", "age", "amount", "kind", "label"]
ODD_IDS = [
    "007",
    "NA",
    "=1+1",
    "1e5",
    "a\tb",
    "two\nlines",
    "two\r\nlines",
    "\r",
    '"quoted"',
    'a"b',
    '"',
    "'",
    " spaces ",
    "",
    "-",
    "+1",
    "null",
    "ünïcödé",
    "日本",
    "x" * 300,
    "00001",
    "00001",
    "True",
    "1.0",
    "\\N",
    "#",
    ",",
]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures of a test have tests of their own and take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_plots", lambda *_, **__: [])
        yield


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """The folder of the tables and of the model `run`, trained on them with two classes."""
    folder = tmp_path_factory.mktemp("tables")
    tiny.train(Config(**tiny.settings(folder)))
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """The same with three classes."""
    folder = tmp_path_factory.mktemp("several")
    tiny.train(Config(**tiny.settings(folder, num_classes=3, max_epochs=1)))
    return folder


def predict(model: Path, source: Path | str, output: Path) -> list[dict[str, str]]:
    """Run the command; the output's rows."""
    assert cli.main(["predict", str(model), str(source), str(output), "--num_threads", "1"]) == 0
    return read_tsv(output)


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def write_csv(path: Path, rows: list[list[Any]], columns: list[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_file_of(folder: Path) -> Path:
    [found] = folder.glob("multimodal_bert-*/test_result_0.tsv")
    return found


test_file_of.__test__ = False


# ---- rows ----


def test_predictions_are_the_test_files_bytes(tables, several, tmp_path):
    for folder in (tables, several):
        predict(folder / "run", folder / "test.csv", tmp_path / "out.tsv")
        assert (tmp_path / "out.tsv").read_bytes() == test_file_of(folder / "run").read_bytes()


def test_a_stream_of_windows_keeps_order_ids_and_labels(tables, tmp_path, monkeypatch):
    whole = predict(tables / "run", tables / "test.csv", tmp_path / "whole.tsv")
    monkeypatch.setattr(new_rows, "WINDOW", 10)
    windows = predict(tables / "run", tables / "test.csv", tmp_path / "windows.tsv")
    assert [row["row_id"] for row in windows] == [f"{row:05d}" for row in range(37)]
    assert [row["label"] for row in windows] == read_csv(tables / "test.csv")["label"].tolist()
    np.testing.assert_allclose(
        [float(row["prob"]) for row in windows], [float(row["prob"]) for row in whole], atol=1e-6
    )


ROWS = {
    "one row": ["r", "refund now", "30", "1.5", "a", "1"],
    "unseen category": ["r", "refund now", "30", "1.5", "never seen", "1"],
    "missing category": ["r", "refund now", "30", "1.5", "", "1"],
    "missing number": ["r", "refund now", "", "1.5", "a", "1"],
    "missing number where training had none": ["r", "refund now", "30", "", "a", "1"],
    "words for missing": ["r", "refund now", "NA", "NaN", "a", "1"],
    "extreme numbers": ["r", "refund now", "1e-320", "-3.4e38", "a", "1"],
    "empty text": ["r", "", "30", "1.5", "a", "1"],
    "blank text": ["r", " \t\n ", "30", "1.5", "a", "1"],
    "only unknown tokens": ["r", "日本 😀 \u200b \u202e", "30", "1.5", "a", "1"],
    "special tokens": ["r", "[SEP] [PAD] [CLS] [MASK]", "30", "1.5", "a", "1"],
    "very long text": ["r", "refund " * 100_000, "30", "1.5", "a", "1"],
    "very long word": ["r", "x" * 1_000_000, "30", "1.5", "a", "1"],
    "all missing": ["r", "", "", "", "", ""],
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_alone_is_scored(tables, tmp_path, case):
    [row] = predict(tables / "run", write_csv(tmp_path / "one.csv", [ROWS[case]]), tmp_path / "out.tsv")
    assert list(row) == ["row_id", "prob", "label", "pred", "prob_calibrated"]
    assert 0 <= float(row["prob"]) <= 1 and row["pred"] == ("1" if float(row["prob"]) > 0.5 else "0")
    assert row["row_id"] == ROWS[case][0] and row["label"] == ROWS[case][-1]


def test_odd_rows_do_not_change_their_neighbours(tables, tmp_path):
    together = predict(tables / "run", write_csv(tmp_path / "all.csv", list(ROWS.values())), tmp_path / "all.tsv")
    for row, found in zip(ROWS.values(), together, strict=True):
        [alone] = predict(tables / "run", write_csv(tmp_path / "one.csv", [row]), tmp_path / "one.tsv")
        assert float(found["prob"]) == pytest.approx(float(alone["prob"]), abs=1e-6)


def test_labels_are_copied_and_never_needed(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    plain = predict(tables / "run", tables / "test.csv", tmp_path / "plain.tsv")
    strange = [["no class", "", "1.0", " 1", "0\t1"][row % 5] for row in range(len(frame))]
    frame.assign(label=strange).to_csv(tmp_path / "strange.csv", index=False)
    frame.drop(columns="label").to_csv(tmp_path / "none.csv", index=False)

    with_strange = predict(tables / "run", tmp_path / "strange.csv", tmp_path / "strange.tsv")
    assert [row["label"] for row in with_strange] == strange
    without = predict(tables / "run", tmp_path / "none.csv", tmp_path / "none.tsv")
    assert list(without[0]) == ["row_id", "prob", "pred", "prob_calibrated"]
    for name in ("row_id", "prob", "pred"):
        assert [row[name] for row in with_strange] == [row[name] for row in without] == [row[name] for row in plain]


def test_order_and_number_of_columns_do_not_matter(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    order = ["another one", "label", "kind", "amount", "extra", "age", "text", "row_id"]
    frame.assign(extra="x", **{"another one": "y"})[order].to_csv(tmp_path / "other.csv", index=False)
    predict(tables / "run", tmp_path / "other.csv", tmp_path / "other.tsv")
    assert (tmp_path / "other.tsv").read_bytes() == test_file_of(tables / "run").read_bytes()


def test_a_header_alone_gives_a_header_alone(tables, several, tmp_path):
    table = write_csv(tmp_path / "header.csv", [], COLUMNS[:-1])
    assert predict(tables / "run", table, tmp_path / "out.tsv") == []
    assert (tmp_path / "out.tsv").read_bytes() == b"row_id\tprob\tpred\tprob_calibrated\n"
    assert predict(several / "run", table, tmp_path / "out.tsv") == []
    assert (tmp_path / "out.tsv").read_bytes() == b"row_id\tprob_0\tprob_1\tprob_2\tpred\tprob_calibrated\n"


def test_ids_come_back_byte_for_byte(tables, tmp_path):
    rows = [[name, "refund", 1, 2, "a", name] for name in ODD_IDS]
    found = predict(tables / "run", write_csv(tmp_path / "ids.csv", rows), tmp_path / "out.tsv")
    assert [row["row_id"] for row in found] == ODD_IDS
    assert [row["label"] for row in found] == ODD_IDS  # copied as they are, too
    frame = pd.read_csv(tmp_path / "out.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert frame["row_id"].tolist() == ODD_IDS


def test_probabilities_read_back_to_the_models_float32(tables, several, tmp_path):
    for folder in (tables, several):
        rows = predict(folder / "run", folder / "test.csv", tmp_path / "out.tsv")
        scorer = Predictor.from_folder(folder / "run")
        [chunk] = read_chunks([str(folder / "test.csv")], Roles.from_config(scorer.loaded.config).inputs())
        computed = scorer.score(encode_chunk(scorer.loaded, chunk)).preds
        columns = [name for name in rows[0] if name.startswith("prob") and name != "prob_calibrated"]
        read = np.array([[np.float32(row[name]) for name in columns] for row in rows])
        assert computed.dtype == np.float32 and np.array_equal(read.reshape(computed.shape), computed)
        shortest = {str(value) for value in computed.ravel()}
        assert {row[name] for row in rows for name in columns} == shortest


def test_several_classes(several, tmp_path):
    rows = predict(several / "run", several / "test.csv", tmp_path / "out.tsv")
    names = ["prob_0", "prob_1", "prob_2"]
    assert list(rows[0]) == ["row_id", *names, "label", "pred", "prob_calibrated"]
    for row in rows:
        values = [float(row[name]) for name in names]
        assert sum(values) == pytest.approx(1, abs=1e-6)
        assert row["pred"] == str(int(np.argmax(values)))


def test_class_names_of_any_text(tables, tmp_path):
    names = sorted(["=1+1", 'a "b"\tc', "NA"])
    for part in ("train", "val"):
        frame = read_csv(tables / f"{part}.csv")
        frame.assign(label=[names[row % 3] for row in range(len(frame))]).to_csv(tmp_path / f"{part}.csv", index=False)
    paths = {f"{part}_path": (str(tmp_path / f"{part}.csv"),) for part in ("train", "val")} | {"test_path": ()}
    folder, _, _ = train_in(tables, tmp_path, is_binary=False, num_classes=3, max_train_rows=16, **paths)
    rows = predict(folder, tmp_path / "val.csv", tmp_path / "out.tsv")
    assert list(rows[0]) == ["row_id", *(f"prob_{name}" for name in names), "label", "pred", "prob_calibrated"]
    for position, row in enumerate(rows):
        assert row["label"] == names[position % 3]
        assert row["pred"] == max(names, key=lambda name: float(row[f"prob_{name}"]))


# ---- files ----


def test_all_formats_and_lists_of_files_give_the_same(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    typed = frame.assign(age=pd.to_numeric(frame["age"]), amount=pd.to_numeric(frame["amount"]))
    frame.to_csv(tmp_path / "all.tsv", sep="\t", index=False)
    frame.to_json(tmp_path / "all.jsonl", orient="records", lines=True)
    typed.to_json(tmp_path / "typed.jsonl", orient="records", lines=True)
    typed.to_parquet(tmp_path / "all.parquet", index=False)
    (tmp_path / "all.csv.gz").write_bytes(gzip.compress((tables / "test.csv").read_bytes()))
    (tmp_path / "mark.csv").write_bytes(b"\xef\xbb\xbf" + (tables / "test.csv").read_bytes().replace(b"\r\n", b"\n"))
    frame[:20].to_csv(tmp_path / "part-1.csv", index=False)
    frame[20:].to_csv(tmp_path / "part-2.csv", index=False)
    expected = test_file_of(tables / "run").read_bytes()
    for source in ("all.tsv", "all.jsonl", "typed.jsonl", "all.parquet", "all.csv.gz", "mark.csv", "part-*.csv"):
        predict(tables / "run", tmp_path / source, tmp_path / "out.txt")
        assert (tmp_path / "out.txt").read_bytes() == expected, source


def test_an_output_named_csv_is_csv_and_other_formats_are_refused(tables, tmp_path, capsys):
    source = write_csv(tmp_path / "ids.csv", [[name, "refund", 1, 2, "a", name] for name in ODD_IDS])
    expected = predict(tables / "run", source, tmp_path / "out.tsv")
    assert cli.main(["predict", str(tables / "run"), str(source), str(tmp_path / "out.CSV"), "--num_threads", "1"]) == 0
    frame = pd.read_csv(tmp_path / "out.CSV", dtype=str, keep_default_na=False)
    assert frame.to_dict("records") == expected and frame["row_id"].tolist() == ODD_IDS
    predict(tables / "run", source, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "out.tsv").read_bytes()
    for suffix in (".parquet", ".jsonl", ".json", ".xlsx", ".tsv.gz"):
        assert cli.main(["predict", str(tables / "run"), str(source), str(tmp_path / f"new{suffix}")]) == 2
        assert "expected an output that ends in .tsv or .csv" in capsys.readouterr().err and not list(
            tmp_path.glob("new*")
        )


def test_an_unquoted_tsv_is_scored_row_by_row(tables, tmp_path, capsys):
    cells = [
        [f"r{row}", text, "1", "2", "a"]
        for row, text in enumerate(["thanks ship", '"refund now', "late", 'pay outside"', "money"])
    ]
    (tmp_path / "new.tsv").write_text(
        "\n".join("\t".join(row[:1] + row[2:] + row[1:2]) for row in [COLUMNS[:5], *cells]) + "\n"
    )
    words = ["predict", str(tables / "run"), str(tmp_path / "new.tsv"), str(tmp_path / "out.tsv"), "--num_threads", "1"]
    assert (
        cli.main(words) == 2
        and "row 2 (line 3): a quote opens a cell" in capsys.readouterr().err
        and not (tmp_path / "out.tsv").exists()
    )
    assert cli.main([*words, "--tsv_quoting", "none"]) == 0
    expected = predict(tables / "run", write_csv(tmp_path / "new.csv", cells, COLUMNS[:5]), tmp_path / "same.tsv")
    assert read_tsv(tmp_path / "out.tsv") == expected and len(expected) == 5
    folder, _, data = train_in(
        tables,
        tmp_path,
        train_path=(str(unquoted(tmp_path / "train.tsv")),),
        val_path=(),
        test_path=(),
        val_fraction=0.0,
        tsv_quoting="none",
    )
    assert (
        len(data.train) == 24 and cli.main(["predict", str(folder), *words[2:]]) == 0
    )  # the model reads as it was trained
    assert len(read_tsv(tmp_path / "out.tsv")) == 5


def unquoted(path: Path) -> Path:
    rows = [
        COLUMNS,
        *([f"r{row}", ['"broken', "fine", 'item"'][row % 3], str(row), "2", "a", str(row % 2)] for row in range(24)),
    ]
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_a_folder_of_parquet_files_is_scored_as_one_file(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    (tmp_path / "parts").mkdir()
    for part in range(3):
        frame[part * 13 : part * 13 + 13].to_parquet(tmp_path / f"parts/part-{part}.parquet", index=False)
    (tmp_path / "parts/_SUCCESS").touch()
    predict(tables / "run", tmp_path / "parts", tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == test_file_of(tables / "run").read_bytes()


def test_windows_of_long_texts_score_what_whole_windows_do(tables, tmp_path, monkeypatch):
    """Memory bounds where reading pauses, not which rows are scored together."""
    frame = read_csv(tables / "test.csv")
    frame.assign(text=frame["text"] + " refund" * 900, row_id=frame["row_id"] + "x" * 50).to_csv(
        tmp_path / "long.csv", index=False
    )
    predict(tables / "run", tmp_path / "long.csv", tmp_path / "whole.tsv")
    monkeypatch.setattr(table, "MAX_CHUNK_CHARACTERS", 5000)
    predict(tables / "run", tmp_path / "long.csv", tmp_path / "short.tsv")
    assert (tmp_path / "short.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    monkeypatch.setattr(encoding, "MAX_WINDOW_CHARACTERS", 300)  # windows that end early for their ids
    rows = predict(tables / "run", tmp_path / "long.csv", tmp_path / "short.tsv")
    whole = read_tsv(tmp_path / "whole.tsv")
    assert [row["row_id"] for row in rows] == [row["row_id"] for row in whole]
    np.testing.assert_allclose([float(row["prob"]) for row in rows], [float(row["prob"]) for row in whole], atol=1e-6)


def test_the_folder_alone_is_enough(tables, tmp_path, monkeypatch):
    """No training data, no pretrained encoder, no network; and scoring writes nothing into the folder."""
    expected = test_file_of(tables / "run").read_bytes()
    home = tmp_path / "home"
    home.mkdir()
    for name in ("config.json", "features.json", "labels.json", "model.safetensors"):
        shutil.copy(tables / "run" / name, home / name)
    shutil.copytree(tables / "run/encoder", home / "encoder")
    shutil.copy(tables / "test.csv", tmp_path / "new.csv")
    before = sorted(home.rglob("*"))
    away = tables.with_name("away")
    os.rename(tables, away)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network connection"))
    try:
        predict(home, tmp_path / "new.csv", tmp_path / "out.tsv")
    finally:
        os.rename(away, tables)
    assert (tmp_path / "out.tsv").read_bytes() == expected
    assert sorted(home.rglob("*")) == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "home",
        "new.csv",
        "out.tsv",
    ]
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".pickle") for path in before)


def test_an_older_output_is_replaced_whole(tables, tmp_path):
    (tmp_path / "out.tsv").write_text("old\n" * 1000)
    assert len(predict(tables / "run", tables / "test.csv", tmp_path / "out.tsv")) == 37
    assert [path.name for path in tmp_path.iterdir()] == ["out.tsv"]


# ---- cells that mean the same ----


def same_cells(num_rows: int, seed: int) -> pd.DataFrame:
    """Booleans, whole numbers, dates and letters that formats and frames write in different ways; the label follows them."""
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


# ---- what training learns from ----


def train_in(tables: Path, tmp_path: Path, **changes: Any) -> tuple[Path, Results, Data]:
    """One epoch on the tables of `tables` into `tmp_path`; the folder, the results and the prepared data."""
    folder = tmp_path / changes.pop("name", "run")
    paths = {"model_path": str(folder), "cache_path": str(tmp_path / "cache")}
    config = Config(**tiny.settings(tables, max_epochs=1, **paths, **changes))
    return folder, tiny.train(config), prepare(config)


def test_test_rows_change_nothing_that_is_fitted(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    frame.assign(age="1e9", amount="-5", kind="unheard of", text="zzz " + frame["text"]).drop(columns="label").to_csv(
        tmp_path / "strange.csv", index=False
    )
    folders = [
        train_in(tables, tmp_path, name=name, test_path=(str(path),), max_train_rows=50)[0]
        for name, path in (("plain", tables / "test.csv"), ("strange", tmp_path / "strange.csv"))
    ]
    for name in ("model.safetensors", "features.json", "labels.json", "encoder/tokenizer.json", "encoder/config.json"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, name
    assert test_file_of(folders[0]).read_bytes() != test_file_of(folders[1]).read_bytes()
    assert list(read_tsv(test_file_of(folders[1]))[0]) == ["row_id", "prob", "pred", "prob_calibrated"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tab_field_list": (), "cat_field_list": ()}, id="text only"),
        pytest.param({"text_name": ()}, id="columns only"),
        pytest.param({"text_name": (), "tab_field_list": ()}, id="categories only"),
        pytest.param({"text_name": ("kind", "text"), "cat_field_list": ()}, id="two text columns"),
        pytest.param({"max_length": 12, "max_chunks": 3}, id="chunks"),
        pytest.param({"id_name": None, "positive_label": "0"}, id="no ids, other positive label"),
        pytest.param({"pooling": "mean", "val_path": (), "val_fraction": 0.0}, id="no validation"),
    ],
)
def test_other_shapes_of_a_model(tables, tmp_path, changes):
    folder, results, data = train_in(tables, tmp_path, **changes)
    assert results.steps == 8
    rows = predict(folder, tables / "test.csv", tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == test_file_of(folder).read_bytes()
    assert len(rows) == 37 and len({row["prob"] for row in rows}) > 1
    if "positive_label" in changes:
        assert data.labels.names == ("1", "0") and json.loads((folder / "labels.json").read_text()) == {
            "names": ["1", "0"]
        }
        assert list(rows[0]) == ["prob", "label", "pred", "prob_calibrated"]
        assert all(row["pred"] == ("0" if float(row["prob"]) > 0.5 else "1") for row in rows)
    if "max_chunks" in changes:
        assert {
            batch.input_ids.shape[1]
            for batch in (data.test.batch([row]) for row in range(37))
            if batch.input_ids.ndim == 3
        } >= {2, 3}
    assert (folder / "encoder").exists() == (changes.get("text_name") != ())


def test_training_from_other_formats_gives_the_same_model(tables, tmp_path):
    frames = {name: read_csv(tables / f"{name}.csv") for name in ("train", "val", "test")}
    same, _, _ = train_in(tables, tmp_path, name="csv", max_train_rows=24)
    for kind in ("jsonl", "tsv", "parquet", "csv.gz"):
        for name, frame in frames.items():
            path = tmp_path / f"{name}.{kind}"
            if kind == "jsonl":
                frame.to_json(path, orient="records", lines=True)
            elif kind == "parquet":
                frame.assign(age=pd.to_numeric(frame["age"]), label=frame["label"].astype(int)).to_parquet(
                    path, index=False
                )
            else:
                frame.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
        paths = {f"{name}_path": (str(tmp_path / f"{name}.{kind}"),) for name in frames}
        folder, _, _ = train_in(tables, tmp_path, name=kind, max_train_rows=24, **paths)
        for name in ("features.json", "labels.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (same / name).read_bytes(), f"{kind}: {name}"
        assert test_file_of(folder).read_bytes() == test_file_of(same).read_bytes(), kind


def test_a_share_of_the_training_rows_validates_group_by_group(tables, tmp_path):
    frame = read_csv(tables / "train.csv")
    frame.assign(thread=[f"t{row // 3}" for row in range(len(frame))]).to_csv(tmp_path / "train.csv", index=False)
    _, _, data = train_in(
        tables, tmp_path, train_path=(str(tmp_path / "train.csv"),), val_path=(), val_fraction=0.25, group_name="thread"
    )
    threads = {part.name: {int(name) // 3 for name in part.ids(range(len(part)))} for part in (data.train, data.val)}
    assert not threads["train"] & threads["val"]
    assert len(data.train) + len(data.val) == 64 and 8 <= len(data.val) <= 24
    learned_from = frame[frame["row_id"].isin(data.train.ids(range(len(data.train))))]
    for place, name in enumerate(("age", "amount")):  # fitted without the validation rows
        assert (
            data.features.medians[place]
            == pd.to_numeric(learned_from[name]).median()
            != pd.to_numeric(frame[name]).median()
        )


def test_balanced_weights_are_those_weights(tables, tmp_path):
    counts = np.bincount(read_csv(tables / "train.csv")["label"].astype(int))
    weights = tuple(float(weight) for weight in 64 / (2 * counts))
    folders = [
        train_in(tables, tmp_path, name=str(index), class_weights=given)[0]
        for index, given in enumerate(("balanced", weights, None))
    ]
    models = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert models[0] == models[1] != models[2]


def test_a_test_file_without_rows(several, tables, tmp_path):
    table = write_csv(tmp_path / "header.csv", [])
    for source, num_classes in ((tables, 2), (several, 3)):
        changes = {
            "num_classes": num_classes,
            "is_binary": num_classes == 2,
            "max_train_rows": 24,
            "test_path": (str(table),),
        }
        folder, results, _ = train_in(source, tmp_path, name=str(num_classes), **changes)
        assert read_tsv(test_file_of(folder)) == []
        assert results.test_metrics["test/num_rows"] == 0 and results.test_metrics["test/accuracy"] is None


def test_one_class_in_validation(tables, tmp_path):
    frame = read_csv(tables / "val.csv")
    frame[frame["label"] == "0"].to_csv(tmp_path / "val.csv", index=False)
    folder, results, _ = train_in(
        tables, tmp_path, val_path=(str(tmp_path / "val.csv"),), early_stop_metric="val/auroc", max_train_rows=24
    )
    assert results.best_metric == "val_loss"
    [line] = [line for line in tiny.metrics_lines(folder) if "val_loss" in line]
    assert line["val/auroc"] is None and line["val/accuracy"] is not None


def test_a_frame_is_scored_as_its_file(several, tmp_path):
    """`Predictor.predict` of rows in memory, whatever their index, equals the command's file."""
    frame = read_csv(several / "test.csv")
    frame.index = frame.index[::-1] * 2
    torch.set_num_threads(1)  # as the run had
    predicted = Predictor.from_folder(several / "run").predict(frame)
    written = pd.read_csv(test_file_of(several / "run"), sep="\t", dtype=str, keep_default_na=False)
    assert predicted.index.tolist() == frame.index.tolist() and predicted.columns.tolist() == written.columns.tolist()
    assert predicted.astype(str).to_numpy().tolist() == written.to_numpy().tolist()


def test_rows_as_dicts_are_scored_as_the_frame(several, tmp_path):
    frame = read_csv(several / "test.csv")
    predictor = Predictor.from_folder(several / "run")
    records = frame.to_dict("records")
    predicted = predictor.predict(frame)
    assert predictor.predict(records) == predicted.astype(object).to_dict("records")
    assert predictor.predict([]) == []
    one = predictor.predict(records[3])
    assert {key: one[key] for key in ("row_id", "label", "pred")} == {
        key: predicted[key].iloc[3] for key in ("row_id", "label", "pred")
    }
    assert all(
        one[key] == pytest.approx(value, abs=1e-6) for key, value in predicted.iloc[3].items() if key.startswith("prob")
    )
    bare = predictor.predict({key: value for key, value in records[3].items() if key not in ("label", "row_id")})
    assert bare == {key: value for key, value in one.items() if key not in ("label", "row_id")}
    assert list(predictor.predict(frame.drop(columns="row_id"))) == [name for name in predicted if name != "row_id"]


def test_predictions_do_not_depend_on_threads_left_by_a_caller(tables, tmp_path):
    torch.set_num_threads(2)
    predict(tables / "run", tables / "test.csv", tmp_path / "out.tsv")
    assert torch.get_num_threads() == 1


def test_a_columns_only_step_is_not_cut_into_more_micro_batches_than_it_needs(tmp_path):
    config = Config(**tiny.settings(tmp_path, text_name=(), batch_size=64, microbatches_per_step="auto", max_epochs=1))
    results = tiny.train(config)
    assert results.microbatches_per_step == 1


def test_more_processes_than_gpus_are_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["inspect", "no folder"]) == 2
    assert "2 processes for 1 GPUs: all compute on the CPU" in capsys.readouterr().err


# ---- numbers outside the training range ----


def test_a_number_far_outside_is_limited_and_counted_everywhere(tables, tmp_path, capsys, caplog, monkeypatch):
    """A cell of 1e6 has the probability of one at the limit: in a file, in several windows, in dicts, in an explanation, in a report."""
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


# ---- the threshold of every row ----


def test_a_stored_threshold_of_every_row_is_the_same_everywhere(tables, tmp_path, capsys):
    """Predictions, figures, report, card and inspect: all rows are class 1, in words. It cannot be asked for: a given one is 0 to 1."""
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
