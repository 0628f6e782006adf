"""The page of `mmbert serve`: a form with the model's columns, the probabilities, the words that contributed to them.

A single HTML document with an inline style sheet and script. A nonce lets the browser use those two and nothing else,
and names and values from the model folder are escaped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.inference.attributions import HIGHLIGHT_LEVELS
from mmbert_core.runtime.templates import environment

MAX_SUGGESTIONS = 1000  # values of one column that the form suggests

TEMPLATES = environment(__package__)


@dataclass(frozen=True)
class FormField:
    """The input of one column."""

    name: str
    kind: Literal["text", "number", "date", "category", "id"]
    hint: str
    suggestions: tuple[str, ...] = ()


def content_security_policy(nonce: str) -> str:
    """The header that lets a browser run the page's own style and script, and send requests to this server only."""
    own = f"'nonce-{nonce}'"
    return (
        f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def render_page(
    model_path: str,
    config: Config,
    features: Features,
    labels: Labels,
    *,
    threshold: float,
    nonce: str,
    positive_class_line: str | None = None,
) -> str:
    """The HTML of the page. `nonce`: new for each answer, and the same in its `content_security_policy`."""
    return TEMPLATES.get_template("form.html").render(
        nonce=nonce,
        title=Path(model_path).name or model_path,
        positive_class_line=positive_class_line,
        fields=form_fields(config, features),
        model={
            "labels": labels.names,
            "is_binary": config.is_binary,
            "threshold": threshold,
            "label_name": config.label_name,
            "texts": config.text_name,
            "min_highlight": HIGHLIGHT_LEVELS[0],
        },
    )


def form_fields(config: Config, features: Features) -> list[FormField]:
    """The input of each column that a prediction needs, once each."""
    fields: dict[str, FormField] = {}
    for name in config.text_name:
        fields[name] = FormField(name, "text", "text")
    # not strict: the units of dates follow
    for name, median in zip(features.plain_number_names, features.medians, strict=False):
        fields[name] = FormField(name, "number", f"number; empty: the training median, {median:g}")
    for name, newest in zip(features.dates.names, features.dates.newest, strict=True) if features.dates else ():
        fields[name] = FormField(
            name, "date", f"date, such as the newest in training, {newest.removesuffix('T00:00:00')}"
        )
    for name, values in zip(features.category_names, features.categories, strict=True):
        hint = f"one of {len(values)} known values, or another"
        fields[name] = FormField(name, "category", hint, tuple(values[:MAX_SUGGESTIONS]))
    if config.id_name is not None and config.id_name not in fields:
        fields[config.id_name] = FormField(config.id_name, "id", "id; returned unchanged")
    return list(fields.values())
