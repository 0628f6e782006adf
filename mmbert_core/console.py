"""What commands print: the log's lines, warnings, tables of figures, the error line."""

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


def tell(error: Exception, context: DistContext) -> None:
    """One line, before it the traceback of what is no plain failure; once, from the rank on which it happened."""
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say_error(
            f"{place(error, context)}out of memory ({reason}); raise microbatches_per_step, or use a smaller max_length or encoder"
        )
    elif isinstance(error, (RunError, OSError)):
        say_error(place(error, context) + str(error))
    else:
        traceback.print_exception(error)
        say_error(f"{place(error, context)}{type(error).__name__}: {error}")


def place(error: Exception, context: DistContext) -> str:
    """Rank, where there are several, and phase."""
    parts = [f"rank {context.rank}"] if context.world_size > 1 else []
    parts += [error.phase] if hasattr(error, "phase") else []
    return f"{', '.join(parts)}: " if parts else ""


def say_error(message: str) -> None:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def set_up_logging(context: DistContext) -> None:
    """Rank 0 logs everything, the others errors alone; transformers logs errors alone, without progress bars."""
    log_to_stderr(is_main=context.is_main)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def warn_of_idle_gpus(context: DistContext) -> None:
    """More processes than GPUs all compute on the CPU, which the user can hardly want."""
    if context.device.type == "cpu" and 0 < torch.cuda.device_count() < context.local_world_size:
        logger.warning(
            "%d processes for %d GPUs: all compute on the CPU; start no more processes than GPUs",
            context.local_world_size,
            torch.cuda.device_count(),
        )


def print_figures(figures: dict[str, Any], config: Config, *, advice: bool = True) -> None:
    """Metrics with their intervals, the baselines beside them, and what to make of it; `advice` on training is for who trains."""
    listed, num_left_out = listed_figures(figures, "test", config)
    baselines = listed.get("baselines", {})
    if baselines:
        print(f"{'':34} {'model':>10}  {'95 % interval':<17}" + "".join(f"{name:>21}" for name in baselines))
    for name, value in listed.items():
        if not name.startswith("test"):
            continue
        shown = "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
        low_high = figures.get("intervals", {}).get(name)
        interval = f"{low_high[0]:.4f} - {low_high[1]:.4f}" if low_high else ""
        rivals = "".join(
            f"{values[name]:>21.4f}" if values.get(name) is not None else f"{'':21}" for values in baselines.values()
        )
        print(f"{name:34} {shown:>10}  {interval:<17}{rivals if name in figures.get('intervals', {}) else ''}".rstrip())
    if num_left_out:
        print(
            f"... {num_left_out:,} more classes in test_metrics.json; the ones above have the lowest average precision"
        )
    if baselines:
        print(line := verdict(figures, "test", config))
        if advice and line.startswith(NOT_BETTER):
            print(TRY)
