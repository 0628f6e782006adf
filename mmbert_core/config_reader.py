"""Config files (YAML, JSON) and `--key value` flags -> `Config`. Floor 0; imports config and errors.

A file comes first, flags go over it. Unknown keys are errors that name the nearest known key.
"""

import argparse
import difflib
import json
import logging
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mmbert_core.config import Config, config_fields
from mmbert_core.errors import InputError

logger = logging.getLogger(__name__)

IGNORED_KEYS = ("full_field_list", "need_language_detect")  # of the original's data pipeline; no use here
NONE_WORDS = ("none", "null", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def read_config(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """A `Config` from a YAML or JSON file and overriding values. Raises `InputError` with the key and what was expected."""
    values = read_config_file(path) if path else {}
    return config_from_dict({**values, **(overrides or {})}, place=path or "command line")


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a .yaml, .yml or .json file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{path}: cannot read the config file ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a valid config file: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys with values, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def config_from_dict(values: Mapping[str, Any], *, place: str = "config") -> Config:
    """Check names, translate the original's keys, coerce values by the key's type, build the `Config`."""
    values = _translate_original_keys(dict(values), place)
    known = config_fields()
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, [*known, "tokenizer", "fp16"], n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; `train.py --help` lists all keys"
            raise InputError(f"{place}: unknown key {key!r}{hint}")
    for name, item in known.items():
        if item.default is MISSING and name not in values:
            raise InputError(f"{place}: the key {name!r} is required: {item.metadata['meaning']}")
    return Config(**coerce_all(values, place=place))


def _translate_original_keys(values: dict[str, Any], place: str) -> dict[str, Any]:
    """`tokenizer` -> encoder, `fp16` -> precision, and one warning for keys without use here."""
    ignored = [key for key in IGNORED_KEYS if values.pop(key, None) is not None]
    if ignored:
        logger.warning("%s: %s %s no use here and %s ignored", place, " and ".join(ignored), *(("has", "is") if len(ignored) == 1 else ("have", "are")))
    if "tokenizer" in values:
        tokenizer = values.pop("tokenizer")
        if values.setdefault("encoder", tokenizer) != tokenizer:
            raise InputError(f"{place}: encoder is {values['encoder']!r} and tokenizer is {tokenizer!r}: they mean the same, keep one")
    if "fp16" in values:
        fp16 = coerce("fp16", values.pop("fp16"), bool, place=place)
        if fp16 and values.setdefault("precision", "fp16") != "fp16" or not fp16 and values.get("precision") == "fp16":
            raise InputError(f"{place}: fp16 is {str(fp16).lower()} and precision is {values['precision']!r}: they contradict, keep precision")
    return values


def coerce_all(values: Mapping[str, Any], *, place: str = "config") -> dict[str, Any]:
    """Values of a mapping, each turned into the type of its key; None means "not set" and takes the default."""
    hints, known = get_type_hints(Config), config_fields()
    result = {}
    for key, value in values.items():
        if value is None and known[key].default is not MISSING:
            continue
        result[key] = coerce(key, value, hints[key], place=place)
    return result


def coerce(key: str, value: Any, hint: Any, *, place: str) -> Any:
    """`value` as the type `hint`; strings are read as a file or a shell gives them (YAML reads 2e-4 as a string)."""
    for member in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        try:
            return _coerce_one(value, member)
        except (TypeError, ValueError):
            continue
    raise InputError(f"{place}: {key}: expected {describe(hint)}, found {value!r}")


def _coerce_one(value: Any, hint: Any) -> Any:
    """One member of a union; raises TypeError or ValueError when `value` is not of it."""
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
        pass  # true is no number and no name
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
    """A type in words, for error lines and --help."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return {str: "one or more names", float: "numbers"}[get_args(hint)[0]]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}[hint]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """One `--key` per setting with its meaning and default, grouped as in config.py."""
    hints = get_type_hints(Config)
    groups: dict[str, Any] = {}
    for name, item in config_fields().items():
        title = item.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = "required" if item.default is MISSING else f"default: {_show(item.default)}"
        is_list = "names" in describe(hints[name]) or "numbers" in describe(hints[name])
        text = f"{item.metadata['meaning']} ({default})".replace("%", "%%")
        group.add_argument(f"--{name}", nargs="*" if is_list else None, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    groups["model"].add_argument("--tokenizer", default=argparse.SUPPRESS, metavar="VALUE", help="the original's name of --encoder")
    groups["run"].add_argument("--fp16", default=argparse.SUPPRESS, metavar="VALUE", help="the original's name of --precision fp16: true or false")


def _show(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else "none" if default is None else str(default)


def overrides_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line; a single word of a list is a scalar (`--class_weights balanced`)."""
    given = {key: value for key, value in vars(arguments).items() if key in config_fields() or key in ("tokenizer", "fp16")}
    return {key: value[0] if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 else value for key, value in given.items()}
