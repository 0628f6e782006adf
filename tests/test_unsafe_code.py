"""The package reads no pickle, runs no code from data, and uses torch.distributed in few modules. Read with `ast`."""

import ast
from pathlib import Path

import pytest

from tests.support.source import ROOT, append, copy_package, dotted, modules_on_disk, nodes_of, path_of

# Start and end of the process group, collectives, DDP. Other modules call their functions, identities in one process.
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


# ---- this project keeps the rules ----


def test_only_three_modules_of_runtime_use_torch_distributed():
    assert distributed_problems(ROOT) == []
    for module in USE_TORCH_DISTRIBUTED:
        assert "torch.distributed" in path_of(ROOT, module).read_text(encoding="utf-8")


def test_nothing_is_unpickled_and_no_code_comes_from_data():
    assert unsafe_problems(ROOT) == []


# ---- and a break of each rule is found ----


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_package(tmp_path)


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
    append(copy, "hooks", line)
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
    append(copy, "storage.files", f"def late(path, text, name, asked):\n    {line}")
    [found] = unsafe_problems(copy)
    assert found.startswith("storage.files, line ")
