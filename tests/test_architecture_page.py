"""The tables of docs/architecture.md name every file of the package, and hooks that exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.source import PACKAGE, ROOT, copy_package, modules_on_disk, nodes_of

PAGE = "docs/architecture.md"


def table_under(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table in a section, without its head."""
    section = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, f"{PAGE}: expected a section {heading!r}"
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section.group(1).splitlines()
        if line.startswith("|")
    ]
    return rows[2:]


def file_table_problems(root: Path, page: str) -> list[str]:
    """Files that the table of docs/architecture.md lacks, has twice, or has for nothing."""
    paths = [
        path
        for row in table_under(page, "## Files of the package")
        for path in re.findall(rf"`({PACKAGE}/[\w/]+\.py)`", row[0])
        if not path.endswith("__init__.py")
    ]
    there = {str(path.relative_to(root)) for path in (root / PACKAGE).rglob("*.py") if path.name != "__init__.py"}
    found = [f"{PAGE} lacks {path}" for path in sorted(there - set(paths))] + [
        f"{PAGE} names {path}, which is not there" for path in sorted(set(paths) - there)
    ]
    return found + [f"{PAGE} names {path} twice" for path in sorted(set(paths)) if paths.count(path) > 1]


def hook_table_problems(root: Path, page: str) -> list[str]:
    """Rows of the hook table whose function is not in the file they name."""
    found = []
    rows = table_under(page, "## Hooks of the original")
    for row in rows:
        hook, file, function = (cell.strip("`") for cell in row[:3])
        body = nodes_of(root / file)[0].body if (root / file).is_file() else []
        for name in function.split("."):  # Class.method
            body = next(
                (node.body for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name),
                None,
            )
            if body is None:
                found.append(f"{PAGE}: hook {hook}: no {function} in {file}")
                break
    return found if rows else [f"{PAGE}: the hook table is empty"]


# ---- the page is right ----


def page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


def test_the_file_table_is_the_folder():
    assert file_table_problems(ROOT, page()) == []


def test_the_hook_table_names_functions_that_exist():
    assert hook_table_problems(ROOT, page()) == []


# ---- and a wrong one is found ----


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_package(tmp_path)


PAGE_TEXT = """# x

## Hooks of the original

text

| hook | file | function |
|---|---|---|
| `training_step` | `mmbert_core/hooks.py` | `training_step` |
| `forward` | `mmbert_core/model/multimodal_bert.py` | `MultimodalBert.forward` |

## Files of the package

| file | what |
|---|---|
{rows}

## Limits
"""


def right_page(root: Path) -> str:
    modules = sorted(modules_on_disk(root) - {"train"})
    paths = [f"{PACKAGE}/{module.replace('.', '/')}.py" for module in modules]
    return PAGE_TEXT.format(rows="\n".join(f"| `{path}` | what it is |" for path in paths))


def test_an_outdated_page_is_found(copy):
    right = right_page(copy)
    assert file_table_problems(copy, right) == [] and hook_table_problems(copy, right) == []
    outdated = file_table_problems(copy, right.replace("mmbert_core/runtime/hub.py", "mmbert_core/runtime/web.py"))
    assert outdated == [
        f"{PAGE} lacks mmbert_core/runtime/hub.py",
        f"{PAGE} names mmbert_core/runtime/web.py, which is not there",
    ]
    assert (
        file_table_problems(copy, right.replace("mmbert_core/runtime/hub.py", "mmbert_core/demo/run.py"))[1]
        == f"{PAGE} names mmbert_core/demo/run.py twice"
    )
    for old, new in (
        ("`training_step` |\n", "`train_step` |\n"),
        ("MultimodalBert.forward", "MultimodalBert.backward"),
        ("mmbert_core/hooks.py", "mmbert_core/hook.py"),
    ):
        assert len(hook_table_problems(copy, right.replace(old, new))) == 1
    with pytest.raises(AssertionError, match="expected a section"):
        file_table_problems(copy, right.replace("## Files of the package", "## Files"))
