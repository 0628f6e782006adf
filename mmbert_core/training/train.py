"""A training from a `Config` to `Results`: read the data, build the model, fit, test."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmbert_core.config import Config
from mmbert_core.config_recipe import recipe_line
from mmbert_core.data.class_messages import positive_class_line
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.evaluation.metrics import lower_is_better
from mmbert_core.model.losses import LossOp
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.runtime import ranks, signals, workers
from mmbert_core.runtime.errors import Stopped, phase
from mmbert_core.runtime.log_handler import visible_lines
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.loop import fit
from mmbert_core.training.results import Results
from mmbert_core.training.run_folder import check_folders
from mmbert_core.training.start import prepare_model

logger = logging.getLogger(__name__)


def train(config: Config, *, loss_op: LossOp | None = None) -> Results:
    """Train, keep the best step, write the model folder, test: `train.py run.yaml` from a script or notebook.

        results = train(read_config("run.yaml"))
        print(results.metrics["auroc"], results.folder)

    Resumes from the newest checkpoint in `config.model_path`; a finished run is not repeated. In a process that
    torchrun has started, it is one rank of the training. Progress is logged to standard error, unless the script has
    set up logging. `loss_op(logits, labels)` [B, K], [B] -> [B] replaces the weighted cross entropy.

    Ctrl-C stops after the current step with a checkpoint and raises KeyboardInterrupt; SIGTERM raises SystemExit
    (exit code 75). Only the main thread receives signals. Signal handlers, the number of threads and logging are
    restored at the end.
    Raises InputError for a mistake in config or data, RunError when the run itself fails.
    """
    context = ranks.read_context()
    with visible_lines(is_main=context.is_main), signals.noted(), kept_torch_settings():
        try:
            return run_training(config, context, loss_op=loss_op, abort_on_error=True)
        except Stopped as stopped:
            if signals.requested() == "SIGINT":
                raise KeyboardInterrupt(str(stopped)) from None
            logger.info("%s", stopped)
            raise SystemExit(signals.EXIT_STOPPED) from None


@contextmanager
def kept_torch_settings() -> Iterator[None]:
    """Restore, at the end, the settings of PyTorch that a training changes for the whole process."""
    num_threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def run_training(
    config: Config, context: DistContext, *, loss_op: LossOp | None = None, abort_on_error: bool = False
) -> Results:
    """Collective. Read the data, build the model and fit, in the caller's process group or in a new one."""
    data, model = prepare_training(config, context)
    with workers.process_group(context, config.timeout_seconds, abort_on_error=abort_on_error):
        return fit(config, data, model, context, loss_op=loss_op)


def prepare_training(config: Config, context: DistContext) -> tuple[Data, MultimodalBert]:
    """Check the folders, set the threads, read the data, build the model and log both; needs no other rank.

    Writes nothing to the run's folder. Raises InputError.
    """
    check_folders(config)
    ranks.set_threads(config.num_threads, context)
    with phase("reading data and encoder"):
        data = prepare(config)
        model = prepare_model(config, data)
    describe(config, data)
    return data, model


def describe(config: Config, data: Data) -> None:
    """Log rows and classes, the positive one of two classes, the inputs, and the metric that chooses the best step."""
    datasets = {"train": data.train, "validation": data.val, "test": data.test}
    counts = ", ".join(
        f"{len(dataset)} {name} rows{'' if dataset.has_labels else ' without labels'}"
        for name, dataset in datasets.items()
        if dataset is not None
    )
    shares = [
        f"{label!r} {(data.train.label_index == index).mean():.1%}"
        for index, label in enumerate(data.labels.names[:10])
    ]
    more = ", ..." if len(data.labels.names) > 10 else ""
    logger.info("%s; %s: %s%s; writing to %s", counts, config.label_name, ", ".join(shares), more, config.model_path)
    if config.is_binary:
        logger.info("%s", positive_class_line(data.labels.names, float((data.train.label_index == 1).mean())))
    lengths = data.train.lengths
    inputs = [f"text of {lengths.mean():.0f} tokens on average, at most {lengths.max()}"] if config.text_name else []
    inputs += [
        f"{kind} columns: {', '.join(names)}"
        for kind, names in (
            ("numeric", config.tab_field_list),
            ("date", config.date_field_list),
            ("categorical", config.cat_field_list),
        )
        if names
    ]
    logger.info("inputs: %s", "; ".join(inputs))
    if line := recipe_line(config.to_dict()):
        logger.info("%s", line)
    if data.val is not None:
        best = "lowest" if lower_is_better(config.early_stop_metric) else "highest"
        logger.info(
            "best step: the %s %s (early_stop_metric); ties: the lowest val_loss", best, config.early_stop_metric
        )
