"""Checkpoints that are complete or absent: written to a temporary folder, synced, the manifest last, renamed.

    checkpoints/step-00000400/  model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

Nothing is pickled. Only one rank reads and writes; `resume` broadcasts what was read to the others.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mmbert_core.runtime.errors import InputError, RunError, shorten
from mmbert_core.storage.files import (
    MEGABYTE,
    TEMPORARY_PREFIX,
    atomic_folder,
    free_bytes,
    missing_space,
    read_json,
    remove_path,
    remove_stale_temporaries,
    save_tensors,
    sync_path,
    write_json,
)
from mmbert_core.storage.manifest import MANIFEST, manifest_of, read_manifest, why_different
from mmbert_core.training.saved_state import AVERAGE, FORMAT_VERSION, NEWER_KEYS, READABLE_STATE, STATE, check_steps

logger = logging.getLogger(__name__)

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", STATE)
ASIDE_PREFIX = "aside-"
DUE = "due"  # in state.json: false for a checkpoint written only because of a signal; older ones lack the key
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
TEMPORARY_FOLDER = re.compile(re.escape(TEMPORARY_PREFIX) + r"(step-[0-9]{8,})-[0-9]+")


@dataclass
class TrainState:
    """The progress of a run; all of it is in `state.json`. Counts are from the first start of the run, over resumes."""

    step: int = 0  # completed optimizer steps
    epoch: int = 0
    rows_consumed: int = 0  # of this epoch's permutation
    skipped_steps: int = 0  # without an update: overflowed in fp16, or left out (on_nonfinite)
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    best_val_loss: float | None = None  # of the best step; decides between equal values of the metric
    bad_validations: int = 0
    validation_pending: bool = False  # stopped by a signal before or in this step's validation
    finished: bool = False
    train_seconds: float = 0.0
    rows_trained: int = 0
    test_folder: str | None = None  # its name in the run's folder; set after the last step


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, on the CPU."""

    path: Path
    weights: dict[str, torch.Tensor]  # by name in the model's state_dict
    moments: dict[str, torch.Tensor]  # see `moments_of`
    state: dict[str, Any]  # state.json


def step_folder(folder: Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The inverse of `step_folder`."""
    return int(Path(path).name.removeprefix("step-"))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of parameters and buffers on the CPU, contiguous, no memory shared between names."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}


# ---- optimizer by parameter name ----


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as `<parameter>.<entry>` CPU tensors: `saved_state.MOMENTS` and AVERAGE."""
    moments = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{entry}"] = value.detach().to("cpu", copy=True).contiguous()
    return moments


def restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]) -> None:
    """Restore the moments by the parameters' names, never by position."""
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, entry = key.rsplit(".", 1)
        by_parameter.setdefault(name, {})[entry] = (
            value.clone()
        )  # a copy: `value` is a view of the file, which is mapped into memory
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    state = {index: by_parameter[name] for index, name in enumerate(ordered) if name in by_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# ---- writing ----


def save_checkpoint(
    folder: Path, *, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Rank 0 only. Write the folder `step-<step>`; one that exists is replaced when the new one is complete.

    Raises `RunError` for weights that are not finite and when the disk is full; then nothing of it is left on the
    disk, and the older checkpoints are unchanged.
    """
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    not_finite = [name for name, tensor in floats.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise RunError(f"step {state['step']}: {not_finite[0]} is not finite; no checkpoint written")
    final = step_folder(folder, state["step"])
    check_space(folder, state["step"], weights, moments)
    try:
        _write(final, weights, moments, state)
    except OSError as error:
        message = f"the checkpoint of step {state['step']} could not be written"
        raise RunError(f"{message}: {_missing_space(folder, weights, moments)} ({error})") from error
    return final


def check_space(
    folder: Path, step: int, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
) -> None:
    """Raise `RunError` when the disk has too little space for a checkpoint of these tensors."""
    if free_bytes(folder) < _size(weights, moments):
        raise RunError(f"no space for the checkpoint of step {step}: {_missing_space(folder, weights, moments)}")


def _size(weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> int:
    """Bytes on the disk: the tensors, and 5 % and a megabyte for headers, JSON and blocks."""
    return sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) * 21 // 20 + MEGABYTE


def _missing_space(folder: Path, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> str:
    return missing_space(folder, _size(weights, moments))


def _write(
    final: Path, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    with atomic_folder(final) as temporary:
        save_tensors(weights, temporary / "model.safetensors")
        save_tensors(moments, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **state})
        for name in CHECKPOINT_FILES:  # before the manifest
            sync_path(temporary / name)
        write_json(temporary / MANIFEST, manifest_of(temporary, CHECKPOINT_FILES, version=FORMAT_VERSION))


def rotate(folder: Path, *, keep: int, newest: int, best_step: int | None) -> None:
    """Rank 0 only. Keep the checkpoints of step `newest`, of the best step and of the last `keep` due steps.

    A checkpoint that was written only because of a signal does not count among the `keep` and is removed after the
    next one: in the end an interrupted run has the same checkpoints as one that was not interrupted.
    Checkpoints later than `newest` are damaged ones that a resume has skipped; the run replaces them at their step.
    """
    steps = sorted(step for step in list_steps(folder) if step <= newest)
    due = [step for step in steps if was_due(step_folder(folder, step))]
    for step in set(steps) - set(due[-keep:]) - {newest, best_step}:
        try:
            remove_path(step_folder(folder, step))
        except OSError as error:  # the run can continue; the next rotation tries again
            logger.warning("the old checkpoint of step %d could not be removed: %s", step, error)


def was_due(path: Path) -> bool:
    """Whether a checkpoint was written because of its step, not only because of a signal."""
    try:
        return read_json(path / "state.json").get(DUE, True) is not False
    except (OSError, ValueError, AttributeError):
        return True


def set_aside(folder: Path, newest: int) -> None:
    """Rank 0 only. Rename the checkpoints later than step `newest`, so that no later start resumes from them."""
    for step in list_steps(folder):
        if step > newest:
            path = step_folder(folder, step)
            suffixes = (f"-{number}" if number else "" for number in count())
            candidates = (path.with_name(f"{ASIDE_PREFIX}{path.name}{suffix}") for suffix in suffixes)
            new_path = next(candidate for candidate in candidates if not candidate.exists())
            path.rename(new_path)
            logger.info("the checkpoint of step %d, later than the one resumed from, is now %s", step, new_path)


# ---- reading ----


def list_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, valid or not, latest first. Links and other names are ignored."""
    if not Path(folder).is_dir():
        return []
    names = [path.name for path in Path(folder).iterdir() if path.is_dir() and not path.is_symlink()]
    steps = {name: int(match.group(1)) for name in names if (match := STEP_FOLDER.fullmatch(name))}
    return sorted((step for name, step in steps.items() if name == step_folder(folder, step).name), reverse=True)


def why_invalid(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, naming the file; None when it is complete and unchanged."""
    try:
        entries = read_manifest(path, version=FORMAT_VERSION)
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except OSError as error:
        return f"{MANIFEST}: cannot be read: {error.strerror}"
    except InputError as error:
        return str(error).removeprefix(f"{path}/")
    if set(entries) != set(CHECKPOINT_FILES):
        return f"{MANIFEST}: expected {', '.join(CHECKPOINT_FILES)} in it, found {', '.join(sorted(entries))[:80]!r}"
    for name in CHECKPOINT_FILES:
        reason = "missing" if (path / name).is_symlink() else why_different(path / name, entries[name])
        if reason:
            return f"{name}: {reason}"
    return None


def find_checkpoint(folder: Path, resume: str | int) -> Path | None:
    """The checkpoint to resume from: the newest valid one, or that of step `resume`. None: a new run.

    Warns of each newer checkpoint that is damaged. Raises `InputError` when `resume` is not possible, and when there
    are checkpoints but all are damaged: a new run would silently lose the old one.
    """
    steps = list_steps(folder)
    if resume == "never":
        if steps:
            advice = "choose another model_path, or resume: auto"
            raise InputError(f"resume is never, but {folder} has checkpoints up to step {steps[0]}: {advice}")
        return None
    if isinstance(resume, int):
        if resume not in steps:
            existing = ", ".join(map(str, sorted(steps))) or "none"
            raise InputError(f"resume: expected a step that has a checkpoint in {folder} ({existing}), found {resume}")
        steps = [resume]
    for step in steps:
        reason = why_invalid(step_folder(folder, step))
        if reason is None:
            return step_folder(folder, step)
        logger.warning("checkpoint %s is damaged and passed over: %s", step_folder(folder, step), reason)
    if isinstance(resume, int):
        raise InputError(
            f"resume: the checkpoint of step {resume} in {folder} is damaged: choose another step, or auto"
        )
    if steps:
        raise InputError(f"{folder}: none of the checkpoints is whole; remove the folder to start anew")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors and the state of a valid checkpoint folder. Raises `InputError` for content that no run writes."""
    try:
        state = read_json(path / STATE, READABLE_STATE)
        check_steps(state, step_of(path))
        return Checkpoint(path, load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state)
    except (ValueError, OSError, SafetensorError) as error:  # as in the manifest, but no run has written it
        raise InputError(f"{path}: {shorten(str(error).removeprefix(f'{path}/'), 300)}") from None


def read_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of a step's checkpoint, averaged where the run has an average, as they were validated.

    Raises `InputError` when it is damaged.
    """
    path = step_folder(folder, step)
    if reason := why_invalid(path):
        raise InputError(f"{path}: the checkpoint of the best step is damaged: {reason}")
    try:
        weights = load_file(path / "model.safetensors")
        with safe_open(path / "optimizer.safetensors", framework="pt") as file:
            averaged = [name for name in weights if f"{name}.{AVERAGE}" in file.keys()]  # noqa: SIM118
            return weights | {name: file.get_tensor(f"{name}.{AVERAGE}") for name in averaged}
    except SafetensorError as error:  # as in the manifest, but no run has written it
        raise InputError(f"{path}: {error}") from None


def clean_up(folder: Path) -> None:
    """Rank 0 only, at the start, in a locked folder: remove what killed processes have left.

    A checkpoint that was complete but not yet renamed gets its name.
    """
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        match = TEMPORARY_FOLDER.fullmatch(path.name)
        if match and not path.is_symlink() and why_invalid(path) is None:
            final = Path(folder) / match.group(1)
            if why_invalid(final) is not None:  # killed before the rename, or while the old one was removed
                remove_path(final)
                path.rename(final)
                sync_path(folder)
    remove_stale_temporaries(folder)


# ---- the state that a run resumes with ----


def without_lost_best(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """`state`, without its best step when that checkpoint is damaged: the next validation is then the best so far."""
    best = state["best_step"]
    if best is None or best == state["step"]:
        return state
    if reason := why_invalid(step_folder(folder, best)):
        logger.warning(
            "the best step so far, %d, is lost (%s): the best is chosen from step %d on", best, reason, state["step"]
        )
        lost = dict.fromkeys(("best_step", "best_value", "best_metric", "best_val_loss"))
        return {**state, **lost, "bad_validations": 0}
    return state


def train_state_from(state: Mapping[str, Any]) -> TrainState:
    """The progress in a checkpoint's state; keys that older checkpoints lack get their defaults."""
    names = [name for name in asdict(TrainState()) if name in state or name not in NEWER_KEYS]
    return TrainState(**{name: state[name] for name in names})
