"""A config as prepared datasets: files read, labels and features fitted, rows split."""

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

LABEL_CHUNKS = 16  # of training rows whose labels are looked at when columns are missing anyway
MANY_CATEGORIES = 10_000  # of one column: more are an id or free text rather than a category


@dataclass
class Data:
    """All that a run knows about its data. Every process of a run holds an equal one."""

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    features: Features
    labels: Labels
    tokenizer: PreTrainedTokenizerFast | None  # None: a columns-only model
    fingerprints: dict[str, dict[str, int | str]]  # path of every file read -> bytes, sha256; and the tokenizer's
    warnings: list[str] = field(default_factory=list)  # what speaks against the figures to come, a line each


def prepare(config: Config) -> Data:
    """Read, check and encode all files of a config; fit labels and features on the training rows alone.

    Every process calls it; it needs no process group. Raises `InputError`, one line, for every mistake in the data.
    """
    roles = Roles.from_config(config)
    train_roles = roles_with_group(config.train_path, roles, config.tsv_quoting) if config.val_path else roles
    _check_files(config, train_roles)
    tokenizer = load_tokenizer(config.encoder) if roles.text else None
    encode = partial(
        open_or_build_cache,
        tokenizer=tokenizer,
        max_length=config.max_length,
        max_chunks=config.max_chunks,
        cache_path=config.cache_path or Path(config.model_path) / "cache",
        tsv_quoting=config.tsv_quoting,
    )
    tables = {
        "train": encode(
            config.train_path, train_roles, progress=Progress("training rows read and tokenised").advance_to
        )
    }
    if config.val_path:
        tables["val"] = encode(
            config.val_path,
            roles_with_group(config.val_path, roles, config.tsv_quoting),
            progress=Progress("validation rows read and tokenised").advance_to,
        )
    if config.test_path:
        test_roles = roles_with_group(config.test_path, roles, config.tsv_quoting)
        tables["test"] = encode(
            config.test_path,
            test_roles,
            label_optional=True,
            progress=Progress("test rows read and tokenised").advance_to,
        )
    for table in (tables["train"], tables.get("val")):
        if table is not None and table.num_rows == 0:
            raise InputError(f"{table.paths[0]}: expected rows, found a header only")
    train = tables["train"]
    labels = _fit_labels(train, config)
    train_rows, val_rows = choose_rows(train, labels, config)
    features = Features.fit(
        train.numbers, train.category_codes, train.vocabularies, roles, rows=train_rows, source=train.paths[0]
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
    data = Data(
        train=dataset(train, train_rows, name="train"),
        val=val,
        test=dataset(tables["test"], None, name="test") if "test" in tables else None,
        features=features,
        labels=labels,
        tokenizer=tokenizer,
        fingerprints={path: value for table in tables.values() for path, value in table.fingerprints.items()}
        | _of_tokenizer(tokenizer),
    )
    data.warnings = _warnings(data, config)
    for line in data.warnings:
        logger.warning("%s", line)
    return data


def roles_with_group(paths: Sequence[str], roles: Roles, tsv_quoting: str) -> Roles:
    """The roles of files that are not split: their groups are compared, where they have the column."""
    has_groups = roles.group is not None and all(
        roles.group in header_of(path, tsv_quoting) for path in expand_paths(paths)
    )
    return roles if has_groups else replace(roles, group=None)


def _of_tokenizer(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, dict[str, int | str]]:
    return {} if tokenizer is None else {"the tokenizer": {"sha256": tokenizer_fingerprint(tokenizer)}}


def _check_files(config: Config, train_roles: Roles) -> None:
    """What can be known before the first row is read: files there, none in two roles, all columns there."""
    if config.val_path and config.group_name:
        seen = (
            "groups are only looked for on both sides"
            if train_roles.group
            else "and the training rows have no such column"
        )
        logger.warning("group_name splits nothing: val_path says which rows validate, %s", seen)
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
            check_columns(
                paths,
                replace(train_roles, group=None),
                label_optional=key == "test_path",
                tsv_quoting=config.tsv_quoting,
            )
    if config.test_path:
        resolve_columns(config.test_path, config.slice_columns, tsv_quoting=config.tsv_quoting)


def _check_all_columns(config: Config, train_roles: Roles) -> None:
    """Raise one `InputError` with all columns that any file lacks and, since it ends the run anyway, what is wrong with the training labels."""
    other_roles, problems = replace(train_roles, group=None), dict[str, list[str]]()
    for paths, roles, label_optional in (
        (config.train_path, train_roles, False),
        (config.val_path, other_roles, False),
        (config.test_path, other_roles, True),
    ):
        found = missing_in_files(
            expand_paths(paths), required_columns(roles, label_optional=label_optional), tsv_quoting=config.tsv_quoting
        )
        for problem, files in found.items():
            problems.setdefault(problem, []).extend(files)
    if problems:
        labels = _label_problem(config)
        raise InputError(join_problems(problems) + (f"; {labels}" if labels else ""))


def _label_problem(config: Config) -> str | None:
    """What `Labels.fit` says of the first training rows; None where nothing is wrong or the label column is missing."""
    first: dict[str, str] = {}
    try:
        chunks = read_chunks(config.train_path, [config.label_name], tsv_quoting=config.tsv_quoting)
        for chunk in islice(chunks, LABEL_CHUNKS):
            for row, value in enumerate(chunk.cells[config.label_name]):
                if value not in first:
                    first[value] = chunk.row_location(row)
        if (
            next(chunks, None) is not None and len(first) <= config.num_classes
        ):  # a later row may have the missing class
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
    codes, first_rows = _first_places(train.label_codes)
    labels = Labels.fit(
        [train.label_values[code] for code in codes],
        num_classes=config.num_classes,
        positive_label=config.positive_label,
        column=config.label_name,
        row_location=lambda index: train.row_location(int(first_rows[index])),
        others=lambda index: other_rows(np.flatnonzero(train.label_codes == codes[index]), train.row_location),
    )
    if not config.is_binary and "calibrated" in labels.names:
        raise InputError(
            f"label_name: a class 'calibrated' would take the name of the column prob_calibrated in the prediction file: rename it in {config.label_name!r}"
        )
    if not config.is_binary and config.id_name in {f"prob_{name}" for name in labels.names}:
        raise InputError(
            f"id_name: {config.id_name!r} is a column that the prediction file has already: expected another column"
        )
    return labels


def _first_places(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique(codes, return_index=True) of codes [N] from 0 on, without sorting ten million of them."""
    first = np.full(int(codes.max(initial=-1)) + 1, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last one written stays
    present = np.flatnonzero(first >= 0)
    return present, first[present]


def choose_rows(train: EncodedRows, labels: Labels, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training table for training and for validation (none where val_path has them)."""
    rows = sample_rows(train.num_rows, config.max_train_rows, config.seed)
    classes = labels.lookup(train.label_values)[select_rows(train.label_codes, rows)]
    missing = set(np.flatnonzero(np.bincount(classes, minlength=len(labels.names)) == 0).tolist())
    if missing:
        name = format_for_message(labels.names[min(missing)])
        raise InputError(
            f"max_train_rows: expected rows of every class, found none of class {name} among {len(rows)} sampled training rows"
        )
    if config.val_path or config.val_fraction == 0:
        return rows, rows[:0]
    groups = None if train.group_codes is None else train.group_codes[rows]
    train_places, val_places = split_rows(classes, groups, val_fraction=config.val_fraction, seed=config.seed)
    if len(val_places) == 0:
        logger.warning(
            "no validation: taking any of %d training rows or groups would leave a class without training rows",
            len(rows),
        )
    return rows[train_places], rows[val_places]


def _warnings(data: Data, config: Config) -> list[str]:
    """What a user would want to know: class 1, small classes, texts cut, ids repeated, rows on both sides, columns that leak the label, values unseen, numbers outside."""
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    tables = list({id(part.encoded): part.encoded for part in parts}.values())
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
            lines.append(
                f"column {column!r}: {len(values)} categories in {len(data.train)} training rows, each with weights of its own to learn: is it an id?"
            )
    for table in tables:
        lines += _repeated_ids(table)
    lines += find_leaks(data.train, data.val, data.test, data.labels)
    for place, part in enumerate(parts[1:], start=1):
        lines += unseen_lines(part.name, part.unseen(), data.features)
        lines += out_of_range_lines(part.name, part.out_of_range(), data.features)
        for earlier in parts[:place]:
            lines += _shared_ids(part, earlier)
    return lines


def truncated_texts_warning(num_truncated: int, num_rows: int, config: Config, *, keep_end: bool = False) -> list[str]:
    """The line about texts that did not fit, if any."""
    size = f"{config.max_chunks} x {config.max_length} tokens (max_chunks x max_length)"
    kept = " at the beginning: the end is kept (truncation_side: left of the tokenizer)" if keep_end else ""
    return [f"{num_truncated} of {num_rows} texts are longer than {size} and were cut{kept}"] if num_truncated else []


def _repeated_ids(table: EncodedRows) -> Iterator[str]:
    if table.id_codes is None:
        return
    in_order = np.sort(table.id_codes)
    if not (in_order[1:] == in_order[:-1]).any():
        return
    is_first = np.zeros(table.num_rows, dtype=bool)
    is_first[np.unique(table.id_codes, return_index=True)[1]] = True  # an empty id equals no other
    repeats = np.flatnonzero(~is_first)
    yield f"{table.paths[0]}: {len(repeats)} of {table.num_rows} ids repeat one of an earlier row, first in {table.row_location(int(repeats[0]))}; all rows are kept"


def _shared_ids(part: Dataset, earlier: Dataset) -> Iterator[str]:
    """Rows that are scored by a model that learned from them, or was chosen by them."""
    if part.encoded.id_codes is None or earlier.encoded.id_codes is None:
        return
    shared = shared_positions(*(select_rows(each.encoded.id_codes, each.rows) for each in (part, earlier)))
    if len(shared):
        yield f"{part.name}: {len(shared)} rows have an id of a {SPLIT_NAMES[earlier.name]} row, first {part.row_location(int(shared[0]))}"
