"""The command line: `train` (also `train.py`) and `predict`. Floor 4; imports all floors.

    torchrun --standalone --nproc_per_node=4 train.py run.yaml --lr 3e-5
    python train.py run.yaml                                   # one process
    python train.py                                            # built-in sample, no download
    mmbert predict MODEL_PATH new.csv predictions.tsv          # `mmbert` is also `python -m mmbert_core`

Exit codes of a process: 0 done, 1 failure, 2 bad config or input (one line says what), 75 stopped by a signal with
nothing lost. torchrun itself makes 1 of all but 0.
"""

import argparse
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmbert_core import signals  # first: it notes the launcher

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # texts are tokenised in threads; no process is ever forked here
gc.set_threshold(100_000, 50, 100)  # the imports below make objects that stay: looking through them again and again takes a second

import transformers

from mmbert_core import demo, distributed
from mmbert_core.config import Config, config_fields
from mmbert_core.config_reader import ALIASES, add_config_arguments, nearest_name, overrides_from, read_config
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.distributed import DistContext
from mmbert_core.errors import InputError, PeerError, RunError, Stopped, phase
from mmbert_core.predictor import Predictor
from mmbert_core.training.loop import fit
from mmbert_core.training.memory import is_out_of_memory
from mmbert_core.training.setup import check_no_links, prepare_model, read_for_all_ranks

logger = logging.getLogger("mmbert_core")

SECONDS_FOR_THE_LAUNCHER = 5.0  # to end a rank that lost another one; after that it says so itself

def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The message of a user's mistake is one line on stderr, once per node.

    Any other failure is raised, after this rank has told it; a rank that only hears of it stays quiet.
    """
    try:
        context = distributed.read_context()
    except InputError as error:
        say_error(str(error))
        return 2
    set_up_logging(context)
    gc.freeze()  # the million objects that imports made stay: collections while rows are read need not look at them
    try:
        arguments = parse(argv)
        return arguments.command(arguments, context)
    except InputError as error:
        distributed.wait_for_local_main()
        say_error(str(error))
        return 2
    except Stopped as stopped:
        logger.info("%s", stopped)
        return signals.EXIT_STOPPED
    except PeerError as error:
        if signals.requested() is None:  # else the launcher knows already
            signals.restore_defaults()
            time.sleep(SECONDS_FOR_THE_LAUNCHER + context.local_rank)  # ranks that gave up together: one line
            say_error(place(error, context) + str(error))
        raise
    except Exception as error:
        tell(error, context)
        raise


def tell(error: Exception, context: DistContext) -> None:
    """One line, before it the traceback of what is no plain failure; once, from the rank on which it happened."""
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say_error(f"{place(error, context)}out of memory ({reason}); raise microbatches_per_step, or use a smaller max_length or encoder")
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


# ---- words of the command line ----

TRAIN_DESCRIPTION = """\
Train from a config file, from flags, or from both: flags win. Without any: a built-in sample, no download, about a
minute. torchrun starts several processes; the steps are the same for any number of them.

  python train.py run.yaml --check
  python train.py run.yaml --lr 2e-4
  torchrun --standalone --nproc_per_node=4 train.py run.yaml

Below, N is a whole number, X a number, [...] any number of words. `--KEY null` takes a file's value back.
"""
PREDICT_DESCRIPTION = """\
Score every row of INPUT once, in its order. Needs the columns that the model was trained on, in any order; other columns
are ignored, labels are not needed. The same under torchrun, for several processes:

  mmbert predict runs/reviews new.csv predictions.tsv
  torchrun --standalone --nproc_per_node=4 -m mmbert_core predict runs/reviews new.csv predictions.tsv
"""


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are `InputError`s like all others: one line, and once per node."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; `{self.prog} --help` explains")


def build_parser() -> Parser:
    parser = Parser(prog="mmbert", description="Fine-tune a pretrained BERT together with tabular columns into a classifier.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    usage = "mmbert train [CONFIG] [--check] [--KEY VALUE ...]      or: python train.py ..."
    train_parser = commands.add_parser("train", help="train a model folder from labelled rows", usage=usage, description=TRAIN_DESCRIPTION)
    train_parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON file with any of the keys below")
    train_parser.add_argument("--check", action="store_true", help="read config, data and encoder, say what was found, and stop")
    add_config_arguments(train_parser)
    train_parser.set_defaults(command=train)

    predict_parser = commands.add_parser("predict", help="score new rows with a model folder", description=PREDICT_DESCRIPTION)
    predict_parser.add_argument("model_path", metavar="MODEL_PATH", help="folder that train has written")
    predict_parser.add_argument("input", metavar="INPUT", help="file or quoted glob: .csv .tsv .jsonl .parquet, .gz")
    predict_parser.add_argument("output", metavar="OUTPUT", help="TSV file to write: id, probabilities, label if the input has it, predicted label")
    predict_parser.add_argument("--num_threads", type=count, metavar="N", help="CPU threads of a process (default: cores divided by the processes of the node)")
    predict_parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "int8"], default="auto", help="auto: on a GPU as the model was trained, fp32 on the CPU; int8, on the CPU alone: about twice as fast, and probabilities move a little (default: auto)")
    predict_parser.add_argument("--sheet_safe", action="store_true", help="put a ' before texts that a spreadsheet would take for a formula (=1+1); else ids come back byte for byte")
    predict_parser.set_defaults(command=predict)
    return parser


def count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {word!r}")
    return int(word)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command. Raises `InputError` for words it does not know, with the nearest flag."""
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("--")), unknown[0]).split("=")[0]
        flags = [*config_fields(), *ALIASES, "check"] if arguments.command is train else ["num_threads", "precision", "sheet_safe"]
        nearest = nearest_name(word.lstrip("-"), flags)
        hint = f"did you mean '--{nearest}'?" if nearest and word.startswith("-") else "--help lists all"
        raise InputError(f"command line: unknown {'flag' if word.startswith('-') else 'argument'} {word!r}; {hint}")
    return arguments


def set_up_logging(context: DistContext) -> None:
    """Rank 0 tells everything, the others only errors. Lines are plain; warnings say so."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            return prefix + super().format(record)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if context.is_main else logging.ERROR)
    logger.propagate = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---- train ----


def train(arguments: argparse.Namespace, context: DistContext) -> int:
    overrides = overrides_from(arguments)
    if arguments.config is None and not overrides and not arguments.check:
        return demo.run_demo(context)
    config = read_config(arguments.config, overrides)
    check_folders(config)
    distributed.set_threads(config.num_threads, context)
    with phase("reading data and encoder"):
        data = prepare(config)
        model, pooling = prepare_model(config, data)
    describe(config, data)
    if arguments.check:
        if os.environ.get("NODE_RANK", "0") == "0":  # torchrun.sh checks on every machine; the first one alone need have the run
            read_for_all_ranks(config, data, model, context)  # a resume that must be refused
        logger.info("the check found nothing wrong")
        return 0
    with distributed.process_group(context, config.timeout_seconds):
        results = fit(config, data, model, pooling, context)
    if context.is_main and results.get("test_metrics"):
        for name, value in results["test_metrics"].items():
            if name != "undefined":
                print(f"{name:45} {'undefined' if value is None else value if isinstance(value, int) else format(value, '.4f')}")
    return 0


def check_folders(config: Config) -> None:
    """What the run will write has a place: no file or link in the way, and the right to write. Makes nothing."""
    for key in ("model_path", "cache_path"):
        folder = getattr(config, key)
        if folder is None:
            continue
        there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"{key}: {there}: expected a folder, found a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise InputError(f"{key}: {there}: cannot be written to")
    check_no_links(Path(config.model_path))


def describe(config: Config, data: Data) -> None:
    """What will be learned from what, in two lines."""
    parts = {"train": data.train, "validation": data.val, "test": data.test}
    counts = ", ".join(f"{len(dataset)} {name} rows{'' if dataset.has_labels else ' without labels'}" for name, dataset in parts.items() if dataset is not None)
    shares = [f"{label!r} {(data.train.label_index == index).mean():.1%}" for index, label in enumerate(data.labels.names[:10])]
    more = ", ..." if len(data.labels.names) > 10 else ""
    logger.info("%s; %s: %s%s; writing to %s", counts, config.label_name, ", ".join(shares), more, config.model_path)
    lengths = data.train.lengths
    inputs = [f"text of {lengths.mean():.0f} tokens on average, at most {lengths.max()}"] if config.text_name else []
    inputs += [f"{kind} columns: {', '.join(names)}" for kind, names in (("numeric", config.tab_field_list), ("categorical", config.cat_field_list)) if names]
    logger.info("inputs: %s", "; ".join(inputs))


# ---- predict ----


def predict(arguments: argparse.Namespace, context: DistContext) -> int:
    distributed.set_threads(arguments.num_threads or "auto", context)
    predictor = Predictor.from_folder(arguments.model_path, context, precision=arguments.precision)
    with distributed.process_group(context), phase("prediction"):
        num_rows = predictor.predict_file([arguments.input], arguments.output, sheet_safe=arguments.sheet_safe)
    logger.info("%d rows scored: %s", num_rows, arguments.output)
    return 0


def run() -> NoReturn:
    """Entry point of a process. torchrun's report gets rank and traceback of a failure by `record`; nothing is said twice."""
    exit_code = 1
    with signals.caught():
        try:
            exit_code = distributed.record(main)() or 0  # None: `record` has swallowed the SystemExit of --help
        except Exception:  # noqa: BLE001 - main has told it
            pass
        except Stopped as stopped:  # outside of a command: nothing had begun
            logger.info("%s", stopped)
            exit_code = signals.EXIT_STOPPED
        signals.ignore()
        distributed.leave(exit_code)
