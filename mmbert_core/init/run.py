"""A first config for a table: the table is read once, and the proposal is written as a file."""

import logging
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from mmbert_core.config import SETTINGS
from mmbert_core.data.column_roles import TEXT, ProposedRoles, propose_roles
from mmbert_core.data.column_statistics import TableStatistics, gather_statistics
from mmbert_core.data.label_column import find_label, task_of
from mmbert_core.data.tokens import join_texts, load_tokenizer
from mmbert_core.init.config_text import ENCODER_NEEDS, FirstConfig, summary_lines
from mmbert_core.init.encoder_lengths import TextLengths, encoder_folders, measure_lengths
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.runtime.progress import Progress, slow_step
from mmbert_core.storage.files import write_text
from mmbert_core.tables.csv_reader import AUTO
from mmbert_core.tables.readers import header_of, lengths_of
from mmbert_core.tables.table import Chunk, check_path, expand_paths, read_chunks, resolve_columns

logger = logging.getLogger(__name__)

RUNS, CACHE = Path("runs"), "cache"


def write_first_config(
    table_path: str,
    output: str,
    *,
    label: str | None = None,
    encoder: str | None = None,
    tsv_quoting: str | None = None,
    overwrite: bool = False,
) -> FirstConfig:
    """Read a table once, propose a config for it and write it to `output`; log what was proposed.

    Raises `InputError` for a table that cannot be read, a label that is not clear or no class, an encoder that cannot
    be loaded, and an `output` that exists (unless `overwrite`) or cannot be written.
    """
    check_output(output, overwrite=overwrite)
    if encoder is not None:
        load_tokenizer(encoder)  # a wrong name is noticed before all rows are read
    if label is not None:  # so is a wrong column
        resolve_columns([table_path], [label], tsv_quoting=tsv_quoting or AUTO)
    table = read_statistics(table_path, tsv_quoting or AUTO)
    label = find_label(table, label, source=table_path)
    task = task_of(table.columns[label], source=table_path)
    roles = propose_roles(table, label)
    config = FirstConfig(
        train_path=table_path,
        num_rows=table.num_rows,
        num_unlabelled=table.columns[label].num_empty,
        label=label,
        task=task,
        roles=roles,
        model_path=str(new_run_folder(label)),
        output=output,
        encoder=encoder,
        encoder_folders=[] if encoder else encoder_folders(table_path),
        lengths=_lengths(table, roles, encoder) if encoder else None,
        tsv_quoting=tsv_quoting,
    )
    for line in summary_lines(config):
        logger.info("%s", line)
    write_text(Path(output), config.to_yaml())
    logger.info("wrote %s, a proposal: read its comments, and change what you know better", output)
    return config


def check_output(output: str, *, overwrite: bool) -> None:
    """Raise `InputError` unless `output` is the name of a YAML file that can be written."""
    check_path(output)
    path = Path(output)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"--output: expected a name that ends in .yaml or .yml, found {format_for_message(output)}")
    if not path.parent.is_dir():
        raise InputError(f"--output: {path.parent}: there is no such folder")
    if path.is_dir():
        raise InputError(f"--output: {output}: expected a file, found a folder")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"--output: {output} exists: give another name, or --force to replace it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--output: {path.parent}: cannot be written to")


def read_statistics(table_path: str, tsv_quoting: str = AUTO) -> TableStatistics:
    """The statistics of the columns of a file, a glob or a folder of Parquet files.

    Raises `InputError` for what cannot be read, and for a table without rows.
    """
    files = expand_paths([table_path])
    names = header_of(files[0], tsv_quoting)

    def chunks() -> Iterator[Chunk]:
        progress = Progress("rows read", lengths_of(files))
        for chunk in read_chunks(files, names, tsv_quoting=tsv_quoting):
            yield chunk
            progress.advance(len(chunk), int(chunk.file_index[-1]), int(chunk.line[-1] or chunk.row[-1]))

    table = gather_statistics(chunks())
    if not table.num_rows:
        raise InputError(f"{table_path}: expected rows, found a header alone")
    return table


def new_run_folder(label: str) -> Path:
    """A folder for the run, named after the label, that holds no run yet."""
    name = re.sub(r"\W+", "_", label).strip("_").lower()[:50] or "run"
    paths = (RUNS / (name if number == 1 else f"{name}_{number}") for number in count(1))
    return next(path for path in paths if _is_unused(path))


def _is_unused(path: Path) -> bool:
    """Whether nothing is there, or only the token cache that a check leaves."""
    if not os.path.lexists(path):
        return True
    return path.is_dir() and all(entry.name == CACHE for entry in path.iterdir())


def _lengths(table: TableStatistics, roles: ProposedRoles, encoder: str) -> TextLengths | None:
    """Token counts of the sample's texts; None without text columns."""
    columns = list(roles.columns(TEXT))
    if not columns:
        return None
    with slow_step("counting tokens"):
        return measure_lengths(encoder, join_texts({name: table.columns[name].sample for name in columns}, columns))


def why_unchecked(config: FirstConfig) -> str | None:
    """Why the written config cannot be checked yet, and what to do; None where it can be.

    Without a named encoder, the default's tokenizer is looked up in the local cache, then on the hub.
    """
    if config.encoder is not None or not config.roles.columns(TEXT):
        return None
    default = SETTINGS["encoder"].default
    try:
        load_tokenizer(default)
    except InputError:
        found = f"; found here: {', '.join(config.encoder_folders)}" if config.encoder_folders else ""
        absent = f"no encoder was named, and the default {default} is neither in the local cache nor can it be fetched"
        return f"{config.output} is not checked: {absent}; set `encoder` to {ENCODER_NEEDS}{found}"
    return None
