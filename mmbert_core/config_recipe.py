"""Recipes: values for many keys at once.

RECOMMENDED is that of every config file and command line that is not written for the original: measured to be better
than the original's settings on several data sets. The original's settings are the defaults in `config`.
"""

from collections.abc import Mapping
from typing import Any

from mmbert_core.config_metrics import RANKING_DEFAULTS
from mmbert_core.config_setting import Setting, in_words

ORIGINAL, RECOMMENDED = "original", "recommended"
# What `recipe: recommended` means for the keys that a config does not name.
RECOMMENDED_VALUES: dict[str, Any] = {
    "max_length": 512,
    "column_encoding": "piecewise_linear",
    "wide_columns": True,
    "min_category_count": 5,
    "max_epochs": 3,
    "head_first": "auto",
    "lr": "auto",
    "head_lr": "auto",
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "gradient_clip_val": 1.0,
    "blend": "auto",
    "val_check_interval": 0.5,
    "early_stop_metric": "val/log_loss_calibrated",
}
METRICS_OF_SEVERAL = ("auroc", "f1_macro", "accuracy")  # metric_choices for more than two classes
SAME_SUBJECT = {"schedule": "run_scheduler"}  # a key of a recipe -> an older key that says the same in another way


def with_recipe(
    named: Mapping[str, Any], *, is_original: bool, run_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`named`, the keys and values that the user has set, and those of their recipe for the others.

    `is_original`: whether the config was written for the original. `run_config`: that of a run to resume, whose values
    are used: the recipe may have been another one when it began.
    """
    recipe = named.get("recipe")
    if run_config is not None and recipe in (None, run_config.get("recipe")):
        recipe = run_config.get("recipe")
        values = run_config if recipe == RECOMMENDED else {}
    else:
        recipe = recipe or (None if is_original else RECOMMENDED)
        values = recommended_values(named) if recipe == RECOMMENDED else {}
    return {**_for_unnamed(values, named), **named, "recipe": recipe}


def recommended_values(named: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's value of each key; some depend on the task."""
    is_binary = named.get("is_binary", True)
    metrics = RANKING_DEFAULTS["metric_choices"] if is_binary else METRICS_OF_SEVERAL
    return {**RECOMMENDED_VALUES, "metric_choices": metrics}


def _for_unnamed(values: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys that the user has not named."""
    return {
        key: values[key]
        for key in (*RECOMMENDED_VALUES, "metric_choices")
        if key in values and key not in named and SAME_SUBJECT.get(key) not in named
    }


def defaults_in_words(name: str, setting: Setting) -> tuple[str, str]:
    """The default of a key in the recommended recipe and in the original's."""
    if name == "metric_choices":
        several = f"; more than two classes: {in_words(METRICS_OF_SEVERAL)}"
        return in_words(RANKING_DEFAULTS["metric_choices"]) + several, setting.default_in_words
    if name not in RECOMMENDED_VALUES:
        return setting.default_in_words, setting.default_in_words
    return in_words(RECOMMENDED_VALUES[name]), setting.default_in_words


def recipe_line(values: Mapping[str, Any]) -> str | None:
    """What a recipe has set, in one line for the start of a run; None for the original's settings."""
    if values["recipe"] != RECOMMENDED:
        return None
    chosen = ", ".join(f"{key} {in_words(value)}" for key, value in RECOMMENDED_VALUES.items() if values[key] == value)
    return f"recipe recommended: {chosen}; recipe: original gives the original's settings"
