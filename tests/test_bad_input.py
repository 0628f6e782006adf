"""Bad configs, data and model folders: one line on stderr, exit code 2, and an earlier run is not changed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.inference import new_rows
from mmbert_core.runtime.errors import InputError
from tests.support import tiny
from tests.support.bad_tables import PREDICT_TABLES, TRAINING_FILES, TRAINING_TABLES, as_csv, read_rows


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """Tables, an encoder, and `run`: a finished run that no failed start may change."""
    folder = tmp_path_factory.mktemp("earlier")
    tiny.train(Config(**tiny.settings(folder, max_epochs=1)))
    return folder


def error_of(capsys, *words: str) -> str:
    """Run a command that must end with exit code 2; returns the message after `error: `."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    errors = [line for line in lines if "error" in line.split(":")[0].lower()]
    assert len(errors) == 1 and errors[0] == lines[-1] and errors[0].startswith("error: "), output.err
    assert "Traceback" not in output.err and output.out == ""
    return errors[0].removeprefix("error: ")


def assert_one_line(capsys, earlier: Path, config: Path, *expected: str) -> None:
    """`--check` and the training itself print the same line with the expected words, and do not change `earlier`."""
    before = tiny.file_hashes(earlier)
    messages = {error_of(capsys, "train", config, *more) for more in (["--check"], [])}
    assert len(messages) == 1
    [message] = messages
    for words in expected:
        assert words in message, message
    assert tiny.file_hashes(earlier) == before
    assert not list(earlier.rglob(".tmp-*")) and not list(config.parent.rglob(".tmp-*"))


def write_config(folder: Path, earlier: Path, **changes: Any) -> Path:
    values = tiny.settings(earlier, max_epochs=1)
    values |= {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    (folder / "run.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder / "run.json"


# ---- tables ----


@pytest.mark.parametrize("case", TRAINING_TABLES)
def test_a_table_that_cannot_be_trained_on(tmp_path, capsys, earlier, case):
    split, edit, expected = TRAINING_TABLES[case]
    path = tmp_path / f"bad_{split}.csv"
    path.write_bytes(as_csv(edit(read_rows(earlier / f"{split}.csv"))))
    config = write_config(tmp_path, earlier, **{f"{split}_path": path})
    assert_one_line(capsys, earlier, config, str(path), *expected)


@pytest.mark.parametrize("case", TRAINING_FILES)
def test_a_file_that_is_not_a_table(tmp_path, capsys, earlier, case):
    suffix, edit, expected = TRAINING_FILES[case]
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(edit(as_csv(read_rows(earlier / "train.csv"))))
    assert_one_line(capsys, earlier, write_config(tmp_path, earlier, train_path=path), str(path), *expected)


def test_impossible_paths(tmp_path, capsys, earlier):
    train = earlier / "train.csv"
    (tmp_path / "link.csv").symlink_to(train)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for changes, expected in (
        ({"train_path": tmp_path / "no.csv"}, f"{tmp_path / 'no.csv'}: there is no such file"),
        ({"train_path": tmp_path / "*.tsv"}, "no file matches this pattern"),
        ({"train_path": tmp_path / "folder"}, "expected a file, found a folder"),
        ({"train_path": []}, "train_path: expected at least one file, found none"),
        ({"train_path": [str(train), str(train)]}, f"{train}: the same file is given twice"),
        ({"test_path": train}, f"test_path: {train} is in train_path too"),
        ({"val_path": tmp_path / "link.csv"}, f"val_path: {tmp_path / 'link.csv'} is in train_path too"),
        ({"model_path": tmp_path / "file"}, f"model_path: {tmp_path / 'file'}: expected a folder, found a file"),
        ({"model_path": tmp_path / "file/run"}, f"{tmp_path / 'file'}: expected a folder, found a file"),
        ({"cache_path": tmp_path / "file"}, f"cache_path: {tmp_path / 'file'}: expected a folder, found a file"),
    ):
        assert_one_line(capsys, earlier, write_config(tmp_path, earlier, **changes), expected)


def test_a_name_that_is_not_utf8_is_refused_at_once(tmp_path, capsys, earlier):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.csv")  # how Python decodes it on the command line
    shutil.copy(earlier / "test.csv", odd)
    config, run = write_config(tmp_path, earlier), earlier / "run"
    rows, out = earlier / "test.csv", tmp_path / "out.tsv"
    commands = [
        ("predict", run, odd, out),
        ("predict", run, rows, odd),
        ("predict", odd, rows, out),
        ("evaluate", run, rows, "--output", odd),
    ]
    commands += [
        ("train", config, "--check", f"--{key}", odd)
        for key in ("train_path", "val_path", "test_path", "model_path", "encoder")
    ]
    for words in (*commands, ("predict", run, tmp_path / "*.csv", out)):
        assert "\\xe9.csv: expected a name in UTF-8, found other bytes in it" in error_of(capsys, *words)
    for key in ("train_path", "model_path", "encoder"):  # from Python
        with pytest.raises(InputError, match=f"^{key}: expected a path in UTF-8"):
            Config(**tiny.settings(earlier, **{key: (odd,) if key == "train_path" else odd}))
    done = subprocess.run(
        [sys.executable, "-m", "mmbert_core", "predict", run, odd, out],
        capture_output=True,
        cwd=tiny.ROOT,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
    )
    assert done.returncode == 2 and done.stderr.count(b"error: ") == 1 and b"caf\\xe9.csv" in done.stderr
    assert not out.exists()


# ---- settings ----


def test_impossible_settings(tmp_path, capsys, earlier, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty_folder").mkdir()
    shutil.copytree(earlier / "encoder", tmp_path / "no_weights")
    (tmp_path / "no_weights/model.safetensors").unlink()
    shutil.copytree(earlier / "encoder", tmp_path / "truncated_weights")
    os.truncate(tmp_path / "truncated_weights/model.safetensors", 1000)
    config = str(tmp_path / "run.json")
    for changes, expected in (
        ({"bach_size": 8}, [config, "unknown key 'bach_size'; did you mean 'batch_size'?"]),
        ({"label_name": ...}, [config, "the key 'label_name' is required"]),
        ({"class_weights": [1, 2, 3]}, [config, "class_weights: expected 2 weights (num_classes), found 3"]),
        (
            {"metric_choices": ["acuracy"]},
            ["metric_choices: expected names among accuracy, ", "found 'acuracy' (nearest: accuracy)"],
        ),
        ({"early_stop_metric": "val/f1"}, ["expected names among accuracy, ", "found 'f1'"]),
        ({"positive_label": "yes"}, ["positive_label: expected one of the labels '0', '1', found 'yes'"]),
        (
            {"is_binary": False, "num_classes": 3},
            ["column 'label': expected 3 classes (num_classes) in the training rows, found 2"],
        ),
        ({"max_train_rows": 2}, ["max_train_rows: expected rows of every class"]),
        ({"max_length": 65}, ["max_length: expected at most 64 tokens", "found 65"]),
        ({"encoder": tmp_path / "no_such_folder"}, ["no_such_folder", "found no such folder"]),
        ({"encoder": "no-such-encoder"}, ["'no-such-encoder'", "the hub cannot be reached"]),
        ({"encoder": tmp_path / "empty_folder"}, ["empty_folder"]),
        ({"encoder": tmp_path / "no_weights"}, ["no_weights", "expected weights in model.safetensors, found none"]),
        ({"encoder": tmp_path / "truncated_weights"}, ["truncated_weights", "cannot be loaded"]),
        ({"reinit_layers": 3}, ["reinit_layers"]),
    ):
        assert_one_line(capsys, earlier, write_config(tmp_path, earlier, **changes), *expected)


def test_a_start_that_does_not_fit_the_earlier_run(tmp_path, capsys, earlier):
    longer = tmp_path / "longer.csv"
    longer.write_bytes((earlier / "test.csv").read_bytes() + b"00999,late,1,1,a,0\n")
    for changes, expected in (
        ({"resume": "never"}, ["resume is never, but", "has checkpoints up to step 8"]),
        ({"resume": 5}, ["resume: expected a step that has a checkpoint in", "(8), found 5"]),
        ({"lr": 0.5}, ["lr was 0.001 in the checkpoint at step 8 and is 0.5 now"]),
        ({"test_path": longer}, ["test_path was", "longer.csv"]),
    ):
        assert_one_line(capsys, earlier, write_config(tmp_path, earlier, **changes), *expected)


def test_unknown_arguments(capsys):
    for words, expected in (
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "a.yaml", "b.yaml"], "unknown argument 'b.yaml'"),
        (["train", "--lr"], "argument --lr: expected one argument"),
        (["predict", "folder"], "the following arguments are required: INPUT, OUTPUT"),
        (
            ["predict", "folder", "a.csv", "b.tsv", "--num_threads", "0"],
            "argument --num_threads: expected a whole number of at least 1, found '0'",
        ),
        (["predict", "folder", "a.csv", "b.tsv", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (
            ["predict", "folder", "a.csv", "b.tsv", "--threads", "2"],
            "unknown flag '--threads'; did you mean '--num_threads'?",
        ),
    ):
        message = error_of(capsys, *words)
        assert message.startswith("command line: ") and expected in message


# ---- predict ----


def assert_predict_refuses(capsys, earlier: Path, words: list[Any], *expected: str) -> None:
    """One line, no output, no temporary file; an older prediction at that path is not changed."""
    output = Path(words[-1])
    if output.parent.is_dir() and output.parent != Path("/proc") and not output.exists():
        output.write_text("an older prediction\n")
    old = output.read_bytes() if output.is_file() else None
    before = tiny.file_hashes(earlier)
    message = error_of(capsys, "predict", *words)
    for words in expected:
        assert words in message, message
    assert tiny.file_hashes(earlier) == before
    assert old is None or output.read_bytes() == old
    assert not output.parent.is_dir() or not list(output.parent.glob(".tmp-*"))


@pytest.mark.parametrize("case", PREDICT_TABLES)
def test_a_table_that_cannot_be_predicted(tmp_path, capsys, earlier, monkeypatch, case):
    monkeypatch.setattr(new_rows, "WINDOW", 16)  # the mistake comes after predicted rows
    edit, expected = PREDICT_TABLES[case]
    path = tmp_path / "bad.csv"
    path.write_bytes(as_csv(edit(read_rows(earlier / "test.csv"))))
    assert_predict_refuses(capsys, earlier, [earlier / "run", path, tmp_path / "out.tsv"], str(path), *expected)


def test_impossible_inputs_and_outputs(tmp_path, capsys, earlier):
    table = tmp_path / "new.csv"
    shutil.copy(earlier / "test.csv", table)
    for source, output, expected in (
        (tmp_path / "no.csv", tmp_path / "out.tsv", "no.csv: there is no such file"),
        (table, tmp_path / "no_folder/out.tsv", "the folder " + str(tmp_path / "no_folder") + " does not exist"),
        (table, tmp_path, "expected a file to write, found a folder"),
        (table, "/dev/null", "expected a file to write, found a device"),
        (table, table, "is the input file"),
        (table, "/proc/out.tsv", "/proc/out.tsv: "),
    ):
        assert_predict_refuses(capsys, earlier, [earlier / "run", source, output], expected)


def test_folders_that_are_not_a_model(tmp_path, capsys, earlier):
    (tmp_path / "empty").mkdir()
    shutil.copytree(earlier / "run", tmp_path / "unfinished")
    (tmp_path / "unfinished/model.safetensors").unlink()
    shutil.copytree(earlier / "run", tmp_path / "no_encoder")
    shutil.rmtree(tmp_path / "no_encoder/encoder")
    tiny.without_manifest(shutil.copytree(tmp_path / "no_encoder", tmp_path / "old_no_encoder"))
    for folder, expected in (
        (tmp_path / "nowhere", "not a model folder: config.json is missing"),
        (tmp_path / "empty", "not a model folder: config.json is missing"),
        (earlier / "encoder", "not a model folder: features.json is missing"),
        (tmp_path / "unfinished", "not a model folder: model.safetensors is missing (the run has not ended)"),
        (
            tmp_path / "no_encoder",
            "not a whole model folder: encoder/config.json is missing, which MANIFEST.json names",
        ),
        (tmp_path / "old_no_encoder", "not a model folder: encoder/ is missing"),
    ):
        assert_predict_refuses(
            capsys, earlier, [folder, earlier / "test.csv", tmp_path / "out.tsv"], str(folder), expected
        )


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
@pytest.mark.parametrize(
    "name", "config.json features.json labels.json model.safetensors encoder/config.json encoder/tokenizer.json".split()
)
def test_a_damaged_model_folder(tmp_path, capsys, earlier, name, damage):
    """A folder without a manifest, as older versions wrote it; test_model_folder.py tests the manifest."""
    folder = tiny.without_manifest(shutil.copytree(earlier / "run", tmp_path / "model"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "garbage": b"\x80garbage" * 20}[damage]
    )
    assert_predict_refuses(
        capsys,
        earlier,
        [folder, earlier / "test.csv", tmp_path / "out.tsv"],
        str(folder / name if "/" not in name else folder),
    )


def test_files_of_different_models(tmp_path, capsys, earlier):
    def edited(name: str, edit: Callable[[Any], Any]) -> Path:
        folder = tiny.without_manifest(
            shutil.copytree(earlier / "run", tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        )
        (folder / name).write_text(json.dumps(edit(json.loads((folder / name).read_text()))))
        return folder

    def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda record: {**record, "config": record["config"] | changes}

    for name, edit, expected in (
        ("config.json", lambda record: {**record, "format_version": 99}, "format_version: expected 1, found 99"),
        ("config.json", lambda record: [record], "expected an object, found a list of 1"),
        ("config.json", changed(lr="fast"), "lr: expected a number or auto, found 'fast'"),
        ("config.json", changed(leftover=1), "unknown key 'leftover'"),
        ("config.json", lambda record: {**record, "resolved": {}}, "expected the key 'pooling', found none"),
        ("config.json", changed(hidden_common_dim=17), "does not fit the other files of the folder"),
        (
            "features.json",
            lambda record: {**record, "number_names": record["number_names"][::-1]},
            "its columns are not those of config.json",
        ),
        (
            "features.json",
            lambda record: {**record, "number_names": ["age"]},
            "medians: expected 1 entries, as the columns have, found 2",
        ),
        (
            "features.json",
            lambda record: {**record, "means": record["means"][:1]},
            "means: expected 3 entries, as the columns have, found 1",
        ),
        (
            "features.json",
            lambda record: {key: record[key] for key in ("means", "stds")},
            "expected the key 'number_names', found none",
        ),
        ("labels.json", lambda record: {"names": ["0", "1", "2"]}, "expected 2 labels as in config.json, found 3"),
    ):
        folder = edited(name, edit)
        assert_predict_refuses(
            capsys, earlier, [folder, earlier / "test.csv", tmp_path / "out.tsv"], str(folder), expected
        )


# ---- real processes ----


def test_check_exits_with_2(tmp_path, earlier):
    path = tmp_path / "run.yaml"
    path.write_text("text_name: text\nlabel_name: label\nmodel_path: run\nbach_size: 8\n")
    done = tiny.run_command(["train.py", str(path), "--check"], timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: unknown key 'bach_size'; did you mean 'batch_size'?\n" and done.stdout == ""


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"train_path": "no.csv"}, id="before the process group", marks=pytest.mark.slow),
        pytest.param({"lr": 0.5}, id="within it"),
    ],
)
def test_two_processes_report_one_error_and_end(tmp_path, earlier, change):
    before, started = tiny.file_hashes(earlier), time.monotonic()
    done = tiny.torchrun(2, ["train.py", str(write_config(tmp_path, earlier, **change))], timeout=120)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert ("no.csv: there is no such file" if "train_path" in change else "lr was 0.001") in done.stderr
    # the one traceback is torchrun's own
    assert "Traceback" not in done.stderr.split("\nerror: ")[0] and "InputError" not in done.stderr
    assert tiny.file_hashes(earlier) == before
