"""Configs of the original module, and the metric that chooses the best step, whose default differs from theirs."""

import json
from dataclasses import replace

import pytest

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict, read_config
from mmbert_core.config_recipe import RECOMMENDED_VALUES
from tests.support import tiny
from tests.support.configs import REQUIRED, write

# what the original's training script writes, with the defaults of the original
ORIGINAL = {
    "text_name": ["text"],
    "label_name": "label",
    "id_name": "row_id",
    "tab_field_list": ["age", "amount"],
    "full_field_list": ["row_id", "text", "age", "amount", "label"],
    "need_language_detect": True,
    "is_binary": True,
    "num_classes": 2,
    "metric_choices": ["accuracy", "f1_score"],
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-08,
    "lr": 2e-05,
    "run_scheduler": True,
    "class_weights": None,
    "hidden_common_dim": 100,
    "tokenizer": "bert-base-cased",
    "reinit_pooler": False,
    "reinit_layers": 0,
    "max_epochs": 10,
    "early_stop_patience": 10,
    "early_stop_metric": "val/f1_score",
    "val_check_interval": 1.0,
    "gradient_clip_val": 0.0,
    "fp16": False,
    "model_path": "runs/x",
}


def test_defaults_are_the_originals():
    plain = config_from_dict(REQUIRED)
    renamed = {"tokenizer": "encoder"}
    for key, value in ORIGINAL.items():
        if key not in (
            *REQUIRED,
            "id_name",
            "tab_field_list",
            "full_field_list",
            "need_language_detect",
            "fp16",
            "metric_choices",
            "early_stop_metric",
        ):
            assert plain.to_dict()[renamed.get(key, key)] == value, key
    assert plain.id_name is None and plain.tab_field_list == () and plain.precision == "auto"


def test_a_json_file_of_the_original_loads_with_one_warning(tmp_path, caplog):
    path = write(
        tmp_path, json.dumps({**ORIGINAL, "train_path": "train.csv", "test_path": ["a.csv", "b.csv"]}), "original.json"
    )
    config = read_config(path)
    assert config == config_from_dict(
        {
            **REQUIRED,
            "id_name": "row_id",
            "tab_field_list": ["age", "amount"],
            "train_path": ["train.csv"],
            "test_path": ["a.csv", "b.csv"],
            "precision": "fp32",  # its fp16 is false
            "metric_choices": ["accuracy", "f1_score"],
            "early_stop_metric": "val/f1_score",
        }
    )
    [warning] = caplog.records
    assert warning.levelname == "WARNING"
    assert "full_field_list and need_language_detect have no use here and are ignored" in warning.getMessage()


def test_a_json_file_of_the_original_passes_the_check(tmp_path, capsys):
    data = {
        key: value for key, value in tiny.settings(tmp_path).items() if key.endswith("_path") and key != "model_path"
    }
    original = {**ORIGINAL, **data, "tokenizer": str(tmp_path / "encoder"), "model_path": str(tmp_path / "run")}
    path = write(tmp_path, json.dumps(original), "original.json")
    assert cli.main(["train", path, "--max_length", "32", "--check"]) == 0
    assert capsys.readouterr().err.count("need_language_detect") == 1


@pytest.mark.parametrize(("fp16", "precision"), [(True, "fp16"), ("true", "fp16"), (False, "fp32"), (None, "auto")])
def test_fp16_is_a_precision(fp16, precision):
    assert config_from_dict({**REQUIRED, "fp16": fp16}).precision == precision


# ---- the metric that chooses the best step ----

RECOMMENDED_METRIC = RECOMMENDED_VALUES["early_stop_metric"]
RANKING = ("val/auroc", ("auroc", "average_precision", "f1_score", "accuracy"))
F1 = ("val/f1_score", ("accuracy", "f1_score"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RANKING),
        ({"metric_choices": None, "early_stop_metric": None}, RANKING),
        ({"metric_choices": ["mcc"]}, ("val/f1_score", ("mcc",))),
        ({"metric_choices": []}, ("val/f1_score", ())),
        ({"early_stop_metric": "val_loss"}, ("val_loss", ("accuracy", "f1_score"))),
        ({"is_binary": False, "num_classes": 3}, F1),
        ({"is_binary": False}, F1),
        *(
            ({key: value}, F1)
            for key, value in (
                ("tokenizer", "a"),
                ("fp16", False),
                ("fp16", None),
                ("full_field_list", ["a"]),
                ("need_language_detect", True),
            )
        ),
        ({"tokenizer": "a", "metric_choices": ["auroc"]}, ("val/f1_score", ("auroc",))),
    ],
)
def test_two_classes_default_to_a_ranking_metric_but_in_configs_of_the_original(tmp_path, changes, expected):
    for config in (
        config_from_dict({**REQUIRED, **changes}),
        read_config(write(tmp_path, json.dumps({**REQUIRED, **changes}), "run.json")),
    ):
        assert (config.early_stop_metric, config.metric_choices) == expected
        stored = config.to_dict()  # what was used, so that a model folder reads back the same
        assert (stored["early_stop_metric"], tuple(stored["metric_choices"])) == expected
        assert config_from_dict(stored) == config


def test_a_config_in_python_has_the_same_default():
    config = Config(text_name=("text",), label_name="label", model_path="x")
    assert (config.early_stop_metric, config.metric_choices) == RANKING
    assert (replace(config, seed=1).early_stop_metric, replace(config, is_binary=False).early_stop_metric) == (
        "val/auroc",
        "val/auroc",
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "val/f1_score"),
        ({"resume": "never"}, RECOMMENDED_METRIC),
        ({"early_stop_metric": "val/mcc"}, "val/mcc"),
        ({"metric_choices": ["auroc"]}, "val/f1_score"),
    ],
)
def test_a_run_that_began_with_other_defaults_continues_with_them(tmp_path, changes, expected):
    values = {**REQUIRED, "model_path": str(tmp_path / "run"), **changes}
    (tmp_path / "run").mkdir()
    write(
        tmp_path / "run",
        json.dumps({"config": {"metric_choices": ["accuracy", "f1_score"], "early_stop_metric": "val/f1_score"}}),
        "config.json",
    )
    of_a_new_run = changes.get("early_stop_metric", RECOMMENDED_METRIC)
    assert read_config(None, {**values, "resume": "auto"}).early_stop_metric == of_a_new_run  # no checkpoint
    (tmp_path / "run" / "checkpoints").mkdir()
    assert read_config(None, values).early_stop_metric == expected
    write(tmp_path / "run", "[]", "config.json")
    assert read_config(None, {**REQUIRED, "model_path": str(tmp_path / "run")}).early_stop_metric == RECOMMENDED_METRIC


def test_a_flag_of_the_originals_says_nothing_of_the_file(tmp_path, caplog):
    path = write(tmp_path, json.dumps(REQUIRED), "run.json")
    assert read_config(path, {"tokenizer": "a"}).early_stop_metric == "val/auroc"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "highest val/auroc"),
        ({"early_stop_metric": "val_loss"}, "lowest val_loss"),
        ({"metric_choices": ["mcc"]}, "highest val/f1_score"),
    ],
)
def test_what_chooses_the_best_step_is_said_in_one_line(tmp_path, capsys, changes, words):
    path = write(tmp_path, json.dumps(tiny.settings(tmp_path) | changes), "run.json")
    assert cli.main(["train", path, "--check"]) == 0
    assert (
        capsys.readouterr().err.count(f"best step: the {words} (early_stop_metric); ties: the lowest val_loss\n") == 1
    )
