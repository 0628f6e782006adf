"""The table of all config keys in docs/data-and-config.md: `python -m tests.support.config_table` writes it."""

import re
from pathlib import Path
from typing import get_type_hints

from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_arguments import placeholder
from mmbert_core.config_recipe import defaults_in_words

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data-and-config.md"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"


def config_table() -> str:
    """One table per group: key, values, default, the original's where it is another, range, resume, meaning."""
    hints, tables = get_type_hints(Config), []
    for group in dict.fromkeys(setting.group for setting in SETTINGS.values()):
        rows = [
            (
                f"`{name}`",
                _cell(placeholder(name, hints[name])),
                _cell(default),
                _cell(original if original != default else ""),
                setting.range_in_words,
                "yes" if setting.may_change_on_resume else "",
                _cell(setting.meaning),
            )
            for name, setting in SETTINGS.items()
            if setting.group == group
            for default, original in [defaults_in_words(name, setting)]
        ]
        head = ("key", "value", "default", "recipe: original", "range", "may change on resume", "meaning")
        lines = [head, ("---",) * len(head), *rows]
        tables.append("\n".join([f"### {group.capitalize()}", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(tables)


def _cell(text: str) -> str:
    """Text that Markdown shows as it is inside a table: no column ends at a bar, nothing is taken for a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def with_table(page: str) -> str:
    """The page with the table as it is now between the two markers."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{config_table()}\n\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
