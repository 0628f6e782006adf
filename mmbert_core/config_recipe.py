"""Recipes: values for many keys at once, which a config takes by one name.

The original's settings are the defaults in `config`; RECOMMENDED has been measured to be better on several data sets.
"""

from collections.abc import Mapping
from typing import Any

ORIGINAL, RECOMMENDED = "original", "recommended"
# The recipe of a config that names neither a recipe nor any of NEW_KEYS, unless it was written for the original.
DEFAULT_RECIPE = ORIGINAL
# What `recipe: recommended` means for the keys that a config does not name.
RECOMMENDED_VALUES: dict[str, Any] = {
    "column_encoding": "piecewise_linear",
    "wide_columns": True,
    "min_category_count": 5,
    "head_first": "auto",
    "lr": "auto",
    "head_lr": "auto",
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "gradient_clip_val": 1.0,
    "blend": "auto",
}
# Keys that the original does not have and that change what is trained: who names one has chosen the settings.
NEW_KEYS = (
    "fusion",
    "column_encoding",
    "min_category_count",
    "wide_columns",
    "blend",
    "head_first",
    "layer_decay",
    "schedule",
    "aux_loss_weight",
    "ema_decay",
)
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
        values = run_config if run_config.get("recipe") == RECOMMENDED else {}
        return {**_for_unnamed(values, named), **named, "recipe": run_config.get("recipe")}
    if (
        recipe is None
        and DEFAULT_RECIPE == RECOMMENDED
        and not is_original
        and not any(key in named for key in NEW_KEYS)
    ):
        recipe = RECOMMENDED
    values = {**RECOMMENDED_VALUES, "recipe": recipe} if recipe == RECOMMENDED else {}
    return {**_for_unnamed(values, named), **named, "recipe": recipe}


def _for_unnamed(values: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys that the user has not named."""
    return {
        key: values[key]
        for key in RECOMMENDED_VALUES
        if key in values and key not in named and SAME_SUBJECT.get(key) not in named
    }


def recipe_line(values: Mapping[str, Any]) -> str | None:
    """What a recipe has set, in one line for the start of a run; None for the original's settings."""
    if values["recipe"] != RECOMMENDED:
        return None
    chosen = ", ".join(
        f"{key} {str(value).lower()}" for key, value in RECOMMENDED_VALUES.items() if values[key] == value
    )
    return f"recipe recommended: {chosen}; recipe: original gives the original's settings"
