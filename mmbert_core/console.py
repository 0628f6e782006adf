"""What commands print: the error line, warnings, the table of figures."""

import logging
import sys
import traceback
from typing import Any

import torch
import transformers

from mmbert_core.config import Config
from mmbert_core.report.results import NOT_BETTER, TRY, listed_figures, verdict
from mmbert_core.runtime.errors import RunError
from mmbert_core.runtime.log_handler import log_to_stderr
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.memory import is_out_of_memory

logger = logging.getLogger(__name__)


def print_failure(error: Exception, context: DistContext) -> None:
    """Print the error line, after a traceback unless the line explains the failure."""
    prefix = error_prefix(error, context)
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "raise microbatches_per_step, or use a smaller max_length or encoder"
        print_error(f"{prefix}out of memory ({reason}); {advice}")
    elif isinstance(error, (RunError, OSError)):
        print_error(prefix + str(error))
    else:
        traceback.print_exception(error)
        print_error(f"{prefix}{type(error).__name__}: {error}")


def error_prefix(error: Exception, context: DistContext) -> str:
    """Such as `rank 1, save: `: the rank, if there are several, and the phase in which the error happened."""
    origin = [f"rank {context.rank}"] if context.world_size > 1 else []
    origin += [error.phase] if hasattr(error, "phase") else []
    return f"{', '.join(origin)}: " if origin else ""


def print_error(message: str) -> None:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def set_up_logging(context: DistContext) -> None:
    """Rank 0 logs everything, the other ranks only errors. transformers logs only errors and shows no progress bars."""
    log_to_stderr(is_main=context.is_main)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def warn_of_idle_gpus(context: DistContext) -> None:
    """Warn when there are GPUs but fewer than processes, as then all processes compute on the CPU."""
    if context.device.type == "cpu" and 0 < torch.cuda.device_count() < context.local_world_size:
        logger.warning(
            "%d processes for %d GPUs: all compute on the CPU; start no more processes than GPUs",
            context.local_world_size,
            torch.cuda.device_count(),
        )


def print_figures(figures: dict[str, Any], config: Config, *, advice: bool = True) -> None:
    """Print metrics with intervals and baselines, and the conclusion; with `advice` also what to try in training."""
    listed, num_left_out = listed_figures(figures, "test", config)
    baselines = listed.get("baselines", {})
    if baselines:
        print(f"{'':34} {'model':>10}  {'95 % interval':<17}" + "".join(f"{name:>21}" for name in baselines))
    intervals = figures.get("intervals", {})
    for name, value in listed.items():
        if not name.startswith("test"):
            continue
        formatted = "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
        line = f"{name:34} {formatted:>10}  "
        if name in intervals:
            interval = "{:.4f} - {:.4f}".format(*intervals[name]) if intervals[name] else ""
            line += f"{interval:<17}"
            of_baselines = (values.get(name) for values in baselines.values())
            line += "".join(f"{'' if value is None else format(value, '.4f'):>21}" for value in of_baselines)
        print(line.rstrip())
    if num_left_out:
        print(
            f"... {num_left_out:,} more classes in test_metrics.json; the ones above have the lowest average precision"
        )
    if baselines:
        print(line := verdict(figures, "test", config))
        if advice and line.startswith(NOT_BETTER):
            print(TRY)
