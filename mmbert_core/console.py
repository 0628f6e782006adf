"""What commands print: the error line, warnings, the table of figures."""

import logging
import sys
import traceback
from typing import Any

import torch
import transformers

from mmbert_core.config import Config
from mmbert_core.report.comparison_page import outcome
from mmbert_core.report.comparison_schema import Comparison
from mmbert_core.report.formatting import decimals, interval, short, signed
from mmbert_core.report.results import NOT_BETTER, TRY, figures_table
from mmbert_core.report.typed_json import Missing
from mmbert_core.runtime.errors import RunError
from mmbert_core.runtime.log_handler import log_to_stderr
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.memory import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_NAME, MAX_SETTING = 40, 60  # characters of a run, id or class, and of a setting's value
MAX_ROWS, MAX_TEXT = 5, 100  # rows on which runs disagree, and characters of their texts


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
    line = ""
    for line in figures_table(figures, config):
        print(line)
    if advice and line.startswith(NOT_BETTER):
        print(TRY)


def print_comparison(comparison: Comparison) -> None:
    """Print the metrics of each run next to the reference's, the settings that differ, and rows of disagreement."""
    width = max(len(short(name, MAX_NAME)) for name in comparison.names) + 2
    print(f"{comparison.num_rows:,} test rows, the same in all runs")
    for run in comparison.runs:
        print(f"{short(run.name, MAX_NAME):<{width}} {run.folder}, test {run.test_folder}")
    print(*comparison.notes, sep="\n", end="\n" if comparison.notes else "")
    for name in comparison.others:
        _print_differences(comparison, name)
    print("", *comparison.metrics.verdicts, sep="\n")
    print("\nsettings that differ" if comparison.settings else "\nno settings differ")
    for setting in comparison.settings:
        print(f"  {short(setting.key, MAX_TEXT)}")
        for name in comparison.names:
            print(f"    {short(name, MAX_NAME):<{width}} {short(setting.values[name], MAX_SETTING)}")
    _print_disputed_rows(comparison, width)


def _print_differences(comparison: Comparison, name: str) -> None:
    """A table of all metrics of the reference and of one other run."""
    heads = [short(title, 20) for title in (comparison.reference, name)]
    print(f"\n{'':34} {heads[0]:>20} {heads[1]:>20} {'difference':>11}  95 % interval")
    of_run = comparison.metrics.runs
    for metric in comparison.metrics.names:
        value = of_run[name][metric]
        values = (of_run[comparison.reference][metric].value, value.value)
        cells = "".join(f" {'undefined' if each is None else decimals(each):>20}" for each in values)
        difference = "" if value.difference is None else signed(value.difference)
        words = f"{interval(value.interval):<20} {outcome(metric, value)}"
        print(f"{metric:34}{cells} {difference:>11}  {words}".rstrip())


def _print_disputed_rows(comparison: Comparison, width: int) -> None:
    section = comparison.disputed_rows
    if isinstance(section, Missing):
        print(f"\nno rows on which the runs disagree: {section.reason}")
        return
    print("\nrows on which the runs disagree most: the probability of the row's own label in each run")
    if section.without_texts:
        print(f"  {section.without_texts}")
    for row in section.rows[:MAX_ROWS]:
        named = "" if row.id is None else f", id {short(row.id, MAX_NAME)}"
        print(f"  {row.location or f'row {row.row}'}{named}, label {short(row.label, MAX_NAME)}")
        if row.text:
            print(f"    {short(' '.join(row.text.split()), MAX_TEXT)}")
        for name in comparison.names:
            line = f"{decimals(row.probabilities[name])}, predicted {short(row.preds[name], MAX_NAME)}"
            print(f"    {short(name, MAX_NAME):<{width}} {line}")
