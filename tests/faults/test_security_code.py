"""Code in data never runs: pickles instead of files, code of an encoder."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.manipulated_runs import (
    Outcome,
    check_outcome,
    keep_first_half,
    trained,
    write_manifest,
)
from tests.support import tiny
from tests.support.fault_matrix import Figures, row
from tests.test_unsafe_code import unsafe_problems

pytestmark = pytest.mark.fault


# ---- S1: pickles ----


class Payload:
    """Unpickling this object runs a command."""

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
    "pickles that run a command: as weights, optimizer.pt, rng.pt of encoders, model folders and checkpoints; "
    "instead of every file of a run, of data and of the config",
    "no command runs; a command that needs the file ends with one line and exit code 2, others ignore it",
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
        "pickles next to good files": (
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


UNUSED_FILES = (
    "optimizer.pt rng.pt pytorch_model.bin encoder/pytorch_model.bin encoder/optimizer.pt features.pkl".split()
)


def pickled_models(folder: Path, content: bytes, canary: Path, figures: Figures, form: str) -> None:
    cases: dict[str, tuple[dict[str, bytes | None], bool]] = {
        "a pickle named model.safetensors": ({"model.safetensors": content}, True),
        "pytorch_model.bin alone": ({"model.safetensors": None, "pytorch_model.bin": content}, True),
        "pickles next to good files": (dict.fromkeys(UNUSED_FILES, content), False),
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
    """The manifest fits the pickled files, and there is no older checkpoint that would be used instead."""
    cases: dict[str, tuple[dict[str, bytes | None], bool]] = {
        "a pickle named model.safetensors": ({"model.safetensors": content}, True),
        "a pickle named optimizer.safetensors": ({"optimizer.safetensors": content}, True),
        "optimizer.pt alone": ({"optimizer.safetensors": None, "optimizer.pt": content}, True),
        "a pickled state.json": ({"state.json": content}, True),
        "pickles next to good files": (
            dict.fromkeys(("optimizer.pt", "rng.pt", "pytorch_model.bin", "scheduler.pt"), content),
            False,
        ),
    }
    for name, (files, must_refuse) in cases.items():
        run = folder / "evil" / f"checkpoint-{name.replace(' ', '-')}"
        shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("cache"))
        keep_first_half(run)
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
    """Each file of a stopped run in turn, in a prediction and a resume: the payload must not run."""
    whole = folder / "evil/whole"
    shutil.copytree(folder / "run", whole)
    keep_first_half(whole)
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


# ---- S3: code of an encoder ----


CODE = """from pathlib import Path
Path({canary!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizerFast
class C(BertConfig):
    model_type = 'evil'
class M(BertModel):
    config_class = C
class T(BertTokenizerFast):
    pass
"""


def run_with_code(kind: str, folder: Path, case: str, code: str, file: str, changes: dict[str, Any]) -> Outcome:
    """Train or predict with an encoder that has evil.py and other values in one of its JSON files."""
    model = folder / "evil" / case.replace(" ", "-").replace(":", "")
    encoder = model / "encoder"
    if kind == "predict":
        shutil.copytree(folder / "run", model, ignore=shutil.ignore_patterns("checkpoints", "cache"))
    else:
        shutil.copytree(folder / "encoder", encoder)
    (encoder / "evil.py").write_text(code)
    path = encoder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if kind == "predict":
        return Outcome("predict", model, folder / "test.csv", folder / "out.tsv")
    words = ("--encoder", encoder, "--model_path", model / "run", "--max_epochs", "1")
    return Outcome("train", folder / "run.json", *words)


@row(
    "S3",
    "encoders with code of their own (auto_map of config, model, tokenizer), with attention code to fetch "
    "(_attn_implementation_internal and similar keys), in a folder to train from and in a model folder",
    "the code does not run; exit code 2 and one line, where the encoder needs it",
)
def test_S3_code_of_an_encoder_is_never_run(tmp_path: Path) -> Figures:
    figures, canary = Figures(), tmp_path / "canary"
    trained(tmp_path)
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
        "tokenizer next to a known one": (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "evil.T"]}},
            False,
        ),
    }
    code = CODE.format(canary=str(canary))
    (tmp_path / "evil.py").write_text(code)
    subprocess.run([sys.executable, "-c", "import evil"], cwd=tmp_path, check=True)
    figures.count(canary.exists(), "the code itself does nothing")
    canary.unlink()
    for name, (file, changes, must_refuse) in cases.items():
        for kind in ("train", "predict"):
            case = f"{kind}: {name}"
            outcome = run_with_code(kind, tmp_path, case, code, file, changes)
            figures.count(not canary.exists(), f"{case}: THE CODE RAN; {outcome}")
            canary.unlink(missing_ok=True)
            if must_refuse:
                figures.refused(outcome.refused, f"{case}: expected a refusal in one line, found {outcome}")
            else:
                figures.count(outcome.refused or outcome.code == 0, f"{case}: {outcome}")
    figures.count(
        "trust_remote_code=True" not in "".join(path.read_text() for path in (tiny.ROOT / "mmbert_core").rglob("*.py")),
        "the package trusts code of others",
    )
    return figures
