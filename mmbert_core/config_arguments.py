"""One command-line flag for each key of a config, and the values that were given."""

import argparse
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_reader import ALIASES
from mmbert_core.config_recipe import defaults_in_words


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one `--key` for each setting, with its meaning, range and default, grouped as in config.py."""
    hints = get_type_hints(Config)
    groups: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        bounds = f"; {setting.range_in_words}" if setting.range_in_words else ""
        default, original = defaults_in_words(name, setting)
        words = "required" if setting.is_required else f"default: {default}"
        words += f"; recipe original: {original}" if original != default else ""
        groups[setting.group].add_argument(
            f"--{name}",
            nargs="*" if is_list(hints[name]) else None,
            default=argparse.SUPPRESS,
            metavar=placeholder(name, hints[name]),
            help=f"{setting.meaning}{bounds} ({words})".replace("%", "%%"),
        )
    groups["model"].add_argument(
        "--tokenizer", default=argparse.SUPPRESS, metavar="NAME", help="the original's name of --encoder"
    )
    groups["run"].add_argument(
        "--fp16",
        default=argparse.SUPPRESS,
        metavar="true|false",
        help="the original's name of --precision; true is fp16, false fp32",
    )


def is_list(hint: Any) -> bool:
    return any(get_origin(member) is tuple for member in [hint, *get_args(hint)])


def placeholder(name: str, hint: Any) -> str:
    """The word for a value in --help: N for a whole number, X for a number, choices as a list."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [placeholder(name, member) for member in get_args(hint) if member is not type(None)]
        return "|".join(dict.fromkeys(members))
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return placeholder(name, get_args(hint)[0])
    return {bool: "true|false", int: "N", float: "X", str: "PATH" if name.endswith("_path") else "NAME"}[hint]


def overrides_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line.

    A list of one word becomes that word (`--class_weights balanced`); the word null means "not set".
    """
    given = {key: value for key, value in vars(arguments).items() if key in SETTINGS or key in ALIASES}
    scalars = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in given.items()}
    return {key: None if value == "null" else value for key, value in scalars.items()}
