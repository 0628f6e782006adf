"""A model folder: what is needed to predict new rows without training data, network or pickle.

    config.json  model.safetensors  encoder/ (config and tokenizer)  features.json  labels.json
    thresholds.json  baselines.json  baselines.safetensors  MANIFEST.json (older folders have none of the last four)
    blend.json (of a model with a blend, whose tensors are in model.safetensors, too)

Without text columns there is no encoder/, and baselines are optional.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import mmbert_core
from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.number_ranges import recover_number_ranges
from mmbert_core.data.tokens import always_used_ids, load_tokenizer
from mmbert_core.evaluation.blending import BlendRecord
from mmbert_core.evaluation.decision import Decision
from mmbert_core.inference.column_modules import build_blend, build_tabular_encoder, build_wide_columns
from mmbert_core.inference.model_files import (
    BASELINE_WEIGHTS,
    BASELINES,
    BLEND,
    CARD,
    CONFIG,
    ENCODER,
    FEATURES,
    FORMAT_VERSION,
    LABELS,
    SUMMARY,
    THRESHOLDS,
    WEIGHTS,
    check_complete,
    check_manifest,
    is_own_card,
    manifest_record,
    prediction_files,
    read_blend,
    read_decision,
    read_settings,
)
from mmbert_core.model.fusion import READ_TOKENS, READ_VALUES, build_fusion
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.positions import max_tokens
from mmbert_core.model.pretrained import build_encoder, load_pretrained_encoder, sentence_pooling
from mmbert_core.model.probe import check_runs_once, check_token_ids
from mmbert_core.model.text_encoder import TextBertBase, reinitialise, resolve_pooling
from mmbert_core.runtime.errors import InputError, RunError, shorten
from mmbert_core.storage.encoder_files import Shapes, check_content, read_shapes
from mmbert_core.storage.files import TEMPORARY_PREFIX, missing_space, save_tensors, sync_path, write_json
from mmbert_core.storage.manifest import MANIFEST

ENCODER_PREFIX = "text_subnetwork.encoder."  # of the encoder's tensors in the weights
BLEND_PREFIX = "blend."  # of a blend's tensors in the weights
PROBE_LENGTH = 11  # tokens of the text that a loaded encoder is tested with: a prime, so no multiple of a chunk size
HEAD_PREFIX = "final_merge_network."  # of the head's tensors


@dataclass(frozen=True)
class LoadedModel:
    """The contents of a model folder. The model is in eval mode, on the CPU, in float32."""

    model: MultimodalBert
    config: Config
    features: Features
    labels: Labels
    tokenizer: Any  # None for a columns-only model
    resolved: dict[str, Any]  # settings that were "auto", as used
    decision: Decision = Decision()
    blend: BlendRecord | None = None  # of `model.blend`


def build_model(config: Config, features: Features) -> MultimodalBert:
    """The model of a new run, with pretrained encoder weights; the other weights are drawn with `config.seed`.

    Raises `InputError` when the encoder cannot be loaded.
    """
    torch.manual_seed(config.seed)
    text = None
    if config.text_name:
        encoder, has_stored_pooler = load_pretrained_encoder(config.encoder)
        check_length(config, encoder)
        trained = sentence_pooling(config.encoder) if config.pooling == "auto" else None
        pooling = resolve_pooling(config.pooling, encoder, has_stored_pooler, trained)
        text = _build_text_encoder(config, encoder, pooling)
        if config.reinit_pooler or config.reinit_layers:
            reinitialise(encoder, pooler=config.reinit_pooler, layers=config.reinit_layers)
    tabular, wide = build_tabular_encoder(config, features), build_wide_columns(config, features)
    return MultimodalBert(text, tabular, config.num_classes, fusion=config.fusion, wide_columns=wide)


def _build_text_encoder(config: Config, encoder: nn.Module, pooling: str) -> TextBertBase:
    reads_tokens = config.fusion in READ_TOKENS
    return TextBertBase(encoder, pooling=pooling, hidden_common_dim=config.hidden_common_dim, reads_tokens=reads_tokens)


def check_length(config: Config, encoder: nn.Module) -> None:
    """Raise `InputError` for a `max_length` above the encoder's number of positions: its forward would fail."""
    limit = max_tokens(encoder)
    if limit is not None and config.max_length > limit:
        raise InputError(
            f"max_length: expected at most {limit} tokens, as encoder {config.encoder!r} has positions, "
            f"found {config.max_length}"
        )


# ---- save and load ----


def save_model_folder(folder: Path, weights: dict[str, torch.Tensor], loaded: LoadedModel) -> None:
    """Rank 0 only. Write the files of `loaded`, then `weights`. Equal weights give equal files, byte for byte.

    Raises `RunError` when the disk is full or refuses a file.
    """
    folder = Path(folder)
    _remove_old_model(folder, replaces_baselines=loaded.decision.baselines is not None)
    temporaries = {name: folder / f"{TEMPORARY_PREFIX}{name}" for name in (BASELINE_WEIGHTS, WEIGHTS)}
    try:
        if loaded.model.text_subnetwork is not None:
            loaded.model.text_subnetwork.encoder.config.save_pretrained(folder / ENCODER)
            loaded.tokenizer.save_pretrained(folder / ENCODER)
            for path in (*(folder / ENCODER).iterdir(), folder / ENCODER):
                sync_path(path)
        write_json(folder / FEATURES, loaded.features.to_json())
        write_json(folder / LABELS, loaded.labels.to_json())
        write_json(folder / CONFIG, config_record(loaded.config, loaded.resolved))
        write_json(folder / THRESHOLDS, loaded.decision.to_json())
        if loaded.blend is not None:
            write_json(folder / BLEND, loaded.blend.to_json())
        if (baselines := loaded.decision.baselines) is not None:
            write_json(folder / BASELINES, baselines.to_json())
            _replace_tensors(baselines.tensors(), temporaries[BASELINE_WEIGHTS], folder / BASELINE_WEIGHTS)
        _replace_tensors(weights, temporaries[WEIGHTS], folder / WEIGHTS, manifest_folder=folder)
    except OSError as error:
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        raise RunError(f"the model could not be written: {missing_space(folder, num_bytes)} ({error})") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _remove_old_model(folder: Path, *, replaces_baselines: bool) -> None:
    """Remove an earlier model's weights, manifest, summary, blend, unedited card, and baselines that nothing replaces.

    The weights are removed first: without them the folder counts as incomplete.
    """
    names = [WEIGHTS, MANIFEST, SUMMARY, BLEND]
    names += [CARD] if is_own_card(folder / CARD) else []
    names += [] if replaces_baselines else [BASELINES, BASELINE_WEIGHTS]
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _replace_tensors(
    tensors: dict[str, torch.Tensor], temporary: Path, final: Path, *, manifest_folder: Path | None = None
) -> None:
    """Write the tensors to `temporary`, the manifest into `manifest_folder` if given, then rename to `final`."""
    save_tensors(tensors, temporary)
    sync_path(temporary)
    if manifest_folder is not None:
        write_json(manifest_folder / MANIFEST, manifest_record(manifest_folder, temporary))
    temporary.replace(final)
    sync_path(final.parent)


def config_record(config: Config, resolved: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json: every setting as given, and `resolved`, the values used for those set to "auto"."""
    return {
        "format_version": FORMAT_VERSION,
        "mmbert_core": mmbert_core.__version__,
        "config": config.to_dict(),
        "resolved": resolved,
    }


def load_model_folder(folder: str | Path) -> LoadedModel:
    """Read a model folder. Raises `InputError`, one line, for a file that is missing, changed or does not fit."""
    folder = Path(folder)
    check_complete(folder)
    for name in (*prediction_files(folder), *((MANIFEST,) if (folder / MANIFEST).is_file() else ())):
        check_content(folder / name, may_be_empty=True)
    check_manifest(folder)
    settings = read_settings(folder)
    config = settings.config
    features = recover_number_ranges(settings.features, settings.labels, config, folder)
    decision, blend = read_decision(folder, settings), read_blend(folder, settings)
    shapes = read_shapes(folder / WEIGHTS)
    _check_head(folder / WEIGHTS, config, features, shapes)
    text, tokenizer = None, None
    if config.text_name:
        tokenizer = load_tokenizer(str(folder / ENCODER))
        # as in training; older versions did not record it and always truncated on the right
        tokenizer.truncation_side = settings.resolved.get("truncation_side", "right")
        encoder = build_encoder(str(folder / ENCODER), _encoder_shapes(shapes))
        check_length(config, encoder)
        check_token_ids(encoder, max(always_used_ids(tokenizer), default=0), name=str(folder / ENCODER))
    try:
        if config.text_name:
            text = _build_text_encoder(config, encoder, settings.resolved["pooling"])
        tabular, wide = build_tabular_encoder(config, features), build_wide_columns(config, features)
        model = MultimodalBert(text, tabular, config.num_classes, fusion=config.fusion, wide_columns=wide)
        model.blend = None if blend is None else build_blend(config, features, blend)
        weights = load_file(folder / WEIGHTS)
        check_blend_tensors(weights)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, SafetensorError, OSError) as error:
        # RuntimeError: names or shapes differ
        raise InputError(
            f"{folder / WEIGHTS}: does not fit the other files of the folder: {shorten(str(error), 300)}"
        ) from None
    if text is not None:
        ids = [max(always_used_ids(tokenizer), default=0)] * min(config.max_length, PROBE_LENGTH)
        check_runs_once(text, ids, name=str(folder / ENCODER))
    return LoadedModel(model.eval(), config, features, settings.labels, tokenizer, settings.resolved, decision, blend)


def check_blend_tensors(weights: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for a tensor of a blend that is not finite float32; names and shapes are checked later."""
    for name, tensor in weights.items():
        if name.startswith(BLEND_PREFIX) and not (tensor.dtype == torch.float32 and torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite float32, found {tensor.dtype} of shape {list(tensor.shape)}")


def _encoder_shapes(shapes: Shapes) -> Shapes:
    """Shapes of the encoder's tensors among the model's, under the encoder's own names."""
    return {
        name.removeprefix(ENCODER_PREFIX): shape for name, shape in shapes.items() if name.startswith(ENCODER_PREFIX)
    }


def _check_head(path: Path, config: Config, features: Features, shapes: Shapes) -> None:
    """Raise `InputError` where the config's widths are not those of the head's weights, before they are allocated."""
    width, column_widths = config.hidden_common_dim, []
    if config.fusion in READ_VALUES and (tabular := build_tabular_encoder(config, features)) is not None:
        column_widths = tabular.output_widths
    elif features.num_numbers or features.cardinalities:
        column_widths = [width]
    with torch.device("meta"):
        head = build_fusion(config.fusion, width if config.text_name else 0, column_widths, config.num_classes)
    for name, tensor in head.state_dict().items():
        if (shape := shapes.get(HEAD_PREFIX + name)) != tuple(tensor.shape):
            found = "none" if shape is None else f"shape {list(shape)}"
            raise InputError(
                f"{path}: does not fit the other files of the folder: expected {HEAD_PREFIX}{name} of shape "
                f"{list(tensor.shape)}, found {found}"
            )
