"""Templates of a package: escaped values, no silent gaps, plain text where the file is not HTML."""

import sys

import pytest
from jinja2 import TemplateNotFound, UndefinedError
from markupsafe import Markup

from mmbert_core.runtime.templates import environment

HOSTILE = "</script><b class='x' title=\"y\">&{{ 7 * 7 }}{% raw %}"


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """A package with two templates."""
    folder = tmp_path / "package_with_templates"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "templates/page.html").write_text('{% if True %}\n<p title="{{ value }}">{{ value }}</p>\n{% endif %}\n')
    (folder / "templates/loop.html").write_text("{% macro cell(x) %}<td>{{ x }}</td>{% endmacro %}{{ cell(value) }}")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder.name
    sys.modules.pop(folder.name, None)


def test_a_value_is_escaped_and_never_read_as_a_template(package):
    page = environment(package).get_template("page.html").render(value=HOSTILE)
    assert "<b" not in page and "</script" not in page and "{{ 7 * 7 }}{% raw %}" in page
    assert page.startswith("<p title=") and page.endswith("</p>\n")  # the tags' own lines are gone


def test_a_macro_does_not_escape_twice_and_markup_passes(package):
    template = environment(package).get_template("loop.html")
    assert template.render(value="a<b") == "<td>a&lt;b</td>"
    assert template.render(value=Markup("<i>x</i>")) == "<td><i>x</i></td>"


def test_a_missing_value_and_a_missing_file_are_errors(package):
    with pytest.raises(UndefinedError, match="'value' is undefined"):
        environment(package).get_template("page.html").render()
    with pytest.raises(TemplateNotFound):
        environment(package).get_template("../__init__.py")


def test_a_file_that_is_not_html_is_not_escaped_and_finalize_sees_each_value(package):
    plain = environment(package, autoescape=False).get_template("page.html")
    assert plain.render(value="a<b") == '<p title="a<b">a<b</p>\n'
    upper = environment(package, finalize=lambda value: value if isinstance(value, Markup) else value.upper())
    assert upper.get_template("loop.html").render(value="a<b") == "<td>A&lt;B</td>"
