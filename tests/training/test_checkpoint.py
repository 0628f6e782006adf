"""Checkpoints: complete or skipped, restored by name, kept and removed by rule."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.storage import files as project_files
from mmbert_core.storage.files import sha256_of
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import (
    CHECKPOINT_FILES,
    TrainState,
    clean_up,
    find_checkpoint,
    list_steps,
    moments_of,
    read_checkpoint,
    read_weights,
    restore_moments,
    rotate,
    save_checkpoint,
    set_aside,
    step_folder,
    train_state_from,
    weights_of,
    why_invalid,
)
from mmbert_core.training.saved_state import FORMAT_VERSION
from tests.training.conftest import warnings_in


class Network(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)
        self.register_buffer("mean", torch.tensor([1.0, 2.0]))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.last(self.norm(self.first(torch.linspace(-1, 1, 12).view(3, 4)))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: Network, *, turned: bool = False) -> torch.optim.Optimizer:
    """Two groups whose order is not the model's; `turned`: another order again, the same members."""
    groups = [list(model.last.parameters()), [*model.norm.parameters(), *model.first.parameters()]]
    if turned:
        groups[1].reverse()
    return torch.optim.AdamW([{"params": groups[0], "lr": 0.1, "weight_decay": 0.5}, {"params": groups[1], "lr": 0.01}])


def save(
    folder: Path, step: int, *, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **state
) -> Path:
    model = model or Network(seed=step)
    moments = {} if optimizer is None else moments_of(model, optimizer)
    return save_checkpoint(folder, weights=weights_of(model), moments=moments, state={"step": step, **state})


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# ---- round trip ----


def test_weights_and_moments_come_back_by_name(tmp_path):
    model = Network()
    optimizer = adamw(model)
    for _ in range(3):
        model.step(optimizer)
    path = save(tmp_path, 3, model=model, optimizer=optimizer, epoch=1)
    assert path == tmp_path / "step-00000003" and sorted(file.name for file in path.iterdir()) == sorted(
        [*CHECKPOINT_FILES, MANIFEST]
    )

    found = read_checkpoint(path)
    assert found.state == {"format_version": FORMAT_VERSION, "step": 3, "epoch": 1}
    assert found.weights.keys() == model.state_dict().keys() and "mean" in found.weights
    names = [name for name, _ in model.named_parameters()]
    assert sorted(found.moments) == sorted(
        f"{name}.{entry}" for name in names for entry in ("step", "exp_avg", "exp_avg_sq")
    )

    again = Network(seed=1)
    again.load_state_dict(found.weights)
    other = adamw(again, turned=True)
    restore_moments(again, other, found.moments)
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.01] and other.param_groups[0]["weight_decay"] == 0.5
    for (name, old), new in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new), name
        for entry, value in optimizer.state[old].items():
            assert torch.equal(value, other.state[new][entry]) and value.dtype == other.state[new][entry].dtype, (
                f"{name}.{entry}"
            )
    model.step(optimizer), again.step(other)
    assert all(torch.equal(old, new) for old, new in zip(model.parameters(), again.parameters(), strict=True))


def test_saved_tensors_are_copies_and_tied_weights_are_allowed(tmp_path):
    model = Network()
    model.tied = model.first
    model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)  # not contiguous
    weights = weights_of(model)
    assert all(
        not torch.equal(value, torch.zeros_like(value)) or name.endswith("bias") for name, value in weights.items()
    )
    with torch.no_grad():
        model.first.weight.zero_()
    assert weights["first.weight"].any() and torch.equal(weights["first.weight"], weights["tied.weight"])
    save_checkpoint(tmp_path, weights=weights, moments={}, state={"step": 1})
    assert torch.equal(read_weights(tmp_path, 1)["turned"], model.turned)


def test_state_holds_all_of_the_train_state():
    state = TrainState(
        step=7,
        epoch=2,
        rows_consumed=16,
        skipped_steps=1,
        best_metric="val/auroc",
        best_value=0.1 + 0.2,
        best_step=5,
        train_seconds=1 / 3,
    )
    read = json.loads(json.dumps({**vars(state), "config": {}, "scheduler": {}}))
    assert train_state_from(read) == state


def test_manifest_names_every_file_with_size_and_hash(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"] == {
        name: {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)} for name in CHECKPOINT_FILES
    }
    assert (path / MANIFEST).stat().st_mtime_ns >= max((path / name).stat().st_mtime_ns for name in CHECKPOINT_FILES)
    assert why_invalid(path) is None


def test_the_same_state_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        model = Network()
        optimizer = adamw(model)
        model.step(optimizer)
        save(tmp_path / folder, 1, model=model, optimizer=optimizer)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    for name in CHECKPOINT_FILES[:2]:
        with safe_open(tmp_path / "a/step-00000001" / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


# ---- damage ----

DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "a byte short": lambda path, data: path.write_bytes(data.rstrip(b"\n")[:-1]),
    "a flipped byte": lambda path, data: path.write_bytes(
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    ),
    "something behind": lambda path, data: path.write_bytes(data + b"x"),
    "missing": lambda path, data: path.unlink(),
    "a folder": lambda path, data: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", (*CHECKPOINT_FILES, MANIFEST))
def test_a_damaged_file_sends_the_resume_to_the_previous_checkpoint(tmp_path, caplog, name, damage):
    for step in (10, 20):
        save(tmp_path, step)
    file = step_folder(tmp_path, 20) / name
    DAMAGES[damage](file, file.read_bytes())
    assert find_checkpoint(tmp_path, "auto") == step_folder(tmp_path, 10)
    [warning] = warnings_in(caplog)
    assert str(step_folder(tmp_path, 20)) in warning and name in warning and "\n" not in warning
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path, 20)
    with pytest.raises(InputError, match="step 20 .* is damaged"):
        find_checkpoint(tmp_path, 20)


@pytest.mark.parametrize("name", (*CHECKPOINT_FILES, MANIFEST))
def test_a_part_that_is_a_link_is_not_followed(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    # a link to a manifest of the same content is accepted
    assert (why_invalid(path) is None) == (name == MANIFEST)


@pytest.mark.parametrize("bit", (0, 5))
def test_no_flipped_bit_of_a_manifest_passes(tmp_path, bit):
    path = save(tmp_path, 1)
    data = (path / MANIFEST).read_bytes().rstrip(b"\n")
    for index in range(len(data)):
        (path / MANIFEST).write_bytes(data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :])
        assert why_invalid(path), f"byte {index}: {data[index : index + 1]!r}"


@pytest.mark.parametrize(
    "manifest",
    (
        "[]",
        "null",
        '{"files": []}',
        '{"files": {"model.safetensors": 3}}',
        '{"format_version": 1, "files": {}}',
        "\0\0\0",
    ),
)
def test_strange_manifests_are_refused(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(manifest)
    assert why_invalid(path).startswith(MANIFEST)


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path, caplog):
    for step in (10, 20):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(InputError, match="none of the checkpoints is whole"):
        find_checkpoint(tmp_path, "auto")
    assert len(warnings_in(caplog)) == 2


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(
        InputError, match=f"state.json: format_version: expected {FORMAT_VERSION}, found {FORMAT_VERSION + 1}"
    ):
        read_checkpoint(path)


# ---- which one ----


def test_resume_never_auto_and_a_step(tmp_path):
    assert (
        find_checkpoint(tmp_path / "nothing", "auto") is None and find_checkpoint(tmp_path / "nothing", "never") is None
    )
    with pytest.raises(InputError, match=r"resume: .* \(none\), found 5"):
        find_checkpoint(tmp_path / "nothing", 5)
    for step in (5, 100000000, 40):
        save(tmp_path, step)
    assert list_steps(tmp_path) == [100000000, 40, 5]
    assert find_checkpoint(tmp_path, "auto").name == "step-100000000"
    assert find_checkpoint(tmp_path, 40).name == "step-00000040"
    with pytest.raises(InputError, match=r"\(5, 40, 100000000\), found 41"):
        find_checkpoint(tmp_path, 41)
    with pytest.raises(InputError, match="resume is never"):
        find_checkpoint(tmp_path, "never")


def test_links_and_odd_names_are_nobodys(tmp_path, caplog):
    save(tmp_path / "elsewhere", 99)
    folder = tmp_path / "checkpoints"
    save(folder, 1), save(folder, 2), save(folder, 3)
    (folder / "step-00000099").symlink_to(tmp_path / "elsewhere/step-00000099")
    (folder / "step-00000098").write_text("a file")
    odd = [
        "step-7",
        "step-000000007",
        "step-0000000x",
        "step--0000007",
        "STEP-00000007",
        "step-00000007\n",
        "step-00000007 ",
        "step-０００００００７",
        "old",
        "...",
    ]
    for name in odd:
        shutil.copytree(step_folder(folder, 3), folder / name)
    before = set(os.listdir(folder))
    assert list_steps(folder) == [3, 2, 1]
    assert find_checkpoint(folder, "auto").name == "step-00000003"
    rotate(folder, keep=1, newest=3, best_step=None)
    assert before - set(os.listdir(folder)) == {"step-00000001", "step-00000002"}
    save(folder, 99), save(folder, 98)  # a run that gets there takes the name, and leaves what the link pointed to
    assert not (folder / "step-00000099").is_symlink() and list_steps(folder) == [99, 98, 3]
    assert why_invalid(tmp_path / "elsewhere/step-00000099") is None
    assert warnings_in(caplog) == []


# ---- rotation ----


@pytest.mark.parametrize(
    ("keep", "best_step", "left"),
    [(2, None, [40, 50]), (2, 10, [10, 40, 50]), (2, 50, [40, 50]), (1, 40, [40, 50]), (9, 30, [10, 20, 30, 40, 50])],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, keep, best_step, left):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    rotate(tmp_path, keep=keep, newest=50, best_step=best_step)
    assert sorted(list_steps(tmp_path)) == left


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    for step in (10, 20, 30):
        save(tmp_path, step)

    def refuse(path):
        raise OSError("Directory not empty")

    monkeypatch.setattr(checkpoint, "remove_path", refuse)
    rotate(tmp_path, keep=2, newest=30, best_step=None)
    assert sorted(list_steps(tmp_path)) == [10, 20, 30]
    assert [message for message in warnings_in(caplog) if "step 10 could not be removed" in message]


def test_later_checkpoints_are_set_aside_not_lost(tmp_path):
    for _ in range(2):
        for step in (10, 20, 30):
            save(tmp_path, step)
        set_aside(tmp_path, 10)
        assert list_steps(tmp_path) == [10] and find_checkpoint(tmp_path, "auto") == step_folder(tmp_path, 10)
    names = [f"aside-step-000000{step}{number}" for step in (20, 30) for number in ("", "-1")]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("aside")) == sorted(names)
    assert all(why_invalid(tmp_path / name) is None for name in names)


def test_a_checkpoint_that_only_a_signal_asked_for_goes_with_the_next_one(tmp_path):
    for step, is_due in ((10, True), (20, True), (25, False), (27, False)):
        save(tmp_path, step, due=is_due)
        rotate(tmp_path, keep=2, newest=step, best_step=None)
    assert list_steps(tmp_path) == [27, 20, 10]
    save(tmp_path, 30, due=True)
    rotate(tmp_path, keep=2, newest=30, best_step=None)
    assert list_steps(tmp_path) == [30, 20]


def test_a_checkpoint_that_could_not_be_removed_goes_with_a_later_rotation(tmp_path, monkeypatch, caplog):
    for step in (10, 20):
        save(tmp_path, step)
    with monkeypatch.context() as patches:
        patches.setattr(
            os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        )
        rotate(tmp_path, keep=1, newest=20, best_step=None)
    assert list_steps(tmp_path) == [20, 10] and "the old checkpoint of step 10 could not be removed" in caplog.text
    rotate(tmp_path, keep=1, newest=20, best_step=None)
    assert list_steps(tmp_path) == [20]


@pytest.mark.parametrize(
    "name",
    (
        "../run",
        "/tmp",
        "multimodal_bert-x",
        "multimodal_bert-2026-01-01-00-00-00/..",
        7,
        ["multimodal_bert-2026-01-01-00-00-00"],
    ),
)
def test_a_test_folder_that_no_run_names_is_refused(tmp_path, name):
    save(tmp_path, 1, test_folder="multimodal_bert-2026-01-01-00-00-00")
    assert read_checkpoint(step_folder(tmp_path, 1)).state["test_folder"]
    save(tmp_path, 1, test_folder=name)
    with pytest.raises(InputError, match="state.json: test_folder: expected a text like"):
        read_checkpoint(step_folder(tmp_path, 1))


def test_rotation_never_removes_what_was_just_written(tmp_path):
    """After resuming from step 10, because 20 and 30 were damaged."""
    for step in (10, 20, 30, 15):
        save(tmp_path, step)
    rotate(tmp_path, keep=1, newest=15, best_step=None)
    assert list_steps(tmp_path) == [30, 20, 15]


# ---- writing ----


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_weights_are_refused(tmp_path, bad):
    save(tmp_path, 1)
    before = content(tmp_path)
    model = Network()
    with torch.no_grad():
        model.last.weight[0, 0] = bad
    with pytest.raises(RunError, match="step 2: last.weight is not finite"):
        save(tmp_path, 2, model=model)
    assert content(tmp_path) == before


@pytest.mark.parametrize("step", (1, 2))
@pytest.mark.parametrize("stage", ("model.safetensors", "optimizer.safetensors", "state.json", MANIFEST, "rename"))
def test_an_interrupted_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, stage, step):
    """Also where the step has a whole folder already: it goes only when the new one is complete."""
    save(tmp_path, 1)
    before = content(tmp_path)

    def breaking(plain, path_of):
        def write(*arguments, **options):
            if path_of(*arguments).name == stage:
                raise OSError("No space left on device")
            return plain(*arguments, **options)

        return write

    monkeypatch.setattr(checkpoint, "save_tensors", breaking(checkpoint.save_tensors, lambda tensors, path: path))
    monkeypatch.setattr(checkpoint, "write_json", breaking(checkpoint.write_json, lambda path, value: path))
    if stage == "rename":  # of the new folder; the old one was moved aside and comes back
        monkeypatch.setattr(
            project_files.os,
            "rename",
            breaking(os.rename, lambda old, new: Path("rename" if ".tmp-step" in str(old) else "")),
        )
    with pytest.raises(RunError, match="need .* MB, have .* MB at .*No space"):
        save(tmp_path, step, model=Network(seed=5))
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["step-00000001"]
    assert find_checkpoint(tmp_path, "auto") == step_folder(tmp_path, 1)


def test_a_step_written_again_replaces_the_old_folder(tmp_path):
    (save(tmp_path, 1) / "state.json").unlink()
    (step_folder(tmp_path, 1) / "stranger").write_text("x")
    path = save(tmp_path, 1, model=Network(seed=5))
    assert why_invalid(path) is None and sorted(os.listdir(path)) == sorted([*CHECKPOINT_FILES, MANIFEST])
    assert torch.equal(read_weights(tmp_path, 1)["first.weight"], Network(seed=5).first.weight)


def test_leftovers_of_an_interrupted_write_are_removed_at_the_start(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-123").mkdir()
    (tmp_path / ".tmp-step-00000002-123/model.safetensors").write_text("half")
    (tmp_path / ".tmp-file").write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "elsewhere")
    assert list_steps(tmp_path) == [1]
    clean_up(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "step-00000001"]
    clean_up(tmp_path / "nothing")


def test_a_write_killed_while_it_replaced_a_checkpoint_is_ended_at_the_start(tmp_path):
    complete = save(tmp_path, 1, model=Network(seed=5))
    before = content(complete)
    complete.rename(tmp_path / ".tmp-step-00000001-123")  # the old folder is gone, the new one not yet renamed
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000001"] and content(step_folder(tmp_path, 1)) == before


def test_a_checkpoint_without_disk_space_is_not_begun(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = content(tmp_path)
    for module in (checkpoint, project_files):
        monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    with pytest.raises(RunError, match=r"no space for the checkpoint of step 2: need 1\.\d MB, have 0\.0 MB at "):
        save(tmp_path, 2)
    assert content(tmp_path) == before
