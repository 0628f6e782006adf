"""Words that this project does not use, in identifiers and in prose: `python -m tests.test_words [FILE ...]`."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmbert_core", "tests", "benchmarks", "docs", "examples", ".ci")
SUFFIXES = {".py", ".md", ".sh", ".cfg", ".toml", ".yaml", ".html", ".css", ".js", ".txt", ""}

# Identifiers, and what stands between the underscores or capitals of one: MAX_X and text_x hold the word x.
# The assignments to these names are the only lines of the project that are not searched:
OWN_LISTS = ("IDENTIFIERS", "PHRASES", "ALLOWED", "EXAMPLES")
IDENTIFIERS = frozenset(
    """
    made hand hands deal deals agree sound place places part parts cut cuts shown scored judge judged judgement
    assessment ahead patient wing wings room rooms floor floors beside settle settles settled unsettled broken_rows
    """.split()
)
PHRASES = tuple(
    re.compile(rf"(?<![\w-])(?:{line.strip().replace(' ', chr(92) + 's+')})(?![\w-])", re.IGNORECASE)
    for line in """
        beside
        judg(?:e|es|ed|ing|ement|ements|ment|ments)
        assessments?
        settl(?:e|es|ed|ing)|unsettled
        (?:im)?patient
        no (?:finite )?number
        numbers? that (?:is|are) none
        earlier li(?:fe|ves)|li(?:fe|ves) of (?:this|the|a) run
        (?:in )?mid-run
        go(?:es|ing)? on|gone on|went on
        sp[eo]ke for|speaks? for
        that know the label|knows? the label
        words of the command line
        dealt|deals? (?:to|out|with)|hand(?:s|ed)? (?:to|over|out|on|back|down)|handed|at hand
        floors? [0-9]+|(?:the|a|lower|upper|higher) floors?|wings?|rooms?
        what (?:it|text|a \\w+|the \\w+) (?:is|are) worth|(?:is|are) worth
        (?:is|are|be) told|as it lies|to be had|in spite of|whoever|two questions old
        in the place of|(?:has|have|finds?) no place|no place for
        (?:is|are|was|were|be|been|gets?) cut|cut (?:off|short|into|to|at)
    """.strip().splitlines()
)

# Words that are not ours to choose, or must not change: (file, or "*" for all; word; why).
ALLOWED = (
    ("*", "*.parts", "an attribute of pathlib's paths, read only"),
    ("*", "*.floor", "a function of math, numpy and torch"),
    ("mmbert_core/demo/sample.py", "settle", "in a generated message: other words would change the sample"),
)


def files(root: Path = ROOT) -> list[Path]:
    """Every document and source file of the project."""
    found = [path for path in root.iterdir() if path.suffix or path.name == ".gitignore"]
    found += [path for folder in FOLDERS for path in (root / folder).rglob("*")]
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.suffix in SUFFIXES
        and not {"__pycache__", ".git"} & set(path.relative_to(root).parts)
    )


# ---- identifiers ----


def words_of(identifier: str) -> list[str]:
    """`_read_CutPart` -> read, cut, part: between underscores, and at the capitals of a class name."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return [word for word in spaced.lower().split("_") if word]


def banned_words(identifier: str) -> list[str]:
    """A test's name is a sentence (`sentences_in`); most, fewest and longest are banned in constants alone."""
    words = [] if identifier.startswith("test_") else words_of(identifier)
    found = [word for word in words if word in IDENTIFIERS]
    found += [word for word in IDENTIFIERS if "_" in word and word in identifier]
    return found + [word for word in words[:1] if word in ("most", "fewest", "longest") and identifier.isupper()]


def identifiers_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and identifier of names, arguments, functions, classes and imports; `*.x` is an attribute that is read."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute):
            yield line, f"*.{node.attr}" if isinstance(node.ctx, ast.Load) else node.attr
        elif isinstance(node, ast.alias):
            yield from ((line, name) for name in (*node.name.split("."), *([node.asname] if node.asname else [])))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((line, name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((line, name) for name in (node.module or "").split("."))
        else:
            yield from (
                (line, name)
                for field in ("id", "arg", "name", "rest")
                if isinstance(name := getattr(node, field, None), str)
            )


def identifier_hits(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, identifier in identifiers_in(tree):
        if any(file in ("*", path) and identifier == name for file, name, _ in ALLOWED):
            continue
        if banned_words(identifier.removeprefix("*.")):
            yield line, identifier.removeprefix("*.")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == "at":
            yield node.lineno, node.name


def template_hits(text: str) -> Iterator[tuple[int, str]]:
    """Names that scripts, templates and shell files define."""
    for match in re.finditer(
        r"\b(?:const|let|var|function|set|for|macro) +(\w+)|^ *(\w+)(?: =|=| *\(\) *\{)", text, re.MULTILINE
    ):
        if banned_words(match.group(1) or match.group(2)):
            yield text.count("\n", 0, match.start()) + 1, match.group(1) or match.group(2)


# ---- prose ----


def comments_in(source: str) -> Iterator[tuple[int, str]]:
    """Comments, those of consecutive lines as one text, so that a phrase is found across a line break."""
    first, lines = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if lines and token.start[0] != first + len(lines):
                yield first, "\n".join(lines)
                lines = []
            first = first if lines else token.start[0]
            lines.append(token.string.lstrip("#"))
    if lines:
        yield first, "\n".join(lines)


def sentences_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of tests, strings, and among them docstrings; an f-string without its values is one text."""
    inner = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            values = [value.value if isinstance(value, ast.Constant) else "{}" for value in node.values]
            yield node.lineno, "".join(map(str, values))
        elif isinstance(node, ast.Constant) and id(node) not in inner:
            if isinstance(node.value, str):
                yield node.lineno, node.value
            elif isinstance(node.value, bytes):
                yield node.lineno, node.value.decode("latin-1")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def phrase_hits(texts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for first, text in texts:
        for phrase in PHRASES:
            for match in phrase.finditer(text):
                yield first + text.count("\n", 0, match.start()), " ".join(match.group().split())


def own_lists(tree: ast.Module) -> list[range]:
    """The lines of this file's own lists."""
    return [
        range(node.lineno, node.end_lineno + 1)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in OWN_LISTS
    ]


# ---- a file ----


def hits(path: Path, root: Path = ROOT) -> list[str]:
    """`file:line: word` of each banned word."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    found = [(1, word) for word in path.relative_to(root).with_suffix("").parts if banned_words(word)]
    if path.suffix == ".py":
        tree = ast.parse(text)
        found += [*identifier_hits(name, tree), *phrase_hits(comments_in(text)), *phrase_hits(sentences_in(tree))]
        if name == "tests/test_words.py":
            own = own_lists(tree)
            found = [(line, word) for line, word in found if not any(line in lines for lines in own)]
    else:
        plain = re.sub(r"^[ \t]*(?:#(?!#)|//|\*|<!--)", "", text, flags=re.MULTILINE)  # comment marks within a phrase
        found += phrase_hits(iter([(1, plain)]))
        found += template_hits(text) if path.suffix not in (".md", ".txt") or "templates" in path.parts else []
    allowed = {word for file, word, _ in ALLOWED if file == name}
    return [f"{name}:{line}: {word}" for line, word in sorted(set(found)) if word not in allowed]


def all_hits(paths: list[Path]) -> list[str]:
    return [hit for path in paths for hit in hits(path)]


def test_no_banned_word_is_left():
    assert all_hits(files()) == []


# ---- every word is found where it is used, and nothing else is ----


def planted(root: Path, text: str, name: str = "mmbert_core/planted.py") -> list[str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    assert path in files(root)
    return hits(path, root)


IN_CODE = (
    "{} = 1",
    "def {}(): pass",
    "def f({}): pass",
    "x.{} = 1",
    "f({}=1)",
    "class A:\n    {}: int",
    "import numpy as {}",
    "f'{{{}}}'",
    "lambda {}: 1",
    "try:\n    x()\nexcept E as {}:\n    pass",
    "first_{} = 1",
    "def read_{}(): pass",
    "MAX_{} = 1",
)


@pytest.mark.parametrize("form", IN_CODE)
def test_every_identifier_is_found(tmp_path, form):
    for word in IDENTIFIERS:
        assert planted(tmp_path, form.format(word)), word
        assert word == "broken_rows" or planted(tmp_path, f"class {word.capitalize()}Rows: pass")


TEMPLATE_LINES = (
    "const {} = 1;",
    "function {}() {{",
    "{{% set {} = 1 %}}",
    "{{% for {} in rows %}}",
    "{{% macro {}(x) %}}",
    "{}=1",
    "{}() {{",
)


@pytest.mark.parametrize("line", TEMPLATE_LINES)
def test_names_of_scripts_and_templates_are_found(tmp_path, line):
    for word in IDENTIFIERS:
        for name in ("torchrun.sh", ".ci/run", "mmbert_core/serve/templates/page.html", "mmbert_core/serve/serve.js"):
            assert planted(tmp_path, f"x\n{line.format(word)}\n", name)[0].startswith(f"{name}:2: "), (word, name)


def test_constants_functions_and_file_names_are_found(tmp_path):
    for line in ("MOST_ROWS = 1", "FEWEST_ROWS = 1", "LONGEST_SECONDS = 1", "settle_metrics()", "def at(x): pass"):
        assert len(planted(tmp_path, line)) == 1, line
    assert planted(tmp_path, "x = 1", "mmbert_core/read_parts.py")


EXAMPLES = """
    a row beside it; we judge it; a judgement; its assessment; it was settled; patient=True; no number; no finite number
    an earlier life; a life of this run; in mid-run; it goes on; going on; it was gone on with; it spoke for it
    columns that know the label; the words of the command line; it is dealt to; at hand; handed over; floor 3; a wing
    rooms; what it is worth; it is told; as it lies; to be had; in spite of; whoever reads; two questions old
    in the place of it; it has no place; texts are cut; cut off
"""


@pytest.mark.parametrize("phrase", [example.strip() for example in EXAMPLES.strip().replace("\n", ";").split(";")])
def test_a_phrase_is_found_in_each_kind_of_text(tmp_path, phrase):
    broken = phrase.replace(" ", "\n# ")
    for text in (f"# {phrase}", f"# {broken}", f'"""{phrase}"""', f'x = f"{{y}} {phrase}"', f'x = b"{phrase}"'):
        assert planted(tmp_path, text), text
    for name in ("README.md", "docs/a.md", "torchrun.sh", ".ci/run", "mmbert_core/serve/templates/form.html"):
        found = planted(tmp_path, f"first\n{phrase}\n", name)
        assert found and found[0].startswith(f"{name}:2: ")


def test_a_tests_name_is_read_as_a_sentence(tmp_path):
    assert planted(tmp_path, "def test_it_goes_on(): pass", "tests/test_planted.py") == [
        f"tests/test_planted.py:1: {'_'.join(('goes', 'on')).replace('_', ' ')}"
    ]


def test_only_the_lists_themselves_are_skipped(tmp_path):
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(own_lists(ast.parse(source))) == len(OWN_LISTS)
    assert planted(tmp_path, source, "tests/test_words.py") == hits(Path(__file__))
    more = planted(
        tmp_path, f"{source}\n{min(IDENTIFIERS)} = 1  # {EXAMPLES.strip().split(';')[0]}\n", "tests/test_words.py"
    )
    assert len(more) == len(hits(Path(__file__))) + 2
    assert len(planted(tmp_path, source, "tests/test_other.py")) > len(more)  # the same lists elsewhere are found


def test_words_of_the_field_are_not_found(tmp_path):
    attributes = [name.removeprefix("*.") for file, name, _ in ALLOWED if file == "*"]
    assert planted(tmp_path, "\n".join(f"x.{name}" for name in attributes)) == []
    assert len(planted(tmp_path, "\n".join(f"x.{name} = 1" for name in attributes))) == len(attributes)
    for file, word, _ in ALLOWED:
        if file != "*":  # in this file alone
            assert planted(tmp_path, f"x = '{word}'") and not planted(tmp_path, f"x = '{word}'", file)
    assert planted(tmp_path, "placeholder = partition = cutoff = early_stop_patience = handle = 1  # numbers") == []


if __name__ == "__main__":
    listed = all_hits([Path(name).resolve() for name in sys.argv[1:]] or files())
    print(*listed, f"{len(listed)} words", sep="\n")
    sys.exit(1 if listed else 0)
