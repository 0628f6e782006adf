"""The command line: `train` (also `train.py`) and `predict`. Floor 4; imports all floors.

    torchrun --standalone --nproc_per_node=4 train.py run.yaml --lr 3e-5
    python train.py run.yaml                                   # one process
    python train.py                                            # built-in sample, no download
    mmbert predict MODEL_PATH new.csv predictions.tsv          # `mmbert` is also `python -m mmbert_core`

Exit codes of a process: 0 done, 1 failure, 2 bad config or input (one line says what).
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # texts are tokenised in threads; no process is ever forked here

import transformers

from mmbert_core import demo, distributed
from mmbert_core.config import Config
from mmbert_core.config_reader import add_config_arguments, overrides_from, read_config
from mmbert_core.data.dataset import Data, prepare
from mmbert_core.distributed import DistContext
from mmbert_core.errors import InputError
from mmbert_core.predictor import Predictor
from mmbert_core.training.loop import fit
from mmbert_core.training.setup import prepare_model

logger = logging.getLogger("mmbert_core")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The message of a user's mistake is one line on stderr, once per node."""
    arguments = build_parser().parse_args(argv)
    context = distributed.read_context()
    set_up_logging(context)
    try:
        return arguments.command(arguments, context)
    except InputError as error:
        if context.local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.wait_for_local_main()
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmbert", description="Fine-tune a pretrained BERT together with tabular columns into a classifier.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train_parser = commands.add_parser(
        "train",
        help="train a model folder from labelled rows",
        description="Train from a config file and flags; flags win. Without any: a built-in sample, no download, about a minute. "
        "Start it with torchrun for several processes; the steps are the same for any number of them.",
        epilog="examples:  python train.py run.yaml --lr 2e-4   |   torchrun --standalone --nproc_per_node=4 train.py run.yaml",
    )
    train_parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML or JSON file with any of the keys below")
    train_parser.add_argument("--check", action="store_true", help="read config and data, say what was found, and stop")
    add_config_arguments(train_parser)
    train_parser.set_defaults(command=train)

    predict_parser = commands.add_parser("predict", help="score new rows with a model folder", description="Score every row of INPUT once, in its order. Labels are not needed.")
    predict_parser.add_argument("model_path", metavar="MODEL_PATH", help="folder that train has written")
    predict_parser.add_argument("input", metavar="INPUT", help="file or quoted glob: .csv .tsv .jsonl .parquet, .gz")
    predict_parser.add_argument("output", metavar="OUTPUT", help="TSV file to write: id, probabilities, label if the input has it, predicted label")
    predict_parser.add_argument("--num_threads", type=int, default=None, help="CPU threads of a process (default: cores divided by the processes of the node)")
    predict_parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="as in training (default: auto)")
    predict_parser.set_defaults(command=predict)
    return parser


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
    distributed.set_threads(config.num_threads, context)
    data = prepare(config)
    model, pooling = prepare_model(config, data)
    describe(config, data)
    if arguments.check:
        logger.info("the check found nothing wrong")
        return 0
    with distributed.process_group(context):
        results = fit(config, data, model, pooling, context)
    if context.is_main and results.get("test_metrics"):
        for name, value in results["test_metrics"].items():
            if name != "undefined":
                print(f"{name:45} {'undefined' if value is None else value if isinstance(value, int) else format(value, '.4f')}")
    return 0


def describe(config: Config, data: Data) -> None:
    """One line on what will be learned from what."""
    parts = {"train": data.train, "validation": data.val, "test": data.test}
    counts = ", ".join(f"{len(dataset)} {name} rows" for name, dataset in parts.items() if dataset is not None)
    shares = ", ".join(f"{label!r} {(data.train.label_index == index).mean():.1%}" for index, label in enumerate(data.labels.names))
    logger.info("%s; %s: %s; writing to %s", counts, config.label_name, shares, config.model_path)


# ---- predict ----


def predict(arguments: argparse.Namespace, context: DistContext) -> int:
    distributed.set_threads("auto" if arguments.num_threads is None else arguments.num_threads, context)
    predictor = Predictor.from_folder(arguments.model_path, context, precision=arguments.precision)
    with distributed.process_group(context):
        num_rows = predictor.predict_file([arguments.input], arguments.output)
    logger.info("%d rows scored: %s", num_rows, arguments.output)
    return 0


def run() -> None:
    """Entry point of a worker process: an uncaught error reaches torchrun's report with rank and traceback."""
    sys.exit(distributed.record(main)())
