"""Names and links that lead out of a run: no file outside it is changed."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from tests.faults.manipulated_runs import (
    Outcome,
    differences,
    keep_first_half,
    listing,
    trained,
    write_config,
    write_manifest,
)
from tests.support import tiny
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


# ---- S2: names that lead elsewhere ----

LONG_NAME = "x" * 300
HOSTILE_NAMES = ("../x", "a/../../b", "", "..", "con\n", LONG_NAME)  # and absolute ones, which need a folder


@row(
    "S2",
    "names that lead out of a run: in MANIFEST.json, state.json, config.json, features.json, labels.json, class names; "
    "checkpoint folders with odd names; links instead of every file and folder",
    "refused or ignored; no file outside the run is created, changed or removed",
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
    """`linked`: files and folders of a run that are replaced by links; None: all of them."""
    figures, folder = Figures(), tmp_path / "inside"
    whole = trained(folder)
    shutil.copytree(whole, folder / "half")
    keep_first_half(folder / "half")
    names = (*HOSTILE_NAMES, str(tmp_path / "outside/x"))
    for attack in (hostile_manifests, hostile_states, hostile_models, hostile_checkpoint_folders):
        attack(folder, names, figures)
    hostile_links(folder, linked, figures)
    hostile_classes(tmp_path, figures)
    return figures


def outside_of(folder: Path) -> Path:
    """Write files next to `folder` that no command may change: two files and a stopped run."""
    outside = folder.parent / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    shutil.copytree(folder / "half", outside / "folder")
    (outside / "folder/.tmp-left").mkdir()
    (outside / "folder/.tmp-left/file").write_text("precious")
    (outside / "file").write_text("precious")
    return outside


def resume_spoiled(folder: Path, spoil: Callable[[Path, Path], None], figures: Figures, case: str) -> Outcome:
    """Spoil a stopped run and resume it; nothing outside it may change."""
    outside, run = outside_of(folder), folder / "run-spoiled"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "half", run)
    spoil(run, outside)
    before = listing(folder.parent, without=[run])
    outcome = Outcome("train", folder / "run.json", "--model_path", run)
    changed = differences(before, listing(folder.parent, without=[run]))
    figures.count(not changed, f"{case}: changed {changed[:5]}; {outcome}")
    return outcome


def hostile_manifests(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """A manifest with one more name, or with a file under another name: the checkpoint before it is used."""
    for name in names:
        for file in (None, "optimizer.safetensors"):

            def spoil(run: Path, outside: Path) -> None:
                path = run / "checkpoints/step-00000004" / MANIFEST
                manifest = json.loads(path.read_text())
                precious = {"bytes": (outside / "file").stat().st_size, "sha256": sha256_of(outside / "file")}
                manifest["files"][name] = manifest["files"].pop(file) if file else precious
                path.write_text(json.dumps(manifest))

            case = f"MANIFEST.json, {'instead of ' + file if file else 'besides'}: {name[:40]!r}"
            outcome = resume_spoiled(folder, spoil, figures, case)
            passed_over = (
                "step-00000004 is damaged and passed over: MANIFEST.json" in outcome.text and outcome.code == 0
            )
            figures.refused(outcome.refused or passed_over, f"{case}: not refused; {outcome}")


def hostile_states(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """state.json with strings instead of numbers, and with impossible numbers; the manifest fits."""
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

        case = f"state.json, {key}: {str(value)[:40]!r}"
        outcome = resume_spoiled(folder, spoil, figures, case)
        if (key, value) != ("best_step", None):  # None means that there was no validation yet
            figures.refused(outcome.refused, f"{case}: expected a refusal in one line, found {outcome}")


def hostile_models(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """A model folder with hostile names in config, features or labels. Prediction uses no path of config.json."""
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
            tiny.without_manifest(model)  # the manifest would refuse every edit
            output = outside / "out.tsv"
            before = listing(folder.parent)
            outcome = Outcome("predict", model, rows, output)
            changed = [path for path in differences(before, listing(folder.parent)) if path != str(output)]
            case = f"{file}, {key}: {name[:40]!r}"
            figures.count(not changed, f"{case}: changed {changed[:5]}; {outcome}")
            figures.count(
                outcome.refused or (outcome.code == 0 and key not in ("pooling", "id_name", "columns")),
                f"{case}: {outcome}",
            )


def hostile_checkpoint_folders(folder: Path, names: Sequence[str], figures: Figures) -> None:
    """Complete checkpoints in folders with names that no step gets: ignored and not changed."""
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
        outcome = resume_spoiled(
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
            or ("resuming from" in outcome.text and "step-00000004" in outcome.text and outcome.code == 0 and left),
            f"checkpoint folder {name[:40]!r}: {outcome}",
        )
    for name in names:
        for key in ("--resume", "--save_every"):
            outcome = Outcome("train", folder / "run.json", "--model_path", folder / "half", key, name)
            figures.refused(outcome.refused, f"{key} {name[:40]!r}: {outcome}")


def hostile_links(folder: Path, linked: tuple[str, ...] | None, figures: Figures) -> None:
    """Each file or folder of a run in turn is replaced by a link to the outside; also each name that a run writes."""
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
    existing = [
        str(path.relative_to(half))
        for path in sorted(half.rglob("*"))
        if "checkpoints" not in path.parts or path.name == "checkpoints" or "step-00000004" in path.parts
    ]
    for name in linked or (*existing, *new):

        def spoil(run: Path, outside: Path) -> None:
            path = run / name
            there = path.exists()
            is_folder = path.is_dir() if there else "." not in name.removeprefix(".")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            target = outside / ("folder" if is_folder else "file")
            if there:  # the target has the replaced content, so that only the link is wrong
                shutil.rmtree(outside / "folder") if is_folder else target.unlink()
                (shutil.copytree if is_folder else shutil.copy)(half / name, target)
            path.symlink_to(target)

        outcome = resume_spoiled(folder, spoil, figures, f"{name} is a link")
        figures.count(outcome.code == 0 or outcome.refused, f"{name} is a link: {outcome}")


def hostile_classes(tmp_path: Path, figures: Figures) -> None:
    """Class names, columns and ids that are paths, in training, metrics, plots, curves and predictions."""
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
    before = listing(tmp_path, without=[folder / "run"])
    outcome = Outcome("train", config)
    changed = differences(before, listing(tmp_path, without=[folder / "run"]))
    figures.count(
        outcome.code == 0 and not changed, f"classes and columns that are paths: changed {changed[:5]}; {outcome}"
    )
