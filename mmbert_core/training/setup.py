"""Everything of a run put together before its first step: a fresh start or the continuation of a checkpoint. Floor 2.

Imports distributed, config, data, model_folder and the files of this folder named before it (checkpoint, run_log, optim, hooks, memory).
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import mmbert_core
from mmbert_core import distributed
from mmbert_core.claims import CLAIM, Claim, claim_folder
from mmbert_core.config import FREE_ON_RESUME, Config
from mmbert_core.data.batches import settle_micro_batches, steps_per_epoch
from mmbert_core.data.prepare import Data
from mmbert_core.data.tokens import keeps_end, sample_tokens
from mmbert_core.distributed import DistContext, UsedRows
from mmbert_core.errors import InputError, RunError, phase
from mmbert_core.evaluation.metrics import check_metric_choices
from mmbert_core.evaluation.thresholds import parse_rule
from mmbert_core.files import LOCK, TEMPORARY_PREFIX, read_json, remove_stale_temporaries, write_json
from mmbert_core.manifest import MANIFEST
from mmbert_core.model.losses import LossOp, add_loss_op, build_loss_op, row_weights
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.probe import ProbeTokens, check_text_encoder
from mmbert_core.model.text_encoder import POOLINGS
from mmbert_core.model_files import FIGURES_JSON
from mmbert_core.model_folder import BASELINE_WEIGHTS, BASELINES, CARD, ENCODER, SUMMARY, THRESHOLDS, WEIGHTS, build_model, config_record
from mmbert_core.schema import nullable, record, whole
from mmbert_core.training import checkpoint
from mmbert_core.training.checkpoint import Checkpoint, TrainState
from mmbert_core.training.hooks import MODEL_CLASS, Task, run_epoch
from mmbert_core.training.memory import keep_freed_memory, settle_by_trial
from mmbert_core.training.optim import build_scaler, configure_optimizers, resolve_precision
from mmbert_core.training.run_log import RunLog
from mmbert_core.training.saved_state import SCHEDULER, check_moments, check_progress, check_run_state, check_schedule, check_tensors

logger = logging.getLogger(__name__)

RESULTS = "train_results.json"
RESULTS_JSON = record({"steps": whole(0), "test_metrics": nullable(FIGURES_JSON)}, others=True)  # what is told of a finished run
WRITTEN = ("config.json", WEIGHTS, ENCODER, "features.json", "labels.json", THRESHOLDS, BASELINES, BASELINE_WEIGHTS, MANIFEST, SUMMARY, CARD, "checkpoints", "metrics.jsonl", RESULTS, "tensorboard", "cache", LOCK, CLAIM)
VERSIONS = {"mmbert_core": mmbert_core.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
# Of a micro-batch when microbatches_per_step is auto: where texts are packed, more of them cost time (each has its own gradient
# of the embeddings); where they are padded, fewer of them cost padding.
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16384}
ROWS_AT_ONCE = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Plan:
    """Durations in optimizer steps, fixed before the first."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    validate_by_epoch: bool  # a share of an epoch counts from the epoch's start, a number of steps from the run's
    micro_batches: int


@dataclass
class Run:
    """All parts of a training run on this rank."""

    config: Config
    data: Data
    context: DistContext
    folder: Path
    model: MultimodalBert  # the raw module: evaluated and saved
    ddp_model: nn.Module  # the same module as training sees it
    task: Task
    optimizer: Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    plan: Plan
    state: TrainState
    log: RunLog
    resolved: dict[str, Any]
    class_weights: np.ndarray  # [K] float64, as the loss weighs rows
    train_labels: np.ndarray  # [N] int64
    used_rows: UsedRows | None  # of the token embedding; none: DDP sums all of it
    best_validation: np.ndarray | None = None  # [N] or [N, K] predictions of the best step, if this life of the run validated it
    claim: Claim | None = None  # of the folder, on rank 0
    stopping: bool = False  # all ranks have agreed to stop: one of them had a signal
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics.jsonl

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


# ---- before the process group: what a user's mistake can break ----


def prepare_model(config: Config, data: Data) -> tuple[MultimodalBert, str | None]:
    """Check the metric names and the threshold's rule, build the model, and try its encoder on made-up texts.

    Raises `InputError`; needs no process group.
    """
    parse_rule(config.threshold_rule)
    check_metric_choices(config.metric_choices, data.labels.names)
    if config.early_stop_metric != "val_loss":
        check_metric_choices([config.early_stop_metric.removeprefix("val/")], data.labels.names, key="early_stop_metric")
    model, pooling = build_model(replace(config, pooling=settled_pooling(config)), data.features)
    if model.text_subnetwork is not None:
        tokens = ProbeTokens(**sample_tokens(data.tokenizer))
        check_text_encoder(model.text_subnetwork, tokens, max_length=config.max_length, name=config.encoder)
    return model, pooling


def settled_pooling(config: Config) -> str:
    """As asked; for `auto` what it meant when the run in `model_path` began, if it did: the encoder's files may say more by now."""
    if config.pooling != "auto" or config.resume == "never":
        return config.pooling
    try:
        record = read_json(Path(config.model_path) / "config.json")
        is_same = (record["config"]["encoder"], record["config"]["pooling"]) == (config.encoder, "auto")
        pooling = record["resolved"]["pooling"] if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return config.pooling
    return pooling if pooling in POOLINGS else config.pooling


def settle_class_weights(config: Config, data: Data) -> list[float] | None:
    """One weight per class: none, as given, or `balanced` = rows / (classes * rows of the class), from the training rows."""
    if config.class_weights == "balanced":
        counts = np.bincount(data.train.label_index, minlength=config.num_classes)
        return (len(data.train) / (config.num_classes * counts)).tolist()
    return None if config.class_weights is None else list(config.class_weights)


# ---- within the process group ----


def already_finished(config: Config) -> dict[str, Any] | None:
    """Collective. The results of the run in `model_path`, once all of it is written; else None."""

    def read() -> dict[str, Any] | None:
        try:
            return read_json(Path(config.model_path) / RESULTS, RESULTS_JSON)
        except (OSError, ValueError):  # not there, or torn: the end of the run is done once more
            return None

    return distributed.on_main(read)


def check_no_links(folder: Path) -> None:
    """Raise `InputError` when a link would lead what a run writes out of its folder; the folder itself may be one. Makes nothing."""
    for part in (*map(folder.joinpath, WRITTEN), *sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))):
        # os.walk: what another process removes meanwhile is no error
        inside = (Path(root) / name for root, folders, files in os.walk(part) for name in (*folders, *files))
        for path in (part, *(() if part.is_symlink() else inside)):
            if path.is_symlink():
                raise InputError(f"{path}: expected no links in the folder of a run, found one to {os.readlink(path)}")


def remove_leftovers(folder: Path) -> None:
    """Rank 0 only, in a locked folder: the halves of files that a killed run was writing; a prediction may write beside them."""
    checkpoint.clean_up(folder / "checkpoints")
    remove_stale_temporaries(folder, WRITTEN)
    for tested in folder.glob(f"{MODEL_CLASS}-*"):
        if not tested.is_symlink():  # which may lead out of the run's folder
            remove_stale_temporaries(tested)


@contextmanager
def claimed_folder(config: Config) -> Iterator[Claim | None]:
    """Collective. Inside, `model_path` of rank 0 belongs to this run alone; what a killed write left there is cleaned up.

    Yields the claim, on rank 0. Raises `InputError` when another run has the folder, and `RunError`, instead of the error of a
    file that is suddenly gone, when another run has taken it meanwhile.
    """
    claim: Claim | None = None

    def take() -> None:
        nonlocal claim
        check_no_links(Path(config.model_path))
        claim = claim_folder(Path(config.model_path))
        remove_leftovers(Path(config.model_path))

    try:
        distributed.on_main(take)
        yield claim
    except OSError:
        if claim is not None:
            claim.check()
        raise
    finally:
        if claim is not None:
            claim.release()


def start_run(
    config: Config, data: Data, model: MultimodalBert, pooling: str | None, context: DistContext, *, loss_op: LossOp | None = None
) -> Run:
    """Collective. A run at its first step, or at the step of the newest whole checkpoint. `loss_op` replaces cross entropy."""
    folder = Path(config.model_path)
    for part in (data.train, data.val, data.test):
        if part is not None:
            part.packed = model.text_subnetwork is not None and model.text_subnetwork.is_packed
    if context.device.type == "cpu":
        keep_freed_memory()
    check_agreement(config, data, pooling, context)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
        torch.use_deterministic_algorithms(True)
    with phase("load"):
        found, source = read_for_all_ranks(config, data, model, context)
    if found and found.state["resolved"]["pooling"] != pooling:
        raise InputError(f"pooling was {found.state['resolved']['pooling']} in the checkpoint at step {found.state['step']} and is {pooling} now: set it back")
    precision = resolve_precision(found.state["resolved"]["precision"] if found else config.precision, context.device)
    task, class_weights = make_task(config, data, precision, context, loss_op)
    used_rows = rows_to_sum(model, context)
    ddp_model = place_model(model, found, data, task, context, used_rows)
    if found:
        resolved = {**found.state["resolved"], "precision": precision, **changed_parts(config, found.state)}
    else:
        sides = {"truncation_side": "left"} if keeps_end(data.tokenizer) else {}  # else right, which folders of before all mean
        resolved = {"pooling": pooling, "precision": precision, **sides, **settle_parts(config, data, ddp_model, task, context)}
    warm_up(ddp_model, data, task)
    plan = make_plan(config, len(data.train), resolved["microbatches_per_step"])
    optimizer, scheduler = configure_optimizers(model, config, plan.total_steps)
    scaler = build_scaler(precision, context.device)
    with phase("load"):
        state = distributed.on_all(lambda: restore(found, model, optimizer, scheduler, scaler) if found else TrainState())[context.rank]
    distributed.on_main(lambda: open_folder(folder, config, resolved, fresh=found is None, finished=state.finished))
    if found and config.resume == state.step:
        distributed.on_main(lambda: checkpoint.set_aside(folder / "checkpoints", state.step))
    log = RunLog(
        folder, is_main=context.is_main, first_step=state.step, total_steps=plan.total_steps,
        validated=not state.validation_pending, tested=state.finished and already_finished(config) is not None,
    )  # fmt: skip
    run = Run(
        config, data, context, folder, model, ddp_model, task, optimizer, scheduler, scaler, plan, state, log, resolved,
        class_weights, np.asarray(data.train.label_index), used_rows,
    )  # fmt: skip
    if source != 0:  # another node had it: from now on it is where the run is written
        save(run)
    elif found:
        distributed.on_main(lambda: rotate_checkpoints(run))  # killed before or in the rotation after the last save
    return run


def make_task(config: Config, data: Data, precision: str, context: DistContext, loss_op: LossOp | None) -> tuple[Task, np.ndarray]:
    """What every step needs, and the loss's weight of each class [K]."""
    loss_op = build_loss_op(settle_class_weights(config, data)) if loss_op is None else add_loss_op(loss_op)
    class_weights = row_weights(loss_op, torch.arange(config.num_classes)).double().numpy()
    loss_op = loss_op.to(context.device) if isinstance(loss_op, nn.Module) else loss_op
    return Task(config.is_binary, loss_op, precision, context.device), class_weights


def rows_to_sum(model: MultimodalBert, context: DistContext) -> UsedRows | None:
    """Where ranks sum gradients on the CPU, and the tokens of a step are all that its encoder looks up, as a packed one does."""
    if context.device.type != "cpu" or model.text_subnetwork is None or not model.text_subnetwork.is_packed:
        return None
    return UsedRows(model.text_subnetwork.encoder.get_input_embeddings().weight)


def place_model(model: MultimodalBert, found: Checkpoint | None, data: Data, task: Task, context: DistContext, used_rows: UsedRows | None) -> nn.Module:
    """Collective. The model on its device with the checkpoint's weights, as training sees it."""
    model.to(context.device).train()
    if found:
        with phase("load"):
            distributed.on_all(lambda: load_weights(model, found))
    freeze_unused(model, data, task)
    return distributed.wrap_ddp(model, context, used_rows)


def load_weights(model: nn.Module, found: Checkpoint) -> None:
    """The checkpoint's weights into the model. Raises `InputError` when they are another model's."""
    with naming_checkpoint(found.path):
        check_tensors(found.weights, model.state_dict(), file="model.safetensors")
    model.load_state_dict(found.weights)


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """A message on a checkpoint's content begins with its folder."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def settle_parts(config: Config, data: Data, ddp_model: nn.Module, task: Task, context: DistContext) -> dict[str, int]:
    """Collective. The micro-batches of a step as asked (or `auto`), and as they fit into memory."""
    device, train = context.device.type, data.train
    if train.packed:
        rows_at_once = max(1, int(TOKENS_AT_ONCE[device] / max(1.0, train.lengths.mean())))
    else:
        rows_at_once = ROWS_AT_ONCE[device] if config.text_name else config.batch_size
    asked = settle_micro_batches(config.microbatches_per_step, batch_size=config.batch_size, num_ranks=context.world_size, rows_at_once=rows_at_once)
    used = settle_by_trial(asked, ddp_model, data.train, task=task, config=config)
    if config.microbatches_per_step == "auto":
        logger.info("microbatches_per_step is auto; to repeat this run on another number of processes: --microbatches_per_step %d", used)
    return {"microbatches_asked": asked, "microbatches_per_step": used}


def changed_parts(config: Config, state: dict[str, Any]) -> dict[str, int]:
    """Another number of micro-batches than the checkpoint's, when the config has changed to it: the way out when memory gave out in mid-run."""
    new, old = config.microbatches_per_step, state["config"]["microbatches_per_step"]
    if new in ("auto", old, state["resolved"]["microbatches_per_step"]):
        return {}
    logger.warning("microbatches_per_step was %s at the checkpoint and is %s now: steps have the same rows, but other dropout", state["resolved"]["microbatches_per_step"], new)
    return {"microbatches_asked": new, "microbatches_per_step": new}


def check_agreement(config: Config, data: Data, pooling: str | None, context: DistContext) -> None:
    """Collective. All ranks must have read the same config and data, or their plans would part; a node may hold old copies."""
    here = {**config.to_dict(), "pooling": pooling, "device": context.device.type, **{path: value["sha256"] for path, value in data.fingerprints.items()}}
    for rank, there in enumerate(item for part in distributed.all_gather_objects([here]) for item in part):
        for key in sorted({*here, *there} - {"num_threads", "model_path", "cache_path"}):  # which may be a node's own
            if here.get(key) != there.get(key):
                raise InputError(f"{key}: expected the same on all ranks, found {here.get(key)!r} on rank {context.rank} and {there.get(key)!r} on rank {rank}")


def make_plan(config: Config, num_rows: int, micro_batches: int) -> Plan:
    """Epochs and shares of an epoch as optimizer steps."""
    per_epoch = steps_per_epoch(num_rows, config.batch_size)
    by_epoch = isinstance(config.val_check_interval, float)
    every = max(1, int(config.val_check_interval * per_epoch)) if by_epoch else int(config.val_check_interval)
    return Plan(config.max_epochs * per_epoch, per_epoch, every, by_epoch, micro_batches)


def open_folder(folder: Path, config: Config, resolved: dict[str, Any], *, fresh: bool, finished: bool) -> None:
    """Rank 0 only, after every check: the first thing a run writes."""
    if not finished:  # results of an earlier life, which would pass for this one's
        (folder / RESULTS).unlink(missing_ok=True)
    if fresh or not (folder / "config.json").exists():  # which another node may have had
        write_json(folder / "config.json", config_record(config, resolved))


def read_for_all_ranks(config: Config, data: Data, model: nn.Module, context: DistContext) -> tuple[Checkpoint | None, int]:
    """Collective. The checkpoint to go on from, on all ranks, and the rank that read it; (None, 0): a fresh start.

    The first rank of every node looks into its own disk and the newest one counts, so that no shared disk is needed and
    a restart that numbers the nodes anew loses nothing. The others get step and tensors by broadcast.
    """
    folder = Path(config.model_path) / "checkpoints"
    # torchrun repeats the arguments of the first start; of several nodes it may count the restart on some only
    resume = "auto" if any(distributed.on_all(distributed.restart_count)) else config.resume

    def look() -> tuple[int, str] | None:
        """Step and path of this node's newest whole checkpoint."""
        looks = context.is_main or (context.local_rank == 0 and resume == "auto")
        path = checkpoint.find_checkpoint(folder, resume) if looks else None
        if path is None and context.is_main and (folder.parent / WEIGHTS).exists():
            raise InputError(f"{folder.parent}: expected an empty folder or a run to go on from, found a trained model without checkpoints: choose another model_path")
        return None if path is None else (checkpoint.step_of(path), str(path))

    answers = distributed.on_all(look)
    if not any(answers):
        return None, 0
    step, source = max((answer[0], -rank) for rank, answer in enumerate(answers) if answer)
    source = -source
    read: list[Checkpoint] = []

    def check_and_read() -> dict[str, Any]:
        found = checkpoint.read_checkpoint(Path(answers[source][1]))
        with naming_checkpoint(found.path):
            check_run_state(found.state)
        checkpoint.check_resumable(
            found.state, config=config.to_dict(), fingerprints=data.fingerprints, parameters=parameter_shapes(model), versions=VERSIONS, free_keys=FREE_ON_RESUME
        )
        with naming_checkpoint(found.path):
            check_progress(found.state, num_rows=len(data.train), batch_size=config.batch_size)
        read.append(found)
        return found.state

    state = distributed.on_rank(source, check_and_read)
    logger.info("going on from %s%s", answers[source][1], f" of rank {source}" if source else "")
    weights = distributed.broadcast_tensors(read[0].weights if read else None, source=source)
    moments = distributed.broadcast_tensors(read[0].moments if read else None, source=source)
    state = distributed.on_main(lambda: checkpoint.without_lost_best(folder, state))
    return Checkpoint(checkpoint.step_folder(folder, step), weights, moments, state), source


def parameter_shapes(model: nn.Module) -> list[list[Any]]:
    """Name and shape of every parameter, in order."""
    return [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]


def restore(found: Checkpoint, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler) -> TrainState:
    """Optimizer, schedule and loss scale as they were; the model's weights were loaded before DDP took them."""
    with naming_checkpoint(found.path):
        check_moments(found.moments, dict(model.named_parameters()), file="optimizer.safetensors")
        check_schedule(found.state["scheduler"], num_groups=len(optimizer.param_groups))
    checkpoint.restore_moments(model, optimizer, found.moments)
    scheduler.load_state_dict({**scheduler.state_dict(), **{key: found.state["scheduler"][key] for key in SCHEDULER}})
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = lr
    if found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    return checkpoint.train_state_from(found.state)


def freeze_unused(model: nn.Module, data: Data, task: Task) -> None:
    """Freeze parameters that no loss reaches (an encoder's unused parts): DDP would wait for their gradients for ever."""
    _, preds, _ = run_epoch(model, data.train.batch(np.arange(1)), "pred", task=task)
    preds.sum().backward()
    unused = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    if unused:
        logger.info("%d parameters are not reached by the loss and stay as they are: %s", len(unused), ", ".join(list(unused)[:4]))


def warm_up(ddp_model: nn.Module, data: Data, task: Task) -> None:
    """Collective. One row that weighs nothing, forward and backward: a resumed run then adds gradients in the order of a straight one.

    DDP lays out its buckets anew after its first backward, and the layout decides the order in which three and more
    ranks are summed.
    """
    if ddp_model is not getattr(ddp_model, "module", ddp_model):
        with distributed.lost_peers():
            loss, _, _ = run_epoch(ddp_model, data.train.batch(np.arange(1)), "train", task=task, weight_sum=math.inf)
            loss.backward()
        ddp_model.zero_grad(set_to_none=True)


# ---- saving ----


def save(run: Run, *, is_due: bool = True) -> None:
    """Collective. A checkpoint of this step, written by rank 0; on failure every rank raises. `is_due`: not only because of a signal."""

    def write() -> None:
        if run.claim is not None:
            run.claim.check()
        if not (run.folder / LOCK).exists():
            raise RunError(f"the run's folder {run.folder} is gone; the checkpoint of step {run.state.step} was not written")
        run.log.sync()  # the lines of the steps that this checkpoint has
        weights, moments = checkpoint.weights_of(run.model), checkpoint.moments_of(run.model, run.optimizer)
        checkpoint.save_checkpoint(run.checkpoints, weights=weights, moments=moments, state={**state_record(run), checkpoint.DUE: is_due})
        rotate_checkpoints(run)

    with phase("save"):
        distributed.on_main(write)


def rotate_checkpoints(run: Run) -> None:
    """Rank 0 only. Remove the checkpoints that the run does not keep."""
    checkpoint.rotate(run.checkpoints, keep=run.config.keep_checkpoints, newest=run.state.step, best_step=run.state.best_step)


def state_record(run: Run) -> dict[str, Any]:
    """What state.json holds."""
    return {
        **asdict(run.state),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "seed": run.config.seed,
        "config": run.config.to_dict(),
        "resolved": run.resolved,
        "fingerprints": run.data.fingerprints,
        "parameters": parameter_shapes(run.model),
        "world_size": run.context.world_size,
        "versions": VERSIONS,
    }
