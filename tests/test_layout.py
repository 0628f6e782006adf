"""The house is built as the README draws it: floors, one user of torch.distributed, the two tables, nothing unsafe. Read with `ast`."""

import ast
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mmbert_core"
# Every file, by floor. A file imports the files of lower floors, and those named before it in its own group.
# Groups of the same floor do not know each other.
FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("errors", "streams", "signals", "progress", "schema", "files", "claims", "manifest", "hub", "encoder_files", "config", "config_file", "config_names", "config_reader", "forks", "connections", "distributed"), ("export_example",)),
    (
        ("data.ahead", "data.batches", "data.sample", "data.cells", "data.lines", "data.csv_reader", "data.parquet_reader", "data.readers", "data.table", "data.class_words", "data.labels", "data.splits", "data.features", "data.tokens",
         "data.encoding", "data.store", "data.dataset", "data.leaks", "data.prepare", "data.known_ranges"),
        ("model.fusion", "model.losses", "model.tabular_encoder", "model.pretrained", "model.dropout", "model.int8", "model.packing", "model.text_encoder", "model.probe", "model.multimodal_bert",
         "model.padded"),
        ("evaluation.predictions", "evaluation.class_counts", "evaluation.class_ranking", "evaluation.metrics", "evaluation.plots", "evaluation.intervals", "evaluation.slices", "evaluation.thresholds",
         "evaluation.calibration", "evaluation.baselines", "evaluation.judgement", "evaluation.sections",
         "evaluation.report_schema", "evaluation.markup", "evaluation.charts", "evaluation.page_style", "evaluation.page_quality", "evaluation.page_details", "evaluation.page"),
    ),
    (("model_files", "model_folder", "assessment", "training.saved_state", "training.checkpoint", "training.run_log", "training.optim", "training.hooks", "explain", "importance", "training.memory", "training.setup"),),
    (("card", "report", "predictor", "serve_page", "serve", "export", "training.loop", "ablation", "demo"),),
    (("command_line", "cli", "__main__", "train"),),  # train: train.py, beside the package
)  # fmt: skip
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle"}
UNSAFE_CALLS |= {"eval", "exec", "compile", "__import__"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


# ---- what a file says ----


def path_of(root: Path, module: str) -> Path:
    return root / "train.py" if module == "train" else root / PACKAGE / f"{module.replace('.', '/')}.py"


def modules_on_disk(root: Path) -> set[str]:
    files = [path.relative_to(root / PACKAGE).with_suffix("").parts for path in (root / PACKAGE).rglob("*.py") if path.name != "__init__.py"]
    return {".".join(parts) for parts in files} | ({"train"} if (root / "train.py").exists() else set())


@lru_cache(maxsize=None)
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


def import_problems(root: Path) -> list[str]:
    """Imports that run up or sideways, are relative, or name no file; and files without a floor."""
    place = {module: (floor, group, index) for floor, groups in enumerate(FLOORS) for group, names in enumerate(groups) for index, module in enumerate(names)}
    found = [f"{module}: has no floor" for module in sorted(modules_on_disk(root) - set(place))]
    found += [f"{module}: has a floor, but there is no such file" for module in sorted(set(place) - modules_on_disk(root))]
    for module in sorted(modules_on_disk(root) & set(place)):
        floor, group, index = place[module]
        for line, imported in imported_modules(root, path_of(root, module)):
            if imported == "":  # the package itself holds the version, nothing else
                continue
            if imported not in place:
                found.append(f"{module}, line {line}: imports {imported!r}, which is no file of the package (imports are absolute and name files)")
                continue
            other_floor, other_group, other_index = place[imported]
            if other_floor > floor:
                found.append(f"{module}, line {line}: imports {imported} from floor {other_floor}, above its own {floor}")
            elif other_floor == floor and (other_group != group or other_index >= index):
                found.append(f"{module}, line {line}: imports {imported} sideways, on floor {floor}")
    for path in sorted((root / PACKAGE).rglob("__init__.py")):
        found += [f"{path.relative_to(root)}, line {line}: imports {imported}" for line, imported in imported_modules(root, path)]
    return found


def distributed_problems(root: Path) -> list[str]:
    """Uses of torch.distributed (and DDP's class) outside distributed.py."""
    found = []
    for module in sorted(modules_on_disk(root) - {"distributed"}):
        for node in nodes_of(path_of(root, module)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [dotted(node)]
            if any(name.startswith(("torch.distributed", "dist.")) or name.endswith("DistributedDataParallel") for name in names):
                found.append(f"{module}, line {node.lineno}: {names[0]}")
    return found


def is_safe_yaml(call: ast.Call, nodes: list[ast.AST]) -> bool:
    """`yaml.load(text, Loader)` with a safe loader, or with a class of the same file that is one."""
    loaders = [dotted(argument) for argument in (*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader"))]
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
                bad = bad or next((f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in UNSAFE_CALLS), "")
            elif isinstance(node, ast.Call):
                name = dotted(node.func)
                bad = f"{name}(" if name in UNSAFE_CALLS and not (name == "yaml.load" and is_safe_yaml(node, nodes)) else ""
                for keyword in node.keywords:
                    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "something"
                    if keyword.arg in ("trust_remote_code", "allow_pickle") and value is not False:
                        bad = f"{keyword.arg}={value}"
            if bad:
                found.append(f"{module}, line {node.lineno}: {bad}")
    return found


def docstring_problems(root: Path) -> list[str]:
    """Files whose docstring does not say their floor; train.py's says how to start it."""
    found = []
    for floor, groups in enumerate(FLOORS):
        for module in (module for names in groups for module in names):
            docstring = docstring_of(path_of(root, module))
            if (module == "train" and "torchrun" not in docstring) or (module != "train" and re.findall(r"Floor (\d)", docstring) != [str(floor)]):
                found.append(f"{module}: expected 'Floor {floor}' in its docstring")
    for path in sorted((root / PACKAGE).rglob("__init__.py")):
        if not docstring_of(path):
            found.append(f"{path.relative_to(root)}: expected a docstring")
    return found


def table_under(readme: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table in a section, without its head."""
    section = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, f"README.md: expected a section {heading!r}"
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in section.group(1).splitlines() if line.startswith("|")]
    return rows[2:]


def file_table_problems(root: Path, readme: str) -> list[str]:
    """Files that the README's table lacks, has twice, or has for nothing; floors that differ from FLOORS."""
    floors = {f"{PACKAGE}/{module.replace('.', '/')}.py": floor for floor, groups in enumerate(FLOORS) for names in groups for module in names if module != "train"}
    rows = table_under(readme, "## Files of the package")
    named = [(path, row) for row in rows for path in re.findall(rf"`({PACKAGE}/[\w/]+\.py)`", row[0]) if not path.endswith("__init__.py")]
    paths = [path for path, _ in named]
    there = {str(path.relative_to(root)) for path in (root / PACKAGE).rglob("*.py") if path.name != "__init__.py"}
    found = [f"README.md lacks {path}" for path in sorted(there - set(paths))] + [f"README.md names {path}, which is not there" for path in sorted(set(paths) - there)]
    found += [f"README.md names {path} twice" for path in sorted(set(paths)) if paths.count(path) > 1]
    for path, row in named:
        if len(row) > 1 and row[1].isdigit() and path in floors and int(row[1]) != floors[path]:
            found.append(f"README.md: {path} is on floor {floors[path]}, found {row[1]}")
    return found


def hook_table_problems(root: Path, readme: str) -> list[str]:
    """Rows of the README's hook table whose function is not in the file they name."""
    found = []
    rows = table_under(readme, "## Hooks of the original")
    for row in rows:
        hook, file, function = (cell.strip("`") for cell in row[:3])
        body = nodes_of(root / file)[0].body if (root / file).is_file() else []
        for name in function.split("."):  # Class.method
            body = next((node.body for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name), None)
            if body is None:
                found.append(f"README.md: hook {hook}: no {function} in {file}")
                break
    return found if rows else ["README.md: the hook table is empty"]


# ---- this project keeps them ----


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_imports_run_down_the_floors():
    assert import_problems(ROOT) == []


def test_only_one_file_uses_torch_distributed():
    assert distributed_problems(ROOT) == []
    assert "torch.distributed" in path_of(ROOT, "distributed").read_text(encoding="utf-8")


def test_nothing_is_unpickled_and_no_code_comes_from_data():
    assert unsafe_problems(ROOT) == []


def test_every_docstring_names_its_floor():
    assert docstring_problems(ROOT) == []


def test_the_readmes_file_table_is_the_folder():
    assert file_table_problems(ROOT, readme()) == []


def test_the_readmes_hook_table_names_functions_that_exist():
    assert hook_table_problems(ROOT, readme()) == []


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
        ("config", "from mmbert_core.data.table import Roles", "above its own 0"),
        ("data.table", "from mmbert_core.training.hooks import Task", "above its own 1"),
        ("training.hooks", "from mmbert_core.training import loop", "above its own 2"),
        ("training.optim", "import mmbert_core.cli", "above its own 2"),
        ("model.losses", "def late():\n    from mmbert_core.predictor import Predictor", "above its own 1"),
        ("model.losses", "from mmbert_core.data.batches import deal", "imports data.batches sideways, on floor 1"),
        ("data.dataset", "from mmbert_core.evaluation import metrics", "imports evaluation.metrics sideways, on floor 1"),
        ("data.table", "from mmbert_core.data.tokens import Tokens", "imports data.tokens sideways, on floor 1"),
        ("training.checkpoint", "from mmbert_core.training.optim import autocast", "imports training.optim sideways, on floor 2"),
        ("predictor", "from mmbert_core.training.loop import fit", "imports training.loop sideways, on floor 3"),
        ("training.loop", "from . import hooks", "imports '.'"),
        ("training.loop", "from mmbert_core.training import nothing", "imports 'training'"),
    ],
)  # fmt: skip
def test_an_import_up_or_sideways_is_found(copy, module, line, problem):
    assert import_problems(copy) == []
    plant(copy, module, line)
    [found] = import_problems(copy)
    assert found.startswith(f"{module}, line ") and problem in found


def test_a_file_without_a_floor_and_a_floor_without_a_file_are_found(copy):
    (copy / PACKAGE / "data/new.py").write_text('"""Floor 1."""\n')
    path_of(copy, "hub").unlink()
    assert set(import_problems(copy)) >= {"data.new: has no floor", "hub: has a floor, but there is no such file"}
    (copy / PACKAGE / "data/__init__.py").write_text("from mmbert_core.data.table import Roles\n")
    assert "mmbert_core/data/__init__.py, line 1: imports data.table" in import_problems(copy)


@pytest.mark.parametrize(
    "line",
    ["import torch.distributed as d", "from torch import distributed as d", "from torch.distributed import barrier", "torch.distributed.barrier()", "dist.barrier()",
     "from torch.nn.parallel import DistributedDataParallel", "nn.parallel.DistributedDataParallel(model)"],
)  # fmt: skip
def test_torch_distributed_elsewhere_is_found(copy, line):
    plant(copy, "training.hooks", line)
    [found, *_] = distributed_problems(copy)
    assert found.startswith("training.hooks, line ")


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(path)", "from torch import load", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "eval(text)", "exec(text)",
     "AutoModel.from_pretrained(name, trust_remote_code=True)", "AutoModel.from_pretrained(name, trust_remote_code=asked)", "np.load(path, allow_pickle=True)"],
)  # fmt: skip
def test_unsafe_words_are_found(copy, line):
    plant(copy, "files", f"def late(path, text, name, asked):\n    {line}")
    [found] = unsafe_problems(copy)
    assert found.startswith("files, line ")


def test_a_missing_or_wrong_floor_in_a_docstring_is_found(copy):
    path_of(copy, "files").write_text("import os\n")
    path_of(copy, "cli").write_text('"""The command line. Floor 3."""\n')
    assert docstring_problems(copy) == ["files: expected 'Floor 0' in its docstring", "cli: expected 'Floor 4' in its docstring"]


def tables_of(root: Path) -> str:
    """A README that is right."""
    floors = {module: floor for floor, groups in enumerate(FLOORS) for names in groups for module in names if module != "train"}
    rows = "\n".join(f"| `{PACKAGE}/{module.replace('.', '/')}.py` | {floor} | what it is |" for module, floor in floors.items())
    hooks = f"| `training_step` | `{PACKAGE}/training/hooks.py` | `training_step` |\n| `forward` | `{PACKAGE}/model/multimodal_bert.py` | `MultimodalBert.forward` |"
    return f"# x\n\n## Hooks of the original\n\ntext\n\n| hook | file | function |\n|---|---|---|\n{hooks}\n\n## Files of the package\n\n| file | floor | what |\n|---|---|---|\n{rows}\n\n## Limits\n"


def test_a_readme_that_drifts_is_found(copy):
    right = tables_of(copy)
    assert file_table_problems(copy, right) == [] and hook_table_problems(copy, right) == []
    assert file_table_problems(copy, right.replace("mmbert_core/hub.py` | 0", "mmbert_core/hub.py` | 1")) == ["README.md: mmbert_core/hub.py is on floor 0, found 1"]
    drifted = file_table_problems(copy, right.replace("mmbert_core/hub.py", "mmbert_core/web.py"))
    assert drifted == ["README.md lacks mmbert_core/hub.py", "README.md names mmbert_core/web.py, which is not there"]
    assert file_table_problems(copy, right.replace("mmbert_core/hub.py", "mmbert_core/demo.py"))[1] == "README.md names mmbert_core/demo.py twice"
    for old, new in (("`training_step` |\n", "`train_step` |\n"), ("MultimodalBert.forward", "MultimodalBert.backward"), ("training/hooks.py", "training/hook.py")):
        assert len(hook_table_problems(copy, right.replace(old, new))) == 1
    with pytest.raises(AssertionError, match="expected a section"):
        file_table_problems(copy, right.replace("## Files of the package", "## Files"))
