"""Files and rows of strangers: pickles that would run, names that lead elsewhere, encoders with code, formulas, secrets, open sockets."""

import base64
import csv
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbert_core.cli import main
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import PARTS
from tests.support import tiny
from tests.support.fault_matrix import Figures, row
from tests.test_layout import unsafe_problems

pytestmark = pytest.mark.fault


# ---- a run to do harm to, and what a command did ----


class Outcome:
    """A command of mmbert, run in this process, where a pickle would find what it looks for."""

    def __init__(self, *arguments: str | Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                self.code = main([str(word) for word in arguments])
            except Exception as error:  # what torchrun would report as a failure
                self.code = 1
                print(f"Traceback: {type(error).__name__}: {error}", file=err)
        self.text = out.getvalue() + err.getvalue()

    @property
    def refused(self) -> bool:
        """Exit code 2 and one line that says why."""
        lines = self.text.splitlines()
        return (
            self.code == 2 and sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in self.text
        )

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.text.strip()[-600:]}"


def write_config(folder: Path, **changes: Any) -> Path:
    """The config of a run of 8 steps in `folder/run`, with its cache in it."""
    values = tiny.settings(folder, num_rows=32, cache_path=None, save_every=1, keep_checkpoints=100, **changes)
    path = folder / "run.json"
    path.write_text(
        json.dumps({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})
    )
    return path


def trained(folder: Path, **changes: Any) -> Path:
    """A whole run, in `folder/run`."""
    outcome = Outcome("train", write_config(folder, **changes))
    assert outcome.code == 0, outcome
    return folder / "run"


def half_way(run: Path) -> None:
    """Make a whole run one that stopped after step 4."""
    for path in sorted((run / "checkpoints").glob("step-*"))[4:]:
        shutil.rmtree(path)
    for path in (run / "model.safetensors", run / "train_results.json", *run.glob("multimodal_bert-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_manifest(checkpoint: Path, **changes: Any) -> None:
    """A manifest that fits the files as they are now, so that only their content can be refused."""
    files = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
        for name in PARTS
        if (checkpoint / name).is_file()
    }
    version = (
        json.loads((checkpoint / "state.json").read_text())["format_version"]
        if is_json(checkpoint / "state.json")
        else 2
    )
    (checkpoint / MANIFEST).write_text(json.dumps({"format_version": version, "files": files} | changes))


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, OSError):
        return False
    return True


def listing(folder: Path, *, but: Sequence[Path] = ()) -> dict[str, str]:
    """Every file, folder and link below `folder`, with its content and time, but for the trees in `but`. Links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) not in but]
        for name in (*folders, *files):
            path = Path(parent, name)
            if path not in but:
                found[str(path)] = (
                    f"link to {os.readlink(path)}"
                    if path.is_symlink()
                    else "folder"
                    if path.is_dir()
                    else f"{sha256_of(path)} of {path.stat().st_mtime_ns}"
                )
    return found


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


# ---- S1: pickles ----


class Payload:
    """Whoever unpickles this runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def pickles(canary: Path) -> dict[str, bytes]:
    """The payload as pickle writes it and as torch does, in its zip format and in the one before."""
    forms = {"pickle": pickle.dumps(Payload(canary))}
    for name, is_zip in (("torch", True), ("old torch", False)):
        stream = io.BytesIO()
        torch.save({"weight": Payload(canary)}, stream, _use_new_zipfile_serialization=is_zip)
        forms[name] = stream.getvalue()
    return forms


@row(
    "S1",
    "pickles that run a command: as weights, optimizer.pt, rng.pt of encoders, model folders and checkpoints; in the place of every file of a run, of data and of the config",
    "no command runs; what needs the file ends with one line and exit code 2, what does not goes on as without it",
    full={"forms": ("pickle", "torch", "old torch")},
)
def test_S1_no_pickle_is_ever_read(tmp_path: Path, forms: tuple[str, ...] = ("torch",)) -> Figures:
    figures, canary = Figures(), tmp_path / "canary"
    problems = unsafe_problems(tiny.ROOT)
    figures.count(problems == [], f"the package has {problems}")
    for form, content in pickles(canary).items():
        (tmp_path / "check").write_bytes(content)
        torch.load(tmp_path / "check", weights_only=False) if form != "pickle" else pickle.loads(content)
        figures.count(canary.exists(), f"{form}: the payload itself does nothing")
        canary.unlink()
        if form in forms:
            folder = tmp_path / form
            trained(folder)
            for attack in (pickled_encoders, pickled_models, pickled_checkpoints, pickled_files, pickled_inputs):
                attack(folder, content, canary, figures, form)
    return figures


def check_outcome(figures: Figures, outcome: Outcome, canary: Path, place: str, *, must_refuse: bool) -> None:
    figures.count(not canary.exists(), f"{place}: THE PAYLOAD RAN; {outcome}")
    canary.unlink(missing_ok=True)
    if must_refuse:
        figures.refused(outcome.refused, f"{place}: expected a refusal in one line, found {outcome}")
    else:
        figures.count(outcome.code == 0, f"{place}: {outcome}")


def pickled_encoders(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    index = json.dumps(
        {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "pytorch_model.bin"}}
    ).encode()
    encoders: dict[str, tuple[dict[str, bytes | None], bool]] = {
        "pytorch_model.bin alone": ({"model.safetensors": None, "pytorch_model.bin": content}, True),
        "a pickle named model.safetensors": ({"model.safetensors": content}, True),
        "an index that leads to pytorch_model.bin": (
            {"model.safetensors": None, "model.safetensors.index.json": index, "pytorch_model.bin": content},
            True,
        ),
        "a pickled config.json": ({"config.json": content}, True),
        "a pickled tokenizer.json": ({"tokenizer.json": content, "vocab.txt": None}, True),
        "pickles beside good files": (
            dict.fromkeys(
                ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt"), content
            ),
            False,
        ),
    }
    for name, (files, must_refuse) in encoders.items():
        encoder = folder / "evil" / name.replace(" ", "-")
        shutil.copytree(folder / "encoder", encoder)
        for file, data in files.items():
            (encoder / file).unlink(missing_ok=True)
            if data is not None:
                (encoder / file).write_bytes(data)
        run = folder / "evil" / f"run-{encoder.name}"
        outcome = Outcome("train", folder / "run.json", "--encoder", encoder, "--model_path", run, "--max_epochs", "1")
        check_outcome(figures, outcome, canary, f"{form}, encoder: {name}", must_refuse=must_refuse)


def pickled_models(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    cases: dict[str, tuple[dict[str, bytes | None], bool]] = {
        "a pickle named model.safetensors": ({"model.safetensors": content}, True),
        "pytorch_model.bin alone": ({"model.safetensors": None, "pytorch_model.bin": content}, True),
        "pickles beside good files": (
            dict.fromkeys(
                (
                    "optimizer.pt",
                    "rng.pt",
                    "pytorch_model.bin",
                    "encoder/pytorch_model.bin",
                    "encoder/optimizer.pt",
                    "features.pkl",
                ),
                content,
            ),
            False,
        ),
    }
    for name, (files, must_refuse) in cases.items():
        model = folder / "evil" / f"model-{name.replace(' ', '-')}"
        shutil.copytree(folder / "run", model, ignore=shutil.ignore_patterns("checkpoints", "cache"))
        for file, data in files.items():
            (model / file).unlink(missing_ok=True)
            if data is not None:
                (model / file).write_bytes(data)
        outcome = Outcome("predict", model, folder / "test.csv", folder / "evil/out.tsv")
        check_outcome(figures, outcome, canary, f"{form}, model folder: {name}", must_refuse=must_refuse)


def pickled_checkpoints(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    """The manifest fits what lies there; the one checkpoint is all there is, so that nothing older hides the outcome."""
    cases: dict[str, tuple[dict[str, bytes | None], bool]] = {
        "a pickle named model.safetensors": ({"model.safetensors": content}, True),
        "a pickle named optimizer.safetensors": ({"optimizer.safetensors": content}, True),
        "optimizer.pt alone": ({"optimizer.safetensors": None, "optimizer.pt": content}, True),
        "a pickled state.json": ({"state.json": content}, True),
        "pickles beside good files": (
            dict.fromkeys(("optimizer.pt", "rng.pt", "pytorch_model.bin", "scheduler.pt"), content),
            False,
        ),
    }
    for name, (files, must_refuse) in cases.items():
        run = folder / "evil" / f"checkpoint-{name.replace(' ', '-')}"
        shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("cache"))
        half_way(run)
        *older, newest = sorted((run / "checkpoints").iterdir())
        for path in older:
            shutil.rmtree(path)
        for file, data in files.items():
            (newest / file).unlink(missing_ok=True)
            if data is not None:
                (newest / file).write_bytes(data)
        write_manifest(newest)
        outcome = Outcome("train", folder / "run.json", "--model_path", run)
        check_outcome(figures, outcome, canary, f"{form}, checkpoint: {name}", must_refuse=must_refuse)


def pickled_files(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    """Each file of a half-done run in turn: going on, then predicting with what is there. Only that nothing runs counts."""
    whole = folder / "evil/whole"
    shutil.copytree(folder / "run", whole)
    half_way(whole)
    shutil.copy(folder / "run/model.safetensors", whole)
    names = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and ("checkpoints" not in path.parts or "step-00000004" in path.parts)
    ]
    for name in names:
        run = folder / "evil/one"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        (run / name).write_bytes(content)
        outcomes = (
            Outcome("predict", run, folder / "test.csv", folder / "evil/out.tsv"),
            Outcome("train", folder / "run.json", "--model_path", run),
        )
        figures.count(not canary.exists(), f"{form}, {name} of a run: THE PAYLOAD RAN; {outcomes[0]}; {outcomes[1]}")
        canary.unlink(missing_ok=True)
    figures.notes.append(f"{form}: {len(names)} files of a run replaced")


def pickled_inputs(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".pkl", ".csv.gz"):
        path = folder / f"evil/rows{suffix}"
        path.write_bytes(content)
        outcomes = {
            "train": Outcome("train", folder / "run.json", "--train_path", path, "--model_path", folder / "evil/none")
        }
        outcomes["predict"] = Outcome("predict", folder / "run", path, folder / "evil/out.tsv")
        for command, outcome in outcomes.items():
            check_outcome(figures, outcome, canary, f"{form}, rows{suffix}, {command}", must_refuse=True)
    command = f"touch {canary}"
    configs = {
        "pickle.yaml": content,
        "pickle.json": content,
        "apply.yaml": f"lr: !!python/object/apply:os.system ['{command}']\n".encode(),
        "new.yaml": f"lr: !!python/object/new:os.system ['{command}']\n".encode(),
        "module.yaml": b"lr: !!python/module:os\n",
    }
    for name, data in configs.items():
        (folder / "evil" / name).write_bytes(data)
        check_outcome(
            figures, Outcome("train", folder / "evil" / name), canary, f"{form}, config {name}", must_refuse=True
        )


# ---- S2: names that lead elsewhere ----

LONG_NAME = "x" * 300
HOSTILE_NAMES = ("../x", "a/../../b", "", "..", "con\n", LONG_NAME)  # and absolute ones, which need a folder


@row(
    "S2",
    "names that lead out of a run: in MANIFEST.json, state.json, config.json, features.json, labels.json, class names; checkpoint folders with odd names; links in the place of every file and folder",
    "refused or passed by; no file outside the run is made, changed or removed",
    full={"linked": None},
)
def test_S2_no_name_leads_out_of_a_run(
    tmp_path: Path,
    linked: tuple[str, ...] | None = (
        "checkpoints",
        "encoder",
        "run.lock",
        "cache",
        ".tmp-model.safetensors",
        "metrics.jsonl",
    ),
) -> Figures:
    """`linked`: the parts of a run that are replaced by links; None: all of them."""
    figures, folder = Figures(), tmp_path / "inside"
    whole = trained(folder)
    shutil.copytree(whole, folder / "half")
    half_way(folder / "half")
    names = (*HOSTILE_NAMES, str(tmp_path / "outside/x"))
    for attack in (hostile_manifests, hostile_states, hostile_models, hostile_checkpoint_folders):
        attack(folder, names, figures)
    hostile_links(folder, linked, figures)
    hostile_classes(tmp_path, figures)
    return figures


def outside_of(folder: Path) -> Path:
    """Files that nobody may touch, made anew beside `folder`: sentinels and a whole run."""
    outside = folder.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    shutil.copytree(folder / "half", outside / "folder")
    (outside / "folder/.tmp-left").mkdir()
    (outside / "folder/.tmp-left/file").write_text("precious")
    (outside / "file").write_text("precious")
    return outside


def go_on(folder: Path, spoil: Callable[[Path, Path], None], figures: Figures, place: str) -> Outcome:
    """A half-done run is spoiled and goes on; nothing outside it may change."""
    outside, run = outside_of(folder), folder / "run-spoiled"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "half", run)
    spoil(run, outside)
    before = listing(folder.parent, but=[run])
    outcome = Outcome("train", folder / "run.json", "--model_path", run)
    changed = differences(before, listing(folder.parent, but=[run]))
    figures.count(not changed, f"{place}: changed {changed[:5]}; {outcome}")
    return outcome


def hostile_manifests(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """A manifest with a name more, and with a part under another name: the checkpoint is passed over for the one before."""
    for name in names:
        for part in (None, "optimizer.safetensors"):

            def spoil(run: Path, outside: Path) -> None:
                path = run / "checkpoints/step-00000004" / MANIFEST
                manifest = json.loads(path.read_text())
                precious = {"bytes": (outside / "file").stat().st_size, "sha256": sha256_of(outside / "file")}
                manifest["files"][name] = manifest["files"].pop(part) if part else precious
                path.write_text(json.dumps(manifest))

            place = f"MANIFEST.json, {'instead of ' + part if part else 'besides'}: {name[:40]!r}"
            outcome = go_on(folder, spoil, figures, place)
            passed_over = (
                "step-00000004 is damaged and passed over: MANIFEST.json" in outcome.text and outcome.code == 0
            )
            figures.refused(outcome.refused or passed_over, f"{place}: not refused; {outcome}")


def hostile_states(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """state.json with names where numbers belong, and numbers that no run has; the manifest fits."""
    values: list[tuple[str, Any]] = [
        (key, name) for key in ("step", "best_step", "epoch", "rows_consumed") for name in names
    ]
    values += [
        ("step", 10**30),
        ("step", -1),
        ("best_step", -1),
        ("best_step", 10**30),
        ("rows_consumed", -8),
        ("epoch", True),
        ("step", 3.5),
        ("best_step", None),
        ("finished", "../x"),
    ]
    for key, value in values:

        def spoil(run: Path, outside: Path) -> None:
            checkpoint = run / "checkpoints/step-00000004"
            state = json.loads((checkpoint / "state.json").read_text())
            (checkpoint / "state.json").write_text(json.dumps({**state, key: value}))
            write_manifest(checkpoint)

        place = f"state.json, {key}: {str(value)[:40]!r}"
        outcome = go_on(folder, spoil, figures, place)
        if (key, value) != ("best_step", None):  # which says that there was no validation yet
            figures.refused(outcome.refused, f"{place}: expected a refusal in one line, found {outcome}")


def hostile_models(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """A model folder whose config, features or labels hold hostile names. Paths in config.json are the training's; predicting uses none."""
    rows = folder / "test.csv"
    for name in names:
        edits: dict[str, tuple[str, Callable[[Any], Any]]] = {
            "model_path": ("config.json", lambda value: value["config"].update(model_path=name)),
            "cache_path": ("config.json", lambda value: value["config"].update(cache_path=name)),
            "encoder": ("config.json", lambda value: value["config"].update(encoder=name)),
            "train_path": ("config.json", lambda value: value["config"].update(train_path=[name])),
            "pooling": ("config.json", lambda value: value["resolved"].update(pooling=name)),
            "id_name": ("config.json", lambda value: value["config"].update(id_name=name)),
            "columns": (
                "features.json",
                lambda value: value.update({key: [name] for key in value if key.endswith("names")}),
            ),
            "classes": ("labels.json", lambda value: value.update(names=[name, "b"])),
        }
        for key, (file, edit) in edits.items():
            model, outside = folder / "model-spoiled", outside_of(folder)
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(folder / "run", model, ignore=shutil.ignore_patterns("checkpoints", "cache"))
            value = json.loads((model / file).read_text())
            edit(value)
            (model / file).write_text(json.dumps(value))
            tiny.without_manifest(model)  # which would refuse every edit
            output = outside / "out.tsv"
            before = listing(folder.parent)
            outcome = Outcome("predict", model, rows, output)
            changed = [path for path in differences(before, listing(folder.parent)) if path != str(output)]
            place = f"{file}, {key}: {name[:40]!r}"
            figures.count(not changed, f"{place}: changed {changed[:5]}; {outcome}")
            figures.count(
                outcome.refused or (outcome.code == 0 and key not in ("pooling", "id_name", "columns")),
                f"{place}: {outcome}",
            )


def hostile_checkpoint_folders(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """Whole checkpoints under names that no step gets, and links to whole checkpoints: passed by, and left as they are."""
    odd = (
        "step-",
        "step-x",
        "step-4",
        "step-0000000９",
        "step-00000009\n",
        "step--0000009",
        "step-0000000009",
        "step-" + "9" * 200,
        " step-00000009",
        "-rf",
        "con\n",
        "step-00000009.tmp",
        "x" * 255,
    )
    for name in odd:
        outcome = go_on(
            folder,
            lambda run, outside: (
                shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints" / name) and None
            ),
            figures,
            f"checkpoint folder {name[:40]!r}",
        )
        left = (folder / "run-spoiled/checkpoints" / name).is_dir()
        figures.count(
            outcome.refused
            or ("going on from" in outcome.text and "step-00000004" in outcome.text and outcome.code == 0 and left),
            f"checkpoint folder {name[:40]!r}: {outcome}",
        )
    for name in names:
        for key in ("--resume", "--save_every"):
            outcome = Outcome("train", folder / "run.json", "--model_path", folder / "half", key, name)
            figures.refused(outcome.refused, f"{key} {name[:40]!r}: {outcome}")


def hostile_links(folder: Path, linked: tuple[str, ...] | None, figures: Figures) -> None:
    """Each part of a run in turn becomes a link to a file or folder elsewhere; and a link under each name that a run writes."""
    half = folder / "half"
    new = [
        "model.safetensors",
        "train_results.json",
        ".tmp-model.safetensors",
        "checkpoints/step-00000005",
        "checkpoints/step-00000009",
        "checkpoints/.tmp-x",
        ".tmp-x",
    ]
    parts = [
        str(path.relative_to(half))
        for path in sorted(half.rglob("*"))
        if "checkpoints" not in path.parts or path.name == "checkpoints" or "step-00000004" in path.parts
    ]
    for name in linked or (*parts, *new):

        def spoil(run: Path, outside: Path) -> None:
            path = run / name
            there = path.exists()
            is_folder = path.is_dir() if there else "." not in name.removeprefix(".")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            target = outside / ("folder" if is_folder else "file")
            if there:  # the link leads to what was there, so that only the link is wrong
                shutil.rmtree(outside / "folder") if is_folder else target.unlink()
                (shutil.copytree if is_folder else shutil.copy)(half / name, target)
            path.symlink_to(target)

        outcome = go_on(folder, spoil, figures, f"{name} is a link")
        figures.count(outcome.code == 0 or outcome.refused, f"{name} is a link: {outcome}")


def hostile_classes(tmp_path: Path, figures: Figures) -> None:
    """Class names, columns and ids that are paths, through training, metrics, pictures, curves and predictions."""
    folder = tmp_path / "classes"
    tiny.settings(folder, num_rows=32)
    swaps = {"0": "../../x", "1": str(tmp_path / "outside/y")}
    for name in ("train", "val", "test"):
        with open(folder / f"{name}.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for line in rows:
            line["label"], line["../kind"] = swaps[line["label"]], line.pop("kind")
            line["/id"] = "../" + line.pop("row_id")
        with open(folder / f"{name}.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    config = write_config(folder, cat_field_list=("../kind",), id_name="/id", positive_label="../../x")
    before = listing(tmp_path, but=[folder / "run"])
    outcome = Outcome("train", config)
    changed = differences(before, listing(tmp_path, but=[folder / "run"]))
    figures.count(
        outcome.code == 0 and not changed, f"classes and columns that are paths: changed {changed[:5]}; {outcome}"
    )


# ---- S3: code of an encoder ----


@row(
    "S3",
    "encoders with code of their own (auto_map of config, model, tokenizer), with attention code to fetch (_attn_implementation_internal and its like), in a folder to train from and in a model folder",
    "the code does not run; exit code 2 and one line, where the encoder cannot do without it",
)
def test_S3_code_of_an_encoder_is_never_run(tmp_path: Path) -> Figures:
    figures, canary = Figures(), tmp_path / "canary"
    run = trained(tmp_path)
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nfrom transformers import BertConfig, BertModel, BertTokenizerFast\nclass C(BertConfig):\n    model_type = 'evil'\nclass M(BertModel):\n    config_class = C\nclass T(BertTokenizerFast):\n    pass\n"
    maps = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    kernel = "kernels-community/evil"
    cases: dict[str, tuple[str, dict[str, Any], bool]] = {
        "auto_map": ("config.json", {"auto_map": maps}, True),
        "auto_map of an unknown model": ("config.json", {"auto_map": maps, "model_type": "evil"}, True),
        "auto_map of another repository": ("config.json", {"auto_map": {"AutoModel": "someone/evil--evil.M"}}, True),
        "auto_map within": ("config.json", {"text_config": {"auto_map": maps}}, True),
        "unknown model": ("config.json", {"model_type": "evil"}, True),
        "_attn_implementation_internal": ("config.json", {"_attn_implementation_internal": kernel}, True),
        "_attn_implementation": ("config.json", {"_attn_implementation": kernel}, True),
        "attn_implementation": ("config.json", {"attn_implementation": kernel}, True),
        "attn_implementation within": ("config.json", {"text_config": {"_attn_implementation_internal": kernel}}, True),
        "attn_implementation by part": ("config.json", {"attn_implementation": {"": kernel}}, True),
        "flash attention": ("config.json", {"attn_implementation": "flash_attention_2"}, True),
        "_experts_implementation_internal": ("config.json", {"_experts_implementation_internal": kernel}, True),
        "eager": ("config.json", {"attn_implementation": "eager"}, False),
        "tokenizer of its own": (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"},
            False,
        ),
        "tokenizer beside a known one": (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "evil.T"]}},
            False,
        ),
    }
    (tmp_path / "evil.py").write_text(code)
    subprocess.run([sys.executable, "-c", "import evil"], cwd=tmp_path, check=True)
    figures.count(canary.exists(), "the code itself does nothing")
    canary.unlink()
    for name, (file, changes, must_refuse) in cases.items():
        for kind, source in (("train", tmp_path / "encoder"), ("predict", run / "encoder")):
            place = f"{kind}: {name}"
            model = tmp_path / "evil" / place.replace(" ", "-").replace(":", "")
            encoder = model / "encoder"
            if kind == "predict":
                shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoints", "cache"))
            else:
                shutil.copytree(source, encoder)
            (encoder / "evil.py").write_text(code)
            path = encoder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
            if kind == "predict":
                outcome = Outcome("predict", model, tmp_path / "test.csv", tmp_path / "out.tsv")
            else:
                outcome = Outcome(
                    "train",
                    tmp_path / "run.json",
                    "--encoder",
                    encoder,
                    "--model_path",
                    model / "run",
                    "--max_epochs",
                    "1",
                )
            figures.count(not canary.exists(), f"{place}: THE CODE RAN; {outcome}")
            canary.unlink(missing_ok=True)
            if must_refuse:
                figures.refused(outcome.refused, f"{place}: expected a refusal in one line, found {outcome}")
            else:
                figures.count(outcome.refused or outcome.code == 0, f"{place}: {outcome}")
    figures.count(
        "trust_remote_code=True" not in "".join(path.read_text() for path in (tiny.ROOT / "mmbert_core").rglob("*.py")),
        "the package trusts code of others",
    )
    return figures


# ---- S4: formulas ----

FORMULAS = (
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x","y")',
    "+",
    "-",
    "-x",
    "=\n1",
    "-2+3+cmd|' /C calc'!A0",
)
PLAIN_TEXTS = ("plain", "007", "a=b", "1e5", "NA", " =1", "'=1", "x\ty", 'say "hi"', "é=")
NUMBERS = ("-5", "+1.5", "-1e5", "-.5")  # which a spreadsheet shows as what they are


@row(
    "S4",
    "ids and class names that a spreadsheet would compute: = + - @ tab, carriage return first",
    "plain: byte for byte; --sheet_safe: a ' before them and before nothing else; probabilities the same in both",
)
def test_S4_formula_cells(tmp_path: Path) -> Figures:
    figures = Figures()
    ids = (*FORMULAS, *PLAIN_TEXTS, *NUMBERS)
    for is_binary in (True, False):
        folder = tmp_path / f"{2 if is_binary else 3}-classes"
        swaps = {"0": "=1+1", "1": "-x", "2": "@a\tb"}
        tiny.settings(folder, num_rows=48, num_classes=2 if is_binary else 3)
        for name in ("train", "val", "test"):
            with open(folder / f"{name}.csv", newline="") as stream:
                rows = list(csv.DictReader(stream))
            rows = [
                line | {"label": swaps[line["label"]], "=id": ids[index] if name == "test" else line["row_id"]}
                for index, line in enumerate(rows[: len(ids) if name == "test" else None])
            ]
            with open(folder / f"{name}.csv", "w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        labels = [line["label"] for line in rows]
        run = trained(folder, num_classes=2 if is_binary else 3, id_name="=id", max_epochs=1)
        tables = {}
        for words in ((), ("--sheet_safe",)):
            output = folder / f"out{len(words)}.tsv"
            outcome = Outcome("predict", run, folder / "test.csv", output, *words)
            if not figures.count(outcome.code == 0, f"predict {words}: {outcome}"):
                return figures
            with open(output, newline="", encoding="utf-8") as stream:
                tables[bool(words)] = list(csv.reader(stream, delimiter="\t"))
        with open(next(run.glob("multimodal_bert-*")) / "test_result_0.tsv", newline="", encoding="utf-8") as stream:
            figures.count(
                list(csv.reader(stream, delimiter="\t")) == tables[False],
                "the test stage's file differs from the plain one",
            )
        compare_cells(figures, tables[False], tables[True], ids, labels, swaps)
    return figures


def compare_cells(
    figures: Figures,
    plain: list[list[str]],
    safe: list[list[str]],
    ids: Sequence[str],
    labels: Sequence[str],
    swaps: dict[str, str],
) -> None:
    label, pred, calibrated = (
        len(plain[0]) - 3,
        len(plain[0]) - 2,
        len(plain[0]) - 1,
    )  # between id and label stand probabilities
    figures.rows_lost += max(0, len(ids) - len(plain) + 1)
    figures.count([line[0] for line in plain[1:]] == list(ids), f"plain ids: {[line[0] for line in plain[1:]]}")
    figures.count([line[label] for line in plain[1:]] == list(labels), "plain labels")
    figures.count({line[pred] for line in plain[1:]} <= set(swaps.values()), "plain predicted classes")
    figures.count(plain[0][0] == "=id" and safe[0][0] == "'=id", f"header: {plain[0]} and {safe[0]}")
    for cells, shown in zip(plain[1:], safe[1:], strict=True):
        for part in (slice(1, label), slice(calibrated, None)):
            figures.count(cells[part] == shown[part], f"probabilities {cells[part]} became {shown[part]}")
        for index in (0, label, pred):
            expected = cells[index] if cells[index] in (*PLAIN_TEXTS, *NUMBERS) else "'" + cells[index]
            figures.count(shown[index] == expected, f"{cells[index]!r} became {shown[index]!r}")


# ---- S5: secrets ----


@row(
    "S5",
    "secrets in the environment of a training on 2 processes, of one that fails, and of a prediction",
    "no byte of them in any file of the run, of the launcher, or in what is printed",
)
def test_S5_secrets_stay_in_the_environment(tmp_path: Path) -> Figures:
    figures = Figures()
    names = (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "DATABASE_PASSWORD",
        "GITHUB_TOKEN",
        "HTTPS_PROXY",
        "MMBERT_SECRET",
        "SLURM_JWT",
    )
    secrets = {name: f"canary-{hashlib.sha256(name.encode()).hexdigest()[:24]}" for name in names}
    secrets["HTTPS_PROXY"] = f"http://user:{secrets['HTTPS_PROXY']}@127.0.0.1:9"
    scratch, out = tmp_path / "scratch", tmp_path / "out.tsv"
    scratch.mkdir()
    config = write_config(tmp_path, max_epochs=1)
    environment = {**secrets, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    done = {"train": tiny.torchrun(2, ["train.py", str(config)], **environment)}
    figures.count(done["train"].returncode == 0, done["train"].stderr[-2000:])
    infinite = ["train.py", str(config), "--model_path", str(tmp_path / "fails"), "--lr", "1e30", "--warmup_steps", "0"]
    done["a training that fails"] = tiny.torchrun(2, infinite, **environment)
    figures.count(
        done["a training that fails"].returncode != 0, "the training with an absurd learning rate did not fail"
    )
    done["predict"] = tiny.run_command(
        ["-m", "mmbert_core", "predict", str(tmp_path / "run"), str(tmp_path / "test.csv"), str(out)], **environment
    )
    done["a prediction that fails"] = tiny.run_command(
        ["-m", "mmbert_core", "predict", str(tmp_path / "no"), str(tmp_path / "test.csv"), str(out)], **environment
    )
    texts = {f"{name}, printed": (process.stdout + process.stderr).encode() for name, process in done.items()}
    files = {str(path): path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    figures.count(any(path.startswith(str(tmp_path / "run")) for path in files) and out.exists(), "nothing was written")
    for place, content in {**texts, **files}.items():
        for name, secret in secrets.items():
            forms = (
                secret.encode(),
                secret.encode().hex().encode(),
                base64.b64encode(secret.encode()).rstrip(b"="),
                secret[::-1].encode(),
                secret.encode("utf-16-le"),
            )
            figures.count(not any(form in content for form in forms), f"{name} is in {place}")
    figures.notes.append(
        f"{len(files)} files of {sum(map(len, files.values())) / 2**20:.1f} MB and {len(texts)} outputs searched for {len(secrets)} secrets"
    )
    return figures


# ---- S6: sockets ----

LISTEN = "0A"


def tree_of(pid: int) -> list[int]:
    """A process and all that came from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def listening(pids: Sequence[int]) -> set[tuple[str, str]]:
    """(name of the process, address) of every TCP socket that one of `pids` listens on; from /proc, as `ss -ltnp` reads it."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN:
                raw = bytes.fromhex(words[1].split(":")[0])
                packed = b"".join(
                    raw[start : start + 4][::-1] for start in range(0, len(raw), 4)
                )  # little-endian words
                addresses[f"socket:[{words[9]}]"] = socket.inet_ntop(
                    socket.AF_INET if table == "tcp" else socket.AF_INET6, packed
                )
    found = set()
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {(name, addresses[link]) for link in links if link in addresses}
    return found


def sockets_of_a_run(
    folder: Path, command: list[str], prefix: Sequence[str] = ()
) -> tuple[set[tuple[str, str]], int, str]:
    """All that a run's processes listen on while it lives, its exit code, its output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "SLURM_"))}
    output = folder / f"output-{time.monotonic_ns()}.txt"
    with open(output, "w") as stream:
        process = subprocess.Popen(
            [*prefix, *command],
            cwd=folder,
            env=variables
            | {"NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    found: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        found |= listening(tree_of(process.pid))
        time.sleep(0.1)
    for pid in tree_of(process.pid) if process.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    return found, process.wait(), output.read_text()


def named_elsewhere(folder: Path) -> list[str]:
    """Words before a command, so that the machine's own name leads to an address others can reach; none where that is not allowed."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address to send from
        address = probe.getsockname()[0]
    except OSError:
        return []
    finally:
        probe.close()
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{address} elsewhere\n")
    script = f"mount --bind '{hosts}' /etc/hosts && hostname elsewhere && exec \"$@\""
    prefix = [
        "unshare",
        *(["--user", "--map-root-user"] if os.geteuid() else []),
        "--uts",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
    ]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        return []
    return prefix


@row(
    "S6",
    "listening sockets of a training on 2 processes of one machine, whose own name leads to an outer address",
    "with ./torchrun.sh all at 127.0.0.1; with `torchrun --standalone` those of the workers, while torchrun's own two are at all addresses",
)
def test_S6_sockets_listen_on_loopback_alone(tmp_path: Path) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, max_epochs=6)
    prefix = named_elsewhere(tmp_path)
    figures.notes.append(
        "the machine's name leads to an outer address" if prefix else "the machine's name could not be changed"
    )
    safe = [str(tiny.ROOT / "torchrun.sh"), str(config)]
    plain = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tiny.ROOT / "train.py"),
        str(config),
        "--model_path",
        str(tmp_path / "plain"),
    ]
    for name, command in (("./torchrun.sh", safe), ("torchrun --standalone", plain)):
        found, code, text = sockets_of_a_run(tmp_path, command, prefix)
        figures.count(code == 0, f"{name}: exit code {code}: {text[-2000:]}")
        figures.count(bool(found), f"{name}: no listening socket was seen")
        for process, address in sorted(found):
            ours = name == "./torchrun.sh" or process != "pt_elastic"
            if ours:
                figures.count(address in ("127.0.0.1", "::1"), f"{name}: {process} listens on {address}")
        figures.notes.append(f"{name}: {', '.join(f'{process} on {address}' for process, address in sorted(found))}")
    return figures
