"""The layers of the package, the users of torch.distributed, the tables of docs/architecture.md, nothing unsafe. Read with `ast`."""

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mmbert_core"
PAGE = "docs/architecture.md"
# Packages and modules, by layer. A module imports those of lower layers, and those named before it in its own group. Groups of the
# same layer do not know each other. The order inside a package is the list in the docstring of its __init__.
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("runtime",),),
    (("storage",),),
    (("config_synonyms", "config_file", "config_setting", "config", "config_reader"), ("model",), ("evaluation",)),
    (("tables",),),
    (("data",),),
    (("inference",),),
    (("report",),),
    (("hooks",),),
    (("training",), ("predictor",)),
    (("export",), ("serve",), ("ablation",), ("demo",)),
    (("cli_arguments", "console", "cli", "__main__", "train"),),  # train: train.py, next to the package
)
# Start and end of the process group, collectives, DDP: all others call their functions, which are identities in one process.
USE_TORCH_DISTRIBUTED = {"runtime.workers", "runtime.distributed", "runtime.ddp"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pd.read_pickle",
    "pandas.read_pickle",
}
UNSAFE_CALLS |= {"eval", "exec", "compile", "__import__"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


# ---- what a file says ----


def path_of(root: Path, module: str) -> Path:
    return root / "train.py" if module == "train" else root / PACKAGE / f"{module.replace('.', '/')}.py"


def modules_on_disk(root: Path) -> set[str]:
    files = [
        path.relative_to(root / PACKAGE).with_suffix("").parts
        for path in (root / PACKAGE).rglob("*.py")
        if path.name != "__init__.py"
    ]
    return {".".join(parts) for parts in files} | ({"train"} if (root / "train.py").exists() else set())


@cache
def _nodes_in(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def nodes_of(path: Path) -> list[ast.AST]:
    """The file's module node, then all that is in it."""
    return _nodes_in(path.read_text(encoding="utf-8"))


def docstring_of(path: Path) -> str:
    return ast.get_docstring(nodes_of(path)[0]) or ""


def imported_modules(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and module, without the package's name, of every import of ours, also of those inside functions; '' is the package itself."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name.removeprefix(PACKAGE).lstrip(".")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = node.module.removeprefix(PACKAGE).lstrip(".")
            for alias in node.names:  # `from mmbert_core.training import hooks` names a file, `from mmbert_core.config import Config` is in one
                inner = f"{module}.{alias.name}".lstrip(".")
                yield node.lineno, inner if path_of(root, inner).exists() else module


def dotted(node: ast.AST) -> str:
    """`torch.distributed.barrier` of an attribute chain; '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


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
            if imported == "":  # the package itself holds the version, nothing else
                continue
            if imported not in positions:
                found.append(
                    f"{module}, line {line}: imports {imported!r}, which is no file of the package (imports are absolute and name files)"
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


def distributed_problems(root: Path) -> list[str]:
    """Uses of torch.distributed (and DDP's class) outside the modules that may."""
    found = []
    for module in sorted(modules_on_disk(root) - USE_TORCH_DISTRIBUTED):
        for node in nodes_of(path_of(root, module)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [dotted(node)]
            if any(
                name.startswith(("torch.distributed", "dist.")) or name.endswith("DistributedDataParallel")
                for name in names
            ):
                found.append(f"{module}, line {node.lineno}: {names[0]}")
    return found


def is_safe_yaml(call: ast.Call, nodes: list[ast.AST]) -> bool:
    """`yaml.load(text, Loader)` with a safe loader, or with a class of the same file that is one."""
    loaders = [
        dotted(argument)
        for argument in (*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader"))
    ]
    bases = {node.name: {dotted(base) for base in node.bases} for node in nodes if isinstance(node, ast.ClassDef)}
    return len(loaders) == 1 and bool(SAFE_LOADERS & {loaders[0], *bases.get(loaders[0], ())})


def unsafe_problems(root: Path) -> list[str]:
    """Pickles, code from strings, code from models."""
    found = []
    for module in sorted(modules_on_disk(root)):
        nodes = nodes_of(path_of(root, module))
        for node in nodes:
            bad = ""
            if isinstance(node, ast.Import):
                bad = next((alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES), "")
            elif isinstance(node, ast.ImportFrom) and node.module:
                bad = node.module if node.module.split(".")[0] in PICKLES else ""
                bad = bad or next(
                    (
                        f"{node.module}.{alias.name}"
                        for alias in node.names
                        if f"{node.module}.{alias.name}" in UNSAFE_CALLS
                    ),
                    "",
                )
            elif isinstance(node, ast.Call):
                name = dotted(node.func)
                bad = (
                    f"{name}("
                    if name in UNSAFE_CALLS and not (name == "yaml.load" and is_safe_yaml(node, nodes))
                    else ""
                )
                for keyword in node.keywords:
                    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "something"
                    if keyword.arg in ("trust_remote_code", "allow_pickle") and value is not False:
                        bad = f"{keyword.arg}={value}"
            if bad:
                found.append(f"{module}, line {node.lineno}: {bad}")
    return found


def docstring_problems(root: Path) -> list[str]:
    """Files without a docstring, or whose docstring lists imports: the layers say that; train.py's says how to start it."""
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


# ---- this project keeps them ----


def page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


def test_imports_run_down_the_layers():
    assert import_problems(ROOT) == []


def test_only_three_modules_of_runtime_use_torch_distributed():
    assert distributed_problems(ROOT) == []
    for module in USE_TORCH_DISTRIBUTED:
        assert "torch.distributed" in path_of(ROOT, module).read_text(encoding="utf-8")


def test_nothing_is_unpickled_and_no_code_comes_from_data():
    assert unsafe_problems(ROOT) == []


def test_every_file_has_a_docstring_and_none_lists_imports():
    assert docstring_problems(ROOT) == []


def test_the_file_table_is_the_folder():
    assert file_table_problems(ROOT, page()) == []


def test_the_hook_table_names_functions_that_exist():
    assert hook_table_problems(ROOT, page()) == []


# ---- and would be caught breaking them ----


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the package, to be spoiled."""
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def plant(root: Path, module: str, line: str) -> None:
    with open(path_of(root, module), "a", encoding="utf-8") as stream:
        stream.write(f"\n\n{line}\n")


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
    plant(copy, module, line)
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


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as d",
        "from torch import distributed as d",
        "from torch.distributed import barrier",
        "torch.distributed.barrier()",
        "dist.barrier()",
        "from torch.nn.parallel import DistributedDataParallel",
        "nn.parallel.DistributedDataParallel(model)",
    ],
)
def test_torch_distributed_elsewhere_is_found(copy, line):
    plant(copy, "hooks", line)
    [found, *_] = distributed_problems(copy)
    assert found.startswith("hooks, line ")


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=asked)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_words_are_found(copy, line):
    plant(copy, "storage.files", f"def late(path, text, name, asked):\n    {line}")
    [found] = unsafe_problems(copy)
    assert found.startswith("storage.files, line ")


def test_a_missing_docstring_and_a_list_of_imports_are_found(copy):
    path_of(copy, "storage.files").write_text("import os\n")
    path_of(copy, "cli").write_text('"""The command line. Imports config and data."""\n')
    assert docstring_problems(copy) == ["cli: its docstring lists imports", "storage.files: expected a docstring"]


def tables_of(root: Path) -> str:
    """A page that is right."""
    rows = "\n".join(
        f"| `{PACKAGE}/{module.replace('.', '/')}.py` | what it is |"
        for module in layer_positions(root)
        if module != "train"
    )
    hooks = f"| `training_step` | `{PACKAGE}/hooks.py` | `training_step` |\n| `forward` | `{PACKAGE}/model/multimodal_bert.py` | `MultimodalBert.forward` |"
    return f"# x\n\n## Hooks of the original\n\ntext\n\n| hook | file | function |\n|---|---|---|\n{hooks}\n\n## Files of the package\n\n| file | what |\n|---|---|\n{rows}\n\n## Limits\n"


def test_a_page_that_drifts_is_found(copy):
    right = tables_of(copy)
    assert file_table_problems(copy, right) == [] and hook_table_problems(copy, right) == []
    drifted = file_table_problems(copy, right.replace("mmbert_core/runtime/hub.py", "mmbert_core/runtime/web.py"))
    assert drifted == [
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
