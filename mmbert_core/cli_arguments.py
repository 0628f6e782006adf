"""The argument parser: commands, options and their help, and one-line errors for unknown words."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mmbert_core.config import SETTINGS
from mmbert_core.config_arguments import add_config_arguments
from mmbert_core.config_file import MAX_DIGITS, MAX_MESSAGE
from mmbert_core.config_reader import ALIASES
from mmbert_core.config_synonyms import nearest_name
from mmbert_core.export.exporter import CHECKED_ROWS, MODEL_FILES
from mmbert_core.runtime.errors import InputError, format_for_message, shorten
from mmbert_core.tables.csv_reader import AUTO, NONE, STANDARD
from mmbert_core.tables.table import check_path

TRAIN_DESCRIPTION = """\
Train from a config file, from flags, or from both: flags win. Without any: a built-in sample, no download, about a
minute. torchrun starts several processes; the steps are the same for any number of them.

  python train.py run.yaml --check
  python train.py run.yaml --lr 2e-4
  torchrun --standalone --nproc_per_node=4 train.py run.yaml

Below, N is a whole number, X a number, [...] any number of words. `--KEY null` takes a file's value back.
"""
INIT_DESCRIPTION = """\
Read a labelled table once and write a first config for it: each column's role with the reason as a comment, the task,
the class of interest, metrics, and what is left out and why. Then check it as `mmbert train --check` does. It is a
proposal: read it and change what you know better. Nothing is guessed when a model is trained.

  mmbert init data/train.csv --label verdict --encoder models/bert --output run.yaml
"""
PREDICT_DESCRIPTION = """\
Score every row of INPUT once, in its order. Needs the columns that the model was trained on, in any order; other
columns are ignored, labels are not needed. Of two classes, prob is the probability of class 1: the label that
`mmbert inspect` names, the second in order unless positive_label was set. The same under torchrun, for several
processes:

  mmbert predict runs/reviews new.csv predictions.tsv
  torchrun --standalone --nproc_per_node=4 -m mmbert_core predict runs/reviews new.csv predictions.tsv

In one process - stands for standard input and output:

  zcat new.csv.gz | mmbert predict runs/reviews - - | cut -f 1,2
"""
EVALUATE_DESCRIPTION = """\
Score labelled rows: predictions, metrics with intervals, baselines and report.html, in a new folder
multimodal_bert-<time> in MODEL_PATH or --output. The same under torchrun.

  mmbert evaluate runs/reviews newer_labelled.csv --slices country
"""
COMPARE_DESCRIPTION = """\
Compare finished runs on the same test rows. Prints each metric of each run with its difference to the first one and a
paired bootstrap interval of the difference (the same resamples of the rows for all runs: what makes rows hard for all
of them cancels out), the settings that differ, and the rows on which the runs disagree most. Writes compare.html, with
the curves of all runs in one picture, and compare.json. A RUN is the folder of a run, whose newest test counts, or the
folder of one test inside it. Nothing is computed with the models.

  mmbert compare runs/base runs/large
  mmbert compare runs/seed-* --against runs/seed-0 --output comparisons/seeds
  mmbert compare runs/abuse/multimodal_bert-2026-01-31-12-00-00 runs/new

Runs with other test rows or other classes are refused: `mmbert evaluate` first gives both a test on the same file. The
interval is about the choice of the test rows; another seed of the same settings changes the figures too.
"""
ABLATE_DESCRIPTION = """\
Train on text only, on columns only and on both, with the same settings and seeds, and print mean and spread of the
test metrics. Takes what `mmbert train` takes. After a stop, the same command continues.

  mmbert ablate run.yaml --seeds 0 1 2
"""
SERVE_DESCRIPTION = """\
Score rows over HTTP, from programs or on a page with a form, which shows the probabilities and how much each word
contributed. There is no authentication: by default only this machine can connect. SIGTERM or Ctrl-C ends it.

  mmbert serve runs/reviews
  curl -H 'Content-Type: application/json' -d '{"message": "...", "order_value": 12.5}' http://127.0.0.1:8000/predict
"""
EXPORT_DESCRIPTION = """\
Write a model folder as ONNX (extra `onnx`), with a script that scores a CSV without PyTorch, or as PyTorch's own .pt2.
The probabilities of the exported model are compared with PyTorch's; where they differ by more than 1e-4 nothing is
written.

  mmbert export runs/reviews exported --format onnx
  python exported/example.py new.csv predictions.tsv
"""


class Parser(argparse.ArgumentParser):
    """Raises `InputError` for mistakes on the command line, so that they are printed as one line, once per node."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {shorten(message, MAX_MESSAGE)}; `{self.prog} --help` explains")


def build_parser() -> Parser:
    parser = Parser(
        prog="mmbert", description="Fine-tune a pretrained BERT together with tabular columns into a classifier."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add_init_command(commands)
    add_training_commands(commands)
    add_scoring_commands(commands)
    add_other_commands(commands)
    return parser


def add_model_command(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, **texts)
    parser.add_argument("model_path", metavar="MODEL_PATH", help="folder that train has written")
    return parser


def add_init_command(commands: Any) -> None:
    parser = commands.add_parser("init", help="write a first config for a table", description=INIT_DESCRIPTION)
    parser.add_argument(
        "table", metavar="TRAIN", help="training rows: a file or quoted glob: .csv .tsv .jsonl .parquet"
    )
    parser.add_argument("--label", metavar="NAME", help="label column (default: the one column called label or target)")
    parser.add_argument("--encoder", metavar="NAME", help="pretrained encoder: a folder, or a name on the hub")
    parser.add_argument("--output", metavar="FILE", default="run.yaml", help="YAML file to write (default: run.yaml)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    choices = [AUTO, STANDARD, NONE]
    parser.add_argument("--tsv_quoting", choices=choices, help="quotes in .tsv files, as the key of that name")


def add_training_commands(commands: Any) -> None:
    usage = "mmbert train [CONFIG] [--check] [--KEY VALUE ...]      or: python train.py ..."
    train_parser = commands.add_parser(
        "train", help="train a model folder from labelled rows", usage=usage, description=TRAIN_DESCRIPTION
    )
    train_parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML or JSON file with any of the keys below"
    )
    train_parser.add_argument(
        "--check", action="store_true", help="read config, data and encoder, say what was found, and stop"
    )
    add_config_arguments(train_parser)

    ablate_parser = commands.add_parser(
        "ablate",
        help="compare text only, columns only and both",
        usage="mmbert ablate CONFIG [--seeds N ...] [--KEY VALUE ...]",
        description=ABLATE_DESCRIPTION,
    )
    ablate_parser.add_argument("config", metavar="CONFIG", help="YAML or JSON file with any of the keys below")
    ablate_parser.add_argument(
        "--seeds", nargs="+", type=number_within("seed"), default=[0, 1, 2], metavar="N", help="(default: 0 1 2)"
    )
    add_config_arguments(ablate_parser)


def add_scoring_commands(commands: Any) -> None:
    predict_parser = add_model_command(
        commands, "predict", help="score new rows with a model folder", description=PREDICT_DESCRIPTION
    )
    predict_parser.add_argument(
        "input", metavar="INPUT", help="file or quoted glob: .csv .tsv .jsonl .parquet, .gz; or -"
    )
    predict_parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="TSV file to write (CSV where its name ends in .csv), or -: id, probabilities, label if the input has it, "
        "predicted label, calibrated probability",
    )
    add_scoring_options(predict_parser)
    predict_parser.add_argument(
        "--sheet_safe",
        action="store_true",
        help="put a ' before texts that a spreadsheet would take for a formula (=1+1); else ids are copied unchanged",
    )
    predict_parser.add_argument(
        "--input_format", choices=["csv", "tsv", "jsonl"], default="csv", help="of standard input (default: csv)"
    )
    add_tsv_quoting(predict_parser)
    add_threshold(predict_parser)

    evaluate_parser = add_model_command(
        commands, "evaluate", help="score labelled rows and write a report", description=EVALUATE_DESCRIPTION
    )
    evaluate_parser.add_argument(
        "input", metavar="INPUT", help="file or quoted glob with the label column: .csv .tsv .jsonl .parquet, .gz"
    )
    evaluate_parser.add_argument("--output", metavar="FOLDER", help="where the new folder goes (default: MODEL_PATH)")
    evaluate_parser.add_argument(
        "--slices",
        nargs="*",
        default=(),
        metavar="COLUMN",
        help="columns to look at value by value, also such as the model does not read (default: its own)",
    )
    add_scoring_options(evaluate_parser)
    add_tsv_quoting(evaluate_parser)
    add_threshold(evaluate_parser)


def add_other_commands(commands: Any) -> None:
    add_model_command(commands, "inspect", help="what a model needs and was trained on, and its metrics")

    report_parser = commands.add_parser(
        "report", help="write report.html or compare.html again from the .json next to it"
    )
    report_parser.add_argument(
        "folder", metavar="FOLDER", help="multimodal_bert-<time> of a test or of evaluate, or a folder of compare"
    )

    compare_parser = commands.add_parser(
        "compare",
        help="differences of finished runs on the same test rows, with intervals",
        usage="mmbert compare RUN RUN ... [--against RUN] [--output FOLDER]",
        description=COMPARE_DESCRIPTION,
    )
    compare_parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or of one of its tests")
    compare_parser.add_argument(
        "--against", metavar="RUN", help="the run with which the others are compared (default: the first)"
    )
    compare_parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where compare.html and compare.json go (default: a new folder comparison-<time> here)",
    )

    serve_parser = add_model_command(
        commands, "serve", help="score rows over HTTP, and a page to try them by hand", description=SERVE_DESCRIPTION
    )
    serve_parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, which no other machine can reach)",
    )
    serve_parser.add_argument(
        "--port", type=port, default=8000, metavar="N", help="port to listen on; 0: any that is free (default: 8000)"
    )
    serve_parser.add_argument(
        "--num_threads", type=number_within("num_threads"), metavar="N", help="CPU threads (default: all cores)"
    )

    export_parser = add_model_command(
        commands, "export", help="write a model folder as ONNX or .pt2", description=EXPORT_DESCRIPTION
    )
    export_parser.add_argument("output", metavar="OUTPUT_FOLDER", help="folder to make, new or empty")
    export_parser.add_argument(
        "--format",
        choices=list(MODEL_FILES),
        required=True,
        help="onnx: for onnxruntime and others; torch_export: for torch.export.load",
    )
    export_parser.add_argument(
        "--check",
        metavar="FILE",
        help=f"compare on the first {CHECKED_ROWS} rows of FILE (default: on rows made up for the model)",
    )


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_threads",
        type=number_within("num_threads"),
        metavar="N",
        help="CPU threads of a process (default: cores divided by the processes of the node)",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        default="auto",
        help="auto: on a GPU as the model was trained, fp32 on the CPU; int8, on the CPU alone: about twice as fast, "
        "and probabilities move a little (default: auto)",
    )


def add_tsv_quoting(parser: argparse.ArgumentParser) -> None:
    choices = [AUTO, STANDARD, NONE]
    parser.add_argument(
        "--tsv_quoting",
        choices=choices,
        help="quotes in .tsv input, as the key of that name (default: as the model was trained)",
    )


def add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        type=share,
        metavar="X",
        help="probability above which a row is class 1 (default: as chosen on the validation rows)",
    )


def number_within(key: str) -> Callable[[str], int]:
    """The `type` of an option: a whole number in the range of the setting `key`."""
    low, high = SETTINGS[key].at_least, SETTINGS[key].at_most

    def whole_number(word: str) -> int:
        digits = word.removeprefix("-")
        value = int(word) if digits.isascii() and digits.isdecimal() and len(digits) <= MAX_DIGITS else None
        if value is None or value < low:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low}, found {format_for_message(word)}"
            )
        if value > high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at most {high:,}, found {format_for_message(word)}"
            )
        return value

    return whole_number


def share(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, found {format_for_message(word)}")
    return value


def port(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) <= MAX_DIGITS and int(word) <= 65535):
        raise argparse.ArgumentTypeError(f"expected a port of 0 to 65535, found {format_for_message(word)}")
    return int(word)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command.

    Raises `InputError` for an unknown flag or argument, with the nearest flag, and for words that are not UTF-8.
    """
    for word in sys.argv[1:] if argv is None else argv:
        check_path(word)
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("--")), unknown[0]).split("=")[0]
        has_config = arguments.command in ("train", "ablate")
        config_flags = [*SETTINGS, *ALIASES, "check", "seeds"]
        own_flags = [name for name in vars(arguments) if name != "command"]
        nearest = nearest_name(word.lstrip("-"), config_flags if has_config else own_flags)
        kind = "flag" if word.startswith("-") else "argument"
        hint = f"did you mean '--{nearest}'?" if nearest and kind == "flag" else "--help lists all"
        raise InputError(f"command line: unknown {kind} {format_for_message(word)}; {hint}")
    return arguments
