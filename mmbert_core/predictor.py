"""A loaded model scores new rows: a file, in windows of constant memory, on one process or several.

One call at a time uses the model and the tokenizer, in whichever thread; a forked process continues with one CPU thread.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from mmbert_core import hooks
from mmbert_core.data.batches import WINDOW
from mmbert_core.data.cache import open_or_build_cache
from mmbert_core.data.class_messages import positive_class_line
from mmbert_core.data.dataset import Dataset, dataset_for_prediction, encode_for_prediction, pad_token_id_of
from mmbert_core.data.encoding import encode_windows, max_cell_characters
from mmbert_core.data.features import OutOfRange, Unseen, add_by_column, out_of_range_lines, unseen_lines
from mmbert_core.data.prepare import truncated_texts_warning
from mmbert_core.data.tokens import join_texts, keeps_end
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.inference import scoring
from mmbert_core.inference.attributions import explain_rows
from mmbert_core.inference.model_files import SUMMARY, SUMMARY_JSON
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder
from mmbert_core.inference.output_file import Columns, header, output_delimiter, table_line, table_rows, open_output
from mmbert_core.inference.precision import resolve_precision
from mmbert_core.inference.scoring import BatchResult, EpochResult, Task
from mmbert_core.model.int8 import quantise_linears
from mmbert_core.model.losses import build_loss_op
from mmbert_core.model.probe import num_embedding_rows
from mmbert_core.report import results
from mmbert_core.report.build import write_report
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.report_schema import DataSummary
from mmbert_core.report.run_sections import rows_section, training_section
from mmbert_core.report.typed_json import Missing, from_json, to_json
from mmbert_core.runtime import distributed, forks, ranks
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.runtime.progress import Progress
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import read_json
from mmbert_core.tables.readers import lengths_of
from mmbert_core.tables.table import (
    Chunk,
    Roles,
    check_path,
    expand_paths,
    frame_to_chunk,
    read_chunks,
    records_to_chunk,
    resolve_columns,
)

logger = logging.getLogger(__name__)
CACHE = "cache"  # of an evaluation, while it lasts
Rows = TypeVar("Rows", pd.DataFrame, list[Mapping[str, Any]], Mapping[str, Any])


class Predictor:
    """A model folder ready to score rows. Needs neither training data nor labels nor network."""

    def __init__(
        self,
        loaded: LoadedModel,
        context: DistContext,
        *,
        precision: str = "auto",
        threshold: float | None = None,
        folder: Path | None = None,
    ) -> None:
        """`threshold`: above which probability a row is class 1; none: as chosen on the validation rows. Several classes have none.

        `folder`: where the model was loaded from, for reports.
        """
        self._options = {"precision": precision, "threshold": threshold}
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold: expected a probability of 0 to 1, found {threshold}")
        if threshold not in (None, loaded.decision.threshold.value):
            given = Threshold(threshold, "given", reason="given when the model was loaded, not chosen on rows")
            loaded = replace(loaded, decision=replace(loaded.decision, threshold=given))
        self.loaded = loaded
        self.folder = folder
        self.context = context
        self.warns_with_examples = True  # of cells; a server's log has none
        self._process_id = os.getpid()
        self._lock = forks.lock_of(loaded.model)  # threads share the tokenizer's settings and the model's hooks
        config = loaded.config
        if precision == "auto" and context.device.type == "cuda":
            precision = loaded.resolved["precision"]  # as the run's own test stage did
        if precision == "int8":
            precision = "fp32"  # of all but the encoder's linear layers
            if context.device.type != "cpu":
                raise InputError(
                    "precision int8: expected to predict on the CPU, found a GPU (use bf16, or hide the GPU with CUDA_VISIBLE_DEVICES=)"
                )
            if loaded.model.text_subnetwork is not None:
                quantise_linears(loaded.model.text_subnetwork.encoder)
        self.task = Task(
            config.is_binary, build_loss_op(None), resolve_precision(precision, context.device), context.device
        )
        loaded.model.to(context.device).eval()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        context: DistContext | None = None,
        *,
        precision: str = "auto",
        threshold: float | None = None,
    ) -> "Predictor":
        """Load a model folder. Raises `InputError` when it is not a whole one.

        `precision`: "auto" (on a GPU as the model was trained, on the CPU fp32), "fp32", "bf16", "fp16" or, on the CPU, "int8".
        """
        return cls(
            load_model_folder(folder),
            context or ranks.read_context(),
            precision=precision,
            threshold=threshold,
            folder=Path(folder),
        )

    # ---- copies, and other processes ----

    def __reduce__(self) -> tuple[Callable[..., "Predictor"], tuple[str, dict[str, Any]]]:
        """Pickled it is its folder's path and its options: the other process loads the folder anew, on its own device."""
        if self.folder is None:
            raise InputError("a Predictor without a model folder cannot be pickled: load it with Predictor.from_folder")
        return load_predictor, (str(self.folder.absolute()), self._options)

    def __copy__(self) -> "Predictor":
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "Predictor":
        copied = copy.copy(self)
        with forks.exclusively(self._lock):
            copied.loaded, copied.task = copy.deepcopy((self.loaded, self.task), memo)
        copied._lock = forks.lock_of(copied.loaded.model)
        return copied

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The model and its tokenizer are this thread's. Raises `RunError` in a forked process that cannot use them."""
        if os.getpid() != self._process_id and (self.context.device.type != "cpu" or self.context.world_size > 1):
            what = "on a GPU" if self.context.device.type != "cpu" else "of several processes"
            advice = "load it there, or start the process with spawn"
            raise RunError(f"a Predictor {what} cannot be used in a forked process: {advice}")
        with forks.exclusively(self._lock):
            yield

    @property
    def positive_label(self) -> str | None:
        """The label that is class 1 of two classes: `prob`, F1 and the threshold are about it. None for several classes."""
        return self.loaded.labels.names[1] if self.loaded.config.is_binary else None

    @cached_property
    def positive_share(self) -> float | None:
        """Share of the training rows, 0..1, with the positive label; None for several classes and for folders that do not say."""
        try:
            classes = summary_of(self.folder)[0]["train"]["classes"]
            return classes[self.positive_label] / sum(classes.values())
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            return None

    @property
    def positive_class_line(self) -> str | None:
        """Which label is class 1, in words; None for several classes."""
        return (
            positive_class_line(self.loaded.labels.names, self.positive_share) if self.loaded.config.is_binary else None
        )

    def predict_file(
        self, paths: Sequence[str], output: str | Path, *, sheet_safe: bool = False, tsv_quoting: str | None = None
    ) -> int:
        """Collective. Score every row of the input once, in its order; returns the number of rows.

        The output is CSV where its name ends in .csv, else TSV ("-": on standard output), and appears whole or not at all.
        Labels, when the input has the label column, are copied as they are; with `sheet_safe` a text that a spreadsheet
        would take for a formula gets a ' before it. `tsv_quoting`: of .tsv input; none: as the model's training files.
        Raises `InputError` for input that cannot be read, a missing column, or an output that cannot be written.
        """
        delimiter = output_delimiter(str(output))
        inputs = expand_paths(paths)
        config, roles = self.loaded.config, Roles.from_config(self.loaded.config)
        tsv_quoting = tsv_quoting or config.tsv_quoting
        kept = resolve_columns(inputs, roles.inputs(), (config.label_name,), tsv_quoting=tsv_quoting)
        names = header(
            self.loaded.labels.names,
            is_binary=config.is_binary,
            id_name=config.id_name,
            has_labels=config.label_name in kept,
        )
        unseen: Unseen = {}
        out_of_range: OutOfRange = {}
        num_truncated, progress = 0, Progress("rows scored", lengths_of(inputs))
        with open_output(output, inputs, self.context) as stream:
            stream.write(table_line(names, delimiter=delimiter, sheet_safe=sheet_safe))
            for dataset in self._windows(inputs, roles, tsv_quoting):
                result = self.score(dataset)
                if self.context.is_main:
                    stream.writelines(
                        table_rows(self._columns(dataset, result), delimiter=delimiter, sheet_safe=sheet_safe)
                    )
                unseen = add_by_column(unseen, dataset.unseen())
                out_of_range = add_by_column(out_of_range, dataset.out_of_range())
                num_truncated += dataset.encoded.num_truncated
                progress.advance(len(dataset), *dataset.encoded.last_position())
        self._warn("input", num_truncated, progress.num_done, unseen, out_of_range)
        return progress.num_done

    def _windows(self, inputs: Sequence[str], roles: Roles, tsv_quoting: str) -> Iterator[Dataset]:
        """The rows of files in windows of WINDOW rows; the same on every rank, for the files alone decide where a window ends."""
        loaded, lengths = (
            self.loaded,
            {"max_length": self.loaded.config.max_length, "max_chunks": self.loaded.config.max_chunks},
        )
        chunks = read_chunks(
            inputs,
            roles.inputs(),
            optional=(loaded.config.label_name,),
            max_characters=max_cell_characters(roles, **lengths),
            keep_end=keeps_end(loaded.tokenizer),
            chunk_rows=WINDOW,
            tsv_quoting=tsv_quoting,
        )
        windows = encode_windows(chunks, roles, loaded.tokenizer, window_rows=WINDOW, **lengths)
        while True:
            with self._in_use():  # while texts are tokenised
                encoded = next(windows, None)
            if encoded is None:
                return
            yield dataset_for_prediction(encoded, loaded.tokenizer, loaded.features, loaded.labels)

    def evaluate_file(
        self,
        paths: Sequence[str],
        parent: str | Path,
        *,
        slice_columns: Sequence[str] = (),
        tsv_quoting: str | None = None,
    ) -> tuple[dict[str, Any], Path]:
        """Collective. Score labelled rows into a new folder in `parent`: what the test of a run writes, the report with it.

        Returns the figures of test_metrics.json and the folder. Raises `InputError` for input that cannot be read or has no labels.
        """
        config, inputs = self.loaded.config, expand_paths(paths)
        check_path(parent)
        tsv_quoting = tsv_quoting or config.tsv_quoting
        resolve_columns(
            inputs, [*Roles.from_config(config).inputs(), config.label_name, *slice_columns], tsv_quoting=tsv_quoting
        )
        if not slice_columns:
            slice_columns = resolve_columns(inputs, [], config.slice_columns, tsv_quoting=tsv_quoting)
        made = [path for path in (Path(parent), *Path(parent).parents) if not path.exists()]
        _, folder = hooks.on_test_epoch_start(parent)
        try:
            dataset = self._stored(inputs, folder / CACHE, tsv_quoting)
            unlike = self._unlike_training("input", dataset.unseen(), dataset.out_of_range())
            for line in unlike:
                logger.warning("%s", line)
            result = self.score(dataset)
            figures = distributed.on_main(
                lambda: self._write_evaluation(dataset, result, folder, slice_columns, unlike), long_timeout=True
            )
        finally:
            if self.context.local_rank == 0:
                shutil.rmtree(folder / CACHE, ignore_errors=True)
                with suppress(OSError):  # not empty: what it is for
                    for path in (folder, *made):
                        path.rmdir()
        return figures, folder

    def _stored(self, inputs: Sequence[str], cache: Path, tsv_quoting: str) -> Dataset:
        """Labelled rows as memory-mapped arrays, so that any number of them can be compared with each other."""
        loaded, config = self.loaded, self.loaded.config
        roles = replace(Roles.from_config(config), group=None)
        lengths = {"max_length": config.max_length, "max_chunks": config.max_chunks}
        with self._in_use():
            encoded = open_or_build_cache(
                inputs, roles, loaded.tokenizer, **lengths, cache_path=cache, tsv_quoting=tsv_quoting
            )
        return Dataset(
            encoded,
            None,
            loaded.features,
            loaded.labels,
            pad_token_id=pad_token_id_of(loaded.tokenizer),
            name="test",
            label_column=config.label_name,
        )

    def _write_evaluation(
        self, dataset: Dataset, result: EpochResult, folder: Path, slice_columns: Sequence[str], unlike: Sequence[str]
    ) -> dict[str, Any]:
        """Rank 0 only. `unlike`: the lines about values and numbers that no training row has."""
        loaded = self.loaded
        figures = results.write_results(
            result, dataset, folder, config=loaded.config, class_names=loaded.labels.names, decision=loaded.decision
        )

        def scored() -> EvaluatedRows:
            trained, best = summary_of(self.folder)
            training = (
                Missing("no folder of a run")
                if self.folder is None
                else training_section(self.folder, best.get("step"), best.get("metric"))
            )
            source = str(self.folder or "a model in memory")
            fingerprints = dataset.encoded.fingerprints
            warnings = [*known_files(trained.get("files", {}), fingerprints), *unlike] or Missing(
                "The training rows are not available: only the files were compared."
            )
            data = {
                **trained,
                "files": {**trained.get("files", {}), **fingerprints},
                "test": to_json(rows_section(dataset, loaded.labels.names)),
            }
            return EvaluatedRows(
                loaded,
                self.task,
                dataset,
                result.preds,
                result.ids,
                figures,
                source,
                training,
                from_json(DataSummary, data),
                warnings,
                slice_columns,
            )

        with self._in_use():
            write_report(scored, folder)
        return figures

    def predict(self, rows: Rows) -> Rows:
        """Collective. Rows as a prediction file has them, in their order: a frame for a frame, a list of dicts for a list, a dict for one row.

        Cells may be texts or numbers; id and label may be left out. Probabilities are float32 in a frame.
        Raises `InputError` for a missing column or a cell that cannot be, and for what is none of these.
        """
        if isinstance(rows, Mapping):
            return self.predict([rows])[0]
        if not isinstance(rows, pd.DataFrame) and not (
            isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)
        ):
            raise InputError(f"rows: expected a dict, a list of dicts or a data frame, found {type(rows).__name__}")
        dataset = self._encode(self._chunk_of(rows))
        columns = self._columns(dataset, self.score(dataset))
        self._warn(
            "data in memory", dataset.encoded.num_truncated, len(dataset), dataset.unseen(), dataset.out_of_range()
        )
        if isinstance(rows, pd.DataFrame):
            return pd.DataFrame(columns, index=rows.index)
        values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]

    def explain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row's `prediction`, as `predict` gives it, and its `tokens`: the pieces of the text with a weight of -1 to 1, above 0 for the predicted class.

        The pieces side by side are the text that the model read; a columns-only model has none. Not collective. Raises `InputError` as `predict` does.
        """
        config = self.loaded.config
        prediction = self.predict(row)
        chunk = self._chunk_of([row])
        texts = join_texts(chunk.cells, config.text_name) if config.text_name else [""]
        predicted = [self.loaded.labels.names.index(prediction["pred"])]
        with self._in_use():
            dataset = self._encode(chunk)
            [pieces] = explain_rows(self.loaded, dataset, [0], predicted=predicted, texts=texts, task=self.task)
        return {"prediction": prediction, "tokens": [list(piece) for piece in pieces]}

    def _chunk_of(self, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> Chunk:
        """Rows in memory, where label and id may be left out."""
        roles = Roles.from_config(self.loaded.config)
        features, optional = roles.features(), [name for name in (roles.id, roles.label) if name is not None]
        return (
            frame_to_chunk(rows, features, optional)
            if isinstance(rows, pd.DataFrame)
            else records_to_chunk(rows, features, optional)
        )

    def _encode(self, chunk: Chunk) -> Dataset:
        loaded, config = self.loaded, self.loaded.config
        roles = Roles.from_config(config)
        lengths = {"max_length": config.max_length, "max_chunks": config.max_chunks}
        with self._in_use():
            return encode_for_prediction(chunk, roles, loaded.tokenizer, loaded.features, loaded.labels, **lengths)

    def _warn(self, name: str, num_truncated: int, num_rows: int, unseen: Unseen, out_of_range: OutOfRange) -> None:
        for line in (
            *truncated_texts_warning(
                num_truncated, num_rows, self.loaded.config, keep_end=keeps_end(self.loaded.tokenizer)
            ),
            *self._unlike_training(name, unseen, out_of_range),
        ):
            logger.warning("%s", line)

    def _unlike_training(self, name: str, unseen: Unseen, out_of_range: OutOfRange) -> list[str]:
        """A line for each column with values or numbers that no training row has; `name` says of which rows."""
        features = self.loaded.features
        unseen_values = unseen_lines(name, unseen, features, examples=self.warns_with_examples)
        return [*unseen_values, *out_of_range_lines(name, out_of_range, features)]

    def score(self, dataset: Dataset) -> EpochResult:
        """Collective. Probabilities and ids of all rows in order; whole batches are dealt to the ranks."""
        results = []
        text = self.loaded.model.text_subnetwork
        if text is not None and (num_rows := num_embedding_rows(text.encoder)) is not None:
            dataset.check_token_ids(num_rows)
        # a table that an encoder makes and keeps in inference mode could not be part of an explanation's gradients
        with self._in_use(), torch.inference_mode() if text is None or text.is_packed else torch.no_grad():
            for index, batch in filter(None, scoring.own_batches(dataset, self.context)):
                made = hooks.predict_step(self.loaded.model, batch, index, task=self.task)
                preds = made[0] if isinstance(made, tuple) else made
                results.append(
                    BatchResult(index, batch.row_index.numpy(), preds.numpy(force=True), None, batch.ids, 0.0, 0.0)
                )
        result = scoring.gather_results(results, len(dataset))
        if len(broken := scoring.non_finite_rows(result.preds)):
            raise RunError(
                f"{dataset.row_location(broken[0])}: its probability is no number in {self.task.precision}: choose another precision, or fp32"
            )
        return result

    def _columns(self, dataset: Dataset, result: EpochResult) -> Columns:
        loaded = self.loaded
        return results.columns_of(
            result, dataset, config=loaded.config, class_names=loaded.labels.names, decision=loaded.decision
        )


def load_predictor(folder: str, options: Mapping[str, Any]) -> Predictor:
    """What a pickled Predictor becomes where it is read. Raises `InputError` where the folder is missing."""
    return Predictor.from_folder(folder, **options)


def summary_of(folder: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What summary.json of a model folder says of the run's data, and of its best step; nothing where there is none."""
    try:
        summary = {"data": {}, "best": {}} if folder is None else read_json(folder / SUMMARY, SUMMARY_JSON)
    except (OSError, ValueError):
        return {}, {}
    return summary["data"], summary["best"]


def known_files(trained: Mapping[str, Mapping[str, Any]], evaluated: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines about evaluated files that the model was trained or chosen on: path -> its sha256, of the run and of the rows at hand."""
    by_digest = {value.get("sha256"): path for path, value in trained.items()}
    return [
        f"{path} is a file of the model's own run ({by_digest[value['sha256']]})"
        for path, value in evaluated.items()
        if value["sha256"] in by_digest
    ]


# ---- the output ----
