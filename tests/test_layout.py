"""Layers of the package, docstrings, and sizes of files and functions."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.source import (
    PACKAGE,
    ROOT,
    append,
    copy_package,
    docstring_of,
    imported_modules,
    modules_on_disk,
    nodes_of,
    path_of,
)

# Packages and modules, by layer. A module imports those of lower layers, and those named before it in its own group.
# Groups of the same layer do not import each other. The order inside a package is the list in its __init__'s docstring.
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("runtime",),),
    (("storage",),),
    (
        (
            "config_synonyms",
            "config_file",
            "config_setting",
            "config_metrics",
            "config_recipe",
            "config_checks",
            "config",
            "config_reader",
            "config_arguments",
        ),
        ("model",),
        ("evaluation",),
    ),
    (("tables",),),
    (("data",),),
    (("inference",),),
    (("report",),),
    (("hooks",),),
    (("training",), ("file_evaluation", "predictor")),
    (("export",), ("serve",), ("ablation",), ("compared_runs", "comparison"), ("demo",), ("init",), ("estimator",)),
    (("cli_arguments", "console", "cli", "__main__", "train"),),  # train: train.py, next to the package
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


# ---- the rules ----


def order_in(root: Path, package: str) -> list[str]:
    """Modules of a package in the order of its docstring, which ends with `...: a, b, c.`; [] where it names none."""
    listed = re.search(r"only those before it: ([\w,\s]+)\.", docstring_of(root / PACKAGE / package / "__init__.py"))
    return [f"{package}.{name.strip()}" for name in listed.group(1).split(",")] if listed else []


def layer_positions(root: Path) -> dict[str, tuple[int, int, int]]:
    """Module -> (layer, group, index in the group)."""
    positions = {}
    for layer, groups in enumerate(LAYERS):
        for group, names in enumerate(groups):
            is_package = [(root / PACKAGE / name).is_dir() for name in names]
            modules = [
                module
                for name, inside in zip(names, is_package, strict=True)
                for module in (order_in(root, name) if inside else [name])
            ]
            positions |= {module: (layer, group, index) for index, module in enumerate(modules)}
    return positions


def import_problems(root: Path) -> list[str]:
    """Imports that run up or sideways, are relative, or name no file; and files without a layer."""
    positions = layer_positions(root)
    found = [f"{module}: has no layer" for module in sorted(modules_on_disk(root) - set(positions))]
    found += [
        f"{module}: has a layer, but there is no such file" for module in sorted(set(positions) - modules_on_disk(root))
    ]
    for module in sorted(modules_on_disk(root) & set(positions)):
        layer, group, index = positions[module]
        for line, imported in imported_modules(root, path_of(root, module)):
            if imported == "":  # the package itself holds the version and the public names
                continue
            if imported not in positions:
                found.append(
                    f"{module}, line {line}: imports {imported!r}, which is not a file of the package "
                    "(imports are absolute and name files)"
                )
                continue
            other_layer, other_group, other_index = positions[imported]
            if other_layer > layer:
                found.append(
                    f"{module}, line {line}: imports {imported} from layer {other_layer}, above its own {layer}"
                )
            elif other_layer == layer and (other_group != group or other_index >= index):
                found.append(f"{module}, line {line}: imports {imported} sideways, in layer {layer}")
    for path in sorted((root / PACKAGE).rglob("__init__.py")):
        if path.parent == root / PACKAGE:  # the public names, imported when they are used
            continue
        found += [
            f"{path.relative_to(root)}, line {line}: imports {imported}"
            for line, imported in imported_modules(root, path)
        ]
    return found


def docstring_problems(root: Path) -> list[str]:
    """Files without a docstring, or whose docstring lists imports, as LAYERS does; train.py's must have its command."""
    found = []
    for module in sorted(modules_on_disk(root)):
        docstring = docstring_of(path_of(root, module))
        if not docstring or (module == "train" and "torchrun" not in docstring):
            found.append(f"{module}: expected a docstring" + (" with the command" if docstring else ""))
        elif re.search(r"\b[Ii]mports [a-z]", docstring):
            found.append(f"{module}: its docstring lists imports")
    for path in sorted((root / PACKAGE).rglob("__init__.py")):
        if not docstring_of(path):
            found.append(f"{path.relative_to(root)}: expected a docstring")
    return found


def size_problems(root: Path) -> list[str]:
    """Files and functions that are too long; a function's lines are those from its `def` to its end."""
    found = []
    for module in sorted(modules_on_disk(root)):
        path = path_of(root, module)
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            found.append(f"{module}: {num_lines} lines, more than {MAX_FILE_LINES}")
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                num_lines = node.end_lineno - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    found.append(f"{module}: {node.name} has {num_lines} lines, more than {MAX_FUNCTION_LINES}")
    return found


# ---- this project keeps them ----


def test_imports_run_down_the_layers():
    assert import_problems(ROOT) == []


def test_every_file_has_a_docstring_and_none_lists_imports():
    assert docstring_problems(ROOT) == []


def test_files_and_functions_are_short():
    assert size_problems(ROOT) == []


# ---- and a break of each rule is found ----


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_package(tmp_path)


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("config", "from mmbert_core.data.splits import select_rows", "above its own 2"),
        ("data.features", "from mmbert_core.inference.scoring import Task", "above its own 4"),
        ("hooks", "from mmbert_core.training import loop", "above its own 7"),
        ("training.optim", "import mmbert_core.cli", "above its own 8"),
        ("model.losses", "def late():\n    from mmbert_core.predictor import Predictor", "above its own 2"),
        (
            "model.losses",
            "from mmbert_core.evaluation import metrics",
            "imports evaluation.metrics sideways, in layer 2",
        ),
        ("data.splits", "from mmbert_core.data.tokens import Tokens", "imports data.tokens sideways, in layer 4"),
        (
            "training.checkpoint",
            "from mmbert_core.training.optim import optimizer_step",
            "imports training.optim sideways, in layer 8",
        ),
        ("predictor", "from mmbert_core.training.loop import fit", "imports training.loop sideways, in layer 8"),
        ("training.loop", "from . import hooks", "imports '.'"),
        ("training.loop", "from mmbert_core.training import nothing", "imports 'training'"),
    ],
)
def test_an_import_up_or_sideways_is_found(copy, module, line, problem):
    assert import_problems(copy) == []
    append(copy, module, line)
    [found] = import_problems(copy)
    assert found.startswith(f"{module}, line ") and problem in found


def test_a_file_without_a_layer_and_a_layer_without_a_file_are_found(copy):
    (copy / PACKAGE / "data/new.py").write_text('"""New."""\n')
    path_of(copy, "runtime.hub").unlink()
    assert set(import_problems(copy)) >= {
        "data.new: has no layer",
        "runtime.hub: has a layer, but there is no such file",
    }
    init = copy / PACKAGE / "data/__init__.py"
    init.write_text(init.read_text() + "from mmbert_core.data.splits import select_rows\n")
    assert any(
        line.startswith("mmbert_core/data/__init__.py, line ") and line.endswith(": imports data.splits")
        for line in import_problems(copy)
    )


def test_a_missing_docstring_and_a_list_of_imports_are_found(copy):
    path_of(copy, "storage.files").write_text("import os\n")
    path_of(copy, "cli").write_text('"""The command line. Imports config and data."""\n')
    assert docstring_problems(copy) == ["cli: its docstring lists imports", "storage.files: expected a docstring"]


def test_a_long_file_and_a_long_function_are_found(copy):
    before = size_problems(copy)
    lines = ["    x = 1"] * MAX_FUNCTION_LINES
    append(copy, "runtime.versions", "\n".join(["def fits():", *lines[1:]]))
    assert size_problems(copy) == before
    append(copy, "runtime.versions", "\n".join(["class Late:", "  async def late(self):", *lines]))
    assert set(size_problems(copy)) - set(before) == {"runtime.versions: late has 61 lines, more than 60"}
    path = path_of(copy, "runtime.hub")
    path.write_text("x = 1\n" * MAX_FILE_LINES)
    assert not any(line.startswith("runtime.hub:") for line in size_problems(copy))
    path.write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert "runtime.hub: 401 lines, more than 400" in size_problems(copy)
