"""The documents: links resolve, every command and config parses, and the README's example runs on a tiny model."""

import ast
import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

from mmbert_core import cli
from mmbert_core.cli_arguments import build_parser, parse
from mmbert_core.config import SETTINGS
from mmbert_core.config_reader import read_config
from mmbert_core.runtime.errors import InputError
from mmbert_core.serve.server import METHODS
from tests.support import tiny

ROOT = tiny.ROOT
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "benchmarks/README.md"]
FEW = {"max_epochs": 1, "num_threads": 1, "max_length": 32, "log_every": 100, "val_fraction": 0.3, "batch_size": 16}
MAX_README_BYTES = 12_000
MAX_COLUMNS = 160  # of prose and lists; tables and fenced blocks may be wider
OTHER_PROGRAMS_FLAGS = {"--max-restarts", "--shutdown-timeout", "--standalone", "--preload", "--KEY", "--key"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- what a page holds ----


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problem(path: Path, link: str) -> str:
    if link.startswith(("https://", "http://")):
        return ""
    target, _, anchor = link.partition("#")
    file = (path.parent / target).resolve() if target else path
    if not file.exists() or ROOT not in file.parents:
        return f"{name_of(path)}: no file {target}"
    return f"{name_of(path)}: no heading for #{anchor} in {file.name}" if anchor and anchor not in anchors(file) else ""


def shell_commands(text: str) -> list[list[str]]:
    """The simple commands of a block: split at line ends, | and &&, without comments and assignments."""
    text = re.sub(r"(^|\s)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    commands, command = [], []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;\n"):
            commands += [command] if command else []
            command = []
        elif command or not re.match(r"[A-Z_]+=", word):
            command.append(word)
    return commands


# ---- does a command parse ----


def extras() -> set[str]:
    section = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) =", section, re.MULTILINE))


def module_flags(module: str) -> set[str]:
    """The flags of a script that is run with `python -m`, and those of a config."""
    files = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "benchmarks/common.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {word for word in words if word.startswith("--")} | {f"--{key}" for key in SETTINGS}


def check_command(words: list[str]) -> None:
    """Raise `AssertionError` or `InputError` for a command that does not exist or has unknown arguments."""
    program, arguments = words[0], words[1:]
    if program == "mmbert":
        parse(arguments)
    elif program == "./torchrun.sh":
        parse(["train", *arguments])
    elif program == "torchrun":
        launched = get_args_parser().parse_args(arguments)
        module = launched.training_script if launched.module else None
        check_command(["python", *(["-m"] if module else []), launched.training_script, *launched.training_script_args])
    elif program == "python" and arguments[0] == "train.py":
        parse(["train", *arguments[1:]])
    elif program == "python" and arguments[:2] == ["-m", "mmbert_core"]:
        parse(arguments[2:])
    elif program == "python" and arguments[0] == "-m":
        flags = [word for word in arguments if word.startswith("--")]
        assert set(flags) <= module_flags(arguments[1]), words
    elif program == "python":
        assert arguments[0].endswith("/example.py") and len(arguments) == 3, words
    elif program == "pytest":
        markers = set(re.findall(r"^    (\w+): ", (ROOT / "setup.cfg").read_text(), re.MULTILINE))
        for flag, value in zip(arguments, [*arguments, ""][1:], strict=True):
            assert flag != "-m" or set(re.findall(r"\w+", value)) - {"and", "not", "or"} <= markers, words
            assert not flag.startswith("tests/") or (ROOT / flag).exists(), words
    elif program == "pip":
        asked = re.findall(r"\[(.*?)\]", " ".join(arguments))
        assert arguments[0] == "install" and set(",".join(asked).split(",")) - {""} <= extras(), words
    elif program == "curl":
        assert any(word.endswith(path) for word in words for path in METHODS if path != "/"), words
        assert isinstance(json.loads(words[words.index("-d") + 1]), dict)
    else:
        assert program in ("zcat", "cut"), words


def inline_code(path: Path) -> Iterator[str]:
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path)))


def command_flags(command: str) -> set[str]:
    """The flags of one of our commands, or of all of them."""
    subparsers = build_parser()._subparsers._group_actions[0].choices
    parsers = [subparsers[command]] if command else list(subparsers.values())
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


# ---- this project's documents ----


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(path):
    assert [problem for link in links(path) if (problem := link_problem(path, link))] == []


def test_paths_in_comments_of_scripts_and_examples_exist():
    for path in [ROOT / "torchrun.sh", ROOT / ".ci/run", *(ROOT / "examples").iterdir()]:
        for found in re.findall(r"\b(?:docs|examples|benchmarks)/[\w.-]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / found).exists(), f"{name_of(path)}: {found}"


def test_paths_in_prose_exist():
    for path in PAGES:
        for code in inline_code(path):
            if re.fullmatch(r"(?:mmbert_core|tests|benchmarks|docs|examples)/[\w./-]+", code):
                assert (ROOT / code).exists(), f"{name_of(path)}: {code}"


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.read_bytes()) <= MAX_README_BYTES
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert [name_of(page) for page in PAGES[1:] if page not in linked] == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_page_leads_back_and_to_related_pages(path):
    linked = {(path.parent / link.partition("#")[0]).resolve() for link in links(path)}
    assert README in linked and len(linked & set(DOCS) - {path}) >= 2


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_lines_can_be_read(path):
    wide = [line for line in prose(path).splitlines() if len(line) > MAX_COLUMNS and not line.startswith("|")]
    assert wide == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_parses(path):
    for text in blocks(path, "sh"):
        for words in shell_commands(text):
            check_command(words)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_in_a_sentence_parses(path):
    for code in inline_code(path):
        words = code.split()
        if code.startswith("--"):
            assert words[0] in command_flags("") | OTHER_PROGRAMS_FLAGS, code
        elif words[0] == "mmbert" and len(words) > 1 and words[1] != "COMMAND":
            assert {word for word in words if word.startswith("--")} <= command_flags(words[1]), code
        elif words[0] in ("python", "pytest", "pip") and not {"--help", "COMMAND"} & set(words):
            check_command(shlex.split(code))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_setting_in_a_sentence_is_one(path):
    for code in inline_code(path):
        if found := re.fullmatch(r"([a-z_]+): .+", code):
            assert found.group(1) in SETTINGS, f"{name_of(path)}: {code}"


def test_every_config_is_read(tmp_path):
    configs = [text for path in PAGES for text in blocks(path, "yaml")]
    assert configs
    for text in [*configs, *(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.yaml"))]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        read_config(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_python_block_compiles(path):
    for text in blocks(path, "python"):
        ast.parse(text)


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    starts = re.findall(r"""readme_command (?:'([^']+)'|"([^"]+)")""", ci)
    starts = {first or second for first, second in starts}
    commands = "".join(blocks(README, "sh")).splitlines()
    assert len(starts) == 2
    assert all(sum(line.startswith(start) for line in commands) == 1 for start in starts)
    for path in re.findall(r"\btests/[\w/]+\.py\b|\btests/\w+(?=\s)", ci):
        assert (ROOT / path).exists(), path


# ---- the checks find what is wrong ----


@pytest.mark.parametrize(
    "command",
    [
        "mmbert predict runs/a new.csv",
        "mmbert predict runs/a new.csv out.tsv --treshold 0.7",
        "mmbert evluate runs/a new.csv",
        "python train.py run.yaml --learning_rate 1",
        "torchrun --standalone --nproc_per_node=2 train.py run.yaml --lrr 1",
        "torchrun --processes=2 train.py",
        "./torchrun.sh run.yaml --lrr 1",
        "python -m benchmarks.scaling rows --size 1",
        "pytest -m faults",
        "pytest tests/nowhere",
        "pip install -e '.[tests]'",
        "curl -d '{' http://127.0.0.1:8000/predict",
        "make all",
    ],
)
def test_a_wrong_command_is_found(command):
    [words] = shell_commands(command)
    with pytest.raises((AssertionError, InputError, SystemExit, ValueError)):
        check_command(words)


def test_commands_of_a_block():
    text = "# first\nA=1   # a folder\nzcat a.gz | cut -f 1 && pytest \\\n    -m gpu\ncurl -d '{\n}'\n"
    assert shell_commands(text) == [
        ["zcat", "a.gz"],
        ["cut", "-f", "1"],
        ["pytest", "-m", "gpu"],
        ["curl", "-d", "{\n}"],
    ]


@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/results.md#nothing", "#nothing", "../elsewhere.md"])
def test_a_broken_link_is_found(link):
    assert link_problem(README, link)
    assert not link_problem(README, "docs/results.md#long-dialogues-five-classes")


# ---- the README's own data, trained and predicted ----


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The folder of a user with the README's config, on a tiny encoder and the columns that the config names."""
    folder = tmp_path_factory.mktemp("project")
    [config] = blocks(README, "yaml")
    encoder = tiny.write_encoder(folder / "encoder")
    text = re.sub("encoder: .*", f"encoder: {encoder}", config) + "".join(f"{k}: {v}\n" for k, v in FEW.items())
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    rng = np.random.default_rng(0)
    for name, num_rows in (("data/train.csv", 160), ("data/test.csv", 40), ("new.csv", 5)):
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            numbers, categories = ["order_value", "account_age_days"], ["item_category", "ship_country"]
            writer.writerow(["message_id", "subject", "message", *numbers, *categories, "verdict"])
            for row in range(num_rows):
                words = rng.choice(tiny.WORDS, size=8)
                cells = [f"{name}-{row}", words[0], " ".join(words), *rng.integers(0, 100, 2), "toys", "NL"]
                writer.writerow([*cells, "abuse" if "pay" in words or "outside" in words else "fine"])
    return folder


def run_block(text: str, name: str) -> None:
    quick = FEW | {"blend": "none", "head_first": "never"}
    text = text.replace('encoder="bert-base-cased"', 'encoder="encoder", **quick').replace('blend="none"', "**quick")
    exec(compile(text, name, "exec"), {"__name__": "__main__", "quick": quick})


def test_the_readmes_python_and_the_pages_run(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    [text] = blocks(README, "python")
    run_block(text, "README.md")
    assert "test/auroc" in capsys.readouterr().out and (project / "models/abuse/model.safetensors").is_file()
    for text in blocks(ROOT / "docs/python-api.md", "python"):
        run_block(text, "docs/python-api.md")
    assert (project / "runs/focal/model.safetensors").is_file() and (project / "predictions.tsv").is_file()


def test_the_readmes_commands_run(project, monkeypatch):
    monkeypatch.chdir(project)
    commands = [words for text in blocks(README, "sh") for words in shell_commands(text)]
    own = [words for words in commands if "run.yaml" in words or words[0] == "mmbert"]
    assert [words[0] for words in own] == ["python", "./torchrun.sh", "mmbert"]
    for words in own:
        assert cli.main(words[1:] if words[0] == "mmbert" else ["train", *words[words[0] == "python" :][1:]]) == 0
    assert len((project / "predictions.tsv").read_text().splitlines()) == 6
