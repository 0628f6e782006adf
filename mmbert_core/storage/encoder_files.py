"""Checks of an encoder's folder before anything is built from it: placeholders, sizes, the config's counts."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmbert_core.runtime.errors import InputError
from mmbert_core.storage.files import check_readable, read_json
from mmbert_core.storage.schema import anything, mapping, parse_json, record, text

Shapes = dict[str, tuple[int, ...]]  # tensor -> its shape

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# Files that are read where they exist; those of the vocabulary only where there is no tokenizer.json.
READ_FILES = (
    f"{CONFIG} {TOKENIZER} tokenizer_config.json special_tokens_map.json added_tokens.json modules.json".split()
)
VOCABULARY_FILES = "vocab.txt vocab.json merges.txt spiece.model sentencepiece.bpe.model tokenizer.model".split()
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the limit of its own reader
MAX_LAYERS = 1024
MAX_LABELS = 100_000  # transformers writes a name for each when it reads the config
MAX_POSITIONS = 2**25
INDEX = record({"weight_map": mapping(text(non_empty=True))}, {"metadata": anything}, others=True)
# Keys of an encoder's config that decide how many modules are built, one after the other.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
MODULE_COUNT = re.compile(r"layers?$|^n_layer|expert|hidden_groups$|inner_group_num|num_blocks|depths?$|block_sizes$")
POSITIONS = ("max_position_embeddings", "n_positions")
SHARED_LAYERS = ("albert",)  # families with more layers than tensors


def check_encoder_files(folder: str | Path) -> None:
    """Raise `InputError` for a file that cannot be used, and for counts in config.json that no encoder has.

    Such a file may not be read, is a Git LFS pointer, is empty, or is not as long as its own header says. Only files
    that are read are checked: a pointer next to complete weights, such as pytorch_model.bin, does no harm.
    """
    folder = Path(folder)
    check_readable(folder)
    vocabulary = () if (folder / TOKENIZER).is_file() else VOCABULARY_FILES
    check_readable(*(folder / name for name in (*READ_FILES, *vocabulary, WEIGHTS, WEIGHTS_INDEX)))
    for name in (*READ_FILES, *vocabulary):
        if (folder / name).is_file():
            check_content(folder / name, may_be_empty=name == "merges.txt")
    if (folder / WEIGHTS).is_file():
        check_content(folder / WEIGHTS)
    elif (folder / WEIGHTS_INDEX).is_file():
        check_content(folder / WEIGHTS_INDEX)
    if (folder / CONFIG).is_file():  # loading the tokenizer builds the config, too
        config: Any = None
        with suppress(ValueError):  # not JSON: the loading itself reports it
            config = read_json(folder / CONFIG)
        if isinstance(config, dict):
            check_config_against_weights(config, {}, error_prefix=f"encoder {str(folder)!r}: its config.json")


def check_content(path: Path, *, may_be_empty: bool = False) -> None:
    """Raise `InputError` for a Git LFS pointer, an empty file, and one that cannot be read.

    A clone without Git LFS has pointers in place of the files.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if head == LFS_POINTER:
        content = "the weights" if path.suffix == ".safetensors" else "the file"
        raise InputError(f"{path}: is a Git LFS pointer, not {content} itself: run `git lfs pull` in its folder")
    if not head and not may_be_empty:
        raise InputError(f"{path}: is empty (0 bytes): fetch the file again")


def read_shapes(path: Path) -> Shapes:
    """Tensor -> shape, from the header of a safetensors file alone.

    Raises `InputError` when the file is not as long as the header says.
    """
    check_content(path)
    shapes, num_bytes = _read_header(path)
    found = os.path.getsize(path)
    if found != num_bytes:
        raise InputError(f"{path}: expected {num_bytes} bytes, as its header says, found {found}: fetch the file again")
    return shapes


def _read_header(path: Path) -> tuple[Shapes, int]:
    """Tensor -> shape, and the length of the whole file in bytes."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        tensors = parse_json(header)
        tensors.pop("__metadata__", None)
        shapes = {name: tuple(int(size) for size in tensor["shape"]) for name, tensor in tensors.items()}
        return shapes, 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise InputError(f"{path}: cannot be loaded: expected a safetensors file, found another content") from None


def encoder_shapes(folder: str | Path) -> Shapes:
    """Tensor -> shape of all weight files of an encoder's folder; {} where there are none. Reads headers only.

    Raises `InputError` for an index that names missing files, files outside the folder, tensors that its files lack,
    or another size than they have.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return read_shapes(folder / WEIGHTS)
    if not (folder / WEIGHTS_INDEX).is_file():
        return {}
    path = folder / WEIGHTS_INDEX
    index = read_json(path, INDEX)
    file_of, metadata = index["weight_map"], index.get("metadata")
    files = sorted(set(file_of.values()))
    outside = [file for file in files if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == ".."]
    if outside:
        raise InputError(f"{path}: expected files of its own folder, found {outside[0]!r:.200}")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{path}: expected {len(files)} weight files, {len(missing)} of them are missing, first {missing[0]!r:.200}"
        )
    shapes = {file: read_shapes(folder / file) for file in files}
    lost = next((name for name, file in file_of.items() if name not in shapes[file]), None)
    if lost is not None:
        raise InputError(f"{folder / file_of[lost]}: lacks the tensor {lost!r:.200}, which {WEIGHTS_INDEX} says it has")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    _check_total(path, total, sum(_num_data_bytes(folder / file) for file in files))
    return {name: shape for inner in shapes.values() for name, shape in inner.items()}


def _num_data_bytes(path: Path) -> int:
    with open(path, "rb") as stream:
        return os.path.getsize(path) - 8 - int.from_bytes(stream.read(8), "little")


def _check_total(path: Path, total: Any, found: int) -> None:
    """Raises `InputError` only for files that are too short: some writers count a tensor with several names twice."""
    if isinstance(total, (int, float)) and total > found:
        raise InputError(
            f"{path}: expected weight files with {total:.0f} bytes of tensors (total_size), found {found}: "
            f"fetch them again"
        )


def settings_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, those of configs within it too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from settings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from settings_in(inner)


def check_config_against_weights(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, error_prefix: str
) -> None:
    """Raise `InputError` for counts in an encoder's config.json that its weights (`shapes`; {}: unknown) cannot have.

    Checks the counts that make building an encoder slow or large even without memory for its tensors: layers, labels,
    positions.
    """
    for key, value in settings_in(dict(config)):
        limit, reason = _limit_of(key, shapes, has_own_layers=config.get("model_type") not in SHARED_LAYERS)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number > limit:
                raise InputError(f"{error_prefix}: {key}: expected at most {limit}{reason}, found {number!r:.40}")


def _limit_of(key: str, shapes: Mapping[str, tuple[int, ...]], *, has_own_layers: bool) -> tuple[float, str]:
    """The largest number that a key of an encoder's config may have, and why; infinite for most keys."""
    if key in LAYER_COUNTS and shapes and has_own_layers:
        return min(len(shapes), MAX_LAYERS), f" (its weights are {len(shapes)} tensors)"
    if MODULE_COUNT.search(str(key)):
        return MAX_LAYERS, ""
    if key == "num_labels":
        return MAX_LABELS, ""
    if key in POSITIONS:
        tables = [
            shape[0]
            for name, shape in shapes.items()
            if len(shape) == 2 and name.split(".")[-2:-1] in (["position_embeddings"], ["wpe"])
        ]
        return (max(tables), " (the rows of its position embeddings)") if tables else (MAX_POSITIONS, "")
    return math.inf, ""


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, error_prefix: str
) -> None:
    """Raise `InputError` where a config asks for other tensors than the weight files have, before any is allocated.

    A weight file may have the encoder under a prefix ("bert.") and tensors of heads; names that only one side has are
    left to the loading itself, unless the config asks for more than twice the numbers that the files hold.
    """
    prefix = _prefix_of(expected, shapes)
    for name, shape in expected.items():
        found = shapes.get(prefix + name, shape)
        if found != shape:
            raise InputError(
                f"{error_prefix} asks for {name} of shape {list(shape)}, the weight file has {list(found)}"
            )
    asked, held = (sum(math.prod(shape) for shape in each.values()) for each in (expected, shapes))
    if asked > 2 * held:
        raise InputError(f"{error_prefix} asks for {asked} weights, the weight file holds {held}")


def _prefix_of(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The prefix of the encoder's own names in a weight file: "" or, of a model with a head, such as "bert."."""
    candidates = {""} | {name[: -len(own)] for own in list(expected)[:1] for name in shapes if name.endswith(f".{own}")}
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in shapes for name in expected))
