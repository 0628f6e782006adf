"""A loaded model scores new rows: a file, in windows of constant memory, on one process or several. Floor 3.

Imports distributed, data, evaluation, model, model_folder, training.hooks.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from mmbert_core import distributed
from mmbert_core.data.batches import WINDOW
from mmbert_core.data.dataset import Dataset, encode_for_prediction
from mmbert_core.data.encoding import longest_texts
from mmbert_core.data.prepare import warn_of_cut_texts, warn_of_unseen
from mmbert_core.data.table import Chunk, Roles, columns_kept, expand_paths, frame_to_chunk, read_chunks, records_to_chunk
from mmbert_core.distributed import DistContext
from mmbert_core.errors import InputError, RunError
from mmbert_core.evaluation.predictions import Columns, header, prediction_columns, tsv_line, tsv_rows
from mmbert_core.files import TEMPORARY_PREFIX, naming, sync_path
from mmbert_core.model.int8 import quantise_linears
from mmbert_core.model.losses import build_loss_op
from mmbert_core.model_folder import LoadedModel, load_model_folder
from mmbert_core.training import hooks
from mmbert_core.training.hooks import BatchResult, EpochResult, Task
from mmbert_core.training.optim import resolve_precision

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
Rows = TypeVar("Rows", pd.DataFrame, list[Mapping[str, Any]], Mapping[str, Any])


class Predictor:
    """A model folder ready to score rows. Needs neither training data nor labels nor network."""

    def __init__(self, loaded: LoadedModel, context: DistContext, *, precision: str = "auto") -> None:
        self.loaded = loaded
        self.context = context
        config = loaded.config
        if precision == "auto" and context.device.type == "cuda":
            precision = loaded.resolved["precision"]  # as the run's own test stage did
        if precision == "int8":
            precision = "fp32"  # of all but the encoder's linear layers
            if context.device.type != "cpu":
                raise InputError("precision int8: expected to predict on the CPU, found a GPU (use bf16, or hide the GPU with CUDA_VISIBLE_DEVICES=)")
            if loaded.model.text_subnetwork is not None:
                quantise_linears(loaded.model.text_subnetwork.encoder)
        self.task = Task(config.is_binary, build_loss_op(None), resolve_precision(precision, context.device), context.device)
        loaded.model.to(context.device).eval()

    @classmethod
    def from_folder(cls, folder: str | Path, context: DistContext | None = None, *, precision: str = "auto") -> "Predictor":
        """Load a model folder. Raises `InputError` when it is not a whole one.

        `precision`: "auto" (on a GPU as the model was trained, on the CPU fp32), "fp32", "bf16", "fp16" or, on the CPU, "int8".
        """
        return cls(load_model_folder(folder), context or distributed.read_context(), precision=precision)

    def predict_file(self, paths: Sequence[str], output: str | Path, *, sheet_safe: bool = False) -> int:
        """Collective. Score every row of the input once, in its order, into a TSV file; returns the number of rows.

        The file appears whole or not at all. Labels, when the input has the label column, are copied as they are; with
        `sheet_safe` a text that a spreadsheet would take for a formula gets a ' before it.
        Raises `InputError` for input that cannot be read, a missing column, or an output that cannot be written.
        """
        inputs, output = expand_paths(paths), Path(output)
        check_output(inputs, output)
        temporary = output.with_name(f"{TEMPORARY_PREFIX}{output.name}-{os.getpid()}")
        config = self.loaded.config
        roles = Roles.from_config(config)
        kept = columns_kept(inputs, roles.inputs(), (config.label_name,))
        longest = longest_texts(roles, max_length=config.max_length, max_chunks=config.max_chunks)
        windows = read_chunks(inputs, roles.inputs(), optional=(config.label_name,), longest=longest, chunk_rows=WINDOW)
        names = header(self.loaded.labels.names, is_binary=config.is_binary, id_name=config.id_name, has_labels=config.label_name in kept)
        unseen: Counter[str] = Counter()
        num_rows, num_cut, started, last_line = 0, 0, time.monotonic(), time.monotonic()
        try:
            distributed.on_main(lambda: create(temporary, output))
            with naming(output), open(temporary if self.context.is_main else os.devnull, "w", encoding="utf-8", newline="") as stream:
                stream.write(tsv_line(names, sheet_safe=sheet_safe))
                for window in windows:
                    dataset = self._encode(window)
                    result = self.score(dataset)
                    if self.context.is_main:
                        stream.writelines(tsv_rows(self._columns(dataset, result), sheet_safe=sheet_safe))
                    unseen.update(dataset.unseen())
                    num_rows, num_cut = num_rows + len(dataset), num_cut + dataset.encoded.num_cut
                    if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                        last_line = time.monotonic()
                        logger.info("%d rows scored, %.0f rows/s", num_rows, num_rows / (last_line - started))
                stream.flush()
                os.fsync(stream.fileno()) if self.context.is_main else None
            distributed.on_main(lambda: publish(temporary, output))
        finally:
            if self.context.is_main:
                temporary.unlink(missing_ok=True)
        warn_of_cut_texts(num_cut, num_rows, config)
        warn_of_unseen("input", unseen)
        return num_rows

    def predict(self, rows: Rows) -> Rows:
        """Collective. Rows as a prediction file has them, in their order: a frame for a frame, a list of dicts for a list, a dict for one row.

        Cells may be texts or numbers. Probabilities are float32 in a frame. Raises `InputError` for a missing column or a cell that cannot be.
        """
        if isinstance(rows, Mapping):
            return self.predict([rows])[0]
        inputs, optional = Roles.from_config(self.loaded.config).inputs(), (self.loaded.config.label_name,)
        chunk = frame_to_chunk(rows, inputs, optional) if isinstance(rows, pd.DataFrame) else records_to_chunk(rows, inputs, optional)
        dataset = self._encode(chunk)
        columns = self._columns(dataset, self.score(dataset))
        warn_of_cut_texts(dataset.encoded.num_cut, len(dataset), self.loaded.config)
        warn_of_unseen("data in memory", dataset.unseen())
        if isinstance(rows, pd.DataFrame):
            return pd.DataFrame(columns, index=rows.index)
        values = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*values, strict=True)]

    def _encode(self, chunk: Chunk) -> Dataset:
        loaded, config = self.loaded, self.loaded.config
        return encode_for_prediction(
            chunk, Roles.from_config(config), loaded.tokenizer, loaded.features, loaded.labels, max_length=config.max_length, max_chunks=config.max_chunks
        )

    def score(self, dataset: Dataset) -> EpochResult:
        """Collective. Probabilities and ids of all rows in order; whole batches are dealt to the ranks."""
        results = []
        with torch.inference_mode():
            for index, batch in filter(None, hooks.own_batches(dataset, self.context)):
                made = hooks.predict_step(self.loaded.model, batch, index, task=self.task)
                preds = made[0] if isinstance(made, tuple) else made
                results.append(BatchResult(index, batch.row_index.numpy(), preds.numpy(force=True), None, batch.ids, 0.0, 0.0))
        result = hooks.gather_results(results, len(dataset))
        if not np.isfinite(result.preds).all():
            row = int(np.argwhere(~np.isfinite(result.preds))[0, 0])
            raise RunError(f"{dataset.where(row)}: its probability is no number in {self.task.precision}: choose another precision, or fp32")
        return result

    def _columns(self, dataset: Dataset, result: EpochResult) -> Columns:
        config = self.loaded.config
        labels = dataset.label_strings(range(len(dataset))) if dataset.has_labels else None
        return prediction_columns(
            result.preds, self.loaded.labels.names, is_binary=config.is_binary, id_name=config.id_name, ids=result.ids, labels=labels
        )


def check_output(inputs: Sequence[str], output: Path) -> None:
    """Refuse an output that is an input, no file (a folder, a device), or in a folder that is not there."""
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist")
    if output.exists() and not output.is_file():
        raise InputError(f"{output}: expected a file to write, found a {'folder' if output.is_dir() else 'device'}")
    if output.exists() and any(os.path.samefile(path, output) for path in inputs):
        raise InputError(f"{output}: is the input file; choose another output")


def create(temporary: Path, output: Path) -> None:
    """Rank 0 only. The empty file that will become `output`, so that no row is scored in vain."""
    try:
        temporary.touch()
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from None


def publish(temporary: Path, output: Path) -> None:
    """Rank 0 only. The finished file takes its name."""
    os.replace(temporary, output)
    sync_path(output.parent)
