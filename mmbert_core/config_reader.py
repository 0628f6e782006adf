"""Config files (YAML, JSON) and `--key value` flags -> `Config`.

Flags override the file. Unknown keys are errors that name the nearest known key.
"""

import logging
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_checks import check_schedule
from mmbert_core.config_file import read_config_file
from mmbert_core.config_metrics import ORIGINAL_DEFAULTS
from mmbert_core.config_recipe import with_recipe
from mmbert_core.config_synonyms import nearest_name
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.storage.files import read_json

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"
ALIASES = ("tokenizer", "fp16")  # the original's names of encoder and precision
IGNORED_KEYS = ("full_field_list", "need_language_detect")  # of the original's data pipeline; no use here
MAX_NAMED, MAX_KEY_CHARACTERS = 5, 40  # unknown keys that a message lists, and characters of each
LIST_OF_KEYS = "`train.py --help` lists all keys"
NONE_WORDS = ("none", "null", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_config(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """A `Config` from a YAML or JSON file and overriding values.

    Raises `InputError` with the key and what was expected.
    """
    in_file = read_config_file(path) if path else {}
    values = _checked(in_file, path) if path else {}
    # translated before they are merged, so that --encoder also overrides the file's `tokenizer`
    flags = _checked(overrides or {}, COMMAND_LINE)
    source = f"{path} and {COMMAND_LINE}" if path and flags else path or COMMAND_LINE
    named = {**values, **flags}
    if "schedule" in named and "run_scheduler" in named:
        try:
            check_schedule(named["schedule"], named["run_scheduler"], are_both_named=True)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    run_config = _config_of_the_run(named)
    unset = {key for key, value in {**in_file, **(overrides or {})}.items() if value is None}
    is_original = path is not None and (path.lower().endswith(".json") or _is_of_the_original(in_file))
    values = with_recipe(
        {key: value for key, value in named.items() if key not in unset},
        is_original=is_original,
        run_config=run_config,
    )
    return _build(_with_metrics_of_the_run({**named, **values}, run_config), source)


def config_from_dict(values: Mapping[str, Any], *, source: str = "config") -> Config:
    """A `Config` from keys and values, also with the original's names.

    Raises `InputError`, whose message begins with `source`.
    """
    return _build(_checked(values, source), source)


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a file or of the flags: the original's names translated, each value of its key's type."""
    values = _translate_original_keys(_with_original_metrics(values, source), source)
    if unknown := [key for key in values if key not in SETTINGS]:
        raise InputError(f"{source}: {_unknown_keys(unknown)}")
    return coerce_all(values, source=source)


def _with_original_metrics(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """For a file with keys that only the original had, the metrics that it does not set are the original's.

    Not for flags: `--tokenizer` says nothing about the metrics.
    """
    if source == COMMAND_LINE or not _is_of_the_original(values):
        return dict(values)
    return {**values, **{key: default for key, default in ORIGINAL_DEFAULTS.items() if values.get(key) is None}}


def _is_of_the_original(values: Mapping[str, Any]) -> bool:
    """Whether a file has keys that only the original had."""
    return any(key in values for key in (*ALIASES, *IGNORED_KEYS))


def _config_of_the_run(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored config of the run that these values would resume; None for a new run, and where it cannot be read."""
    folder = Path(values.get("model_path") or "")
    if values.get("resume") == "never":
        return None
    try:
        if not (folder / "checkpoints").is_dir():  # raises for a name that is too long or a folder without access
            return None
        stored = read_json(folder / "config.json")["config"]
        known = {key: value for key, value in stored.items() if key in SETTINGS}
        return coerce_all(known, source=str(folder / "config.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reported when the folder is loaded
        return None


def _with_metrics_of_the_run(values: dict[str, Any], run_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """For a config without metrics that resumes a run, the metrics are those that the run started with.

    A run that version 0.2 began had other defaults for two classes.
    """
    if run_config is None or any(values.get(key) is not None for key in ORIGINAL_DEFAULTS):
        return values
    metrics = {key: run_config[key] for key in ORIGINAL_DEFAULTS if key in run_config}
    return values | metrics if len(metrics) == len(ORIGINAL_DEFAULTS) else values


def _unknown_keys(unknown: list[str]) -> str:
    """For a message: each unknown key with the key that was probably meant; of many, the first few."""
    nearest = [nearest_name(key, [*SETTINGS, *ALIASES]) for key in unknown[:MAX_NAMED]]
    keys = [format_for_message(key, MAX_KEY_CHARACTERS) for key in unknown[:MAX_NAMED]]
    if len(unknown) == 1:
        return f"unknown key {keys[0]}; " + (f"did you mean {nearest[0]!r}?" if nearest[0] else LIST_OF_KEYS)
    named = [f"{key} (did you mean {name!r}?)" if name else key for key, name in zip(keys, nearest, strict=True)]
    more = f" and {len(unknown) - MAX_NAMED:,} more" if len(unknown) > MAX_NAMED else ""
    return f"unknown keys {', '.join(named)}{more}" + ("" if all(nearest) and not more else f"; {LIST_OF_KEYS}")


def _build(values: Mapping[str, Any], source: str) -> Config:
    """Build the `Config`. Raises `InputError`, beginning with `source`, also for a missing key."""
    for name, setting in SETTINGS.items():
        if setting.is_required and name not in values:
            raise InputError(f"{source}: the key {name!r} is required: {setting.meaning}")
    try:
        return Config(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _translate_original_keys(values: dict[str, Any], source: str) -> dict[str, Any]:
    """`tokenizer` -> encoder, `fp16` -> precision, and one warning for keys without use here. None means "not set"."""
    ignored = [key for key in IGNORED_KEYS if values.pop(key, None) is not None]
    if ignored:
        verbs = ("has", "is") if len(ignored) == 1 else ("have", "are")
        logger.warning("%s: %s %s no use here and %s ignored", source, " and ".join(ignored), *verbs)
    if (tokenizer := values.pop("tokenizer", None)) is not None:
        encoder = values.get("encoder")
        if encoder not in (None, tokenizer):
            raise InputError(
                f"{source}: encoder is {format_for_message(encoder)} and tokenizer is {format_for_message(tokenizer)}: "
                f"they mean the same, keep one"
            )
        values["encoder"] = tokenizer
    if (fp16 := values.pop("fp16", None)) is not None:
        fp16, precision = coerce("fp16", fp16, bool, source=source), values.get("precision")
        translated = "fp16" if fp16 else "fp32"  # the original had no other precision
        if precision not in (None, translated):
            raise InputError(
                f"{source}: fp16 is {str(fp16).lower()} and precision is {format_for_message(precision)}: "
                f"they contradict, keep precision"
            )
        values["precision"] = translated
    return values


# ---- values of a file or a shell -> the types of Config ----


def coerce_all(values: Mapping[str, Any], *, source: str = "config") -> dict[str, Any]:
    """Convert each value to the type of its key. None means "not set" and becomes the default of its key."""
    hints = get_type_hints(Config)
    result = {}
    for key, value in values.items():
        is_unset = value is None and not SETTINGS[key].is_required
        result[key] = SETTINGS[key].default if is_unset else coerce(key, value, hints[key], source=source)
    return result


def coerce(key: str, value: Any, hint: Any, *, source: str) -> Any:
    """Convert `value` to the type `hint`. Strings are parsed: a shell has no numbers, and YAML reads 2e-4 as a string.

    Raises `InputError` for a value that is not of that type.
    """
    for member in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        try:
            return _coerce_one(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    items = value if isinstance(value, list) else [value]
    is_yaml_word = any(isinstance(item, bool) for item in items) and str in _members(hint)
    quotes = " (YAML reads yes, no, on, off so: write a name in quotes)" if is_yaml_word else ""
    raise InputError(f"{source}: {key}: expected {describe(hint)}, found {format_for_message(value)}{quotes}")


def _members(hint: Any) -> list[Any]:
    """The plain types of a hint: those of a union, those in a tuple."""
    if get_origin(hint) is Literal:
        return [Literal]
    members = get_args(hint)
    return [plain for member in members for plain in _members(member)] if members else [hint]


def _coerce_one(value: Any, hint: Any) -> Any:
    """Convert `value` to one member of a union. Raises TypeError or ValueError when it is not of that type."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce_one(item, get_args(hint)[0]) for item in items)
    elif hint is type(None):
        if value is None or (isinstance(value, str) and value.lower() in NONE_WORDS):
            return None
    elif hint is bool:
        word = str(value).lower()
        if word in TRUE_WORDS + FALSE_WORDS:
            return word in TRUE_WORDS
    elif isinstance(value, bool):
        pass  # true is neither a number nor a name
    elif hint is int:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, int):
            return number
    elif hint is float:
        return float(value)
    elif hint is str and isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(hint)


def describe(hint: Any) -> str:
    """A type in words, for error messages."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return {str: "one or more names", float: "numbers"}[get_args(hint)[0]]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[hint]
