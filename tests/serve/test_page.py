"""The page of `mmbert serve`: every column has an input, only its own code runs, names of a model are escaped."""

import json
import re

import pytest

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.serve.page import MAX_SUGGESTIONS, TEMPLATES, content_security_policy, form_fields, render_page
from tests.support.page_tree import Element, tree_of
from tests.support.serving import ask

HOSTILE = (
    "</script><script>alert(1)</script>\"'&",
    "</title></style></textarea></datalist><img src=x onerror=alert(1)>",
    "{{ nonce }}{% raw %}{# @@NONCE@@",
    "\\u003c<!--<script>",
    "line\nbreak\ttab\u2028\u00a0\U0001f600",
    '" autofocus onfocus="alert(1)',
)


def page_of(name: str, *, other: str = "c") -> str:
    """A page on which every text that comes from a model folder is `name`."""
    config = Config(
        text_name=(name,), cat_field_list=("c",), label_name=f"label{name}", model_path="m", id_name=f"id{name}"
    )
    features = Features((f"n{name}",), (1.5,), (0.0,), (1.0,), (False,), (other,), ((name, f"{name}2"),))
    return render_page(
        f"runs/{name}", config, features, Labels(("0", name)), threshold=0.5, nonce="n0nce", positive_class_line=name
    )


def model_of(page: str) -> dict:
    return json.loads(re.search(r'id="model">(.*?)</script>', page, re.DOTALL)[1])


def shape(element: Element) -> list[tuple[str, list[str]]]:
    """Tags and attribute names in the order of the page."""
    return [(each.tag, sorted(each.attributes)) for each in element.all()]


def test_the_page_has_every_column_and_only_code_with_the_nonce(server):
    answer, again = ask(server, "/"), ask(server, "/")
    page = answer.text.decode()
    tree = tree_of(page)
    inputs = {each.attributes["name"]: each for tag in ("textarea", "input") for each in tree.all(tag)}
    assert sorted(inputs) == ["age", "amount", "kind", "row_id", "text"]
    kinds = {name: each.attributes["data-kind"] for name, each in inputs.items()}
    assert kinds == {"text": "text", "age": "number", "amount": "number", "kind": "category", "row_id": "id"}
    labels = {each.attributes["for"]: each.text for each in tree.all("label")}
    hints = {each.attributes["id"] for each in tree.all("small")}
    for name, each in inputs.items():
        assert labels[each.attributes["id"]] == name and each.attributes["aria-describedby"] in hints
    assert [each.attributes["value"] for each in tree.all("option")] == ["a", "b", "c"]
    policy = answer.headers["Content-Security-Policy"]
    [nonce] = set(re.findall(r"'nonce-([^']+)'", policy))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert nonce not in again.headers["Content-Security-Policy"]
    code = [*tree.all("script"), *tree.all("style")]
    assert [each.attributes.get("nonce") for each in code] == [None, nonce, nonce]
    assert code[0].attributes["type"] == "application/json"
    assert not re.search(r"(src|href)=|\son\w+=|style=|https?://", page)


def test_the_styles_and_the_script_are_the_files(server):
    tree = tree_of(ask(server, "/").text.decode())
    for name, element in (("serve.css", next(tree.all("style"))), ("serve.js", [*tree.all("script")][1])):
        source = TEMPLATES.loader.get_source(TEMPLATES, name)[0]
        assert element.text.strip() == source.strip() and not re.search(r"</(style|script)", source, re.IGNORECASE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_a_model_folder_changes_no_tag_of_the_page(name):
    page = page_of(name)
    assert shape(tree_of(page)) == shape(tree_of(page_of("plain")))
    assert page.count("n0nce") == 2 and "<script>alert" not in page and "<img" not in page
    assert model_of(page)["labels"] == ["0", name] and model_of(page)["texts"] == [name]
    tree = tree_of(page)
    assert next(tree.all("textarea")).attributes["name"] == name
    assert [each.attributes["value"] for each in tree.all("option")] == [name, f"{name}2"]
    assert next(tree.all("label")).text == name and next(each for each in tree.all("p")).text == name


def test_a_column_has_one_input_and_a_category_a_bounded_number_of_suggestions():
    config = Config(text_name=("a",), label_name="label", model_path="m", id_name="a")
    values = tuple(map(str, range(MAX_SUGGESTIONS + 5)))
    fields = form_fields(config, Features((), (), (), (), (), ("b",), (values,)))
    assert [(field.name, field.kind) for field in fields] == [("a", "text"), ("b", "category")]
    assert fields[1].suggestions == values[:MAX_SUGGESTIONS] and "one of 1005 known values" in fields[1].hint


def test_the_policy_allows_the_nonce_and_this_server_only():
    directives = dict(line.split(" ", 1) for line in content_security_policy("abc").split("; "))
    assert directives == {
        "default-src": "'none'",
        "script-src": "'nonce-abc'",
        "style-src": "'nonce-abc'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
