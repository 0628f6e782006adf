"""What a training takes from its tables, and the predictions of its model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from mmbert_core import cli
from mmbert_core.config import Config
from tests.predictor.tables import predict, read_csv, read_tsv, test_file_of, train_in, write_csv
from tests.support import tiny


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
    threads = {
        split.name: {int(name) // 3 for name in split.ids(range(len(split)))} for split in (data.train, data.val)
    }
    assert not threads["train"] & threads["val"]
    assert len(data.train) + len(data.val) == 64 and 8 <= len(data.val) <= 24
    learned_from = frame[frame["row_id"].isin(data.train.ids(range(len(data.train))))]
    for index, name in enumerate(("age", "amount")):  # fitted without the validation rows
        assert (
            data.features.medians[index]
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


def test_predictions_do_not_depend_on_threads_left_by_a_caller(tables, tmp_path):
    torch.set_num_threads(2)
    predict(tables / "run", tables / "test.csv", tmp_path / "out.tsv")
    assert torch.get_num_threads() == 1


def test_a_columns_only_step_is_not_split_into_more_micro_batches_than_it_needs(tmp_path):
    config = Config(**tiny.settings(tmp_path, text_name=(), batch_size=64, microbatches_per_step="auto", max_epochs=1))
    results = tiny.train(config)
    assert results.microbatches_per_step == 1


def test_more_processes_than_gpus_are_reported(monkeypatch, capsys):
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
