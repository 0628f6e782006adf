"""Declared structures: each kind of mismatch is one line that names the key; bounds on JSON text."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage import schema
from mmbert_core.storage.files import read_json
from mmbert_core.storage.schema import (
    Check,
    array,
    boolean,
    check_structure,
    constant,
    either,
    mapping,
    nullable,
    number,
    parse_json,
    record,
    text,
    whole,
)

NAMES = record({"names": array(text(non_empty=True), min_length=2, distinct=True)})


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (NAMES, {"names": ["a", None]}, "f.json: names[1]: expected a text that is not empty, found null"),
        (NAMES, {"names": ["a", ""]}, "f.json: names[1]: expected a text that is not empty, found the text ''"),
        (NAMES, {"names": "ab"}, "f.json: names: expected a list of at least 2, found the text 'ab'"),
        (NAMES, {"names": ["0", "0"]}, "f.json: names: expected a list without repeats, found '0' twice"),
        (NAMES, {"names": {"a": 1}}, "f.json: names: expected a list of at least 2, found an object of 1 keys"),
        (NAMES, {}, "f.json: expected the key 'names', found none"),
        (NAMES, {"names": ["a", "b"], "x\n": 1}, "f.json: expected only the keys names, found 'x\\n' too"),
        (NAMES, [], "f.json: expected an object, found a list of 0"),
        (number(0, 1), True, "f.json: expected a finite number of at least 0 and of at most 1, found true"),
        (number(0, 1), 1.5, "f.json: expected a finite number of at least 0 and of at most 1, found 1.5"),
        (number(above=0), 0, "f.json: expected a finite number above 0, found 0"),
        (number(), float("nan"), "f.json: expected a finite number, found nan"),
        (number(), float("inf"), "f.json: expected a finite number, found inf"),
        (whole(0), 1.0, "f.json: expected a whole number of at least 0, found 1.0"),
        (whole(0), 10**5000, "f.json: expected a whole number of at least 0, found a whole number of 16610 bits"),
        (whole(1, 3), False, "f.json: expected a whole number of at least 1 and of at most 3, found false"),
        (boolean, 1, "f.json: expected true or false, found 1"),
        (constant(2), True, "f.json: expected 2, found true"),
        (nullable(text()), 3, "f.json: expected a text or null, found 3"),
        (either(text(), whole()), [], "f.json: expected a text or a whole number, found a list of 0"),
        (text(choices=("a", "b")), "c", "f.json: expected one of a, b, found the text 'c'"),
        (text(pattern="[0-9a-f]{4}"), "00G0", "f.json: expected a text like [0-9a-f]{4}, found the text '00G0'"),
        (
            mapping(whole(), keys=text(non_empty=True)),
            {"a b.c": 1, "d": None},
            "f.json: d: expected a whole number, found null",
        ),
        (mapping(array(boolean)), {"a b": [True, 0]}, "f.json: ['a b'][1]: expected true or false, found 0"),
        (mapping(mapping(boolean)), {"a": {"b": 0}}, "f.json: a.b: expected true or false, found 0"),
        (array(boolean, length=2), [True], "f.json: expected a list of 2, found a list of 1"),
        (text(pattern="x"), "y" * 10**6, f"f.json: expected a text like x, found the text '{'y' * 76}..."),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 200 else type(value).__name__,
)
def test_mismatches_name_the_key(check: Check, value: Any, message: str):
    with pytest.raises(InputError) as caught:
        check_structure(value, check, "f.json")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (NAMES, {"names": ["a", "b"]}),
        (record({"a": whole()}, {"b": boolean}, others=True), {"a": 1, "c": None}),
        (nullable(array(number())), None),
        (either(text(), array(text())), ["a"]),
        (array(whole(), max_length=2), []),
        (number(0, 1), 1),
    ],
)
def test_declared_values_pass(check: Check, value: Any):
    check_structure(value, check, "f.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "at most 50 deep"),
        ("[" * 51 + "]" * 51, "at most 50 deep"),
        ('{"a":' * 51 + "1" + "}" * 51, "at most 50 deep"),
        ("9" * 100_000, "below 2**63"),
        (str(2**63), "below 2**63"),
        (str(-(2**63)), "below 2**63"),
        ("1e999", "within float64"),
        ("[NaN]", "found NaN"),
        ("-Infinity", "found -Infinity"),
        ('{"a": 1, "a": 2}', "found 'a' twice"),
        (r'"\ud800"', "surrogates not allowed"),
        ("", "Expecting value"),
        (b"\xff", "invalid start byte"),
    ],
)
def test_json_beyond_the_bounds_is_one_line(tmp_path: Path, content: str | bytes, words: str):
    path = tmp_path / "f.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a JSON file (") and words in message
    assert "\n" not in message and len(message) < len(str(path)) + 260


def test_json_within_the_bounds():
    for value in ("é😀", [[]], 2**63 - 1, {"a": {"b": [1.5, None, True]}}, 1e308, "\u2028"):
        for ascii_only in (True, False):
            assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value
    assert parse_json("[" * 50 + "]" * 50)


def test_a_json_file_is_bounded_before_it_is_parsed(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_text("[" + " " * 2**20 + "]")
    with pytest.raises(InputError, match=r"f\.json: expected at most 1 MB of JSON, found more"):
        read_json(path, max_bytes=2**20)
    assert read_json(path) == []
    with open(path, "wb") as stream:
        stream.truncate(2**40)  # a file of holes: a terabyte
    started = time.perf_counter()
    with pytest.raises(InputError, match="at most 64 MB of JSON"):
        read_json(path)
    assert time.perf_counter() - started < 5


def test_only_plain_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="expected a file, found a device or a pipe"):
            read_json(path)
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


def test_checks_of_long_lists_are_fast():
    value = {"names": [f"name {index}" for index in range(200_000)]}
    started = time.perf_counter()
    check_structure(value, NAMES, "f.json")
    assert time.perf_counter() - started < 2
    assert schema.describe(value["names"]) == "a list of 200000"
