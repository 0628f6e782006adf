"""Model folders: what the manifest finds, parts that do not fit each other, and the rights of files."""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.config import Config
from mmbert_core.inference.model_files import prediction_files
from mmbert_core.inference.model_folder import load_model_folder, save_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.report.model_card import write_card
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import weights_of
from tests.support import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, with its manifest."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.train(Config(**tiny.settings(folder, num_rows=32, max_epochs=1)))
    return folder / "run"


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(
        trained,
        tmp_path / "model",
        ignore=shutil.ignore_patterns("checkpoints", "cache", "tensorboard", "multimodal_bert-*"),
    )


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the manifest ----


def test_the_manifest_names_every_file_that_decides_a_prediction(trained):
    entries = json.loads((trained / MANIFEST).read_text())["files"]
    encoder = {path.relative_to(trained).as_posix() for path in (trained / "encoder").iterdir()}
    named = {
        "config.json",
        "features.json",
        "labels.json",
        "thresholds.json",
        "baselines.json",
        "baselines.safetensors",
        "model.safetensors",
    }
    assert set(entries) == named | encoder == set(prediction_files(trained))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flipped, Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"\n")],
    ids=["flipped", "missing", "longer"],
)
def test_every_changed_file_is_named(model, damage):
    for name in json.loads((model / MANIFEST).read_text())["files"]:
        content = (model / name).read_bytes()
        damage(model / name)
        message = refusal(model)
        assert name in message and ("copy the whole folder again" in message or "is missing" in message), (
            name,
            message,
        )
        assert ("--threshold" in message) == (name == "thresholds.json" and damage is not Path.unlink)
        (model / name).write_bytes(content)
    load_model_folder(model)


def test_a_new_file_that_would_be_read_is_refused_and_others_do_not_matter(model):
    for name in ("notes.txt", "optimizer.pt", "encoder/optimizer.pt", "encoder/pytorch_model.bin", "summary.json"):
        (model / name).write_bytes(b"{}")
    load_model_folder(model)
    for name in ("encoder/added_tokens.json", "encoder/spiece.model"):
        (model / name).write_text("{}")
        assert f"{name}: is no file of this model" in refusal(model)
        (model / name).unlink()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "encoder/../../x.json", "checkpoints", "other.safetensors"])
def test_a_manifest_leads_nowhere_else(model, name):
    values = json.loads((model / MANIFEST).read_text())
    values["files"][name] = values["files"]["config.json"]
    (model / MANIFEST).write_text(json.dumps(values))
    assert f"{MANIFEST}: expected files of a model folder, found {name!r}" in refusal(model)


def test_a_folder_of_an_older_version_loads_without_one(model):
    tiny.without_manifest(model)
    load_model_folder(model)


def test_a_model_written_again_has_a_manifest_that_fits(model):
    """Also where the new model has no baselines: those of the old one are gone."""
    loaded = load_model_folder(model)
    save_model_folder(
        model, weights_of(loaded.model), replace(loaded, decision=replace(loaded.decision, baselines=None))
    )
    assert load_model_folder(model).decision.baselines is None and not (model / "baselines.json").exists()


def test_weights_never_stand_without_their_manifest(model, monkeypatch):
    """Whatever stops the writing, a folder with weights has the manifest of these weights."""
    loaded = load_model_folder(model)
    weights = weights_of(loaded.model)
    seen = []
    plain = Path.replace

    def stopped(path: Path, target: Path) -> Path:
        if target.name == "model.safetensors":
            seen.append((model / MANIFEST).exists() and not (model / "model.safetensors").exists())
            raise KeyboardInterrupt
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_model_folder(model, weights, loaded)
    assert seen == [True] and "model.safetensors is missing" in refusal(model)
    monkeypatch.undo()
    save_model_folder(model, weights, loaded)
    load_model_folder(model)


def left_by_others(model: Path) -> None:
    """What file managers, editors, notebooks, git and people leave in folders."""
    names = (
        ".DS_Store",
        "notes.txt",
        "notes.json",
        ".git/config.json",
        ".ipynb_checkpoints/config-checkpoint.json",
        "__MACOSX/._config.json",
        "encoder/._config.json",
        "encoder/.ipynb_checkpoints/tokenizer-checkpoint.json",
        "encoder/__MACOSX/._vocab.txt",
        "encoder/.nfs000.json",
        "encoder/notes.txt",
        "encoder/config (1).json",
    )
    for name in names:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("not of the model")


def with_crlf(model: Path) -> None:
    for path in (*model.glob("*.json"), *model.glob("encoder/*.json")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("change", [left_by_others, with_crlf])
def test_a_copy_with_other_files_or_line_ends_is_the_same_model(model, change):
    row = {"text": "refund pay outside", "age": "40", "amount": "2.5", "kind": "a"}
    expected = Predictor.from_folder(model).predict(row)
    change(model)
    assert Predictor.from_folder(model).predict(row) == expected


def test_a_manifest_that_is_a_git_lfs_pointer_is_said_to_be_one(model):
    (model / MANIFEST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "MANIFEST.json: is a Git LFS pointer" in refusal(model)


# ---- README.md ----


@pytest.mark.parametrize("summary", [True, False])
@pytest.mark.parametrize("edit", [lambda text: text + "my own line\n", lambda text: "my own words\n"])
def test_a_readme_of_the_users_outlives_the_next_model(model, summary, edit):
    """Whether a run has ended in the folder before or not."""
    own = edit((model / "README.md").read_text())
    (model / "README.md").write_text(own)
    if not summary:
        (model / "summary.json").unlink()
    loaded = load_model_folder(model)
    save_model_folder(model, weights_of(loaded.model), loaded)
    write_card(model, loaded, data={}, best={}, test=None)
    assert (model / "README.md").read_text() == own and (model / "summary.json").is_file()


def test_a_card_without_its_summary_is_written_anew(model, caplog):
    """A kill between the two files."""
    (model / "summary.json").unlink()
    loaded = load_model_folder(model)
    write_card(model, loaded, data={"train": {"rows": 5}}, best={}, test=None)
    assert not caplog.messages and "train: 5 rows" in (model / "README.md").read_text()
    save_model_folder(model, weights_of(loaded.model), loaded)
    assert not (model / "README.md").exists() and not (model / "summary.json").exists()


# ---- files that do not fit each other, in a folder without a manifest ----


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "labels.json",
            lambda value: value.update(names="ab"),
            "labels.json: names: expected a list of at least 2, found the text 'ab'",
        ),
        (
            "labels.json",
            lambda value: value.update(names=["0", "0"]),
            "labels.json: names: expected a list without repeats, found '0' twice",
        ),
        (
            "labels.json",
            lambda value: value.update(names=[None, None]),
            "labels.json: names[0]: expected a text that is not empty, found null",
        ),
        (
            "labels.json",
            lambda value: value.update(names={"0": 1, "1": 2}),
            "labels.json: names: expected a list of at least 2, found an object",
        ),
        (
            "features.json",
            lambda value: value.update(medians=value["medians"][:1]),
            "medians: expected 2 entries, as the columns have, found 1",
        ),
        (
            "features.json",
            lambda value: value["categories"].__setitem__(0, ["a", "a", "b"]),
            "categories[0]: expected a list without repeats, found 'a' twice",
        ),
        (
            "features.json",
            lambda value: value["stds"].__setitem__(0, 0),
            "stds[0]: expected a finite number above 0, found 0",
        ),
        (
            "features.json",
            lambda value: value["means"].__setitem__(0, "1"),
            "means[0]: expected a finite number, found the text '1'",
        ),
        (
            "thresholds.json",
            lambda value: value["threshold"].update(value=1.5),
            "threshold.value: expected a finite number",
        ),
        (
            "thresholds.json",
            lambda value: value["calibration"].update(temperature=0),
            "calibration.temperature: expected a finite number",
        ),
        (
            "baselines.json",
            lambda value: value.update(shares=[0.5, 0.4]),
            "shares: expected 2 shares that sum to 1, found 2 that sum to 0.9",
        ),
        (
            "baselines.json",
            lambda value: value.update(models=["other"]),
            "models[0]: expected one of columns only, text only",
        ),
        ("config.json", lambda value: value["config"].update(max_length=1000), "max_length"),
        (
            "config.json",
            lambda value: value["config"].update(hidden_common_dim=99_999),
            "does not fit the other files of the folder",
        ),
        ("config.json", lambda value: value["resolved"].update(pooling="sum"), "resolved.pooling: expected one of"),
        ("encoder/config.json", lambda value: value.update(num_hidden_layers=100_000), "num_hidden_layers"),
        ("encoder/config.json", lambda value: value.update(num_labels=10**9), "num_labels"),
        ("encoder/config.json", lambda value: value.update(vocab_size=10**9), "encoder"),
        ("encoder/config.json", lambda value: value.update(hidden_size=2**20), "encoder"),
        ("encoder/tokenizer_config.json", lambda value: value.update(cls_token="[NEW]"), "encoder"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(model, name, change: Callable[[Any], None], message):
    tiny.without_manifest(model)
    value = json.loads((model / name).read_text())
    change(value)
    (model / name).write_text(json.dumps(value))
    started = time.perf_counter()
    assert message in refusal(model)
    assert time.perf_counter() - started < 10


# ---- rights ----

AS_NOBODY = """
import os, sys
from pathlib import Path
from mmbert_core.cli import main

folder = Path(sys.argv[1])
main(["inspect", str(folder)])  # loads the modules that are loaded late
for name, mode in (("", 0o755), ("model.safetensors", 0o600), ("encoder/tokenizer.json", 0o600), ("", 0o700)):
    before = (folder / name).stat().st_mode
    (folder / name).chmod(mode)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os._exit(main(["inspect", str(folder)]))
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=sys.stderr, flush=True)
    (folder / name).chmod(before)
"""


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077], indirect=True)
def test_every_file_of_a_run_follows_the_umask(tmp_path, umask):
    tiny.train(Config(**tiny.settings(tmp_path, num_rows=16, max_epochs=1, cache_path=None)))
    paths = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    assert any(path.suffix == ".safetensors" for path in paths)
    wrong = {
        str(path): oct(path.stat().st_mode)
        for path in paths
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_file_that_may_not_be_read_is_said_to_be_that(trained):
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders are root's alone
        Path(outside).chmod(0o755)
        model = shutil.copytree(trained, Path(outside) / "model", ignore=shutil.ignore_patterns("checkpoints", "cache"))
        done = tiny.run_command(["-c", AS_NOBODY, str(model)])
    lines = [line for line in done.stderr.splitlines() if line.startswith(("code", "error:"))]
    rights = "cannot be read: permission denied (its mode is 0{}00, its owner user 0)"
    assert lines == [
        "code 0",
        f"error: {model / 'model.safetensors'}: {rights.format(6)}",
        "code 2",
        f"error: {model / 'encoder/tokenizer.json'}: {rights.format(6)}",
        "code 2",
        f"error: {model}: {rights.format(7)}",
        "code 2",
    ], done.stderr


@pytest.mark.parametrize(
    "key, value",
    [("chunk_size_feed_forward", 7), ("chunk_size_feed_forward", None), ("output_hidden_states", "float16")],
)
def test_an_encoder_config_that_no_text_can_be_computed_with_is_refused_at_load(model, key, value):
    tiny.without_manifest(model)
    path = model / "encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert "encoder: the encoder cannot compute a text of 11 tokens with this config.json" in refusal(model)
