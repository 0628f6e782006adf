"""A config file (YAML, JSON) -> keys and values, in bounded time and memory for any content.

YAML tags that run code are refused. The values of an alias count at each use, so that a short file cannot expand to a
huge one.
"""

import json
import re
from typing import Any

import yaml

from mmbert_core.runtime.errors import InputError, format_for_message, shorten

MAX_BYTES = 1_000_000  # of a config file
MAX_KEYS = 1_000  # of one mapping in YAML, whose parser takes a tenth of a millisecond for each
MAX_VALUES = 50_000  # of a YAML file: keys, values and members of lists, those of an alias at each use
CHARACTERS_PER_VALUE = 40  # a text counts as one value more for each so many characters
MAX_DEPTH = 20  # of nested mappings and lists; a config needs 2
MAX_DIGITS = 100  # of a number
MAX_MESSAGE = 300  # characters of a parser's message
# First bytes of files that are given as a config by mistake, most often the table instead of the config.
SIGNATURES = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive, such as an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x1f\x8b": "a file packed by gzip",
    b"%PDF": "a PDF file",
}
# A text that YAML reads as itself without quotes, such as a name or a path, and texts that it reads as another type.
PLAIN_IN_YAML = re.compile(r"(?:[A-Za-z_]|\.{0,2}/)[\w ./-]*\w|[A-Za-z_]", re.ASCII)
YAML_WORDS = frozenset("yes no on off true false y n null none".split())
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".xlsx", ".xls", ".csv.gz", ".tsv.gz", ".jsonl.gz")
ADVICE = "a config has lines such as `train_path: train.csv`, or give the table as --train_path"


def read_config_file(path: str) -> dict[str, Any]:
    """The keys and values of a .yaml, .yml or .json file. Raises `InputError`, one line, for what is not a config."""
    text = _read_text(path)
    try:
        values = _parse_json(text) if path.endswith(".json") else yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}: {_not_valid(path, text)}: {_yaml_problem(error)}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: {_not_valid(path, text)}: {shorten(str(error), MAX_MESSAGE)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        hint = f"; {ADVICE}" if _is_table(path, text) else ""
        raise InputError(f"{path}: expected keys with values, found {type(values).__name__}{hint}")
    return {_as_key(key): value for key, value in values.items()}


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise InputError(f"{path}: cannot read the config file ({getattr(error, 'strerror', None) or error})") from None
    for signature, kind in SIGNATURES.items():
        if content.startswith(signature):
            raise InputError(f"{path}: expected a config file (YAML or JSON), found {kind}; {ADVICE}")
    beginning = content[:100_000].decode("utf-8", errors="replace")
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: {_not_valid(path, beginning)}: expected at most {MAX_BYTES:,} bytes, found more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {_not_valid(path, beginning)}: {shorten(str(error), MAX_MESSAGE)}") from None


def _not_valid(path: str, text: str) -> str:
    return (
        f"expected a config file (YAML or JSON), found what looks like a table; {ADVICE}"
        if _is_table(path, text)
        else "not a valid config file"
    )


def _is_table(path: str, text: str) -> bool:
    """By the file's name, or by its first two lines: a separator in both, and nothing that looks like a config."""
    if path.lower().endswith(TABLE_SUFFIXES):
        return True
    lines = text[:100_000].splitlines()[:2]
    if path.endswith(".json") or len(lines) < 2 or lines[0].lstrip().startswith(("{", "[", "#", "-", "%")):
        return False
    first, second = lines
    has_columns = any(0 < first.count(separator) <= second.count(separator) for separator in ",;\t")
    return has_columns and ": " not in first and not first.endswith(":")


def _as_key(key: Any) -> str:
    try:
        return str(key)
    except ValueError:
        return format_for_message(key)


def check_repeats(keys: list[Any]) -> None:
    """Raise `ValueError` for a key that a mapping has twice: the parsers would take the last value silently."""
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {format_for_message(key)} stands in it twice")
        seen.add(key)


# ---- JSON ----


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_mapping_of, parse_int=_whole_number)


def _mapping_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_repeats([key for key, _ in pairs])
    return dict(pairs)


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"expected a number of at most {MAX_DIGITS} digits, found one of {len(digits):,}")
    return int(digits)


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Safe YAML without repeated keys, within the bounds above. Raises only `yaml.YAMLError`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = self._depth = 0
        self._sizes: dict[str, int] = {}  # anchor -> number of values of its node, once that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML's step from events to a node, with the bounds. A mapping's keys have the `index` None."""
        event = self.peek_event()
        if isinstance(parent, yaml.MappingNode) and index is None and len(parent.value) >= MAX_KEYS:
            some = ", ".join(format_for_message(key.value, 30) for key, _ in parent.value[:3])
            raise _error(event, f"expected at most {MAX_KEYS:,} keys, found more: {some}, ...")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _error(event, f"the alias *{event.anchor} stands within what it stands for")
            self._count(event, self._sizes.get(event.anchor, 1))
            return super().compose_node(parent, index)
        if self._depth >= MAX_DEPTH:
            raise _error(event, f"expected at most {MAX_DEPTH} mappings and lists in each other, found more")
        before = self._num_values
        self._count(event, 1 + len(getattr(event, "value", "")) // CHARACTERS_PER_VALUE)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._num_values - before
        return node

    def _count(self, event: yaml.Event, size: int) -> None:
        self._num_values += size
        if self._num_values > MAX_VALUES:
            expected = f"expected at most {MAX_VALUES:,} values (an alias counts as what it stands for)"
            raise _error(event, f"{expected}, found more")

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            try:
                check_repeats([key.value for key in scalars if key.tag != "tag:yaml.org,2002:merge"])
            except ValueError as error:
                raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A node's value. A value that cannot be converted (`!!int ""`, 2026-02-31) is an error that names its line."""
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            problem = f"expected a number of at most {MAX_DIGITS} digits, found one of {len(node.value):,}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            value = format_for_message(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            # a ValueError names the cause, such as a day that the month lacks; others are internals of the parser
            reason = f" ({error})" if type(error) is ValueError else ""
            problem = f"{value} cannot be read as {kind}{reason}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def yaml_scalar(text: str) -> str:
    """A text as YAML that is read back as this text: plain where possible, else in quotes on one line."""
    if PLAIN_IN_YAML.fullmatch(text) and text.lower() not in YAML_WORDS:
        return text
    escapes = {'"': '\\"', "\\": "\\\\"}
    letters = (escapes.get(letter) or (letter if letter.isprintable() else f"\\U{ord(letter):08x}") for letter in text)
    return f'"{"".join(letters)}"'


def _error(event: yaml.Event, problem: str) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, problem, event.start_mark)


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """The parser's message on one line, with line and column."""
    mark = error.problem_mark or error.context_mark
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    words = ", ".join(filter(None, [error.context, error.problem]))
    return shorten(words, MAX_MESSAGE - len(where)) + where
