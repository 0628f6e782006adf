"""Export of a model folder to a file that runs without this package: ONNX, or PyTorch's own .pt2.

    model.onnx or model.pt2   preprocessing.json   tokenizer.json (with texts)   example.py (onnx)

B rows, C chunks of a text, T tokens of a chunk, F numbers with indicators, K categorical columns.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

import mmbert_core
from mmbert_core.data.dataset import encode_for_prediction, pad_token_id_of
from mmbert_core.data.encoding import MISSING_DATES, MISSING_NUMBERS
from mmbert_core.data.features import FIRST_CATEGORY, MAX_FLOAT32, MISSING, UNSEEN
from mmbert_core.data.tokens import characters_read, keeps_end
from mmbert_core.export import example as export_example
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.model.padded import PaddedModel
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import MEGABYTE, atomic_folder, write_json, write_text
from mmbert_core.tables.table import Roles, read_chunks, records_to_chunk

logger = logging.getLogger(__name__)

MODEL_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}  # format -> its file
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_PROTOBUF = 2**31 - 2**24  # bytes of weights in model.onnx itself; those of larger models are in a file next to it
FORMAT_VERSION = 1  # of preprocessing.json
TOLERANCE = 1e-4  # the largest difference of an exported model's probability to PyTorch's
CHECKED_ROWS, GENERATED_ROWS = 128, 28  # at most so many rows of a file are compared; so many are generated
CHECKED_BATCH_SIZES = (1, 7)  # rows; every compared row is scored with each

Rows = list[dict[str, str]]


def export_model(loaded: LoadedModel, output: str | Path, *, format: str, check: str | None = None) -> float:
    """Write the folder `output`, complete or not at all; returns the largest difference to PyTorch's probabilities.

    Both models score the first rows of the file `check`, or rows generated from the model's own words and categories.
    The exported model reads them through preprocessing.json and tokenizer.json, as a user of the folder would.
    Raises `InputError` for an unknown format, a missing package or an unsuitable folder, `RunError` for an encoder that
    cannot be exported and for probabilities that differ by more than TOLERANCE.
    """
    output = Path(output)
    check_request(output, format)
    rows = generated_rows(loaded) if check is None else rows_of_file(loaded, check)
    expected = probabilities_of(loaded, rows)
    with atomic_folder(output) as folder:
        write_preprocessing(folder, loaded)
        with _one_line(loaded, format):
            program = trace(loaded)
            if format == "onnx":
                write_onnx(folder, program, example_inputs(loaded)[1])
                write_example(folder)
                run = export_example.load_model(folder)
            else:
                run = in_memory(program)
                program.example_inputs = None  # the file would hold them as its only pickle
                torch.export.save(program, folder / MODEL_FILES[format])
        settings, tokenizer = export_example.load_preprocessing(folder)
        found = [export_example.score(rows, settings, tokenizer, run, max_rows=size) for size in CHECKED_BATCH_SIZES]
        difference = float(np.abs(np.stack(found) - expected).max())
        if not difference <= TOLERANCE:  # also where it is NaN
            raise RunError(
                f"{output}: not written: expected PyTorch's probabilities to {TOLERANCE:g}, "
                f"found a difference of {difference:.1e}"
            )
        names = sorted(path.name for path in folder.iterdir())
        num_bytes = sum((folder / name).stat().st_size for name in names)
    logger.info("%s: %s; %.1f MB", output, ", ".join(names), num_bytes / MEGABYTE)
    kind = "generated rows" if check is None else f"rows of {check}"
    compared = f"{len(rows)} {kind} in batches of {' and '.join(map(str, CHECKED_BATCH_SIZES))}"
    logger.info("%s: probabilities differ from PyTorch's by at most %.1e", compared, difference)
    return difference


def check_request(output: Path, format: str) -> None:
    """Raise `InputError` for an export that cannot be written; needs no model."""
    if format not in MODEL_FILES:
        raise InputError(f"format: expected one of {', '.join(MODEL_FILES)}, found {format!r}")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise InputError(f"ONNX export needs {', '.join(missing)}: pip install 'mmbert_core[onnx]'")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: expected a folder to make, found a file")
    if output.is_dir() and output.samefile("."):
        raise InputError(f"{output}: expected a folder to make, found the one that this command runs in")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: expected a new or empty folder, found files in it")


# ---- preprocessing ----


def write_preprocessing(folder: Path, loaded: LoadedModel) -> None:
    """Write preprocessing.json and, for texts, tokenizer.json: how cells become the model's inputs."""
    write_json(folder / "preprocessing.json", preprocessing(loaded))
    if loaded.tokenizer is not None:
        tokenizer = tokenizers.Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(
            max_length=loaded.config.max_length,
            stride=0,
            strategy="longest_first",
            direction="left" if keeps_end(loaded.tokenizer) else "right",
        )
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def write_example(folder: Path) -> None:
    write_text(folder / "example.py", Path(export_example.__file__).read_text(encoding="utf-8"))


def preprocessing(loaded: LoadedModel) -> dict[str, Any]:
    """The contents of preprocessing.json. Pooling and standardisation of the columns are in the model itself."""
    config, features, tokenizer = loaded.config, loaded.features, loaded.tokenizer
    text = None
    if config.text_name:
        text = {
            "columns": list(config.text_name),
            "separator": " ",  # between cells that are not empty
            "max_length": config.max_length,  # tokens of a chunk; tokenizer.json truncates there
            "max_chunks": config.max_chunks,
            # of a text; further ones are not tokenised
            "max_characters": characters_read(config.max_length, config.max_chunks),
            "keep_end": keeps_end(tokenizer),  # a text that is too long loses its beginning instead of its end
            "pad_token_id": pad_token_id_of(tokenizer),
            "ids_of_nothing": [pad_token_id_of(tokenizer)],  # ids of a text without tokens
            "encode_special_tokens": tokenizer.backend_tokenizer.encode_special_tokens,
        }
    return {
        "format_version": FORMAT_VERSION,
        "mmbert_core": mmbert_core.__version__,
        "id": config.id_name,
        "label": config.label_name,
        "classes": list(loaded.labels.names),
        "is_binary": config.is_binary,
        "threshold": loaded.decision.threshold.value,
        "temperature": loaded.decision.calibration.temperature,
        "text": text,
        "numbers": {
            "columns": list(features.plain_number_names),
            **_date_settings(loaded),
            "medians": list(features.medians),
            "has_indicator": list(features.has_indicator),
            "missing_words": sorted(MISSING_NUMBERS),
            "largest": MAX_FLOAT32,
            # for information: the graph itself clips numbers to these; null: the training range is not known
            "limits": None if features.limits is None else np.stack(features.limits, axis=1).tolist(),
        },
        "categories": {
            "columns": list(features.category_names),
            "values": [list(values) for values in features.categories],
            "missing_index": MISSING,
            "unseen_index": UNSEEN,
            "first_index": FIRST_CATEGORY,
        },
    }


def _date_settings(loaded: LoadedModel) -> dict[str, Any]:
    """Date columns, whose units follow the numbers; {} without any."""
    if (dates := loaded.features.dates) is None:
        return {}
    columns = zip(dates.names, dates.newest_seconds(), dates.units, strict=True)
    return {
        "dates": [{"column": name, "newest_seconds": newest, "units": list(units)} for name, newest, units in columns],
        "date_order": loaded.config.date_order,
        "missing_dates": sorted(MISSING_DATES),
    }


# ---- the model ----


def example_inputs(loaded: LoadedModel) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Inputs to trace with, and the names of their dynamic axes.

    Dynamic sizes are 2 or more where they can be: torch.export treats a 1 as a constant.
    """
    config, features = loaded.config, loaded.features
    inputs: dict[str, torch.Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    num_tokens = min(5, config.max_length)
    shape, names = (3, num_tokens), ("batch", "tokens")
    if config.max_chunks > 1:
        shape, names = (3, 2, num_tokens), ("batch", "chunks", "tokens")
    for name in ("input_ids", "attention_mask") if config.text_name else ():
        inputs[name] = torch.ones(*shape, dtype=torch.int64)
        axes[name] = dict(enumerate(names))
    if features.num_numbers:
        inputs["numbers"] = torch.zeros(3, features.num_numbers)
        axes["numbers"] = {0: "batch"}
    if features.cardinalities:
        inputs["categories"] = torch.zeros(3, len(features.cardinalities), dtype=torch.int64)
        axes["categories"] = {0: "batch"}
    return inputs, axes


def trace(loaded: LoadedModel) -> torch.export.ExportedProgram:
    """The graph of the padded model, for any number of rows and up to the config's number of chunks and tokens."""
    config = loaded.config
    dims = {"batch": torch.export.Dim("batch"), "tokens": torch.export.Dim("tokens", max=config.max_length)}
    if config.max_chunks > 1:
        dims["chunks"] = torch.export.Dim("chunks", max=config.max_chunks)
    inputs, axes = example_inputs(loaded)
    shapes = {name: {axis: dims[dim] for axis, dim in named.items()} for name, named in axes.items()}
    padded = PaddedModel(
        loaded.model, is_binary=config.is_binary, max_chunks=config.max_chunks, limits=input_limits(loaded)
    ).eval()
    program = torch.export.export(padded, (), inputs, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and source lines of this machine
    return program


def input_limits(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Lowest and highest number [F] float32 of each numeric input, indicators included; None: not known.

    The graph clips numbers after rounding to float32, the package before it: the results are the same.
    """
    features = loaded.features
    if features.limits is None or not features.num_numbers:
        return None
    indicators = np.zeros(features.num_numbers - len(features.number_names))
    low, high = (np.concatenate([limit, indicators + end]) for limit, end in zip(features.limits, (0, 1), strict=True))
    return torch.from_numpy(low).float(), torch.from_numpy(high).float()


def write_onnx(folder: Path, program: torch.export.ExportedProgram, axes: dict[str, dict[int, str]]) -> None:
    """Write model.onnx with the exporter for torch.export's graphs: the older one turns shapes into constants."""
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx = torch.onnx.export(program, dynamo=True, output_names=["probabilities"], dynamic_shapes=axes, verbose=False)
    onnx.save(folder / MODEL_FILES["onnx"], external_data=num_bytes > MAX_PROTOBUF)


def in_memory(program: torch.export.ExportedProgram) -> export_example.Run:
    """A function that runs the exported program on numpy arrays."""
    module = program.module()

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(**{name: torch.from_numpy(values) for name, values in inputs.items()}).numpy()

    return run


@contextmanager
def _one_line(loaded: LoadedModel, format: str) -> Iterator[None]:
    """Silence the exporter, which logs whole graphs, and turn its errors into a `RunError` of one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # the exporters have exception classes of their own
        text = loaded.model.text_subnetwork
        encoder = f"the encoder ({text.encoder.config.model_type}) of this model" if text is not None else "this model"
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise RunError(f"{encoder} cannot be exported as {format}: {type(error).__name__}: {message[:300]}") from error
    finally:
        logging.disable(disabled)


# ---- the comparison ----


def rows_of_file(loaded: LoadedModel, path: str) -> Rows:
    """The first CHECKED_ROWS rows of a file. Raises `InputError` when it has none, or lacks a column."""
    columns = Roles.from_config(loaded.config).features()
    chunk = next(read_chunks([path], columns, chunk_rows=CHECKED_ROWS, tsv_quoting=loaded.config.tsv_quoting), None)
    if chunk is None:
        raise InputError(f"{path}: expected at least one row to compare, found none")
    return [dict(zip(chunk.cells, cells, strict=True)) for cells in zip(*chunk.cells.values(), strict=True)]


def generated_rows(loaded: LoadedModel) -> Rows:
    """Texts from no words to more than the model reads, cells with and without values; the same rows in every call."""
    config, features, rng = loaded.config, loaded.features, np.random.default_rng(0)
    limit = config.max_length * config.max_chunks
    lengths = (0, 1, 3, limit // 4, limit // 2, limit, 2 * limit)  # words
    words = []
    if loaded.tokenizer is not None:
        words = sorted(word for word in loaded.tokenizer.get_vocab() if word.isalpha()) or ["text"]
    choices: dict[str, Sequence[str]] = {}
    out_of_range = [] if features.limits is None else ["1e30", "-1e30"]  # to compare the clipping too
    # not strict: means and deviations continue with those of the indicators
    columns = zip(features.plain_number_names, features.medians, features.means, features.stds, strict=False)
    for column, median, mean, std in columns:
        choices[column] = ["", "NA", repr(median), repr(mean + 3 * std), repr(mean - std), *out_of_range]
    for column, newest in zip(features.dates.names, features.dates.newest, strict=True) if features.dates else ():
        choices[column] = ["", "NaT", newest, newest[:10].replace("-", "/"), f"{newest[:4]}-02-03 17:45", "1970-01-01"]
    for column, values in zip(features.category_names, features.categories, strict=True):
        choices[column] = ["", "a value that no training row has", *values]
    rows: Rows = []
    for index in range(GENERATED_ROWS):
        row = {column: cells[rng.integers(len(cells))] for column, cells in choices.items()}
        for shift, column in enumerate(config.text_name):
            picked = rng.integers(len(words), size=lengths[(index + shift) % len(lengths)])
            row[column] = " ".join(words[word] for word in picked)
        rows.append(row)
    if config.text_name:
        rows[-1][config.text_name[0]] = "".join(loaded.tokenizer.all_special_tokens) + ' "x"\n\té ́ 日本 😀'
    return rows


def probabilities_of(loaded: LoadedModel, rows: Rows) -> np.ndarray:
    """PyTorch's probabilities, float32 on the CPU. Raises `InputError` for an invalid cell."""
    config = loaded.config
    predictor = Predictor(loaded, DistContext(0, 0, 1, 1, torch.device("cpu")), precision="fp32")
    roles = Roles.from_config(config)
    dataset = encode_for_prediction(
        records_to_chunk(rows, roles.features()),
        roles,
        loaded.tokenizer,
        loaded.features,
        loaded.labels,
        max_length=config.max_length,
        max_chunks=config.max_chunks,
    )
    return predictor.score(dataset).preds
