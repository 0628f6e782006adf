"""From a config to its datasets: reads and checks files, fits labels and features, splits rows."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from mmbert_core.config import Config
from mmbert_core.data.cache import check_columns, open_or_build_cache, required_columns
from mmbert_core.data.class_messages import few_rows_warning, positive_class_warning
from mmbert_core.data.dataset import Dataset, pad_token_id_of
from mmbert_core.data.encoding import EncodedRows
from mmbert_core.data.features import Features, out_of_range_lines, unseen_lines
from mmbert_core.data.labels import Labels, other_rows, spelling_warnings
from mmbert_core.data.leaks import SPLIT_NAMES, find_leaks, shared_positions
from mmbert_core.data.splits import sample_rows, select_rows, split_rows
from mmbert_core.data.tokens import keeps_end, load_tokenizer, tokenizer_fingerprint
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.runtime.progress import Progress
from mmbert_core.tables.readers import header_of
from mmbert_core.tables.table import (
    Roles,
    expand_paths,
    join_problems,
    missing_in_files,
    read_chunks,
    resolve_columns,
)

logger = logging.getLogger(__name__)

LABEL_CHUNKS = 16  # chunks of training rows whose labels are checked when columns are missing
MANY_CATEGORIES = 10_000  # of one column: more are probably an id or free text


@dataclass
class Data:
    """The prepared data of a run, the same in all of its processes."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    features: Features
    labels: Labels
    tokenizer: PreTrainedTokenizerFast | None  # None: a columns-only model
    fingerprints: dict[str, dict[str, int | str]]  # path of every file read -> bytes, sha256; and the tokenizer's
    warnings: list[str] = field(default_factory=list)  # lines about problems of the data


def prepare(config: Config) -> Data:
    """Read, check and encode all files of a config; fit labels and features on the training rows only.

    Every process calls it; it needs no process group. Raises `InputError`, one line, for a problem with the data.
    """
    roles = Roles.from_config(config)
    train_roles = _with_group(config.train_path, roles, config.tsv_quoting) if config.val_path else roles
    _check_files(config, train_roles)
    tokenizer = load_tokenizer(config.encoder) if roles.text else None
    tables = _encode_tables(config, roles, train_roles, tokenizer)
    train = tables["train"]
    labels = _fit_labels(train, config)
    train_rows, val_rows = choose_rows(train, labels, config)
    features = Features.fit(
        train.numbers,
        train.category_codes,
        train.vocabularies,
        roles,
        rows=train_rows,
        source=train.paths[0],
        with_edges=config.column_encoding == "piecewise_linear" or config.wide_columns or config.blend == "auto",
        min_category_count=config.min_category_count,
    )
    dataset = partial(
        Dataset,
        features=features,
        labels=labels,
        pad_token_id=pad_token_id_of(tokenizer),
        label_column=config.label_name,
    )
    val = dataset(train, val_rows, name="val") if len(val_rows) else None
    if "val" in tables:
        val = dataset(tables["val"], None, name="val")
    fingerprints = {path: value for table in tables.values() for path, value in table.fingerprints.items()}
    if tokenizer is not None:
        fingerprints["the tokenizer"] = {"sha256": tokenizer_fingerprint(tokenizer)}
    data = Data(
        train=dataset(train, train_rows, name="train"),
        val=val,
        test=dataset(tables["test"], None, name="test") if "test" in tables else None,
        features=features,
        labels=labels,
        tokenizer=tokenizer,
        fingerprints=fingerprints,
    )
    data.warnings = _warnings(data, config)
    for line in data.warnings:
        logger.warning("%s", line)
    return data


def _encode_tables(
    config: Config, roles: Roles, train_roles: Roles, tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, EncodedRows]:
    """Split name -> its rows, for the splits that have files. Raises `InputError` for train or val without rows."""

    def encode(paths: Sequence[str], roles: Roles, name: str, *, label_optional: bool = False) -> EncodedRows:
        return open_or_build_cache(
            paths,
            roles,
            tokenizer,
            max_length=config.max_length,
            max_chunks=config.max_chunks,
            cache_path=config.cache_path or Path(config.model_path) / "cache",
            label_optional=label_optional,
            tsv_quoting=config.tsv_quoting,
            progress=Progress(f"{name} rows read and tokenised").advance_to,
        )

    tables = {"train": encode(config.train_path, train_roles, "training")}
    if config.val_path:
        val_roles = _with_group(config.val_path, roles, config.tsv_quoting)
        tables["val"] = encode(config.val_path, val_roles, "validation")
    if config.test_path:
        test_roles = _with_group(config.test_path, roles, config.tsv_quoting)
        tables["test"] = encode(config.test_path, test_roles, "test", label_optional=True)
    for name in ("train", "val"):
        if name in tables and tables[name].num_rows == 0:
            raise InputError(f"{tables[name].paths[0]}: expected rows, found a header only")
    return tables


def _with_group(paths: Sequence[str], roles: Roles, tsv_quoting: str) -> Roles:
    """The roles for files that are not split: the group column is only compared, so that it may be missing."""
    has_groups = roles.group is not None and all(
        roles.group in header_of(path, tsv_quoting) for path in expand_paths(paths)
    )
    return roles if has_groups else replace(roles, group=None)


def _check_files(config: Config, train_roles: Roles) -> None:
    """Checks before the first row is read: the files exist, none is in two splits, all columns exist."""
    if config.val_path and config.group_name:
        reported = "and groups with rows in several splits are only reported"
        use = reported if train_roles.group else "and the training rows have no such column"
        logger.warning("group_name is not used to split rows: val_path has the validation rows, %s", use)
    if not config.train_path:
        raise InputError("train_path: expected at least one file, found none")
    train_files = {os.path.realpath(path) for path in expand_paths(config.train_path)}
    _check_all_columns(config, train_roles)
    check_columns(config.train_path, train_roles, tsv_quoting=config.tsv_quoting)
    for key in ("val_path", "test_path"):
        paths = getattr(config, key)
        for path in expand_paths(paths):
            if os.path.realpath(path) in train_files:
                raise InputError(f"{key}: {path} is in train_path too, expected files that the model is not trained on")
        if paths:
            other_roles, is_test = replace(train_roles, group=None), key == "test_path"
            check_columns(paths, other_roles, label_optional=is_test, tsv_quoting=config.tsv_quoting)
    if config.test_path:
        resolve_columns(config.test_path, config.slice_columns, tsv_quoting=config.tsv_quoting)


def _check_all_columns(config: Config, train_roles: Roles) -> None:
    """Raise one `InputError` with all columns that any file lacks.

    It includes a problem with the training labels, so that one start reports both.
    """
    other_roles, problems = replace(train_roles, group=None), dict[str, list[str]]()
    for paths, roles, label_optional in (
        (config.train_path, train_roles, False),
        (config.val_path, other_roles, False),
        (config.test_path, other_roles, True),
    ):
        columns = required_columns(roles, label_optional=label_optional)
        found = missing_in_files(expand_paths(paths), columns, tsv_quoting=config.tsv_quoting)
        for problem, files in found.items():
            problems.setdefault(problem, []).extend(files)
    if problems:
        labels = _label_problem(config)
        raise InputError(join_problems(problems) + (f"; {labels}" if labels else ""))


def _label_problem(config: Config) -> str | None:
    """The error of `Labels.fit` for the first training rows; None without one or without the label column."""
    first: dict[str, str] = {}  # label text -> its first row
    try:
        chunks = read_chunks(config.train_path, [config.label_name], tsv_quoting=config.tsv_quoting)
        for chunk in islice(chunks, LABEL_CHUNKS):
            for row, value in enumerate(chunk.cells[config.label_name]):
                if value not in first:
                    first[value] = chunk.row_location(row)
        is_prefix = next(chunks, None) is not None
        if is_prefix and len(first) <= config.num_classes:  # later rows may have the missing classes
            return None
        locations = list(first.values())
        Labels.fit(
            list(first),
            num_classes=config.num_classes,
            positive_label=config.positive_label,
            column=config.label_name,
            row_location=locations.__getitem__,
        )
    except InputError as error:
        return None if "not found" in str(error) else str(error)
    return None


def _fit_labels(train: EncodedRows, config: Config) -> Labels:
    """Raises `InputError` as `Labels.fit`, and for names that would be a column of the prediction file twice."""
    codes, first_rows = _first_indices(train.label_codes)
    labels = Labels.fit(
        [train.label_values[code] for code in codes],
        num_classes=config.num_classes,
        positive_label=config.positive_label,
        column=config.label_name,
        row_location=lambda index: train.row_location(int(first_rows[index])),
        others=lambda index: other_rows(np.flatnonzero(train.label_codes == codes[index]), train.row_location),
    )
    if not config.is_binary and "calibrated" in labels.names:
        conflict = "a class 'calibrated' would take the name of the column prob_calibrated in the prediction file"
        raise InputError(f"label_name: {conflict}: rename it in {config.label_name!r}")
    if not config.is_binary and config.id_name in {f"prob_{name}" for name in labels.names}:
        found = f"{config.id_name!r} is a column that the prediction file has already"
        raise InputError(f"id_name: {found}: expected another column")
    return labels


def _first_indices(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique(codes, return_index=True)` for codes [N] >= 0, in linear time: N may be ten million."""
    first = np.full(int(codes.max(initial=-1)) + 1, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of repeated indices numpy keeps the last value written
    present = np.flatnonzero(first >= 0)
    return present, first[present]


def choose_rows(train: EncodedRows, labels: Labels, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (train, val) of the training table, each sorted int64; val is empty with a val_path."""
    rows = sample_rows(train.num_rows, config.max_train_rows, config.seed)
    classes = labels.lookup(train.label_values)[select_rows(train.label_codes, rows)]
    missing = set(np.flatnonzero(np.bincount(classes, minlength=len(labels.names)) == 0).tolist())
    if missing:
        found = f"found none of class {format_for_message(labels.names[min(missing)])}"
        raise InputError(
            f"max_train_rows: expected rows of every class, {found} among {len(rows)} sampled training rows"
        )
    if config.val_path or config.val_fraction == 0:
        return rows, rows[:0]
    groups = None if train.group_codes is None else train.group_codes[rows]
    train_positions, val_positions = split_rows(classes, groups, val_fraction=config.val_fraction, seed=config.seed)
    if len(val_positions) == 0:
        logger.warning(
            "no validation: taking any of %d training rows or groups would leave a class without training rows",
            len(rows),
        )
    return rows[train_positions], rows[val_positions]


def _warnings(data: Data, config: Config) -> list[str]:
    """Lines about class 1, small classes, truncated texts, labels, categories, ids, leaks, unseen and extreme cells."""
    splits = [split for split in (data.train, data.val, data.test) if split is not None]
    tables = list({id(split.encoded): split.encoded for split in splits}.values())  # train and val may share one
    counts = np.bincount(data.train.label_index, minlength=len(data.labels.names)).tolist()
    lines = [
        *positive_class_warning(data.labels.names, counts, config.positive_label),
        *few_rows_warning(data.labels.names, counts),
    ]
    lines += truncated_texts_warning(
        sum(table.num_truncated for table in tables),
        sum(table.num_rows for table in tables),
        config,
        keep_end=keeps_end(data.tokenizer),
    )
    lines += spelling_warnings(data.train.encoded.label_values, config.label_name)
    for column, values in zip(data.features.category_names, data.features.categories, strict=True):
        if len(values) > MANY_CATEGORIES:
            found = f"column {column!r}: {len(values)} categories in {len(data.train)} training rows"
            lines.append(f"{found}, each with weights of its own to learn: is it an id?")
    for table in tables:
        lines += _repeated_ids(table)
    lines += find_leaks(data.train, data.val, data.test, data.labels)
    for index, split in enumerate(splits[1:], start=1):
        lines += unseen_lines(split.name, split.unseen(), data.features)
        lines += out_of_range_lines(split.name, split.out_of_range(), data.features)
        for earlier in splits[:index]:
            lines += _shared_ids(split, earlier)
    return lines


def truncated_texts_warning(num_truncated: int, num_rows: int, config: Config, *, keep_end: bool = False) -> list[str]:
    """A line about texts that were longer than the model's input, if there are any."""
    size = f"{config.max_chunks} x {config.max_length} tokens (max_chunks x max_length)"
    kept = " at the beginning: the end is kept (truncation_side: left of the tokenizer)" if keep_end else ""
    line = f"{num_truncated} of {num_rows} texts are longer than {size} and were truncated{kept}"
    return [line] if num_truncated else []


def _repeated_ids(table: EncodedRows) -> Iterator[str]:
    """A line if rows of one table have the same id."""
    if table.id_codes is None:
        return
    in_order = np.sort(table.id_codes)
    if not (in_order[1:] == in_order[:-1]).any():
        return
    is_first = np.zeros(table.num_rows, dtype=bool)
    is_first[np.unique(table.id_codes, return_index=True)[1]] = True  # an empty id equals no other
    repeats = np.flatnonzero(~is_first)
    repeated = f"{len(repeats)} of {table.num_rows} ids repeat one of an earlier row"
    yield f"{table.paths[0]}: {repeated}, first in {table.row_location(int(repeats[0]))}; all rows are kept"


def _shared_ids(split: Dataset, earlier: Dataset) -> Iterator[str]:
    """A line if rows of an evaluation split were also used to train the model or to choose its best step."""
    if split.encoded.id_codes is None or earlier.encoded.id_codes is None:
        return
    shared = shared_positions(*(select_rows(each.encoded.id_codes, each.rows) for each in (split, earlier)))
    if len(shared):
        rows = f"{len(shared)} rows have an id of a {SPLIT_NAMES[earlier.name]} row"
        yield f"{split.name}: {rows}, first {split.row_location(int(shared[0]))}"
