"""Predictor: a model folder that predicts new rows, in memory or from files, on one process or several.

Threads may share a Predictor: calls wait for each other to use the model and the tokenizer. In a forked process it
computes with one CPU thread.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from mmbert_core import hooks
from mmbert_core.data.class_messages import positive_class_line
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.features import OutOfRange, Unseen, add_by_column, out_of_range_lines, unseen_lines
from mmbert_core.data.prepare import truncated_texts_warning
from mmbert_core.data.tokens import join_texts, keeps_end
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.file_evaluation import (
    CACHE,
    evaluation_folder,
    labelled_dataset,
    resolve_slice_columns,
    write_evaluation,
)
from mmbert_core.inference import scoring
from mmbert_core.inference.attributions import explain_rows
from mmbert_core.inference.model_files import read_summary
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder
from mmbert_core.inference.new_rows import encode_chunk, encode_files, rows_to_chunk
from mmbert_core.inference.output_file import Columns, header, open_output, output_delimiter, table_line, table_rows
from mmbert_core.inference.precision import resolve_precision
from mmbert_core.inference.scoring import BatchResult, EpochResult, Task
from mmbert_core.model.int8 import quantise_linears
from mmbert_core.model.losses import build_loss_op
from mmbert_core.model.probe import num_embedding_rows
from mmbert_core.report.results import columns_of
from mmbert_core.runtime import distributed, forks, ranks
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.runtime.progress import Progress
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.tables.readers import lengths_of
from mmbert_core.tables.table import Chunk, Roles, check_path, expand_paths, resolve_columns

logger = logging.getLogger(__name__)
Rows = TypeVar("Rows", pd.DataFrame, list[Mapping[str, Any]], Mapping[str, Any])


class Predictor:
    """A loaded model folder. Needs neither training data nor labels nor network.

    `Predictor.from_folder("runs/abuse").predict(frame)`
    """

    def __init__(
        self,
        loaded: LoadedModel,
        context: DistContext,
        *,
        precision: str = "auto",
        threshold: float | None = None,
        folder: Path | None = None,
    ) -> None:
        """`context`, `precision`, `threshold`: as for `from_folder`. `folder`: where the model was loaded from."""
        self._options = {"precision": precision, "threshold": threshold}
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold: expected a probability of 0 to 1, found {threshold}")
        if threshold not in (None, loaded.decision.threshold.value):
            given = Threshold(threshold, "given", reason="given when the model was loaded, not chosen on rows")
            loaded = replace(loaded, decision=replace(loaded.decision, threshold=given))
        self.loaded = loaded
        self.folder = folder
        self.context = context
        self.warns_with_examples = True  # warnings quote cells; a server's log must not
        self._process_id = os.getpid()
        self._lock = forks.lock_of(loaded.model)  # threads share the tokenizer's settings and the model's hooks
        config = loaded.config
        if precision == "auto" and context.device.type == "cuda":
            precision = loaded.resolved["precision"]  # as in the test of the run
        if precision == "int8":
            precision = "fp32"  # of everything but the encoder's linear layers
            if context.device.type != "cpu":
                raise InputError(
                    "precision int8: expected to predict on the CPU, found a GPU "
                    "(use bf16, or hide the GPU with CUDA_VISIBLE_DEVICES=)"
                )
            if loaded.model.text_subnetwork is not None:
                quantise_linears(loaded.model.text_subnetwork.encoder)
        precision = resolve_precision(precision, context.device)
        self.task = Task(config.is_binary, build_loss_op(None), precision, context.device)
        loaded.model.to(context.device).eval()  # in place: self.loaded is on the device too

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        context: DistContext | None = None,
        *,
        precision: str = "auto",
        threshold: float | None = None,
    ) -> "Predictor":
        """Load a model folder. Raises `InputError` when it is incomplete or damaged.

        `context`: device and ranks; None: as torchrun set them, else one process on the GPU if there is one.
        `precision`: "auto" (on a GPU that of training, on the CPU fp32), "fp32", "bf16", "fp16" or, on the CPU, "int8".
        `threshold`: the probability above which a row is class 1; None: the one chosen on the validation rows. Has no
        effect with more than two classes.
        """
        return cls(
            load_model_folder(folder),
            context or ranks.read_context(),
            precision=precision,
            threshold=threshold,
            folder=Path(folder),
        )

    # ---- copies, pickling and concurrent use ----

    def __reduce__(self) -> tuple[Callable[..., "Predictor"], tuple[str, dict[str, Any]]]:
        """A pickled Predictor is its folder's path and options: unpickling loads the folder, on the device there."""
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
        """Context in which no other thread uses the model. Raises `RunError` in a forked process that cannot use it."""
        if os.getpid() != self._process_id and (self.context.device.type != "cpu" or self.context.world_size > 1):
            kind = "on a GPU" if self.context.device.type != "cpu" else "of several processes"
            advice = "load it there, or start the process with spawn"
            raise RunError(f"a Predictor {kind} cannot be used in a forked process: {advice}")
        with forks.exclusively(self._lock):
            yield

    # ---- classes ----

    @property
    def positive_label(self) -> str | None:
        """The label of class 1, to which `prob`, F1 and the threshold refer; None for several classes."""
        return self.loaded.labels.names[1] if self.loaded.config.is_binary else None

    @cached_property
    def positive_share(self) -> float | None:
        """Share of the training rows with the positive label, 0..1; None for several classes or if not recorded."""
        try:
            classes = read_summary(self.folder)[0]["train"]["classes"]
            return classes[self.positive_label] / sum(classes.values())
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            return None

    @property
    def positive_class_line(self) -> str | None:
        """A line that says which label is class 1; None for several classes."""
        if not self.loaded.config.is_binary:
            return None
        return positive_class_line(self.loaded.labels.names, self.positive_share)

    # ---- files ----

    def predict_file(
        self, paths: Sequence[str], output: str | Path, *, sheet_safe: bool = False, tsv_quoting: str | None = None
    ) -> int:
        """Collective. Predict every row of the input once, in its order; returns the number of rows.

        The output is CSV where its name ends in .csv, else TSV ("-": standard output), and is written atomically. A
        label column is copied unchanged. `sheet_safe`: a text that a spreadsheet would evaluate as a formula gets a '
        before it. `tsv_quoting`: of .tsv input; None: as for the model's training files. Raises `InputError` for input
        that cannot be read, a missing column, or an output that cannot be written.
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
        windows = encode_files(self.loaded, inputs, tsv_quoting=tsv_quoting, tokenizer_in_use=self._in_use)
        unseen: Unseen = {}
        out_of_range: OutOfRange = {}
        num_truncated = 0
        progress = Progress("rows scored", lengths_of(inputs))
        with open_output(output, inputs, self.context) as stream:
            stream.write(table_line(names, delimiter=delimiter, sheet_safe=sheet_safe))
            for dataset in windows:
                result = self.score(dataset)
                if self.context.is_main:
                    columns = self._columns(dataset, result)
                    stream.writelines(table_rows(columns, delimiter=delimiter, sheet_safe=sheet_safe))
                unseen = add_by_column(unseen, dataset.unseen())
                out_of_range = add_by_column(out_of_range, dataset.out_of_range())
                num_truncated += dataset.encoded.num_truncated
                progress.advance(len(dataset), *dataset.encoded.last_position())
        self._warn("input", num_truncated, progress.num_done, unseen, out_of_range)
        return progress.num_done

    def evaluate_file(
        self,
        paths: Sequence[str],
        parent: str | Path,
        *,
        slice_columns: Sequence[str] = (),
        tsv_quoting: str | None = None,
    ) -> tuple[dict[str, Any], Path]:
        """Collective. Evaluate labelled rows: predictions, metrics and report in a new folder in `parent`.

        `slice_columns`: columns for each of whose values the metrics are also computed; empty: those of the training
        config. Returns the content of test_metrics.json and the folder. Raises `InputError` for input that cannot be
        read or has no labels.
        """
        config, inputs = self.loaded.config, expand_paths(paths)
        check_path(parent)
        tsv_quoting = tsv_quoting or config.tsv_quoting
        slice_columns = resolve_slice_columns(inputs, config, slice_columns, tsv_quoting=tsv_quoting)
        with evaluation_folder(parent, self.context) as folder:
            with self._in_use():
                dataset = labelled_dataset(self.loaded, inputs, folder / CACHE, tsv_quoting=tsv_quoting)
            warnings = self._new_value_lines("input", dataset.unseen(), dataset.out_of_range())
            for line in warnings:
                logger.warning("%s", line)
            result = self.score(dataset)

            def write() -> dict[str, Any]:
                with self._in_use():  # the report computes attributions
                    return write_evaluation(
                        self.loaded,
                        dataset,
                        result,
                        folder,
                        task=self.task,
                        model_folder=self.folder,
                        slice_columns=slice_columns,
                        warnings=warnings,
                    )

            figures = distributed.on_main(write, long_timeout=True)
        return figures, folder

    # ---- rows in memory ----

    def predict(self, rows: Rows) -> Rows:
        """Collective. The predictions of a data frame, a list of dicts or one dict, in the same form and order.

        The columns are those of a prediction file. Cells may be texts or numbers; id and label may be left out.
        Probabilities are float32 in a frame. Raises `InputError` for a missing column, an invalid cell or another type.
        """
        if isinstance(rows, Mapping):
            return self.predict([rows])[0]
        dataset = self._encode(rows_to_chunk(self.loaded, rows))
        columns = self._columns(dataset, self.score(dataset))
        self._warn(
            "data in memory", dataset.encoded.num_truncated, len(dataset), dataset.unseen(), dataset.out_of_range()
        )
        if isinstance(rows, pd.DataFrame):
            return pd.DataFrame(columns, index=rows.index)
        values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]

    def explain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row's `prediction`, as `predict` gives it, and its `tokens`: [span of the text, attribution] pairs.

        Attributions are -1 to 1, above 0 where a span contributed to the predicted class. The spans joined are the text
        that the model read; a columns-only model has none. Not collective. Raises `InputError` as `predict` does.
        """
        config = self.loaded.config
        prediction = self.predict(row)
        chunk = rows_to_chunk(self.loaded, [row])
        texts = join_texts(chunk.cells, config.text_name) if config.text_name else [""]
        predicted = [self.loaded.labels.names.index(prediction["pred"])]
        with self._in_use():
            dataset = self._encode(chunk)
            [attributions] = explain_rows(self.loaded, dataset, [0], predicted=predicted, texts=texts, task=self.task)
        return {"prediction": prediction, "tokens": [list(span) for span in attributions]}

    def _encode(self, chunk: Chunk) -> Dataset:
        with self._in_use():
            return encode_chunk(self.loaded, chunk)

    def _warn(self, name: str, num_truncated: int, num_rows: int, unseen: Unseen, out_of_range: OutOfRange) -> None:
        keep_end = keeps_end(self.loaded.tokenizer)
        truncated = truncated_texts_warning(num_truncated, num_rows, self.loaded.config, keep_end=keep_end)
        for line in (*truncated, *self._new_value_lines(name, unseen, out_of_range)):
            logger.warning("%s", line)

    def _new_value_lines(self, name: str, unseen: Unseen, out_of_range: OutOfRange) -> list[str]:
        """A line for each column with values that the training rows do not have; it begins with `name`."""
        features = self.loaded.features
        unseen_values = unseen_lines(name, unseen, features, examples=self.warns_with_examples)
        return [*unseen_values, *out_of_range_lines(name, out_of_range, features)]

    # ---- encoded rows ----

    def score(self, dataset: Dataset) -> EpochResult:
        """Collective. Probabilities and ids of all rows, in order. Raises `RunError` where one is not finite."""
        outputs = []
        text_encoder = self.loaded.model.text_subnetwork
        if text_encoder is not None and (num_ids := num_embedding_rows(text_encoder.encoder)) is not None:
            dataset.check_token_ids(num_ids)
        # some encoders keep tensors between calls; attributions cannot use tensors that inference mode created
        has_no_state = text_encoder is None or text_encoder.is_packed
        with self._in_use(), torch.inference_mode() if has_no_state else torch.no_grad():
            for index, batch in filter(None, scoring.own_batches(dataset, self.context)):
                output = hooks.predict_step(self.loaded.model, batch, index, task=self.task)
                preds = output[0] if isinstance(output, tuple) else output
                row_index = batch.row_index.numpy()
                outputs.append(BatchResult(index, row_index, preds.numpy(force=True), None, batch.ids, 0.0, 0.0))
        result = scoring.gather_results(outputs, len(dataset))
        if len(rows := scoring.non_finite_rows(result.preds)):
            raise RunError(
                f"{dataset.row_location(rows[0])}: its probability is not finite in {self.task.precision}: "
                "choose another precision, or fp32"
            )
        return result

    def _columns(self, dataset: Dataset, result: EpochResult) -> Columns:
        loaded = self.loaded
        class_names, decision = loaded.labels.names, loaded.decision
        return columns_of(result, dataset, config=loaded.config, class_names=class_names, decision=decision)


def load_predictor(folder: str, options: Mapping[str, Any]) -> Predictor:
    """Unpickle a Predictor. Raises `InputError` where the folder is missing."""
    return Predictor.from_folder(folder, **options)
