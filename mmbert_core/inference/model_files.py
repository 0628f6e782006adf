"""The JSON files of a model folder: read, and checked against each other before anything is built from them."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.data.features import FEATURES_JSON, Features
from mmbert_core.data.labels import LABELS_JSON, Labels
from mmbert_core.evaluation.baselines import BASELINES_JSON, Baselines
from mmbert_core.evaluation.blending import BLEND_JSON, BlendRecord
from mmbert_core.evaluation.calibration import CALIBRATION_JSON, Calibration
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.thresholds import THRESHOLD_JSON, Threshold
from mmbert_core.model.text_encoder import POOLINGS
from mmbert_core.runtime.errors import InputError, shorten
from mmbert_core.storage.files import check_readable, read_json
from mmbert_core.storage.manifest import MANIFEST, first_difference, manifest_of, read_manifest
from mmbert_core.storage.schema import Check, anything, array, constant, mapping, nullable, number, record, text, whole

FORMAT_VERSION = 1
CONFIG, FEATURES, LABELS, ENCODER = "config.json", "features.json", "labels.json", "encoder"
THRESHOLDS, BASELINES, BASELINE_WEIGHTS = "thresholds.json", "baselines.json", "baselines.safetensors"
BLEND = "blend.json"  # of a model with a blend
SUMMARY, CARD = "summary.json", "README.md"  # data, best step and test figures of the run; written after the test
WEIGHTS = "model.safetensors"  # written last: a folder that has it is complete
# Files that decide a prediction, together with those of the encoder.
PREDICTION_FILES = (CONFIG, FEATURES, LABELS, THRESHOLDS, BASELINES, BASELINE_WEIGHTS, BLEND, WEIGHTS)
ENCODER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # of the files that transformers reads
# Files that a tokenizer of transformers reads wherever they exist, also if they did not in training.
TOKENIZER_NAMES = re.compile(
    r"config\.json|([a-z]+_)?vocab\.(json|txt)|merges\.txt|(special_tokens_map|added_tokens|tokenizer|tokenizer_config)\.json"
    r"|(spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe|tokenizer)\.model|(tokenizer|vocab|.*)\.tiktoken"
    r"|(dict|bpe)\.txt|(emoji|normalizer|byte_maps|word_shape|word_pronunciation)\.json"
)
CARD_MARK = "<!-- model card of mmbert_core, sha256 of the lines above: {} -->\n"
MAX_CARD_BYTES = 2**24
MAX_FEATURES_BYTES = 2**28  # enough for columns with millions of categories

RESOLVED = record(
    {"pooling": nullable(text(choices=POOLINGS[1:])), "precision": text(choices=("fp32", "bf16", "fp16"))},
    {
        "microbatches_asked": whole(1),
        "microbatches_per_step": whole(1),
        "truncation_side": text(choices=("left", "right")),
        "lr": number(0),
        "head_lr": number(0),
    },
    others=True,  # versions differ in what they resolve
)
CONFIG_JSON = record(
    {"format_version": constant(FORMAT_VERSION), "config": mapping(anything), "resolved": RESOLVED},
    {"mmbert_core": text()},
)
THRESHOLDS_JSON = record({"threshold": THRESHOLD_JSON, "calibration": CALIBRATION_JSON})
# Results on evaluated rows: metrics by name, and these keys.
FIGURES_JSON = record(
    {},
    {
        "undefined": mapping(text()),
        "intervals": mapping(nullable(array(number(), length=2))),
        "threshold": nullable(number(-1, 1)),
        "baselines": mapping(mapping(nullable(number()))),
        "no_baselines": mapping(text()),
    },
    others=nullable(number()),
)
# Description of a split's rows; versions differ in their keys.
SPLIT_JSON = record(
    {"rows": whole(0)}, {"classes": nullable(mapping(whole(0))), "mean_tokens": nullable(number(0))}, others=True
)
SUMMARY_JSON = record(
    {
        "data": record({}, {"files": mapping(record({"sha256": text()}, {"bytes": whole(0)}))}, others=SPLIT_JSON),
        "best": record(
            {}, {"step": nullable(whole(0)), "metric": nullable(text()), "value": nullable(number())}, others=True
        ),
        "test": nullable(FIGURES_JSON),
    },
    {"mmbert_core": text()},
)


@dataclass(frozen=True)
class ModelSettings:
    """The contents of a model folder's JSON files, checked against each other."""

    config: Config
    resolved: dict[str, Any]  # settings that were "auto", as used
    features: Features
    labels: Labels


# ---- the manifest ----


def prediction_files(folder: Path) -> list[str]:
    """The folder's files on which a prediction depends, except the manifest, as paths below the folder."""
    present = [name for name in PREDICTION_FILES if (folder / name).is_file()]
    paths = sorted(path for path in (folder / ENCODER).rglob("*") if path.suffix in ENCODER_SUFFIXES)
    encoder_files = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return [*present, *(name for name in encoder_files if not _is_hidden(name))]


def _is_hidden(name: str) -> bool:
    """Whether it is a file of file managers, editors, notebooks or version control, as in `.ipynb_checkpoints/`."""
    return any(folder_or_file.startswith(".") or folder_or_file == "__MACOSX" for folder_or_file in name.split("/"))


def manifest_record(folder: Path, weights: Path) -> dict[str, Any]:
    """The content of MANIFEST.json; `weights`: the weight file under its temporary name."""
    return manifest_of(folder, [*prediction_files(folder), WEIGHTS], version=FORMAT_VERSION, paths={WEIGHTS: weights})


def check_manifest(folder: Path) -> None:
    """Raise `InputError` for a missing, changed or added file on which a prediction may depend.

    Folders of version 0.2 and older have no manifest and are not checked.
    """
    try:
        entries = read_manifest(folder, version=FORMAT_VERSION)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{folder / MANIFEST}: cannot be read: {error.strerror}") from None
    present = set(prediction_files(folder))
    known = {*present, *PREDICTION_FILES, *(name for name in entries if is_encoder_file(name))}
    if unknown := sorted(set(entries) - known):
        raise InputError(f"{folder / MANIFEST}: expected files of a model folder, found {unknown[0]!r:.100}")
    if not {CONFIG, FEATURES, LABELS, WEIGHTS} <= set(entries):
        raise InputError(
            f"{folder / MANIFEST}: expected {CONFIG}, {FEATURES}, {LABELS} and {WEIGHTS} in it, "
            f"found {len(entries)} files"
        )
    advice = "copy the whole folder again, or train once more"
    unlisted = present - set(entries)
    if added := sorted(name for name in unlisted if name in PREDICTION_FILES or _is_tokenizer_file(name)):
        raise InputError(
            f"{folder / added[0]}: is no file of this model ({MANIFEST} does not name it): remove it, or {advice}"
        )
    if difference := first_difference(folder, entries):
        name, reason = difference
        if reason == "missing":
            raise InputError(f"{folder}: not a whole model folder: {name} is missing, which {MANIFEST} names: {advice}")
        option = "; for another threshold use --threshold" if name == THRESHOLDS else ""
        raise InputError(f"{folder / name}: is not as it was written with the model ({reason}): {advice}{option}")


def is_encoder_file(name: str) -> bool:
    """Whether a name in a manifest can be that of an encoder's file, inside the folder."""
    return name.startswith(f"{ENCODER}/") and name.endswith(ENCODER_SUFFIXES) and ".." not in name.split("/")


def _is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer reads a file of this name if it exists; it does not read a user's notes, for example."""
    return name.startswith(f"{ENCODER}/") and TOKENIZER_NAMES.fullmatch(name.removeprefix(f"{ENCODER}/")) is not None


# ---- the model card ----


def with_card_mark(text: str) -> str:
    """The card and a last line with its hash, by which a later run recognises that the card was not edited."""
    return text + CARD_MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_own_card(path: Path) -> bool:
    """Whether a README.md is an unedited card of a run; any other README.md is never replaced or removed."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
            return False
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    card, mark, _ = text.rpartition(CARD_MARK.split("{}")[0])
    return bool(mark) and text == with_card_mark(card)


# ---- reading ----


def check_complete(folder: Path) -> None:
    """Raise `InputError` when a file that every model folder has is missing, or a file cannot be read."""
    check_readable(folder)
    for name in (CONFIG, FEATURES, LABELS, WEIGHTS):
        check_readable(folder / name)
        if not (folder / name).is_file():
            unfinished = " (the run has not ended)" if name == WEIGHTS and folder.is_dir() else ""
            raise InputError(f"{folder}: not a model folder: {name} is missing{unfinished}")
    check_readable(
        folder / ENCODER, *(folder / name for name in (THRESHOLDS, BASELINES, BASELINE_WEIGHTS, BLEND, MANIFEST))
    )
    if (folder / ENCODER).is_dir():
        check_readable(*sorted((folder / ENCODER).iterdir()))


def read_settings(folder: Path) -> ModelSettings:
    """Config, features and labels. Raises `InputError`, one line, where they do not fit each other or the format."""
    values = read_folder_json(folder / CONFIG, CONFIG_JSON)
    config, resolved = config_from_dict(values["config"], source=f"{folder / CONFIG}: config"), values["resolved"]
    if config.text_name and resolved["pooling"] is None:
        raise InputError(f"{folder / CONFIG}: resolved.pooling: expected {', '.join(POOLINGS[1:])}, found null")
    features_json = read_folder_json(folder / FEATURES, FEATURES_JSON, max_bytes=MAX_FEATURES_BYTES)
    features = _build_from(folder / FEATURES, lambda: Features.from_json(features_json))
    dates, units = (), ()
    if features.dates is not None:
        dates, units = features.dates.names, features.dates.unit_names
    columns = (config.tab_field_list + units, config.date_field_list, config.cat_field_list)
    if (features.number_names, dates, features.category_names) != columns:
        raise InputError(f"{folder / FEATURES}: its columns are not those of {CONFIG}")
    labels = Labels.from_json(read_folder_json(folder / LABELS, LABELS_JSON))
    if len(labels.names) != config.num_classes:
        raise InputError(
            f"{folder / LABELS}: expected {config.num_classes} labels as in {CONFIG}, found {len(labels.names)}"
        )
    if config.text_name and not (folder / ENCODER).is_dir():
        raise InputError(f"{folder}: not a model folder: {ENCODER}/ is missing")
    return ModelSettings(config, resolved, features, labels)


def read_decision(folder: Path, settings: ModelSettings) -> Decision:
    """Threshold, calibration and baselines. A folder of version 0.2 or older has none of them: the threshold is 0.5."""
    if not (folder / THRESHOLDS).is_file():
        return Decision()
    values = read_folder_json(folder / THRESHOLDS, THRESHOLDS_JSON)
    threshold = _build_from(folder / THRESHOLDS, lambda: Threshold.from_json(values["threshold"]))
    calibration = _build_from(folder / THRESHOLDS, lambda: Calibration.from_json(values["calibration"]))
    if not (folder / BASELINES).is_file():
        return Decision(threshold, calibration)
    baselines_json = read_folder_json(folder / BASELINES, BASELINES_JSON)
    tensors = _build_from(folder / BASELINE_WEIGHTS, lambda: load_file(folder / BASELINE_WEIGHTS))
    sizes = {
        "num_classes": settings.config.num_classes,
        "num_columns": settings.features.num_numbers + sum(settings.features.cardinalities),
    }
    baselines = _build_from(folder / BASELINES, lambda: Baselines.from_json(baselines_json, tensors, **sizes))
    return Decision(threshold, calibration, baselines)


def read_blend(folder: Path, settings: ModelSettings) -> BlendRecord | None:
    """The members of the folder's blend and their weights; None for a model without one."""
    if not (folder / BLEND).is_file():
        return None
    values, config = read_folder_json(folder / BLEND, BLEND_JSON), settings.config
    has_columns = bool(settings.features.num_numbers or settings.features.cardinalities)
    return _build_from(
        folder / BLEND,
        lambda: BlendRecord.from_json(
            values, has_text=bool(config.text_name), has_columns=has_columns, num_classes=config.num_classes
        ),
    )


def read_summary(folder: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """`data` and `best` of summary.json: the run's rows and files, its best step; {} and {} without a valid file."""
    if folder is None:
        return {}, {}
    try:
        summary = read_json(folder / SUMMARY, SUMMARY_JSON)
    except (OSError, ValueError):
        return {}, {}
    return summary["data"], summary["best"]


def read_folder_json(path: Path, check: Check, **bounds: int) -> Any:
    """The value of a JSON file of the folder. Raises `InputError` also where it cannot be read."""
    try:
        return read_json(path, check, **bounds)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _build_from(path: Path, build: Callable[[], Any]) -> Any:
    """The result of `build`; its errors become an `InputError` of one line that names the file."""
    try:
        return build()
    except FileNotFoundError:
        raise InputError(f"{path}: is missing") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{path}: {shorten(str(error).removeprefix(f'{path}: '), 300)}") from None
