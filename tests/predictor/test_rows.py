"""Rows of a prediction file and in memory: order, ids, labels, probabilities."""

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core.inference import new_rows
from mmbert_core.inference.new_rows import encode_chunk
from mmbert_core.predictor import Predictor
from mmbert_core.tables.table import Roles, read_chunks
from tests.predictor.tables import COLUMNS, ODD_IDS, predict, read_csv, test_file_of, train_in, write_csv


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
    for split in ("train", "val"):
        frame = read_csv(tables / f"{split}.csv")
        frame.assign(label=[names[row % 3] for row in range(len(frame))]).to_csv(tmp_path / f"{split}.csv", index=False)
    paths = {f"{split}_path": (str(tmp_path / f"{split}.csv"),) for split in ("train", "val")} | {"test_path": ()}
    folder, _, _ = train_in(tables, tmp_path, is_binary=False, num_classes=3, max_train_rows=16, **paths)
    rows = predict(folder, tmp_path / "val.csv", tmp_path / "out.tsv")
    assert list(rows[0]) == ["row_id", *(f"prob_{name}" for name in names), "label", "pred", "prob_calibrated"]
    for position, row in enumerate(rows):
        assert row["label"] == names[position % 3]
        assert row["pred"] == max(names, key=lambda name: float(row[f"prob_{name}"]))


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
