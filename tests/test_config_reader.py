"""Config files of every kind: bounded time, memory and messages; tables given by mistake; names of other programs."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from mmbert_core import cli
from mmbert_core.config import SETTINGS
from mmbert_core.config_file import MAX_BYTES, MAX_KEYS
from mmbert_core.config_reader import ALIASES, config_from_dict, read_config
from mmbert_core.config_synonyms import SYNONYMS
from mmbert_core.runtime.errors import InputError
from tests.support import tiny
from tests.support.configs import REQUIRED, write

SEEDS = [path.read_text(encoding="utf-8") for path in sorted((tiny.ROOT / "examples").glob("*.yaml"))] + [
    "text_name: [text]\nlabel_name: label\nmodel_path: runs/x\nlr: 2e-4\nclass_weights: [1, 2.5]\n",
    "common: &cols [age, 'amount']\ntext_name: &t text\ntab_field_list: *cols\nlabel_name: !!str 1\n<<: {seed: 1}\n",
    "{text_name: text, ? label_name : 'it''s', model_path: \"a\\u0041\\x42\", seed: 0x1F, lr: 1:30, "
    "id_name: 2026-01-31, fp16: !!bool yes}\n",
]
PIECES = r"""
    !!python/name:os.system *a *common *cols [ ] { } , ' " # 0x 0b 0o 1:59:59 1_0 .inf -.nan = ~ 1e999 2026-02-31
    2026-01-01T99:99:99 null yes [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[
""".split()
PIECES += ["!!int ", '!!int ""', '!!bool "maybe"', "!!float x", "!!timestamp x", "!!null 1", "!!binary '*'"]
PIECES += ["!!set {a}", "!!omap [a]", "!!pairs [1]", "!!merge x", "!!seq x", "!!map [1]", "!!str [1]"]
PIECES += ["!!python/object/apply:os.system [true]", "!x ", "!<tag:yaml.org,2002:int> ", "! ", "&a ", "&cols "]
PIECES += ["<<: *cols", "<<: ", "? ", ": ", "- ", "|\n", ">\n", "|9\n", "---\n", "...\n", "%YAML 1.1\n"]
PIECES += ["%YAML 9.9\n", "%TAG ! x\n", "\t", "\x00", "\x07", "\u2028", "\ufeff", "\ud83d\ude00", "\\ud800"]
PIECES += ['"\\ud800"', "\r", "\r\n", "9" * 120, "x" * 2000, "{a: " * 30, "- " * 40]


def message_of(path: str) -> str:
    """What a file is refused with: one line that names it, short whatever the file holds."""
    with pytest.raises(InputError) as caught:
        read_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) - len(path) <= 450, message
    return message


# ---- YAML ----


def bomb(levels: int, width: int, leaf: str = "x") -> str:
    lines = [f"a0: &a0 [{', '.join([leaf] * width)}]"]
    return (
        "\n".join(
            [*lines, *(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels))]
        )
        + "\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        bomb(9, 9),
        bomb(9, 9) + "label_name: *a8\n",
        bomb(6, 5) + "text_name: *a5\n",
        bomb(25, 2),
        bomb(3, 40, '"' + "x" * 300 + '"'),
        f"label_name: &x {'x' * 60_000}\ntext_name: [{', '.join(['*x'] * 500)}]\n",
        "a: &a {k1: 1, k2: 2}\n"
        + "".join(
            f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}' if level else '*a'] * 9)}]}}\n"
            for level in range(8)
        ),
        "a: &a [*a]\n",
        "a: &a {<<: *a}\n",
        "a: &a {b: *a}\n",
    ],
)
def test_aliases_that_stand_for_more_than_a_config_holds(tmp_path, text):
    started = time.process_time()
    tracemalloc.start()
    try:
        message_of(write(tmp_path, text))
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10


def test_a_few_aliases_are_fine(tmp_path):
    config = read_config(
        write(
            tmp_path,
            "text_name: text\nlabel_name: label\nmodel_path: r\n"
            "tab_field_list: &columns [age, amount]\nslice_columns: *columns\n",
        )
    )
    assert config.slice_columns == config.tab_field_list == ("age", "amount")


@pytest.mark.parametrize(
    "value",
    [
        '!!int ""',
        '!!int "x"',
        '!!bool "maybe"',
        '!!float ""',
        "!!float x",
        "!!timestamp x",
        '!!timestamp ""',
        "2026-02-31",
        "!!binary '*'",
        "!!int [1]",
        "!!seq x",
        "!!set [1]",
        "!!omap [x]",
        "!!python/object/apply:os.getcwd []",
        "!!python/tuple [1]",
        "!unknown x",
        "1:" + "1:" * 60 + "1",
        "0x" + "f" * 200,
        "{[a]: 1}",
        "{{a: 1}: 1}",
        "!!merge x",
        "=",
        "!!int {a: 1}",
    ],
)
def test_tags_that_do_not_fit_their_value(tmp_path, value):
    message = message_of(write(tmp_path, f"text_name: text\nlabel_name: label\nmodel_path: r\nmax_epochs: {value}\n"))
    assert "(line 4, column" in message or "max_epochs: " in message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 100_000,
        "a:\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1, 900)),
        '{"a": ' * 50_000,
    ],
)
@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_deep_nesting(tmp_path, text, name):
    started = time.process_time()
    message_of(write(tmp_path, text, name))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_forty_thousand_keys_take_less_than_two_seconds(tmp_path, name):
    keys = {f"key_{number}": number for number in range(40_000)}
    text = json.dumps(keys) if name.endswith("json") else "".join(f"{key}: {value}\n" for key, value in keys.items())
    started = time.process_time()
    message = message_of(write(tmp_path, text, name))
    assert time.process_time() - started < 2
    assert "key_0" in message and (f"{MAX_KEYS:,} keys" if name.endswith("yaml") else "and 39,995 more") in message


def test_a_few_unknown_keys_are_all_named(tmp_path):
    message = message_of(write(tmp_path, "learning_rate: 1\nbatchsize: 8\nnonsense: 1\nlr: 1\n"))
    for words in (
        "'learning_rate' (did you mean 'lr'?)",
        "'batchsize' (did you mean 'batch_size'?)",
        "'nonsense'",
        "lists all keys",
    ):
        assert words in message


@pytest.mark.parametrize("key", ["x" * 500_000, "é" * 100_000, "lr\\n" * 1000])
def test_long_names_and_values_are_shortened_in_messages(tmp_path, key):
    for text in (
        f'"{key}": 1\n',
        f'lr: "{key}"\n',
        f'fp16: true\nprecision: "{key}"\n',
        f'tokenizer: a\nencoder: "{key}"\n',
        f'early_stop_metric: "{key}"\n',
    ):
        message_of(
            write(tmp_path, "text_name: text\nlabel_name: label\nmodel_path: r\n" * (not text.startswith('"')) + text)
        )


def test_a_file_of_more_than_a_megabyte(tmp_path):
    assert f"at most {MAX_BYTES:,} bytes" in message_of(write(tmp_path, "#" * (MAX_BYTES + 1)))


def mutated(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 6)):
        start, kind = rng.randrange(len(text) + 1), rng.randrange(6)
        if kind == 0:
            text = text[:start] + rng.choice(PIECES) + text[start:]
        elif kind == 1:
            text = text[:start] + text[start + rng.randrange(1, 20) :]
        elif kind == 2:
            codes = [rng.randrange(*bounds) for bounds in ((128,), (0x3000,), (0xD800, 0xE000), (0x110000,))]
            text = text[:start] + chr(rng.choice(codes)) + text[start + 1 :]
        elif kind == 3:
            other = rng.choice(SEEDS)
            text = text[:start] + other[rng.randrange(len(other)) :]
        elif kind == 4:
            end = start + rng.randrange(60)
            text = text[:start] + text[start:end] * rng.randrange(2, 6) + text[end:]
        else:  # the value of a line
            lines = text.split("\n")
            row = rng.randrange(len(lines))
            lines[row] = (
                lines[row].partition(":")[0] + ": " + "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 4)))
            )
            text = "\n".join(lines)
    return text


def tried(folder: Path, rng: random.Random, name: str) -> bool:
    """Whether a mutated file is refused, in one line and in time."""
    text, started = mutated(rng), time.process_time()
    path = write(folder, text, name)
    try:
        read_config(path)
        return False
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) - len(path) <= 600, message
        message.encode("utf-8", "backslashreplace")
        return True
    finally:
        assert time.process_time() - started < 2, text


def test_mutated_yaml_is_read_or_refused_in_one_line(tmp_path):
    rng, started, refused = random.Random(20), time.process_time(), 0
    for number in range(1500):
        refused += tried(tmp_path, rng, "run.yaml" if number % 10 else "run.json")
    assert 500 < refused and time.process_time() - started < 60


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(4))
def test_many_mutations_of_yaml(tmp_path, seed):
    rng = random.Random(1000 + seed)
    assert sum(tried(tmp_path, rng, "run.yaml") for _ in range(2500)) > 1000


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30), "checkpoints/" * 400])
@pytest.mark.parametrize("key", ["model_path", "cache_path"])
def test_a_folder_whose_name_is_too_long_is_refused_in_one_line(tmp_path, key, name, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,x\nb,y\n" * 20)
    keys = {
        "text_name": "text",
        "label_name": "label",
        "train_path": str(rows),
        "encoder": "none",
        "model_path": "run",
    } | {key: name}
    path = write(tmp_path, json.dumps(keys), "run.json")
    assert getattr(read_config(path), key) == name
    assert cli.main(["train", path, "--check"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}: ") and line.endswith("File name too long") and len(line) < 600


# ---- what is no config ----


def test_a_table_in_place_of_the_config_is_called_one(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "rows.parquet")
    rows = 'id,text,label\n1,"a, b: c",x\n2,d,y\n'
    for name, content, kind in (
        ("rows.csv", rows, "looks like a table"),
        ("rows.txt", rows, "looks like a table"),
        ("rows.tsv", rows.replace(",", "\t"), "looks like a table"),
        ("rows.yaml", "a;b;c\n1;2;3\n", "table"),
        ("one.csv", "text,label\n", "--train_path"),
        ("big.csv", rows * 50_000, "looks like a table"),
        ("latin.csv", rows.encode() + b"3,\xe4\xf6,x\n", "looks like a table"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n', "looks like a table"),
        ("rows.xlsx", b"PK\x03\x04" + bytes(50), "Excel workbook"),
        ("old.xls", b"\xd0\xcf\x11\xe0" + bytes(50), "Excel workbook"),
        ("rows.csv.gz", b"\x1f\x8b" + bytes(20), "gzip"),
        ("rows.parquet", (tmp_path / "rows.parquet").read_bytes(), "Parquet"),
        ("rows.conf", (tmp_path / "rows.parquet").read_bytes(), "Parquet"),
    ):
        path = write(tmp_path, content, name)
        message = message_of(path)
        assert kind in message and "--train_path" in message, message
        assert cli.main(["train", path, "--check"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


# ---- names of other programs ----


def test_synonyms_lead_to_keys_and_are_no_keys():
    known = [*SETTINGS, *ALIASES]
    assert set(SYNONYMS.values()) <= set(known) and not set(SYNONYMS) & set(known)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("text_column", "text_name"),
        ("learning_rate", "lr"),
        ("epochs", "max_epochs"),
        ("label", "label_name"),
        ("target", "label_name"),
        ("id", "id_name"),
        ("num_epochs", "max_epochs"),
        ("num_train_epochs", "max_epochs"),
        ("batch", "batch_size"),
        ("max_len", "max_length"),
        ("max_seq_length", "max_length"),
        ("model", "encoder"),
        ("output_dir", "model_path"),
        ("categorical_columns", "cat_field_list"),
        ("numerical_columns", "tab_field_list"),
        ("Learning-Rate", "lr"),
        ("random_state", "seed"),
    ],
)
def test_names_of_other_programs_get_the_right_key(word, key, capsys):
    with pytest.raises(InputError, match=f"did you mean '{key}'"):
        config_from_dict({**REQUIRED, word: 1})
    assert cli.main(["train", f"--{word}", "1"]) == 2
    assert f"did you mean '--{key}'?" in capsys.readouterr().err
