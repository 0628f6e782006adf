"""Config files and flags -> Config: names, types, ranges, contradictions."""

import json

import pytest

from mmbert_core import cli
from mmbert_core.config import FREE_BETWEEN_NODES, FREE_ON_RESUME, SETTINGS, Config
from mmbert_core.config_reader import config_from_dict, read_config
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import DistContext
from tests.support import config_table, tiny
from tests.support.configs import REQUIRED, write


def message_of(*arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_config(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- help ----


@pytest.mark.parametrize(
    "words", [["train.py", "--help"], ["-m", "mmbert_core", "--help"], ["-m", "mmbert_core", "predict", "--help"]]
)
def test_help_of_a_process_ends_well(words):
    done = tiny.run_command(words)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


def test_help_shows_every_key_with_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, setting in SETTINGS.items():
        first = next(number for number, line in enumerate(lines) if line.strip().startswith(f"--{name} "))
        help_text = " ".join(lines[first : first + 2])  # a long flag has its help in the next line
        assert setting.meaning in help_text
        assert ("(required)" if setting.is_required else "(default: ") in help_text
    for words in (
        "--check",
        "--tokenizer",
        "--fp16",
        "auto|pooler|cls|mean",
        "(default: auroc average_precision f1_score accuracy; more than two classes: auroc f1_macro accuracy; recipe ",
        "; 0 to 100 (default: auto; recipe original: 2e-05)",
        "(default: 32)",
    ):
        assert any(words in line for line in lines)


def test_the_documentation_has_every_key_as_it_is():
    page = config_table.PAGE.read_text(encoding="utf-8")
    assert config_table.with_table(page) == page, "write it again: python -m tests.support.config_table"
    assert all(f"| `{name}` |" in page for name in SETTINGS)


def test_keys_that_may_change_on_resume_follow_from_their_settings():
    assert {name for name, setting in SETTINGS.items() if setting.may_change_on_resume} == FREE_ON_RESUME
    assert FREE_BETWEEN_NODES == {"cache_path", "model_path", "num_threads"} < FREE_ON_RESUME


# ---- names ----


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lerning_rate", None),
        ("batchsize", "batch_size"),
        ("tab_fields_list", "tab_field_list"),
        ("Lr", "lr"),
        ("max-epochs", "max_epochs"),
        ("tokeniser", "tokenizer"),
        ("epochs", "max_epochs"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, key, nearest):
    path = write(tmp_path, json.dumps({**REQUIRED, key: 1}), "run.json")
    message = message_of(path)
    assert message.startswith(f"{path}: unknown key {key!r}; ")
    assert (f"did you mean {nearest!r}?" if nearest else "lists all keys") in message


def test_unknown_flags_name_the_nearest_in_one_line(capsys):
    assert cli.main(["train", "--batchsize", "8"]) == 2
    assert capsys.readouterr().err == "error: command line: unknown flag '--batchsize'; did you mean '--batch_size'?\n"
    assert cli.main(["train", "--max_e", "8"]) == 2  # no abbreviations: a later key could change what they mean
    assert "did you mean '--max_epochs'?" in capsys.readouterr().err


@pytest.mark.parametrize("key", REQUIRED)
def test_a_required_key_that_is_missing_is_named(key):
    with pytest.raises(ValueError, match=f"'{key}' is required"):
        config_from_dict({name: value for name, value in REQUIRED.items() if name != key})


# ---- values ----


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr: 2e-4", "lr", 2e-4),  # YAML reads it as a text
        ("lr: 1", "lr", 1.0),
        ("warmup_steps: 100", "warmup_steps", 100),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("val_check_interval: 1", "val_check_interval", 1),
        ("val_check_interval: 1.0", "val_check_interval", 1.0),
        ("val_check_interval: 0.25", "val_check_interval", 0.25),
        ("val_check_interval: 200", "val_check_interval", 200),
        ("microbatches_per_step: 12", "microbatches_per_step", 12),
        ("microbatches_per_step: auto", "microbatches_per_step", "auto"),
        ("resume: never", "resume", "never"),
        ("resume: 400", "resume", 400),
        ("positive_label: 1", "positive_label", "1"),
        ("positive_label: none", "positive_label", "none"),  # a label like any other
        ("positive_label: null", "positive_label", None),
        ("class_weights: balanced", "class_weights", "balanced"),
        ("class_weights: [1, 2.5]", "class_weights", (1.0, 2.5)),
        ("text_name: body", "text_name", ("body",)),
        ("text_name: [title, body]", "text_name", ("title", "body")),
        ("tab_field_list: [1, 2]", "tab_field_list", ("1", "2")),
        ("cat_field_list:", "cat_field_list", ()),
        ("run_scheduler: off", "run_scheduler", False),
        ("head_lr: 1e-3", "head_lr", 1e-3),
        ("head_lr: none", "head_lr", None),
    ],
)
def test_values_of_a_file(tmp_path, text, key, value):
    required = "".join(f"{name}: {json.dumps(given)}\n" for name, given in REQUIRED.items() if name != key)
    found = getattr(read_config(write(tmp_path, required + text)), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lr", "2e-4"], "lr", 2e-4),
        (["--val_check_interval", "1"], "val_check_interval", 1),
        (["--val_check_interval", "1.0"], "val_check_interval", 1.0),
        (["--warmup_steps", "1e-1"], "warmup_steps", 0.1),
        (["--text_name", "title", "body"], "text_name", ("title", "body")),
        (["--tab_field_list", "age"], "tab_field_list", ("age",)),
        (["--tab_field_list"], "tab_field_list", ()),
        (["--class_weights", "1", "2.5"], "class_weights", (1.0, 2.5)),
        (["--class_weights", "balanced"], "class_weights", "balanced"),
        (["--id_name", "null"], "id_name", None),
        (["--max_train_rows", "null"], "max_train_rows", None),
        (["--encoder", "models/b"], "encoder", "models/b"),
        (["--precision", "fp32"], "precision", "fp32"),
        (["--fp16", "false"], "precision", "fp32"),
    ],
)
def test_flags_win_over_the_file(tmp_path, monkeypatch, words, key, value):
    file = {
        **REQUIRED,
        "lr": 1e-5,
        "val_check_interval": 0.5,
        "warmup_steps": 7,
        "tab_field_list": ["a", "b"],
        "class_weights": [1, 1],
        "id_name": "row",
        "max_train_rows": 10,
        "tokenizer": "models/a",
        "fp16": True,
    }
    seen: list[Config] = []

    def stop_here(config: Config, context: DistContext) -> None:
        seen.append(config)
        raise InputError("far enough")

    monkeypatch.setattr(cli, "run_training", stop_here)
    assert cli.main(["train", write(tmp_path, json.dumps(file), "run.json"), *words]) == 2
    found = getattr(seen[0], key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp16": True, "precision": "bf16"}, "fp16 is true and precision is 'bf16'"),
        ({"fp16": False, "precision": "fp16"}, "fp16 is false and precision is 'fp16'"),
        ({"fp16": False, "precision": "bf16"}, "fp16 is false and precision is 'bf16'"),
        ({"tokenizer": "a", "encoder": "b"}, "encoder is 'b' and tokenizer is 'a'"),
        ({"num_classes": 3}, "num_classes is 3 but is_binary is true"),
        ({"class_weights": [1, 2, 3]}, "class_weights: expected 2 weights (num_classes), found 3"),
        ({"class_weights": [1, -1]}, "class_weights: expected finite weights"),
        ({"class_weights": [1, float("nan")]}, "class_weights: expected finite weights"),
        ({"class_weights": [0, 0]}, "class_weights: expected finite weights"),
        ({"class_weights": "even"}, "class_weights: expected numbers or balanced or none, found 'even'"),
        ({"text_name": []}, "there is nothing to learn from"),
        ({"tab_field_list": ["label"]}, "column 'label' stands in tab_field_list and in label_name"),
        ({"cat_field_list": ["text"]}, "column 'text' stands in text_name and in cat_field_list"),
        ({"id_name": "pred"}, "id_name: 'pred' is a column that the prediction file has already"),
        ({"label_name": None}, "label_name: expected a text, found None"),
        ({"label_name": True}, "write a name in quotes"),
        ({"tab_field_list": [False]}, "write a name in quotes"),
        ({"lr": "fast"}, "lr: expected a number or auto, found 'fast'"),
        ({"lr": float("nan")}, "lr: expected a number of at least 0, found nan"),
        ({"lr": -1}, "lr: expected a number of at least 0"),
        ({"batch_size": 0}, "batch_size: expected a number of at least 1, found 0"),
        ({"batch_size": 8.5}, "batch_size: expected a whole number, found 8.5"),
        ({"max_epochs": True}, "max_epochs: expected a whole number, found True"),
        ({"run_scheduler": "maybe"}, "run_scheduler: expected true or false, found 'maybe'"),
        ({"pooling": "max"}, "pooling: expected auto or pooler or cls or mean or last, found 'max'"),
        ({"val_fraction": 0.95}, "val_fraction: expected a number of at most 0.9, found 0.95"),
        ({"val_check_interval": 1.5}, "val_check_interval: expected a share of an epoch"),
        ({"val_check_interval": 0}, "val_check_interval: expected a share of an epoch"),
        ({"early_stop_metric": "f1_score"}, "early_stop_metric: expected val_loss or val/<metric>, found 'f1_score'"),
        ({"model_path": " "}, "model_path: expected a folder"),
        ({"cache_path": "a\0b"}, "cache_path: expected a path, found a NUL character"),
        ({"seed": 2**70}, "seed: expected a number of at most 9,223,372,036,854,775,807"),
        ({"resume": "yes please"}, "resume: expected auto or never or a whole number, found 'yes please'"),
    ],
)
def test_values_that_cannot_be(tmp_path, changes, words):
    message = message_of(write(tmp_path, json.dumps({**REQUIRED, **changes}), "run.json"))
    assert message.startswith(f"{tmp_path / 'run.json'}: ") and words in message


def test_a_mistake_in_a_flag_is_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path, json.dumps(REQUIRED), "run.json")
    assert message_of(path, {"lr": "fast"}).startswith("command line: lr: expected a number or auto")
    assert message_of(path, {"num_classes": "3"}).startswith(f"{path} and command line: num_classes is 3")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.yaml", b"lr: [1, 2", "not a valid config file: while parsing"),
        ("run.json", b'{"lr": 1,}', "not a valid config file: "),
        ("run.yaml", b"lr: 1\nseed: 2\nlr: 3\n", "the key 'lr' stands in it twice"),
        ("run.json", b'{"lr": 1, "lr": 2}', "the key 'lr' stands in it twice"),
        ("run.yaml", b"label_name: 2026-02-31\n", "not a valid config file: "),
        ("run.yaml", b"label_name: \xff\n", "not a valid config file: "),
        ("run.yaml", b"- lr\n- seed\n", "expected keys with values, found list"),
        ("run.yaml", b"", "the key 'text_name' is required"),
        ("run.yaml", b"a: !!python/object/apply:os.getcwd []", "not a valid config file: "),
    ],
)
def test_files_that_are_no_config(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = message_of(str(tmp_path / name))
    assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_a_config_that_is_not_there(tmp_path):
    assert (
        message_of(str(tmp_path / "no.yaml"))
        == f"{tmp_path / 'no.yaml'}: cannot read the config file (No such file or directory)"
    )
    assert "Is a directory" in message_of(str(tmp_path))


# ---- whole configs ----


def test_columns_only_and_text_only():
    assert config_from_dict({**REQUIRED, "text_name": [], "cat_field_list": "kind"}).text_name == ()
    assert config_from_dict({**REQUIRED, "tab_field_list": None}).tab_field_list == ()


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load(path):
    config = read_config(str(path))
    assert config.train_path and config.test_path and config.model_path.startswith("runs/")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"val_check_interval": 1, "warmup_steps": 0.1, "resume": 3, "microbatches_per_step": 4, "num_threads": 2},
        {"class_weights": [1, 2.5, 0], "is_binary": False, "num_classes": 3, "lr": 1e-7, "head_lr": 1e-3},
        {"class_weights": "balanced", "positive_label": "007", "train_path": ["a.csv", "b.csv"], "max_train_rows": 9},
    ],
)
def test_to_dict_is_json_that_reads_back(changes):
    config = config_from_dict({**REQUIRED, **changes})
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert {name: type(value) for name, value in vars(again).items()} == {
        name: type(value) for name, value in vars(config).items()
    }
