"""Evaluation of a labelled file with a loaded model: its rows, its folder, the result files and the report.

`Predictor.evaluate_file` predicts the rows and calls these functions.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.data.cache import open_or_build_cache
from mmbert_core.data.dataset import Dataset, pad_token_id_of
from mmbert_core.inference.model_files import read_summary
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.inference.scoring import EpochResult, Task
from mmbert_core.report.build import write_report
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.report_schema import DataSummary
from mmbert_core.report.results import write_results
from mmbert_core.report.run_sections import rows_section, training_section
from mmbert_core.report.typed_json import Missing, from_json, to_json
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.tables.table import Roles, resolve_columns

CACHE = "cache"  # subfolder of the encoded rows during an evaluation


def resolve_slice_columns(
    inputs: Sequence[str], config: Config, slice_columns: Sequence[str], *, tsv_quoting: str
) -> Sequence[str]:
    """The given columns; if none are given, those of the config that the input has.

    Raises `InputError` where the input lacks a column of the model, the labels or a given column.
    """
    needed = [*Roles.from_config(config).inputs(), config.label_name, *slice_columns]
    resolve_columns(inputs, needed, tsv_quoting=tsv_quoting)
    return slice_columns or resolve_columns(inputs, [], config.slice_columns, tsv_quoting=tsv_quoting)


@contextmanager
def evaluation_folder(parent: str | Path, context: DistContext) -> Iterator[Path]:
    """Collective. A new folder in `parent`. When the block ends, its cache and empty new folders are removed."""
    new_parents = [path for path in (Path(parent), *Path(parent).parents) if not path.exists()]
    _, folder = hooks.on_test_epoch_start(parent)
    try:
        yield folder
    finally:
        if context.local_rank == 0:
            shutil.rmtree(folder / CACHE, ignore_errors=True)
            with suppress(OSError):  # not empty, as after every successful evaluation
                for path in (folder, *new_parents):
                    path.rmdir()


def labelled_dataset(loaded: LoadedModel, inputs: Sequence[str], cache: Path, *, tsv_quoting: str) -> Dataset:
    """Labelled rows, encoded into memory-mapped arrays in `cache`: their number is not limited by memory."""
    config = loaded.config
    roles = replace(Roles.from_config(config), group=None)
    lengths = {"max_length": config.max_length, "max_chunks": config.max_chunks}
    encoded = open_or_build_cache(inputs, roles, loaded.tokenizer, **lengths, cache_path=cache, tsv_quoting=tsv_quoting)
    return Dataset(
        encoded,
        None,
        loaded.features,
        loaded.labels,
        pad_token_id=pad_token_id_of(loaded.tokenizer),
        name="test",
        label_column=config.label_name,
    )


def write_evaluation(
    loaded: LoadedModel,
    dataset: Dataset,
    result: EpochResult,
    folder: Path,
    *,
    task: Task,
    model_folder: Path | None,
    slice_columns: Sequence[str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Rank 0 only. Write the predictions, test_metrics.json and the report into `folder`; returns the metrics.

    `model_folder`: where the model was loaded from; the report describes the training from its log. `warnings`: lines
    about values that no training row has.
    """
    class_names = loaded.labels.names
    figures = write_results(
        result, dataset, folder, config=loaded.config, class_names=class_names, decision=loaded.decision
    )

    def evaluated_rows() -> EvaluatedRows:
        run_data, best = read_summary(model_folder)
        training = Missing("no folder of a run")
        if model_folder is not None:
            training = training_section(model_folder, best.get("step"), best.get("metric"))
        run_files, fingerprints = run_data.get("files", {}), dataset.encoded.fingerprints
        test = to_json(rows_section(dataset, class_names))
        data = {**run_data, "files": {**run_files, **fingerprints}, "test": test}
        data_warnings = [*files_of_the_run(run_files, fingerprints), *warnings]
        return EvaluatedRows(
            loaded,
            task,
            dataset,
            result.preds,
            result.ids,
            figures,
            model_path=str(model_folder or "a model in memory"),
            training=training,
            data=from_json(DataSummary, data),
            warnings=data_warnings or Missing("The training rows are not available: only the files were compared."),
            slice_columns=slice_columns,
        )

    write_report(evaluated_rows, folder)
    return figures


def files_of_the_run(
    run_files: Mapping[str, Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A line for each evaluated file on which the model was trained or selected.

    Files of the run and of the evaluation: path -> a dict with its sha256.
    """
    by_digest = {value.get("sha256"): path for path, value in run_files.items()}
    return [
        f"{path} is a file of the model's own run ({by_digest[value['sha256']]})"
        for path, value in evaluated.items()
        if value["sha256"] in by_digest
    ]
