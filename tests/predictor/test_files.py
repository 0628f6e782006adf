"""Formats of input and output, windows of a file, and what is needed of a model folder."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmbert_core import cli
from mmbert_core.data import encoding
from mmbert_core.tables import table
from tests.predictor.tables import COLUMNS, ODD_IDS, predict, read_csv, read_tsv, test_file_of, train_in, write_csv


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


def test_a_folder_of_parquet_files_is_predicted_as_one_file(tables, tmp_path):
    frame = read_csv(tables / "test.csv")
    (tmp_path / "parts").mkdir()
    for number in range(3):
        frame[number * 13 : number * 13 + 13].to_parquet(tmp_path / f"parts/part-{number}.parquet", index=False)
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
