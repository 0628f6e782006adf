"""Reading the package's source with `ast`, and a copy of it in which a test can break a rule."""

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mmbert_core"


def path_of(root: Path, module: str) -> Path:
    return root / "train.py" if module == "train" else root / PACKAGE / f"{module.replace('.', '/')}.py"


def modules_on_disk(root: Path) -> set[str]:
    files = [
        path.relative_to(root / PACKAGE).with_suffix("").parts
        for path in (root / PACKAGE).rglob("*.py")
        if path.name != "__init__.py"
    ]
    return {".".join(names) for names in files} | ({"train"} if (root / "train.py").exists() else set())


@cache
def _nodes_in(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def nodes_of(path: Path) -> list[ast.AST]:
    """The file's module node, then all that is in it."""
    return _nodes_in(path.read_text(encoding="utf-8"))


def docstring_of(path: Path) -> str:
    return ast.get_docstring(nodes_of(path)[0]) or ""


def imported_modules(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of the package, also inside functions.

    Modules are without the package's name; '' is the package itself.
    """
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name.removeprefix(PACKAGE).lstrip(".")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = node.module.removeprefix(PACKAGE).lstrip(".")
            # `from mmbert_core.training import loop` names a file, `from mmbert_core.config import Config` does not
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield node.lineno, inner if path_of(root, inner).exists() else module


def dotted(node: ast.AST) -> str:
    """`torch.distributed.barrier` of an attribute chain; '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def copy_package(folder: Path) -> Path:
    """A copy of the package and train.py."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    return folder


def append(root: Path, module: str, text: str) -> None:
    """Add text at the end of a module."""
    with open(path_of(root, module), "a", encoding="utf-8") as stream:
        stream.write(f"\n\n{text}\n")
