"""The roles of a data frame's columns: those that were given, and for all other columns those that `init` proposes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.data.column_roles import (
    CATEGORY,
    DATE,
    GROUP,
    ID,
    LABEL,
    LEFT_OUT,
    NUMBER,
    TEXT,
    ColumnRole,
    ProposedRoles,
    propose_roles,
)
from mmbert_core.data.column_statistics import gather_statistics
from mmbert_core.estimator.parameters import ROLE_KEYS, plain
from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.tables.table import Chunk, frame_to_chunk

logger = logging.getLogger(__name__)

ROLES = {"text": TEXT, "numbers": NUMBER, "categories": CATEGORY, "dates": DATE, "id": ID, "group": GROUP}
ONE_COLUMN = ("id", "group")
GIVEN = "given"  # the reason of a role that was given
MAX_LINES = 40

Given = Mapping[str, Sequence[str] | None]  # argument -> its columns; None: to infer


def given_columns(parameters: Mapping[str, object]) -> dict[str, list[str] | None]:
    """The columns of each argument in ROLE_KEYS; None where they are to be inferred.

    Raises `InputError` for what is no name of a column.
    """
    given: dict[str, list[str] | None] = {}
    for name in ROLE_KEYS:
        value = plain(parameters[name])
        names = [value] if isinstance(value, (str, int)) else value
        is_list = isinstance(names, list) and all(isinstance(column, (str, int)) for column in names)
        if value is not None and not is_list:
            raise InputError(f"{name}: expected names of columns, found {format_for_message(value)}")
        given[name] = None if value is None else [str(column) for column in names]
        if name in ONE_COLUMN and len(given[name] or ()) > 1:
            raise InputError(f"{name}: expected one column, found {len(given[name])}")
    return given


def roles_of(
    frame: pd.DataFrame, label: str, labels: Sequence[str], given: Given, *, date_order: str | None = None
) -> ProposedRoles:
    """The role of each column, with its reason, in the order of the frame; the label last.

    A role that is given has these columns alone: the proposals for it are left out. `labels` [N] are the label's
    cells; `date_order`: None: as the dates show it. Raises `InputError` for a given column that the frame lacks.
    """
    named: dict[str, ColumnRole] = {}
    for argument, columns in given.items():
        for column in columns or ():
            named.setdefault(column, ColumnRole(ROLES[argument], GIVEN))
    frame_to_chunk(frame.iloc[:0], list(named))
    roles: dict[str, ColumnRole] = {}
    cells: dict[str, list[str]] = {}
    for index, name in enumerate(map(str, frame.columns)):
        if name in named and named[name].role != DATE:
            continue
        try:
            cells |= frame_to_chunk(frame.iloc[:, [index]], [name]).cells
        except InputError as error:  # such as lists, which no model can read
            roles[name] = ColumnRole(LEFT_OUT, str(error))
    proposed = propose_roles(gather_statistics([_chunk_of({**cells, label: list(labels)})]), label)
    is_category = {str(name): isinstance(dtype, pd.CategoricalDtype) for name, dtype in frame.dtypes.items()}
    for name, column_role in proposed.roles.items():
        if column_role.role == NUMBER and is_category[name]:
            column_role = ColumnRole(CATEGORY, f"its dtype is category ({column_role.reason})")
        roles.setdefault(name, _unless_given(column_role, given))
    names = [*map(str, frame.columns), label]
    roles = {name: named.get(name) or roles[name] for name in names}
    has_dates = any(column_role.role == DATE for column_role in roles.values())
    return ProposedRoles(roles, date_order or (proposed.date_order if has_dates else "unambiguous"))


def config_columns(roles: ProposedRoles, given: Given) -> dict[str, Any]:
    """The keys of the config that name columns; those that were given keep their order, in which texts are joined."""
    columns = {
        ROLE_KEYS[argument]: list(roles.columns(ROLES[argument]) if names is None else names)
        for argument, names in given.items()
    }
    return columns | {ROLE_KEYS[name]: next(iter(columns[ROLE_KEYS[name]]), None) for name in ONE_COLUMN}


def _unless_given(proposed: ColumnRole, given: Given) -> ColumnRole:
    """The proposed role of a column, or LEFT_OUT where the columns of this role were given."""
    argument = next((name for name, role in ROLES.items() if role == proposed.role), None)
    if argument is None or given[argument] is None:
        return proposed
    return ColumnRole(LEFT_OUT, f"not named in {argument!r} ({proposed.role}: {proposed.reason})")


def _chunk_of(cells: dict[str, list[str]]) -> Chunk:
    num_rows = len(next(iter(cells.values())))
    rows, zeros = np.arange(1, num_rows + 1), np.zeros(num_rows, dtype=np.int64)
    return Chunk(cells, ["data frame"], zeros, rows, zeros)


def log_inferred(roles: ProposedRoles) -> None:
    """A line for each column whose role was not given, and for the order of dates."""
    inferred = {name: found for name, found in roles.roles.items() if found.reason != GIVEN and found.role != LABEL}
    for name, found in list(inferred.items())[:MAX_LINES]:
        logger.info("column %s, %s (inferred): %s", format_for_message(name), found.role, found.reason)
    if len(inferred) > MAX_LINES:
        logger.info("%d more columns: see roles_", len(inferred) - MAX_LINES)
    if roles.date_order != "unambiguous":
        logger.info("dates: %s", roles.date_order.replace("_", " "))
