"""A whole model in a folder: it scores new files without training data, network or pickle. Floor 2.

    config.json  model.safetensors  encoder/ (config and tokenizer)  features.json  labels.json

Imports errors, files, config, data, model. Texts, columns and classes are those of the training run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import mmbert_core
from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.tokens import load_tokenizer
from mmbert_core.errors import InputError, RunError
from mmbert_core.files import TEMPORARY_PREFIX, read_json, save_tensors, space, sync_path, write_json
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase, build_encoder, load_pretrained_encoder, reinitialise, resolve_pooling

T = TypeVar("T")
FORMAT_VERSION = 1
ENCODER = "encoder"
WEIGHTS = "model.safetensors"  # written last: a folder that has it is whole


@dataclass(frozen=True)
class LoadedModel:
    """What a model folder holds, ready to score: the model is in eval mode, on the CPU, in float32."""

    model: MultimodalBert
    config: Config
    features: Features
    labels: Labels
    tokenizer: Any  # None for a columns-only model
    resolved: dict[str, Any]  # settings that were `auto`, as used


def build_model(config: Config, features: Features) -> tuple[MultimodalBert, str | None]:
    """The model of a new run with pretrained encoder weights, and the pooling in use. Random parts come from `config.seed`.

    Raises `InputError` when the encoder cannot be loaded.
    """
    torch.manual_seed(config.seed)
    text, pooling = None, None
    if config.text_name:
        encoder, has_stored_pooler = load_pretrained_encoder(config.encoder)
        check_length(config, encoder)
        pooling = resolve_pooling(config.pooling, encoder, has_stored_pooler)
        text = TextBertBase(encoder, pooling=pooling, hidden_common_dim=config.hidden_common_dim)
        if config.reinit_pooler or config.reinit_layers:
            reinitialise(encoder, pooler=config.reinit_pooler, layers=config.reinit_layers)
    return MultimodalBert(text, _tabular_part(config, features), config.num_classes), pooling


def check_length(config: Config, encoder: nn.Module) -> None:
    """Refuse chunks longer than the encoder's positions, which would fail deep inside it."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet has relative positions and says -1
        return
    offset = (getattr(encoder.config, "pad_token_id", 0) or 0) + 1 if encoder.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    if config.max_length > positions - offset:
        raise InputError(f"max_length: expected at most {positions - offset} tokens, as encoder {config.encoder!r} has positions, found {config.max_length}")


def _tabular_part(config: Config, features: Features) -> TabAE | None:
    if not features.num_numbers and not features.cardinalities:
        return None
    return TabAE(
        features.num_numbers, features.cardinalities, hidden_common_dim=config.hidden_common_dim, means=features.means, stds=features.stds
    )


# ---- save and load ----


def save_model_folder(
    folder: Path, weights: dict[str, torch.Tensor], *, config: Config, model: MultimodalBert, features: Features, labels: Labels, tokenizer: Any, resolved: dict[str, Any]
) -> None:
    """Rank 0 only. Write all parts, the weights last. The same weights always give the same file, byte for byte.

    Raises `RunError` when the disk does not take it.
    """
    folder = Path(folder)
    (folder / WEIGHTS).unlink(missing_ok=True)  # never an old model beside new parts
    temporary = folder / f"{TEMPORARY_PREFIX}{WEIGHTS}"
    try:
        if model.text_subnetwork is not None:
            model.text_subnetwork.encoder.config.save_pretrained(folder / ENCODER)
            tokenizer.save_pretrained(folder / ENCODER)
            for path in (*(folder / ENCODER).iterdir(), folder / ENCODER):
                sync_path(path)
        write_json(folder / "features.json", features.to_json())
        write_json(folder / "labels.json", labels.to_json())
        write_json(folder / "config.json", config_record(config, resolved))
        save_tensors(weights, temporary)
        sync_path(temporary)
        temporary.replace(folder / WEIGHTS)
        sync_path(folder)
    except OSError as error:
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        raise RunError(f"the model could not be written: {space(folder, num_bytes)} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def config_record(config: Config, resolved: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds: every setting as asked, and those that were settled by the run."""
    return {"format_version": FORMAT_VERSION, "mmbert_core": mmbert_core.__version__, "config": config.to_dict(), "resolved": resolved}


def load_model_folder(folder: str | Path) -> LoadedModel:
    """Read a model folder. Raises `InputError`, one line, when a part is missing or does not fit the others."""
    folder = Path(folder)
    for name in ("config.json", "features.json", "labels.json", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not a model folder: {name} is missing" + (" (the run has not ended)" if name == WEIGHTS and folder.is_dir() else ""))
    config, resolved = _read_part(folder / "config.json", _config_of)
    features = _read_part(folder / "features.json", Features.from_json)
    labels = _read_part(folder / "labels.json", Labels.from_json)
    if (features.number_names, features.category_names) != (config.tab_field_list, config.cat_field_list):
        raise InputError(f"{folder / 'features.json'}: its columns are not those of config.json")
    if len(labels.names) != config.num_classes:
        raise InputError(f"{folder / 'labels.json'}: expected {config.num_classes} labels as in config.json, found {len(labels.names)}")
    text, tokenizer = None, None
    if config.text_name:
        if not (folder / ENCODER).is_dir():
            raise InputError(f"{folder}: not a model folder: {ENCODER}/ is missing")
        tokenizer = load_tokenizer(str(folder / ENCODER))
        encoder = build_encoder(str(folder / ENCODER))
    try:
        if config.text_name:
            text = TextBertBase(encoder, pooling=resolved["pooling"], hidden_common_dim=config.hidden_common_dim)
        model = MultimodalBert(text, _tabular_part(config, features), config.num_classes)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, ValueError, TypeError, SafetensorError, OSError) as error:  # RuntimeError: names or shapes differ
        raise InputError(f"{folder / WEIGHTS}: does not fit the other files of the folder: {' '.join(str(error).split())[:300]}") from None
    return LoadedModel(model.eval(), config, features, labels, tokenizer, resolved)


def _read_part(path: Path, build: Callable[[Any], T]) -> T:
    """What a JSON file of the folder holds; whatever is wrong in it is one line that names the file."""
    try:
        return build(read_json(path))
    except KeyError as error:
        raise InputError(f"{path}: expected the key {error}, found none") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: {' '.join(str(error).removeprefix(f'{path}: ').split())}") from None
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected another structure ({error})") from None


def _config_of(record: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(f"expected format {FORMAT_VERSION}, found {record.get('format_version')}")
    config = config_from_dict(record["config"], place="config")
    if config.text_name and record["resolved"]["pooling"] is None:
        raise ValueError("no pooling was settled")
    return config, record["resolved"]
