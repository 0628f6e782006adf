"""Dataclasses as JSON: what is written is read back, what is missing has its default, other structures are refused."""

import copy
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from mmbert_core.report.page import render
from mmbert_core.report.report_schema import Report, check_report, report_of
from mmbert_core.report.typed_json import Missing, check_of, from_json, json_key, left_out, to_json
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import check_structure, nullable, number
from tests.support import reports

Number = Annotated[float | None, nullable(number())]


@dataclass(frozen=True, kw_only=True)
class Inner:
    x: list[Number]
    area: Number = None
    share: Number = left_out(None)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    location: str | None = json_key("place", None)
    inner: Inner | Missing = Missing()
    by_name: dict[str, Inner | None] = field(default_factory=dict)
    any: Any = None


FULL = {
    "name": "a",
    "place": "row 3",
    "inner": {"x": [1.0, None], "area": 0.5},
    "by_name": {"b": {"x": [], "area": None, "share": 0.25}, "c": None},
    "any": {"k": [1]},
}


def test_what_is_read_is_written_with_the_same_keys_in_the_same_order():
    check_structure(FULL, check_of(Outer), "file")
    outer = from_json(Outer, FULL)
    assert outer.location == "row 3" and outer.inner == Inner(x=[1.0, None], area=0.5)
    assert outer.by_name == {"b": Inner(x=[], share=0.25), "c": None}
    assert json.dumps(to_json(outer)) == json.dumps(FULL)


def test_what_is_missing_or_null_has_its_default_and_a_section_its_reason():
    for value in ({"name": "a"}, dict.fromkeys(FULL) | {"name": "a"}, {"name": "a", "unknown": 1}):
        check_structure(value, check_of(Outer), "file")
        assert from_json(Outer, value) == Outer(name="a")
    reason = {"name": "a", "inner": {"reason": "why"}}
    assert from_json(Outer, reason).inner == Missing("why") and to_json(from_json(Outer, reason))["inner"] == {
        "reason": "why"
    }


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": None}, "file: name: expected a text, found null"),
        ({"inner": {"x": [1, "b"]}}, "file: inner.x[1]: expected a finite number or null, found the text 'b'"),
        ({"inner": {"reason": 3}}, "file: inner.reason: expected a text, found 3"),
        ({"inner": []}, "file: inner: expected an object or null, found a list of 0"),
        ({"by_name": {"b": {"x": {}}}}, "file: by_name.b.x: expected a list, found an object of 0 keys"),
    ],
)
def test_another_structure_is_refused_in_one_line(change, line):
    with pytest.raises(InputError) as error:
        check_structure(FULL | change, check_of(Outer), "file")
    assert str(error.value) == line
    with pytest.raises(TypeError, match="expected a type that has a check"):
        check_of(set[int])


@pytest.mark.parametrize("name", ["binary", "multiclass", "reasons"])
def test_a_report_is_written_as_it_was_read(name):
    value = reports.EXAMPLES[name]()
    if name != "reasons":
        value["calibration"]["method"] = None
    if name == "binary":
        value["threshold"]["rows"] = 2349
    assert to_json(report_of(value)) == json.loads(json.dumps(value))


def test_every_report_that_lacks_an_optional_key_is_a_page():
    """As reports of older versions do: each key of the report and of its sections in turn."""
    whole = reports.binary_report()
    paths = [(key,) for key in whole] + [
        (key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value
    ]
    num_pages = 0
    for path in paths:
        report = copy.deepcopy(whole)
        container = report if len(path) == 1 else report[path[0]]
        del container[path[-1]]
        try:
            check_structure(report, check_report, "report.json")
        except InputError as error:
            assert f"expected the key {path[-1]!r}" in str(error) or path == ("confusion", "counts")
        else:
            assert render(report_of(report)).endswith("</html>\n")
            num_pages += 1
    assert num_pages > 40 and {"title", "class_names"} <= Report.__dataclass_fields__.keys()
