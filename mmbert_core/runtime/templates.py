"""The Jinja environment of a package's templates: values are escaped, undefined names are errors."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(package: str, *, autoescape: bool = True, finalize: Callable[[Any], Any] | None = None) -> Environment:
    """An environment for the files of `<package>/templates`.

    Every value is escaped as HTML unless it is `markupsafe.Markup`; `autoescape=False` is for files that are not HTML.
    A name that is not defined raises `UndefinedError`. `finalize` is applied to each value before it is escaped. A line
    that holds only a `{% %}` tag leaves no blank line.
    """
    return Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
