"""What a checkpoint's state.json and tensors may hold, checked before a run uses any of it.

N training rows. The values decide which rows, folders and sizes a run uses, so a value that no run writes is refused
and never repaired.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mmbert_core.model.text_encoder import POOLINGS
from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.schema import (
    Check,
    anything,
    array,
    boolean,
    check_structure,
    constant,
    either,
    mapping,
    nullable,
    number,
    record,
    text,
    whole,
)

FORMAT_VERSION = 2
STATE = "state.json"
TEST_FOLDER = r"[a-z_]+-[0-9]{4}(-[0-9]{2}){5}"  # name of the folder that a repeated test replaces
MAX_MICRO_BATCHES = 1_000_000
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter that has had a gradient
AVERAGE = "average"  # and, with ema_decay, the moving average of the weights

PROGRESS: dict[str, Check] = {
    "epoch": whole(0),
    "rows_consumed": whole(0),
    "skipped_steps": whole(0),
    "best_metric": nullable(text()),
    "best_value": nullable(number()),
    "best_step": nullable(whole(0)),
    "bad_validations": whole(0),
    "validation_pending": boolean,
    "finished": boolean,
    "train_seconds": number(0),
    "rows_trained": whole(0),
}
# LambdaLR's keys differ between versions of PyTorch; only these four are restored.
SCHEDULER = {
    "base_lrs": array(number(0)),
    "_last_lr": array(number(0)),
    "last_epoch": whole(0),
    "_step_count": whole(0),
}
SCALER = {
    "scale": number(above=0),
    "growth_factor": number(above=0),
    "backoff_factor": number(above=0),
    "growth_interval": whole(1),
    "_growth_tracker": whole(0),
}
RUN_RECORD: dict[str, Check] = {
    "scheduler": record(SCHEDULER, others=True),
    "scaler": either(record({}), record(SCALER)),  # empty: not in use
    "seed": whole(0),
    "config": mapping(anything),  # compared with the run's own, value by value
    "resolved": record(
        {
            "pooling": nullable(text(choices=POOLINGS[1:])),
            "precision": text(choices=("fp32", "bf16", "fp16")),
            "microbatches_asked": whole(1, MAX_MICRO_BATCHES),
            "microbatches_per_step": whole(1, MAX_MICRO_BATCHES),
        },
        {"lr": number(0), "head_lr": number(0)},  # where they were auto
        others=True,  # versions differ in what they resolve
    ),
    "fingerprints": mapping(record({"sha256": text()}, {"bytes": whole(0)})),
    "parameters": array(array(either(text(), array(whole(0))), length=2)),
    "world_size": whole(1),
    "versions": mapping(text()),
}
# Keys that older checkpoints may lack.
NEWER_KEYS = {
    "test_folder": nullable(text(pattern=TEST_FOLDER)),
    "due": boolean,
    "best_val_loss": nullable(number()),
}
# `record(required, optional)`; `others`: newer versions may write more keys.
READABLE_STATE = record(
    {"format_version": constant(FORMAT_VERSION), "step": whole(0)},
    {**PROGRESS, **RUN_RECORD, **NEWER_KEYS},
    others=True,
)
RUN_STATE = record({"step": whole(0), **PROGRESS, **RUN_RECORD}, NEWER_KEYS, others=True)


def check_steps(state: Mapping[str, Any], step: int) -> None:
    """Raise `InputError` unless the state's step is `step`, as in the folder's name, and its best step is not later."""
    if state["step"] != step or (state.get("best_step") or 0) > step:
        raise InputError(
            f"{STATE}: expected step {step} as in the folder's name, and no later best_step, "
            f"found {state['step']} and {state.get('best_step')}"
        )


def check_run_state(state: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the state has all that a run resumes from."""
    check_structure(state, RUN_STATE, STATE)


def check_progress(state: Mapping[str, Any], *, num_rows: int, batch_size: int) -> None:
    """Raise `InputError` unless epoch and rows are those of a run of N rows at the state's step."""
    steps_per_epoch = -(-num_rows // batch_size)
    epoch, step_of_epoch = divmod(state["step"], steps_per_epoch)
    expected = {
        "epoch": epoch,
        "rows_consumed": step_of_epoch * batch_size,
        "rows_trained": epoch * num_rows + step_of_epoch * batch_size,
    }
    for key, value in expected.items():
        if state[key] != value:
            raise InputError(
                f"{STATE}: {key}: expected {value} for {num_rows} rows after step {state['step']}, found {state[key]}"
            )


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, file: str) -> None:
    """Raise `InputError` unless names and shapes are those of the model's own tensors."""
    if different := sorted(set(found) ^ set(expected)):
        in_file, in_model = ("has", "lacks") if different[0] in found else ("lacks", "has")
        raise InputError(f"{file}: {in_file} the tensor {different[0]!r:.120}, which the model {in_model}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise InputError(f"{file}: {name}: expected shape {list(tensor.shape)}, found {list(found[name].shape)}")


def check_moments(
    moments: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], *, has_average: bool, file: str
) -> None:
    """Raise `InputError` unless each parameter has all of MOMENTS, in its own shape, or none of them.

    `has_average`: and AVERAGE too.
    """
    names = {key.rpartition(".")[0] for key in moments}
    scalar = torch.zeros(())
    trained = {name: parameter for name, parameter in parameters.items() if name in names}
    expected = {
        f"{name}.{entry}": scalar if entry == "step" else parameter
        for name, parameter in trained.items()
        for entry in (*MOMENTS, *((AVERAGE,) if has_average else ()))
    }
    check_tensors(moments, expected, file=file)


def check_schedule(scheduler: Mapping[str, Any], *, num_groups: int) -> None:
    """Raise `InputError` unless there is a learning rate for each of the optimizer's groups of parameters."""
    for key in ("base_lrs", "_last_lr"):
        if len(scheduler[key]) != num_groups:
            raise InputError(
                f"{STATE}: scheduler.{key}: expected {num_groups} learning rates, found {len(scheduler[key])}"
            )
