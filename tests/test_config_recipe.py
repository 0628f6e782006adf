"""Which keys a recipe sets, and for which configs."""

import json

import pytest

from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_metrics import RANKING_DEFAULTS
from mmbert_core.config_reader import config_from_dict, read_config
from mmbert_core.config_recipe import METRICS_OF_SEVERAL, RECOMMENDED, RECOMMENDED_VALUES, recipe_line
from mmbert_core.runtime.errors import InputError
from tests.support.configs import REQUIRED, write

YAML = "text_name: text\nlabel_name: label\nmodel_path: runs/x\n"
ORIGINAL_CONFIG = Config(text_name=("text",), label_name="label", model_path="runs/x")


def recommended(config: Config) -> dict:
    """The keys of the recipe with the values that it gives them."""
    return {key: getattr(config, key) for key in RECOMMENDED_VALUES if getattr(config, key) == RECOMMENDED_VALUES[key]}


def test_the_recipe_is_a_table_of_keys_that_it_changes():
    assert set(RECOMMENDED_VALUES) <= set(SETTINGS)
    assert all(SETTINGS[key].default != value for key, value in RECOMMENDED_VALUES.items())
    config = read_config(None, {**REQUIRED, "recipe": "recommended"})
    assert recommended(config) == RECOMMENDED_VALUES
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_original_s_settings_have_a_name(tmp_path):
    for config in (
        read_config(None, {**REQUIRED, "recipe": "original"}),
        read_config(write(tmp_path, YAML + "recipe: original\n")),
    ):
        assert config.to_dict() == {**ORIGINAL_CONFIG.to_dict(), "recipe": "original"}
        assert recipe_line(config.to_dict()) is None


@pytest.mark.parametrize(
    ("named", "choices", "metric"),
    [
        ({}, RANKING_DEFAULTS["metric_choices"], "val/log_loss_calibrated"),
        ({"is_binary": False, "num_classes": 3}, METRICS_OF_SEVERAL, "val/log_loss_calibrated"),
        ({"metric_choices": ("mcc",)}, ("mcc",), "val/log_loss_calibrated"),
        ({"early_stop_metric": "val/mcc"}, RANKING_DEFAULTS["metric_choices"], "val/mcc"),
    ],
)
def test_metrics_of_the_recipe(named, choices, metric):
    config = read_config(None, {**REQUIRED, **named})
    assert (config.metric_choices, config.early_stop_metric) == (choices, metric)


def test_what_the_user_names_stays_and_what_they_take_back_is_the_recipe_s(tmp_path):
    path = write(tmp_path, YAML + "lr: 3e-5\nhead_lr: none\nfusion: tabm\ngradient_clip_val: 5\n")
    config = read_config(path, {"gradient_clip_val": None})
    assert (config.lr, config.head_lr, config.fusion) == (3e-5, None, "tabm")
    assert config.gradient_clip_val == RECOMMENDED_VALUES["gradient_clip_val"]
    line = recipe_line(config.to_dict())
    assert line.startswith("recipe recommended: ") and "gradient_clip_val 1.0" in line and "\n" not in line
    assert " lr " not in line and "head_lr" not in line


def test_a_recipe_that_would_set_nothing_is_refused():
    with pytest.raises(InputError, match=r"expected read_config\(None, \{...\}\) for the recommended recipe"):
        Config(text_name=("text",), label_name="label", model_path="runs/x", recipe="recommended")


def test_a_recipe_does_not_contradict_an_older_key(monkeypatch):
    monkeypatch.setitem(RECOMMENDED_VALUES, "schedule", "cosine")
    assert read_config(None, REQUIRED).schedule == "cosine"
    config = read_config(None, {**REQUIRED, "run_scheduler": False})
    assert (config.schedule, config.run_scheduler) == (None, False)


@pytest.mark.parametrize(
    ("name", "more", "flags", "expected"),
    [
        ("run.yaml", "", {}, True),
        ("run.yaml", "lr: 1e-4\n", {}, True),
        ("run.yaml", "ema_decay: 0.99\n", {}, True),
        ("run.yaml", "", {"seed": "1"}, True),
        ("run.yaml", "recipe: original\n", {}, False),
        ("run.yaml", "", {"recipe": "original"}, False),
        ("run.yaml", "tokenizer: bert-base-cased\n", {}, False),
        ("run.yaml", "full_field_list: [a]\n", {}, False),
        ("run.json", "", {}, False),
        ("run.json", "", {"recipe": "recommended"}, True),
        (None, "", {}, True),
    ],
)
def test_the_recipe_is_for_all_but_configs_of_the_original(tmp_path, name, more, flags, expected):
    content = json.dumps(REQUIRED) if name == "run.json" else YAML + more
    path = None if name is None else write(tmp_path, content, name)
    config = read_config(path, {**(REQUIRED if name is None else {}), **flags})
    assert (config.recipe == RECOMMENDED) == expected
    assert (config.head_lr == "auto") == expected
