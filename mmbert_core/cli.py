"""The commands and their exit codes: `init`, `train` (also `train.py`), `predict`, `evaluate`, `serve` and others.

    torchrun --standalone --nproc_per_node=4 train.py run.yaml --lr 3e-5
    python train.py run.yaml                                   # one process
    python train.py                                            # built-in sample, no download
    mmbert init data/train.csv --label NAME                    # writes a first run.yaml
    mmbert predict MODEL_PATH new.csv predictions.tsv          # `mmbert` is also `python -m mmbert_core`
    mmbert evaluate MODEL_PATH labelled.csv                    # also: ablate compare inspect report export
    mmbert serve MODEL_PATH                                    # a web page and JSON, for this machine

Exit codes of a process: 0 done, 1 failure, 2 bad config or input (one line says what), 75 stopped by a signal with
a checkpoint (`serve` once it listens: 0, as only a signal ends it). torchrun itself exits with 1 for all but 0.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import mmbert_core.runtime.startup as startup  # before what imports torch
from mmbert_core.ablation import run_ablation, table
from mmbert_core.cli_arguments import parse
from mmbert_core.comparison import COMPARISON, compare_runs, render_comparison_again, write_comparison
from mmbert_core.config import Config
from mmbert_core.config_arguments import overrides_from
from mmbert_core.config_reader import read_config
from mmbert_core.console import (
    error_prefix,
    print_comparison,
    print_error,
    print_failure,
    print_figures,
    set_up_logging,
    warn_of_idle_gpus,
)
from mmbert_core.demo import run as demo
from mmbert_core.export.exporter import check_request, export_model
from mmbert_core.inference.model_folder import load_model_folder
from mmbert_core.inference.output_file import STANDARD
from mmbert_core.init.run import why_unchecked, write_first_config
from mmbert_core.predictor import Predictor
from mmbert_core.report.build import PAGE, render_again
from mmbert_core.report.model_card import describe as describe_model
from mmbert_core.runtime import ranks, signals, workers
from mmbert_core.runtime.errors import InputError, PeerError, RunError, Stopped, phase
from mmbert_core.runtime.log_handler import LineHandler, package_logger
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.runtime.streams import open_closed_streams, protect_streams, until_reader_closes
from mmbert_core.serve.server import run_server
from mmbert_core.training.resume import read_for_all_ranks
from mmbert_core.training.run_folder import check_folder, check_folders
from mmbert_core.training.train import prepare_training, run_training

logger = logging.getLogger("mmbert_core")

# How long a rank that has lost another one waits for torchrun to end it, before it prints its own error line.
SECONDS_FOR_TORCHRUN = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. A mistake of the user is printed as one line on stderr, once per node.

    Any other failure is raised after the rank on which it happened has printed it; the other ranks print nothing.
    """
    open_closed_streams()
    try:
        context = ranks.read_context()
    except InputError as error:
        print_error(str(error))
        return 2
    set_up_logging(context)
    warn_of_idle_gpus(context)
    startup.freeze_imports()
    try:
        arguments = parse(argv)
        exit_code = COMMANDS[arguments.command](arguments, context)
        sys.stdout.flush()  # while the error of a full disk can still be printed
        return exit_code
    except InputError as error:
        workers.wait_for_local_main()
        print_error(str(error))
        return 2
    except Stopped as stopped:
        logger.info("%s", stopped)
        return signals.EXIT_STOPPED
    except PeerError as error:
        if signals.requested() is None:  # else torchrun has sent the signal and ends this rank
            signals.restore_defaults()
            time.sleep(SECONDS_FOR_TORCHRUN + context.local_rank)  # one rank after the other: the first ends the rest
            print_error(error_prefix(error, context) + str(error))
        raise
    except Exception as error:
        print_failure(error, context)
        raise


# ---- init, train ----


def init(arguments: argparse.Namespace, context: DistContext) -> int:
    if context.world_size > 1:
        raise InputError(f"init: expected one process, found {context.world_size}; start it without torchrun")
    ranks.set_threads("auto", context)
    written = write_first_config(
        arguments.table,
        arguments.output,
        label=arguments.label,
        encoder=arguments.encoder,
        tsv_quoting=arguments.tsv_quoting,
        overwrite=arguments.force,
    )
    if reason := why_unchecked(written):
        logger.warning("%s", reason)
        return 0
    return check(read_config(arguments.output), context)


def train(arguments: argparse.Namespace, context: DistContext) -> int:
    overrides = overrides_from(arguments)
    if arguments.config is None and not overrides and not arguments.check:
        return demo.run_demo(context)
    config = read_config(arguments.config, overrides)
    if arguments.check:
        return check(config, context)
    results = run_training(config, context)
    if context.is_main and results.test_metrics:
        print_figures(results.test_metrics, config)
    return 0


def check(config: Config, context: DistContext) -> int:
    """Check what `train` checks before its first step, without a process group; write nothing to the run's folder."""
    data, model = prepare_training(config, context)
    if os.environ.get("NODE_RANK", "0") == "0":  # torchrun.sh checks on every node; the others may have no checkpoints
        read_for_all_ranks(config, data, model, context)  # raises for a checkpoint that the run cannot resume from
    num_warnings = sum(handler.num_warnings for handler in package_logger.handlers if isinstance(handler, LineHandler))
    warnings_above = f"; {num_warnings} warning{'s'[: num_warnings > 1]} above" if num_warnings else ""
    logger.info("the check found nothing wrong%s", warnings_above)
    return 0


# ---- predict ----


def predict(arguments: argparse.Namespace, context: DistContext) -> int:
    predictor = build_predictor(arguments, context)
    standard = [name for name in ("input", "output") if getattr(arguments, name) == STANDARD]
    if standard and context.world_size > 1:
        raise InputError(
            f"command line: - as {' and '.join(standard)} is for one process, found {context.world_size}: name files"
        )
    with workers.process_group(context), phase("prediction"), input_path(arguments) as path:
        with until_reader_closes():
            num_rows = predictor.predict_file(
                [path], arguments.output, sheet_safe=arguments.sheet_safe, tsv_quoting=arguments.tsv_quoting
            )
            log_positive_class(predictor)  # after the input is read: an input error stays the only line
            logger.info("%d rows scored%s", num_rows, "" if arguments.output == STANDARD else f": {arguments.output}")
    return 0


def log_positive_class(predictor: Predictor) -> None:
    """Log which of two classes is the positive one of prob, F1 and threshold."""
    if predictor.positive_class_line is not None:
        logger.info("%s", predictor.positive_class_line)


def build_predictor(arguments: argparse.Namespace, context: DistContext) -> Predictor:
    ranks.set_threads(arguments.num_threads or "auto", context)
    predictor = Predictor.from_folder(
        arguments.model_path, context, precision=arguments.precision, threshold=arguments.threshold
    )
    if arguments.threshold is not None and not predictor.loaded.config.is_binary:
        found = f"{len(predictor.loaded.labels.names)} in {arguments.model_path}"
        raise InputError(f"--threshold: expected a model of two classes, found {found}")
    return predictor


@contextmanager
def input_path(arguments: argparse.Namespace) -> Iterator[str]:
    """The path of the input; standard input is copied to a file first, as it is read twice and may exceed memory."""
    if arguments.input != STANDARD:
        yield arguments.input
        return
    with tempfile.TemporaryDirectory(prefix="mmbert-") as folder:
        path = Path(folder) / f"stdin.{arguments.input_format}"
        with open(path, "wb") as stream:
            shutil.copyfileobj(sys.stdin.buffer, stream)
        try:
            yield str(path)
        except (InputError, RunError) as error:  # the user does not know the copy, which is removed
            raise type(error)(str(error).replace(str(path), "standard input")) from None


# ---- evaluate, ablate, compare, inspect, report ----


def evaluate(arguments: argparse.Namespace, context: DistContext) -> int:
    predictor = build_predictor(arguments, context)
    output = arguments.output or arguments.model_path
    check_folder("--output" if arguments.output else "the model folder, where no --output is given", output)
    with workers.process_group(context, predictor.loaded.config.timeout_seconds), phase("evaluation"):
        figures, folder = predictor.evaluate_file(
            [arguments.input], output, slice_columns=arguments.slices, tsv_quoting=arguments.tsv_quoting
        )
    if context.is_main:
        log_positive_class(predictor)
        print_figures(figures, predictor.loaded.config, advice=False)
        page = folder / PAGE
        logger.info("report: %s", page if page.exists() else f"none; the figures are in {folder}")
    return 0


def ablate(arguments: argparse.Namespace, context: DistContext) -> int:
    config = read_config(arguments.config, overrides_from(arguments))
    check_folders(config)
    ranks.set_threads(config.num_threads, context)
    with workers.process_group(context, config.timeout_seconds):
        results = run_ablation(config, arguments.seeds, context)
    if context.is_main:
        print(table(results))
    return 0


def compare(arguments: argparse.Namespace, context: DistContext) -> int:
    if arguments.output is not None:
        check_folder("--output", arguments.output)
    if context.is_main:
        comparison = compare_runs(arguments.runs, against=arguments.against)
        print_comparison(comparison)
        logger.info("page: %s", write_comparison(comparison, arguments.output))
    return 0


def inspect(arguments: argparse.Namespace, context: DistContext) -> int:
    lines = describe_model(Path(arguments.model_path))
    if context.is_main:
        print("\n".join(lines))
    return 0


def report(arguments: argparse.Namespace, context: DistContext) -> int:
    if context.is_main:
        folder = Path(arguments.folder)
        is_comparison = (folder / COMPARISON).is_file()
        logger.info("report: %s", render_comparison_again(folder) if is_comparison else render_again(folder))
    return 0


# ---- serve, export ----


def serve(arguments: argparse.Namespace, context: DistContext) -> int:
    if context.world_size > 1:
        raise InputError(f"serve: expected one process, found {context.world_size} (start it without torchrun)")
    ranks.set_threads(arguments.num_threads or "auto", context)
    predictor = Predictor.from_folder(arguments.model_path, context)
    run_server(predictor, arguments.model_path, host=arguments.host, port=arguments.port)
    return 0


def export(arguments: argparse.Namespace, context: DistContext) -> int:
    if context.world_size > 1:
        raise InputError(f"export: expected one process, found {context.world_size}; start it without torchrun")
    ranks.set_threads("auto", context)
    check_request(Path(arguments.output), arguments.format)
    with phase("export"):
        loaded = load_model_folder(arguments.model_path)
        export_model(loaded, arguments.output, format=arguments.format, check=arguments.check)
    return 0


# ---- the process ----

COMMANDS: dict[str, Callable[[argparse.Namespace, DistContext], int]] = {
    "init": init,
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "ablate": ablate,
    "compare": compare,
    "inspect": inspect,
    "report": report,
    "serve": serve,
    "export": export,
}


def run() -> NoReturn:
    """Run a command and end the process with its exit code. `record` passes a failure's traceback to torchrun."""
    exit_code = 1
    protect_streams()
    with signals.caught():
        try:
            exit_code = workers.record(main)() or 0  # None: `record` returns it for the SystemExit of --help
        except Exception:  # `main` has printed it
            pass
        except Stopped as stopped:  # before a command has begun
            logger.info("%s", stopped)
            exit_code = signals.EXIT_STOPPED
        signals.ignore()
        workers.leave(exit_code)
