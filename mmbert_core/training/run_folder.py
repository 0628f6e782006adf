"""The folder of a run: locked by one run at a time, free of links and of the leftovers of killed processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmbert_core.config import Config
from mmbert_core.hooks import MODEL_CLASS
from mmbert_core.inference.model_files import (
    BASELINE_WEIGHTS,
    BASELINES,
    CARD,
    ENCODER,
    FIGURES_JSON,
    SUMMARY,
    THRESHOLDS,
    WEIGHTS,
)
from mmbert_core.inference.model_folder import config_record
from mmbert_core.runtime import distributed
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.storage.files import LOCK, TEMPORARY_PREFIX, read_json, remove_stale_temporaries, write_json
from mmbert_core.storage.folder_lock import CLAIM, Claim, claim_folder
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.storage.schema import nullable, record, whole
from mmbert_core.training import checkpoint

RESULTS = "train_results.json"
RESULTS_JSON = record({"steps": whole(0), "test_metrics": nullable(FIGURES_JSON)}, others=True)
# Names in the folder of a run that the run writes.
WRITTEN = (
    "config.json",
    WEIGHTS,
    ENCODER,
    "features.json",
    "labels.json",
    THRESHOLDS,
    BASELINES,
    BASELINE_WEIGHTS,
    MANIFEST,
    SUMMARY,
    CARD,
    "checkpoints",
    "metrics.jsonl",
    RESULTS,
    "tensorboard",
    "cache",
    "rows",
    LOCK,
    CLAIM,
)


def already_finished(config: Config) -> dict[str, Any] | None:
    """Collective. What train_results.json holds, which is written last; None when the run is not finished."""

    def read() -> dict[str, Any] | None:
        try:
            return read_json(Path(config.model_path) / RESULTS, RESULTS_JSON)
        except (OSError, ValueError):  # absent or damaged: the end of the run is repeated
            return None

    return distributed.on_main(read)


def check_folders(config: Config) -> None:
    """Raise `InputError` unless the run can write its folder and its cache. Creates nothing."""
    for key in ("model_path", "cache_path"):
        if getattr(config, key) is not None:
            check_folder(key, getattr(config, key))
    check_no_links(Path(config.model_path))


def check_folder(key: str, folder: str) -> None:
    """Raise `InputError`, about the setting `key`, unless `folder` exists and is writable, or can be created."""
    try:
        nearest = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise InputError(f"{key}: {format_for_message(folder)}: {error.strerror}") from None
    if not nearest.is_dir():
        raise InputError(f"{key}: {nearest}: expected a folder, found a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {nearest}: cannot be written to")


def check_no_links(folder: Path) -> None:
    """Raise `InputError` for a link under a name that the run writes: it would write outside of its folder.

    The folder itself may be a link. Creates nothing.
    """
    for written in (*map(folder.joinpath, WRITTEN), *sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))):
        # os.walk: a file that another process removes meanwhile is no error
        inside = (Path(root) / name for root, folders, files in os.walk(written) for name in (*folders, *files))
        for path in [written] if written.is_symlink() else [written, *inside]:
            if path.is_symlink():
                raise InputError(f"{path}: expected no links in the folder of a run, found one to {os.readlink(path)}")


def remove_leftovers(folder: Path) -> None:
    """Rank 0 only, in a locked folder: remove temporary files of killed runs, but not of predictions still running."""
    checkpoint.clean_up(folder / "checkpoints")
    remove_stale_temporaries(folder, WRITTEN)
    for test_folder in folder.glob(f"{MODEL_CLASS}-*"):
        if not test_folder.is_symlink():  # a link may lead out of the run's folder
            remove_stale_temporaries(test_folder)


@contextmanager
def locked_folder(config: Config) -> Iterator[Claim | None]:
    """Collective. Rank 0 holds the lock of `model_path` and removes the leftovers of killed processes.

    Yields the lock on rank 0, else None. Raises `InputError` when another run holds the lock, and `RunError`, instead
    of an error about a missing file, when another run has taken the folder meanwhile.
    """
    folder = Path(config.model_path)

    def claim_and_clean() -> Claim:
        check_no_links(folder)
        claim = claim_folder(folder)
        try:
            remove_leftovers(folder)
        except BaseException:
            claim.release()
            raise
        return claim

    claim = distributed.on_main(claim_and_clean, share=False)
    try:
        yield claim
    except OSError:
        if claim is not None:
            claim.check()
        raise
    finally:
        if claim is not None:
            claim.release()


def open_folder(folder: Path, config: Config, resolved: dict[str, Any], *, fresh: bool, finished: bool) -> None:
    """Rank 0 only, after every check: remove older results and write config.json, the first file of a run."""
    if not finished:  # older results would be mistaken for those of this run
        (folder / RESULTS).unlink(missing_ok=True)
    if fresh or not (folder / "config.json").exists():  # none: the run began on another node
        write_json(folder / "config.json", config_record(config, resolved))
