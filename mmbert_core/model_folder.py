"""A whole model in a folder: it scores new files without training data, network or pickle. Floor 2.

    config.json  model.safetensors  encoder/ (config and tokenizer)  features.json  labels.json
    thresholds.json  baselines.json  baselines.safetensors (older folders have none of the last three)

Imports errors, files, config, data, model, evaluation.judgement. Texts, columns and classes are those of the training run.
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
from mmbert_core.data.known_ranges import with_known_ranges
from mmbert_core.data.labels import Labels
from mmbert_core.data.tokens import always_used_ids, load_tokenizer
from mmbert_core.encoder_files import Shapes, read_shapes
from mmbert_core.errors import InputError, RunError
from mmbert_core.evaluation.baselines import Baselines
from mmbert_core.evaluation.calibration import Calibration
from mmbert_core.evaluation.judgement import Judgement
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.files import TEMPORARY_PREFIX, read_json, save_tensors, space, sync_path, write_json
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.pretrained import sentence_pooling
from mmbert_core.model.probe import check_token_ids
from mmbert_core.model.tabular_encoder import TabAE
from mmbert_core.model.text_encoder import TextBertBase, build_encoder, load_pretrained_encoder, reinitialise, resolve_pooling

T = TypeVar("T")
FORMAT_VERSION = 1
ENCODER, THRESHOLDS, BASELINES, BASELINE_WEIGHTS = "encoder", "thresholds.json", "baselines.json", "baselines.safetensors"
SUMMARY, CARD = "summary.json", "README.md"  # for people, written after the test
ENCODER_PREFIX = "text_subnetwork.encoder."  # of the encoder's tensors in the weights
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
    judgement: Judgement = Judgement()


def build_model(config: Config, features: Features) -> tuple[MultimodalBert, str | None]:
    """The model of a new run with pretrained encoder weights, and the pooling in use. Random parts come from `config.seed`.

    Raises `InputError` when the encoder cannot be loaded.
    """
    torch.manual_seed(config.seed)
    text, pooling = None, None
    if config.text_name:
        encoder, has_stored_pooler = load_pretrained_encoder(config.encoder)
        check_length(config, encoder)
        trained = sentence_pooling(config.encoder) if config.pooling == "auto" else None
        pooling = resolve_pooling(config.pooling, encoder, has_stored_pooler, trained)
        text = TextBertBase(encoder, pooling=pooling, hidden_common_dim=config.hidden_common_dim)
        if config.reinit_pooler or config.reinit_layers:
            reinitialise(encoder, pooler=config.reinit_pooler, layers=config.reinit_layers)
    return MultimodalBert(text, _tabular_part(config, features), config.num_classes), pooling


def check_length(config: Config, encoder: nn.Module) -> None:
    """Refuse chunks longer than the encoder's positions, which would fail deep inside it."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet has relative positions and says -1
        return
    offset = 0
    for name, module in encoder.named_modules():
        if name.split(".")[-1] == "position_embeddings" and isinstance(module, nn.Embedding):
            positions = min(positions, module.num_embeddings)
            offset = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's way: they start behind the padding's
    if config.max_length > positions - offset:
        raise InputError(f"max_length: expected at most {positions - offset} tokens, as encoder {config.encoder!r} has positions, found {config.max_length}")


def _tabular_part(config: Config, features: Features) -> TabAE | None:
    if not features.num_numbers and not features.cardinalities:
        return None
    return TabAE(
        features.num_numbers, features.cardinalities, hidden_common_dim=config.hidden_common_dim, means=features.means, stds=features.stds
    )


# ---- save and load ----


def save_model_folder(folder: Path, weights: dict[str, torch.Tensor], made: LoadedModel) -> None:
    """Rank 0 only. Write all parts, the weights last. The same weights always give the same file, byte for byte.

    Raises `RunError` when the disk does not take it.
    """
    folder = Path(folder)
    stale = (WEIGHTS, SUMMARY, CARD) if (folder / SUMMARY).exists() else (WEIGHTS,)  # a README.md may be another's
    for name in stale:  # never an old model, or its figures, beside new parts
        (folder / name).unlink(missing_ok=True)
    baselines = made.judgement.baselines
    temporaries = {name: folder / f"{TEMPORARY_PREFIX}{name}" for name in (BASELINE_WEIGHTS, WEIGHTS)}
    try:
        if made.model.text_subnetwork is not None:
            made.model.text_subnetwork.encoder.config.save_pretrained(folder / ENCODER)
            made.tokenizer.save_pretrained(folder / ENCODER)
            for path in (*(folder / ENCODER).iterdir(), folder / ENCODER):
                sync_path(path)
        write_json(folder / "features.json", made.features.to_json())
        write_json(folder / "labels.json", made.labels.to_json())
        write_json(folder / "config.json", config_record(made.config, made.resolved))
        write_json(folder / THRESHOLDS, made.judgement.to_json())
        if baselines is not None:
            write_json(folder / BASELINES, baselines.to_json())
            _replace_tensors(baselines.tensors(), temporaries[BASELINE_WEIGHTS], folder / BASELINE_WEIGHTS)
        _replace_tensors(weights, temporaries[WEIGHTS], folder / WEIGHTS)
    except OSError as error:
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        raise RunError(f"the model could not be written: {space(folder, num_bytes)} ({error})") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _replace_tensors(tensors: dict[str, torch.Tensor], temporary: Path, final: Path) -> None:
    save_tensors(tensors, temporary)
    sync_path(temporary)
    temporary.replace(final)
    sync_path(final.parent)


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
    features = with_known_ranges(features, labels, config, folder)
    text, tokenizer = None, None
    if config.text_name:
        if not (folder / ENCODER).is_dir():
            raise InputError(f"{folder}: not a model folder: {ENCODER}/ is missing")
        tokenizer = load_tokenizer(str(folder / ENCODER))
        encoder = build_encoder(str(folder / ENCODER), _encoder_shapes(folder / WEIGHTS))
        check_length(config, encoder)
        check_token_ids(encoder, max(always_used_ids(tokenizer), default=0), name=str(folder / ENCODER))
    try:
        if config.text_name:
            text = TextBertBase(encoder, pooling=resolved["pooling"], hidden_common_dim=config.hidden_common_dim)
        model = MultimodalBert(text, _tabular_part(config, features), config.num_classes)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, ValueError, TypeError, SafetensorError, OSError) as error:  # RuntimeError: names or shapes differ
        raise InputError(f"{folder / WEIGHTS}: does not fit the other files of the folder: {' '.join(str(error).split())[:300]}") from None
    return LoadedModel(model.eval(), config, features, labels, tokenizer, resolved, _judgement_of(folder))


def _encoder_shapes(path: Path) -> Shapes:
    """Shapes of the encoder's tensors among the model's, under the encoder's own names; from the file's header alone."""
    return {name.removeprefix(ENCODER_PREFIX): shape for name, shape in read_shapes(path).items() if name.startswith(ENCODER_PREFIX)}


def _judgement_of(folder: Path) -> Judgement:
    """Threshold, calibration and baselines; a folder of version 0.2 or older has none, and counts rows above one half."""
    if not (folder / THRESHOLDS).is_file():
        return Judgement()
    threshold, calibration = _read_part(folder / THRESHOLDS, lambda values: (Threshold.from_json(values["threshold"]), Calibration.from_json(values["calibration"])))
    baselines = None
    if (folder / BASELINES).is_file():
        tensors = _read_part(folder / BASELINE_WEIGHTS, load_file, read=Path)
        baselines = _read_part(folder / BASELINES, lambda values: Baselines.from_json(values, tensors))
    return Judgement(threshold, calibration, baselines)


def _read_part(path: Path, build: Callable[[Any], T], *, read: Callable[[Path], Any] = read_json) -> T:
    """What a file of the folder holds; whatever is wrong in it is one line that names the file."""
    try:
        return build(read(path))
    except KeyError as error:
        raise InputError(f"{path}: expected the key {error}, found none") from None
    except (ValueError, OSError, SafetensorError) as error:
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
