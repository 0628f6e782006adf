"""Checks of an encoder's folder before a model is built from it: Git LFS pointers, file sizes, the config's counts."""

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
# Files that are read if they exist; those of the vocabulary only without a tokenizer.json.
READ_FILES = (
    f"{CONFIG} {TOKENIZER} tokenizer_config.json special_tokens_map.json added_tokens.json modules.json".split()
)
VOCABULARY_FILES = "vocab.txt vocab.json merges.txt spiece.model sentencepiece.bpe.model tokenizer.model".split()
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the limit of the safetensors library
MAX_LAYERS = 1024
MAX_LABELS = 100_000  # transformers creates a name for each when it reads the config
MAX_POSITIONS = 2**25
INDEX = record({"weight_map": mapping(text(non_empty=True))}, {"metadata": anything}, others=True)
# Keys of an encoder's config that decide how many modules are built, one after the other.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
MODULE_COUNT = re.compile(r"layers?$|^n_layer|expert|hidden_groups$|inner_group_num|num_blocks|depths?$|block_sizes$")
POSITIONS = ("max_position_embeddings", "n_positions")
POSITION_EMBEDDINGS = re.compile(r"(^|\.)(position_embeddings|wpe)\.[^.]*$")
SHARED_LAYERS = ("albert",)  # model types whose layers share their weights: more layers than tensors


def check_encoder_files(folder: str | Path) -> None:
    """Raise `InputError` for files that are unreadable, empty or Git LFS pointers, and for a config with huge counts.

    Only files that loading an encoder reads are checked: a pointer that is not read, such as pytorch_model.bin next to
    model.safetensors, does no harm.
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
        with suppress(ValueError):  # not JSON: reported when the config is loaded
            config = read_json(folder / CONFIG)
        if isinstance(config, dict):
            check_config_against_weights(config, {}, error_prefix=f"encoder {str(folder)!r}: its config.json")


def check_content(path: Path, *, may_be_empty: bool = False) -> None:
    """Raise `InputError` for a file that cannot be read, is empty, or is a Git LFS pointer.

    A clone made without Git LFS has such pointers instead of the large files.
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
    """Tensor -> shape; reads only the header of a safetensors file.

    Raises `InputError` for another kind of file, and for one that is not as long as its header says.
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
    """Tensor -> shape of all weight files in an encoder's folder; {} if there are none. Reads headers only.

    Raises `InputError` for an index that names missing files, files outside the folder or tensors that its files lack,
    or whose total size is larger than that of the files' tensors.
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
    """Raise `InputError` for files with fewer bytes than `total`.

    More are allowed: writers differ in how they count a tensor with several names.
    """
    if isinstance(total, (int, float)) and total > found:
        raise InputError(
            f"{path}: expected weight files with {total:.0f} bytes of tensors (total_size), found {found}: "
            f"fetch them again"
        )


def settings_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, including those of nested configs."""
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
    """Raise `InputError` for counts in an encoder's config that do not fit its weights (`shapes`; {}: unknown).

    Checks the numbers of layers, labels and positions: these make building an encoder slow even before memory for its
    tensors is allocated.
    """
    for key, value in settings_in(dict(config)):
        limit, reason = _limit_of(key, shapes, has_own_layers=config.get("model_type") not in SHARED_LAYERS)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number > limit:
                raise InputError(f"{error_prefix}: {key}: expected at most {limit}{reason}, found {number!r:.40}")


def _limit_of(key: str, shapes: Mapping[str, tuple[int, ...]], *, has_own_layers: bool) -> tuple[float, str]:
    """The largest value of a key in an encoder's config, and the reason for the message; infinity for most keys."""
    if key in LAYER_COUNTS and shapes and has_own_layers:
        return min(len(shapes), MAX_LAYERS), f" (its weights are {len(shapes)} tensors)"
    if MODULE_COUNT.search(str(key)):
        return MAX_LAYERS, ""
    if key == "num_labels":
        return MAX_LABELS, ""
    if key in POSITIONS:
        embeddings = [shape for name, shape in shapes.items() if POSITION_EMBEDDINGS.search(name) and len(shape) == 2]
        num_rows = max((shape[0] for shape in embeddings), default=None)
        return (MAX_POSITIONS, "") if num_rows is None else (num_rows, " (the rows of its position embeddings)")
    return math.inf, ""


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, error_prefix: str
) -> None:
    """Raise `InputError` when the tensors that a config asks for (`expected`) differ from those of the weight files.

    Called before any tensor is allocated. A weight file may have the encoder under a prefix ("bert.") and also tensors
    of heads. Names that only one side has are allowed here, unless the config asks for more than twice as many weights
    as the files hold.
    """
    prefix = _prefix_of(expected, shapes)
    for name, shape in expected.items():
        found = shapes.get(prefix + name, shape)
        if found != shape:
            raise InputError(
                f"{error_prefix} asks for {name} of shape {list(shape)}, the weight file has {list(found)}"
            )
    num_expected, num_found = (sum(map(math.prod, tensors.values())) for tensors in (expected, shapes))
    if num_expected > 2 * num_found:
        raise InputError(f"{error_prefix} asks for {num_expected} weights, the weight file holds {num_found}")


def _prefix_of(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The prefix of the encoder's tensors in a weight file: "", or such as "bert." in a model with a head."""
    first = next(iter(expected), "")
    candidates = {""} | {name.removesuffix(first) for name in shapes if name.endswith(f".{first}")}
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in shapes for name in expected))
