"""Checks of a config's values: ranges, paths, one role for each column, and values that contradict each other.

`values` maps every key of `Config` to its value.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mmbert_core.config_recipe import RECOMMENDED, RECOMMENDED_VALUES
from mmbert_core.config_setting import Setting
from mmbert_core.runtime.errors import InputError, format_for_message

COLUMN_KEYS = ("tab_field_list", "date_field_list", "cat_field_list")  # of the columns that are no text
PREDICTION_COLUMNS = ("prob", "label", "pred", "prob_calibrated")  # names that an id column must not have
FUSIONS_OF_BOTH = ("gate", "cross_attention", "moe")  # values of `fusion` that need text and columns


def check_values(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    """Raise `InputError`, with the key and what was expected, for a value out of its range or a contradiction."""
    check_ranges(values, settings)
    check_paths(values)
    check_columns(values)
    check_classes(values, settings["class_weights"])
    check_schedule(values["schedule"], values["run_scheduler"], are_both_named=not values["run_scheduler"])
    if values["recipe"] == RECOMMENDED and all(values[key] != value for key, value in RECOMMENDED_VALUES.items()):
        found = "Config(recipe='recommended'), which sets no other key"
        raise InputError(f"recipe: expected read_config(None, {{...}}) for the recommended recipe, found {found}")
    metric = values["early_stop_metric"]
    if metric != "val_loss" and not metric.startswith("val/"):
        raise InputError(f"early_stop_metric: expected val_loss or val/<metric>, found {format_for_message(metric)}")


def check_ranges(values: Mapping[str, Any], settings: Mapping[str, Setting]) -> None:
    for name, key_setting in settings.items():
        if isinstance(values[name], (int, float)):
            key_setting.check_range(name, values[name])
    interval = values["val_check_interval"]
    if interval == 0 or (isinstance(interval, float) and interval > 1):
        raise InputError(
            f"val_check_interval: expected a share of an epoch above 0 and up to 1.0, "
            f"or a whole number of steps, found {interval}"
        )


def check_paths(values: Mapping[str, Any]) -> None:
    if not values["model_path"].strip():
        raise InputError("model_path: expected a folder, found an empty value")
    for name, path in _paths(values):
        if "\0" in path and isinstance(values[name], str):  # table files are checked with their globs
            raise InputError(f"{name}: expected a path, found a NUL character in it")
    for name, path in _paths(values):
        try:
            path.encode("utf-8")  # model folders and reports store paths as JSON
        except UnicodeEncodeError:
            raise InputError(
                f"{name}: expected a path in UTF-8, found other bytes in it: {format_for_message(path)}: rename it"
            ) from None


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, path) of every setting that names files or folders; `encoder` may be a name on the hub."""
    for name, value in values.items():
        if name.endswith("_path") or name == "encoder":
            yield from ((name, path) for path in ((value,) if isinstance(value, str) else value or ()))


def check_columns(values: Mapping[str, Any]) -> None:
    """Inputs that suit the fusion, one role for each column, an id column that the predictions do not have."""
    has_columns = any(values[key] for key in COLUMN_KEYS)
    if not values["text_name"] and not has_columns:
        raise InputError(
            "text_name is empty and there are no tab_field_list or cat_field_list: there is nothing to learn from"
        )
    if values["fusion"] in FUSIONS_OF_BOTH and not (values["text_name"] and has_columns):
        raise InputError(
            f"fusion: {values['fusion']} joins text and columns, found {'text' if values['text_name'] else 'columns'} "
            "only: set fusion to concat or tabm"
        )
    roles: dict[str, str] = {}
    for key in ("text_name", *COLUMN_KEYS, "label_name"):
        value = values[key]
        for column in (value,) if isinstance(value, str) else value:
            if column in roles:
                raise InputError(
                    f"column {format_for_message(column)} stands in {roles[column]} and in {key}: "
                    f"expected one role for each column"
                )
            roles[column] = key
    if values["id_name"] in (*PREDICTION_COLUMNS, values["label_name"]):
        raise InputError(
            f"id_name: {values['id_name']!r} is a column that the prediction file has already: expected another column"
        )


def check_classes(values: Mapping[str, Any], weights_setting: Setting) -> None:
    """The number of classes, and one finite weight for each of them."""
    num_classes, weights = values["num_classes"], values["class_weights"]
    if values["is_binary"] and num_classes != 2:
        raise InputError(
            f"num_classes is {num_classes} but is_binary is true: set is_binary to false, or num_classes to 2"
        )
    if not isinstance(weights, tuple):
        return
    if len(weights) != num_classes:
        raise InputError(f"class_weights: expected {num_classes} weights (num_classes), found {len(weights)}")
    low, high = weights_setting.at_least, weights_setting.at_most
    if not all(low <= weight <= high for weight in weights) or sum(weights) == 0:
        raise InputError(
            f"class_weights: expected finite weights of at least {low} and at most {high:,}, not all 0, "
            f"found {format_for_message(list(weights))}"
        )


def check_schedule(schedule: str | None, run_scheduler: bool, *, are_both_named: bool) -> None:
    """`are_both_named`: whether the user has set both; true, the default of `run_scheduler`, contradicts nothing."""
    if are_both_named and schedule is not None and run_scheduler != (schedule != "constant"):
        raise InputError(
            f"run_scheduler is {str(run_scheduler).lower()} and schedule is {schedule}: they contradict, keep schedule"
        )
