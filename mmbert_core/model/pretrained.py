"""Pretrained encoders from a folder or the hub. Only safetensors are loaded, and no code that comes with an encoder."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.runtime.hub import check_hub_answers, check_hub_name
from mmbert_core.storage.encoder_files import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    Shapes,
    check_config_against_weights,
    check_content,
    check_encoder_files,
    check_shapes,
    encoder_shapes,
    settings_in,
)
from mmbert_core.storage.files import read_json
from mmbert_core.storage.schema import record

logger = logging.getLogger(__name__)

# Files of sentence-transformers.
SENTENCE_POOLING = "1_Pooling/config.json"
SENTENCE_MODULES = "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
SENTENCE_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # its name of a mode -> the pooling here
POOLING_FLAG = "pooling_mode_"  # prefix of the older form's keys, one for each mode
# Keys of a config.json with which transformers would run an encoder's own code or load other weights, and the message.
REFUSED_KEYS = {
    "auto_map": "it needs code of its own (auto_map), which is never run; choose one that transformers knows",
    "quantization_config": "its weights are quantised and cannot be fine-tuned; choose the full-precision one",
    "transformers_weights": "its config names a weight file of its own; expected model.safetensors",
}
# Keys with this in their name choose attention code; transformers may fetch other values from the hub and run them.
IMPLEMENTATION, PLAIN_IMPLEMENTATIONS = "_implementation", (None, "eager", "sdpa")


def load_pretrained_encoder(name_or_folder: str) -> tuple[nn.Module, bool]:
    """Load an encoder in float32 and eval mode: `(encoder, has_stored_pooler)`.

    A name is looked up in the local cache first and on the hub only if it is not there, so that a second start needs
    no network. `has_stored_pooler`: the encoder has a pooler and its weights came from the file. Many checkpoints, such
    as RoBERTa's, have no weights of the pooler, and transformers then draws them at random.

    Raises `InputError` (one line) when the folder or name does not exist, holds only pickled weights, needs code of its
    own, lacks weights of the encoder, or cannot be fetched.
    """
    name = os.fspath(name_or_folder)
    if os.path.isdir(name):
        with _naming_encoder(name):
            _check_weight_files(name)
            shapes = encoder_shapes(name)
        return _load(name, local_files_only=True, shapes=shapes)
    check_hub_name(name)
    try:
        return _load(name, local_files_only=True)
    except _NotCached:
        check_hub_answers(name)
    logger.info("encoder %s: not in the local cache, downloading it", name)
    for file in (SENTENCE_MODULES, SENTENCE_CONFIG, SENTENCE_POOLING):
        with suppress(Exception):  # optional files; the hub's client raises errors of its own classes
            cached_file(name, file)
    return _load(name, local_files_only=False)


def sentence_pooling(name_or_folder: str) -> str | None:
    """The pooling with which an encoder was trained to make sentence vectors, from files of sentence-transformers.

    "mean", "cls" or "last"; None for an encoder without such files in its folder or in the hub's local cache. Reads
    both forms of the file: a flag for each mode, or one key `pooling_mode`. Raises `InputError` (one line) for settings
    that this project does not have: several or unknown modes, or vectors without the tokens of a prompt.
    """
    name = os.fspath(name_or_folder)
    path = _cached_path(name, _pooling_file(name))
    if path is None:
        return None
    advice = "set pooling to mean, cls, last or pooler"
    error_prefix = f"pooling: auto cannot follow {path}"
    try:
        check_content(path)
        settings = read_json(path, record({}, others=True))
    except InputError as error:
        raise InputError(f"{error_prefix} ({str(error).removeprefix(f'{path}: ')}): {advice}") from None
    modes = _pooling_modes(settings)
    if len(modes) != 1 or modes[0] not in SENTENCE_POOLINGS:
        found = ", ".join(map(format_for_message, modes)) or "none"
        raise InputError(
            f"{error_prefix}: expected one mode of {', '.join(SENTENCE_POOLINGS)}, found {found}: {advice}"
        )
    if settings.get("include_prompt") is False and _has_prompt(name):
        raise InputError(
            f"{error_prefix}: its vectors leave out the tokens of a prompt (include_prompt: false), "
            f"which texts here never have: {advice}"
        )
    return SENTENCE_POOLINGS[modes[0]]


def _pooling_file(name: str) -> str:
    """Path below the encoder's folder of the pooling's settings, as modules.json gives it."""
    path = _cached_path(name, SENTENCE_MODULES)
    with suppress(InputError, TypeError, AttributeError):
        for module in read_json(path) if path is not None else []:
            folder = os.path.normpath(str(module.get("path")))
            is_inside = not os.path.isabs(folder) and folder.split(os.sep)[0] not in (".", "..")
            if str(module.get("type")).split(".")[-1] == "Pooling" and is_inside:
                return f"{folder}/config.json"
    return SENTENCE_POOLING


def _pooling_modes(settings: Mapping[str, Any]) -> list[str]:
    """The modes in use, named as in `pooling_mode`; a flag with an invalid value counts as one more mode."""
    named = settings.get("pooling_mode", [])
    modes = [str(mode).lower() for mode in (named if isinstance(named, list) else [named])]
    for key, is_used in settings.items():
        if key.startswith(POOLING_FLAG) and is_used not in (False, None):
            mode = key.removeprefix(POOLING_FLAG).removesuffix("_tokens").removesuffix("_token")
            modes.append(mode if is_used in (True,) else f"{key}: {is_used}")  # 1 and 0 count as true and false
    return list(dict.fromkeys(modes))


def _has_prompt(name: str) -> bool:
    path = _cached_path(name, SENTENCE_CONFIG)
    with suppress(InputError):
        settings = read_json(path) if path is not None else {}
        prompts = settings.get("prompts") if isinstance(settings, dict) else None
        return isinstance(prompts, dict) and any(prompts.values())
    return False


def _cached_path(name: str, file: str) -> Path | None:
    """A file of an encoder's folder, or of the hub's local cache; None if it does not exist."""
    try:
        path = cached_file(name, file, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)


def build_encoder(folder: str, shapes: Shapes | None = None) -> nn.Module:
    """An encoder with random weights, float32, eval mode, from the config.json of a model folder.

    `shapes`: tensor -> shape of the weights to be loaded later, under the encoder's own names. Raises `InputError`
    where the config implies other shapes, before memory is allocated for them.
    """
    name = os.fspath(folder)
    check_encoder_files(name)
    with _quiet_transformers(), _one_line(name):
        config = _checked_config(name, local_files_only=True, shapes=shapes or {})
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


class _NotCached(InputError):
    """The hub's local cache does not have the files."""


def _load(name: str, *, local_files_only: bool, shapes: Shapes | None = None) -> tuple[nn.Module, bool]:
    """`load_pretrained_encoder` from one source. Raises `_NotCached` where the hub's local cache lacks the files."""
    with _quiet_transformers(), _one_line(name, not_cached=local_files_only and not os.path.isdir(name)):
        _checked_config(name, local_files_only=local_files_only, shapes=shapes or {})
        encoder, report = AutoModel.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local_files_only,
            output_loading_info=True,
        )
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise InputError(f"encoder {name!r}: expected an encoder alone, found {type(encoder).__name__} with a decoder")
    missing = sorted(report["missing_keys"])
    missing_pooler = [key for key in missing if "pooler" in key.split(".")]
    if len(missing) > len(missing_pooler):
        # transformers draws missing weights at random: the encoder would not be pretrained
        key = next(key for key in missing if key not in missing_pooler)
        raise InputError(
            f"encoder {name!r}: its weight file lacks {len(missing) - len(missing_pooler)} tensors of "
            f"{type(encoder).__name__}, such as {key}"
        )
    has_stored_pooler = getattr(encoder, "pooler", None) is not None and not missing_pooler
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    pooler = "a stored pooler" if has_stored_pooler else "no stored pooler"
    logger.info("encoder %s: %s, %.1f million weights, %s", name, type(encoder).__name__, millions, pooler)
    return encoder, has_stored_pooler


def _check_weight_files(folder: str) -> None:
    check_encoder_files(folder)
    names = set(os.listdir(folder))
    if CONFIG not in names:
        raise InputError(f"encoder {folder!r}: expected config.json and model.safetensors in it, found no config.json")
    if "adapter_config.json" in names:
        raise InputError(f"encoder {folder!r}: it is a PEFT adapter; merge it into its encoder and save that first")
    if WEIGHTS in names or WEIGHTS_INDEX in names:
        return
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    found = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else "none"
    raise InputError(f"encoder {folder!r}: expected weights in model.safetensors, found {found}")


def _checked_config(name: str, *, local_files_only: bool, shapes: Shapes) -> PretrainedConfig:
    """The config of an encoder. Raises `InputError` where it would run code or does not fit the weights' `shapes`.

    `shapes`: tensor -> shape; {}: not known, and not checked.
    """
    settings, _ = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)
    for key, value in settings_in(settings):
        if key in REFUSED_KEYS and value:
            raise InputError(f"encoder {name!r}: {REFUSED_KEYS[key]}")
        if IMPLEMENTATION in f"_{key}" and value not in PLAIN_IMPLEMENTATIONS:
            raise InputError(
                f"encoder {name!r}: its config chooses code to run, which is never fetched: "
                f"expected {key} eager or sdpa, found {value!r:.80}"
            )
    if not isinstance(settings.get("model_type"), str):
        raise InputError(f"encoder {name!r}: its config.json names no model_type")
    error_prefix = f"encoder {name!r}: its config.json"
    check_config_against_weights(settings, shapes, error_prefix=error_prefix)
    config = AutoConfig.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)
    if shapes:
        with torch.device("meta"):  # names and shapes without memory
            empty = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        expected = {tensor: tuple(parameter.shape) for tensor, parameter in empty.named_parameters()}
        check_shapes(expected, shapes, error_prefix=error_prefix)
    return config


@contextmanager
def _naming_encoder(name: str) -> Iterator[None]:
    """Put "encoder NAME" before the message of an `InputError` about a file of the folder `name`."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(
            message if message.startswith("encoder ") else f"encoder {name!r}: {message.removeprefix(name + os.sep)}"
        ) from None


@contextmanager
def _one_line(name: str, *, not_cached: bool = False) -> Iterator[None]:
    """Turn any error of transformers while loading into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the hub, JSON, safetensors and transformers each raise classes of their own
        message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        error_class = _NotCached if not_cached and isinstance(error, OSError) else InputError
        if "above report" in str(error):  # a list of tensors of other shapes, which _quiet_transformers silences
            message = (
                "weights of its model.safetensors have other shapes than its config.json says, "
                "or cannot be converted to what the model needs"
            )
        if isinstance(error, json.JSONDecodeError):
            message = f"its config.json is not JSON ({message})"
        raise error_class(f"encoder {name!r}: cannot be loaded: {message[:300]}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' report on missing and unused weights and its progress bar, then restore both.

    `_load` checks the missing weights itself. Not thread-safe: both switches are global in transformers.
    """
    verbosity = transformers_logging.get_verbosity()
    show_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(max(verbosity, transformers_logging.ERROR))
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if show_bars:
            transformers_logging.enable_progress_bar()
