"""Dataclasses as JSON: checking, reading and writing a file follow from the fields of one declaration.

    @dataclass(frozen=True, kw_only=True)
    class Curve:
        x: list[Number]  # required
        area: Number = None  # may be absent or null: the default is used
        share: Number = left_out(None)  # the same, and not written if it equals its default

Types: str, bool, Any, list[...], dict[str, ...], dataclasses, `... | None`, `... | Missing`, and, for numbers and their
ranges, `Annotated[type, check]` with a check of `storage.schema`. Unknown keys of a file are ignored.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mmbert_core.storage.schema import Check, anything, array, boolean, mapping, nullable, record, text

NOT_IN_REPORT = "not in this report"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Missing:
    """A section that has only the reason why it is empty; null in a file is read as one."""

    reason: str = NOT_IN_REPORT


def left_out(default: Any) -> Any:
    """A field that is not written if it equals its default."""
    return field(default=default, metadata={"left_out": True})


def json_key(key: str, default: Any) -> Any:
    """A field that has another name in the file."""
    return field(default=default, metadata={"key": key})


# ---- checks ----


@cache
def check_of(kind: Any) -> Check:
    """The check for values of this type. Raises `TypeError` for a type that is not listed above."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (str, bool, Any):
        return {str: text(), bool: boolean, Any: anything}[kind]
    if origin is Annotated:
        return arguments[1]
    if origin is list:
        return array(check_of(arguments[0]))
    if origin is dict:
        return mapping(check_of(arguments[1]))
    if origin in (Union, UnionType):
        inner = check_of(arguments[0])
        return nullable(_section_or_reason(inner) if Missing in arguments else inner)
    if is_dataclass(kind):
        return _check_of_fields(kind)
    raise TypeError(f"expected a type that has a check, found {kind}")


def _check_of_fields(kind: Any) -> Check:
    types = _types_of(kind)
    required = {_key_of(each): check_of(types[each.name]) for each in fields(kind) if not _has_default(each)}
    optional = {_key_of(each): _check_of_optional(types[each.name]) for each in fields(kind) if _has_default(each)}
    return record(required, optional, others=True)


def _check_of_optional(kind: Any) -> Check:
    options = get_args(get_args(kind)[0] if get_origin(kind) is Annotated else kind)
    return check_of(kind) if NoneType in options or Missing in options else nullable(check_of(kind))


def _section_or_reason(full: Check) -> Check:
    reason = record({"reason": text()})

    def check(value: Any) -> None:
        (reason if _is_reason(value) else full)(value)

    return check


def _is_reason(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"reason"}


# ---- reading and writing ----


def from_json(kind: Callable[..., Value], value: Any) -> Value:
    """An instance of the dataclass `kind` from JSON values, which `check_of(kind)` must allow: not checked again."""
    return _read(kind, value)


def _read(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if Missing in arguments and (value is None or _is_reason(value)):
            return Missing() if value is None else Missing(str(value["reason"]))
        return None if value is None else _read(arguments[0], value)
    if origin is list:
        return list(value) if _is_plain(arguments[0]) else [_read(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _read(arguments[1], item) for key, item in value.items()}
    if not is_dataclass(kind):
        return value
    types, known = _types_of(kind), {}
    for each in fields(kind):
        key = _key_of(each)
        if key in value and not (value[key] is None and _has_default(each)):
            known[each.name] = _read(types[each.name], value[key])
    return kind(**known)


def to_json(value: Any) -> Any:
    """Dataclasses, dicts and sequences as JSON values; keys in the order of the fields."""
    if is_dataclass(value):
        pairs = ((each, getattr(value, each.name)) for each in fields(value))
        return {_key_of(each): to_json(inner) for each, inner in pairs if not _is_left_out(each, inner)}
    if isinstance(value, dict):
        return {key: to_json(inner) for key, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _key_of(each: Field[Any]) -> str:
    return each.metadata.get("key", each.name)


def _is_left_out(each: Field[Any], value: Any) -> bool:
    return "left_out" in each.metadata and value == each.default


def _has_default(each: Field[Any]) -> bool:
    return each.default is not MISSING or each.default_factory is not MISSING


def _is_plain(kind: Any) -> bool:
    """Whether values of this type need no conversion: no dataclass in them."""
    if get_origin(kind) in (list, dict, Union, UnionType):
        return all(_is_plain(inner) for inner in get_args(kind))
    return not is_dataclass(kind)


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
