"""A role for each column of a table, with the reason in words: a proposal, from statistics and the column's name.

The rules look at, in this order: what holds nothing or is known after the label; what the cells are (dates, numbers,
texts, identifiers, categories); how well an input alone predicts the label.
"""

import re
from dataclasses import dataclass
from datetime import timedelta

from mmbert_core.config_checks import PREDICTION_COLUMNS
from mmbert_core.data.class_messages import format_share
from mmbert_core.data.column_leaks import (
    SampledLabel,
    categories_of,
    dates_of,
    emptiness_of,
    leak_of,
    numbers_of,
    sampled_label,
)
from mmbert_core.data.column_names import (
    follows_label_by_name,
    is_about_label,
    is_code,
    is_identifier,
    is_personal,
    is_time,
)
from mmbert_core.data.column_statistics import ColumnStatistics, TableStatistics
from mmbert_core.data.dates import EPOCH
from mmbert_core.runtime.errors import format_for_message

TEXT, NUMBER, CATEGORY, DATE = INPUTS = ("text", "number", "category", "date")
ID, GROUP, LABEL, LEFT_OUT = "id", "group", "label", "left out"
CONFIG_KEYS = {
    TEXT: "text_name",
    NUMBER: "tab_field_list",
    CATEGORY: "cat_field_list",
    DATE: "date_field_list",
    ID: "id_name",
    GROUP: "group_name",
    LABEL: "label_name",
}

MIN_WORD_SHARE = 0.01  # of the cells of a column of codes that are words; fewer are mistakes in a column of numbers
MIN_VARYING_ROWS = 10  # rows that differ from a column's most frequent cell
MIN_ROWS_UNIQUE = 50  # rows; in fewer, all values of a column may differ by chance
UNIQUE_SHARE = 0.95  # distinct values per cell, from which values hardly repeat
FREE_SHARE = 0.5  # distinct values per cell, from which they are no categories
# Of a group without a name that says so: rows with a value, and values of several rows.
MIN_GROUPED_SHARE, MIN_REPEATED_SHARE = 0.9, 0.5
MAX_CODES = 50  # distinct values of an identifier that may be categories, such as the ids of ten shops
MIN_TEXT_WORDS, LONG_TEXT_WORDS, LONG_TEXT_CHARACTERS = 1.8, 12, 80
MAX_WORD_CHARACTERS = 64  # of cells of one word; longer ones are encoded data
MANY_TEXTS, FEW_TEMPLATES = 5_000, 100  # distinct values of several words: texts, even if many repeat; categories
MATCHING_SHARE = 0.9  # of a column's cells that have a pattern
PATTERNS = {
    "UUIDs": re.compile(r"\{?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\}?"),
    "hashes": re.compile(r"(?=.*[0-9])(?=.*[a-fA-F])(0x)?[0-9a-fA-F]{16,128}"),
    "e-mail addresses": re.compile(r"[^@\s]+@[^@\s]+\.[A-Za-z]{2,}"),
    "web addresses": re.compile(r"(https?://|www\.)\S+"),
    "IP addresses": re.compile(r"([0-9]{1,3}\.){3}[0-9]{1,3}"),
}
PERSONAL_PATTERNS = ("e-mail addresses", "web addresses", "IP addresses")  # never the id, which predictions hold
AMOUNT = re.compile(r"[-+]?[^\w\s]?\s?[-+]?[0-9][0-9.,' ]*\s?([%€$£¥]|[A-Za-z]{1,3})?")  # such as $1,234.50 and 12 kg
UNIX_TIMES = (3e8, 2.2e9)  # seconds: years 1979 to 2039
LEADING_ZERO = re.compile(r"0[0-9]+")


@dataclass(frozen=True)
class ColumnRole:
    """The proposed role of a column (one of INPUTS, ID, GROUP, LABEL, LEFT_OUT), and why, as a phrase."""

    role: str
    reason: str


@dataclass(frozen=True)
class ProposedRoles:
    """The roles of all columns, in the order of the table."""

    roles: dict[str, ColumnRole]
    date_order: str = "unambiguous"  # see `dates.seconds_of`

    def columns(self, role: str) -> dict[str, str]:
        """Column -> reason, of those with this role."""
        return {name: proposed.reason for name, proposed in self.roles.items() if proposed.role == role}


def propose_roles(table: TableStatistics, label: str | None) -> ProposedRoles:
    """The role of each column. `label`: the label column; None: none of the columns is one.

    At most one column is the id and at most one the group. A column with several possible roles has the one that its
    reason names, and nothing about the table is changed.
    """
    date_order, date_evidence = _date_order(table)
    roles: dict[str, ColumnRole] = {}
    fingerprints: dict[int, str] = {}  # of the columns so far
    sampled = None if label is None else sampled_label(table.columns[label])
    for name, column in table.columns.items():
        twin = fingerprints.setdefault(column.fingerprint, name)
        if name == label:
            roles[name] = ColumnRole(LABEL, "the label")
        elif twin != name and column.num_present and twin != label:
            roles[name] = ColumnRole(LEFT_OUT, f"the same cells as column {format_for_message(twin)}")
        else:
            proposed = _left_out_at_first(column, label) or _role_of_cells(column, date_order, date_evidence)
            if sampled is not None and proposed.role in INPUTS:
                proposed = _without_leak(column, proposed, sampled, date_order)
            roles[name] = proposed
    _keep_one_id(roles)
    _keep_one_group(roles, table)
    has_dates = any(proposed.role == DATE for proposed in roles.values())
    return ProposedRoles(roles, date_order if has_dates else "unambiguous")


# ---- what no model should read ----


def _left_out_at_first(column: ColumnStatistics, label: str | None) -> ColumnRole | None:
    """For a column that is left out for any cells: it hardly varies, or its name says that it is known late."""
    if not column.num_present:
        return ColumnRole(LEFT_OUT, "every cell is empty")
    counts = column.values.counts_by_text()
    if counts is not None:
        value, count = next(iter(counts.items()))
        rest = column.num_rows - max(count, column.num_empty)
        if rest == 0:
            return ColumnRole(LEFT_OUT, f"constant: {format_for_message(value)} in every row")
        if rest < MIN_VARYING_ROWS <= column.num_rows / 10:
            return ColumnRole(LEFT_OUT, f"nearly constant: only {rest} of {column.num_rows:,} rows differ")
    if label is not None and is_about_label(column.name, label):
        return ColumnRole(LEFT_OUT, "by its name it is about the label, so it is known only with it")
    if follows_label_by_name(column.name) and not _is_long_text(column):
        return ColumnRole(LEFT_OUT, "by its name it may be known only after the label is")
    return None


# ---- what the cells are ----


def _role_of_cells(column: ColumnStatistics, date_order: str, date_evidence: str) -> ColumnRole:
    if date := _as_date(column, date_order, date_evidence):
        return date
    numbers = column.numbers
    if not numbers.is_refuted and numbers.num_numbers:
        if numbers.bad.count == 0:
            return _role_of_numbers(column)
        are_words = numbers.bad.count >= MIN_WORD_SHARE * column.num_present
        if are_words and numbers.are_whole and column.num_distinct <= min(MAX_CODES, column.num_present / 2):
            return ColumnRole(CATEGORY, f"numbers and words: {_category_words(column)}")
        found = f"{format_for_message(numbers.bad.first)} in {numbers.bad.first_row}"
        count = f"{numbers.bad.count:,} cells are none, first {found}"
        return ColumnRole(LEFT_OUT, f"numbers, but {count}: empty or correct them, then add it to tab_field_list")
    return _role_of_strings(column)


def _as_date(column: ColumnStatistics, order: str, evidence: str) -> ColumnRole | None:
    """A date column, or one whose dates cannot all be read; None for other cells."""
    dates = column.dates
    if dates.is_refuted or not dates.num_dates:
        return None
    if column.numbers.num_numbers and not (_is_date_number(column.numbers.minimum)):
        return None
    if dates.bad.count:
        found = f"{format_for_message(dates.bad.first)} in {dates.bad.first_row}"
        count = f"{dates.bad.count:,} cells are none, first {found}"
        return ColumnRole(LEFT_OUT, f"dates, but {count}: empty or correct them, then add it to date_field_list")
    if dates.ambiguous.count and order == "unambiguous":
        found = f"{format_for_message(dates.ambiguous.first)} in {dates.ambiguous.first_row}"
        problem = f"dates, but day or month may be first, as in {found}"
        return ColumnRole(LEFT_OUT, f"{problem}: set date_order, then add it to date_field_list")
    if (order == "day_first" and dates.num_month_first) or (order == "month_first" and dates.num_day_first):
        return ColumnRole(LEFT_OUT, f"dates in another order than {order.replace('_', ' ')} ({evidence})")
    if dates.earliest > dates.latest:  # ambiguous ones alone
        return ColumnRole(DATE, f"dates, {order.replace('_', ' ')}{_empty_share(column)}")
    first, last = ((EPOCH + timedelta(seconds=seconds)).date() for seconds in (dates.earliest, dates.latest))
    return ColumnRole(DATE, f"dates from {first} to {last}{_empty_share(column)}")


def _is_date_number(number: float) -> bool:
    """Whether a number may be a date such as 20190924."""
    return 19000101 <= number <= 21001231


def _date_order(table: TableStatistics) -> tuple[str, str]:
    """The order of day and month, one for all columns, and the column that shows it."""
    votes = {"day_first": 0, "month_first": 0}
    seen_in = {}
    for column in table.columns.values():
        dates = column.dates
        if dates.is_refuted or not dates.ambiguous.count:
            continue
        for order, count, other in (
            ("day_first", dates.num_day_first, dates.num_month_first),
            ("month_first", dates.num_month_first, dates.num_day_first),
        ):
            if count and not other:
                votes[order] += count
                seen_in.setdefault(order, f"as column {format_for_message(column.name)} has it")
    order = max(votes, key=lambda name: votes[name])
    return (order, seen_in[order]) if votes[order] else ("unambiguous", "")


def _role_of_numbers(column: ColumnStatistics) -> ColumnRole:
    numbers = column.numbers
    low, high = _in_words(numbers.minimum), _in_words(numbers.maximum)
    if numbers.are_whole:
        if has_leading_zeros(column):
            return _codes(column, "digits with leading zeros: codes, no amounts")
        if is_time(column.name) and UNIX_TIMES[0] <= numbers.minimum and numbers.maximum <= UNIX_TIMES[1]:
            times = f"seconds since 1970, by name and range ({low} to {high})"
            return ColumnRole(LEFT_OUT, f"{times}: write dates such as 2024-09-24, then add it to date_field_list")
        is_dense = numbers.maximum - numbers.minimum < 1.5 * column.num_present
        if (
            _is_unique(column)
            and column.num_empty == 0
            and (is_identifier(column.name) or numbers.are_increasing or is_dense)
        ):
            return ColumnRole(ID, f"a different whole number in every row, {low} to {high}")
        if is_identifier(column.name):
            return _role_of_identifier(column)
        if is_code(column.name):
            return _codes(column, f"by its name a code, {low} to {high}")
    kind = "whole numbers" if numbers.are_whole else "numbers"
    few = f", {column.num_distinct} different ones" if column.num_distinct <= 20 else ""
    found = "0 and 1 (true and false)" if (low, high, numbers.are_whole) == ("0", "1", True) else ""
    return ColumnRole(NUMBER, f"{found or f'{kind} from {low} to {high}{few}'}{_empty_share(column)}")


def _role_of_strings(column: ColumnStatistics) -> ColumnRole:
    if _is_long_text(column):
        late = "; by its name it may be known only after the label is: is it?" * follows_label_by_name(column.name)
        return ColumnRole(TEXT, f"{_text_words(column)}{late}")
    if pattern := _pattern(column):
        return _role_of_identifier(column, pattern)
    if is_identifier(column.name):
        return _role_of_identifier(column)
    share = column.distinct_share
    if is_personal(column.name) and share >= FREE_SHARE:
        return ColumnRole(LEFT_OUT, f"by its name it identifies somebody or something: {_values_words(column)}")
    if not is_code(column.name) and _matches(column, AMOUNT):
        amount = f"numbers with signs, units or separators, such as {format_for_message(column.present_sample[0])}"
        return ColumnRole(LEFT_OUT, f"{amount}: write plain numbers such as 1234.5, then add it to tab_field_list")
    if column.mean_words >= MIN_TEXT_WORDS:
        if share >= FREE_SHARE or column.num_distinct > MANY_TEXTS:
            return ColumnRole(TEXT, _text_words(column))
    elif column.mean_characters > MAX_WORD_CHARACTERS:
        words = f"long cells without spaces, {column.mean_characters:.0f} characters on average"
        return ColumnRole(LEFT_OUT, f"{words}: {_values_words(column)}")
    elif _is_unique(column) and column.num_empty == 0:
        return ColumnRole(ID, "a different value of one word in every row")
    elif share >= FREE_SHARE and column.num_present >= MIN_ROWS_UNIQUE:
        is_known = column.num_present >= MIN_GROUPED_SHARE * column.num_rows
        if is_known and column.values.num_repeated >= MIN_REPEATED_SHARE * len(column.values.counts):
            return ColumnRole(GROUP, f"free identifiers, most of which repeat: {_values_words(column)}")
        return ColumnRole(LEFT_OUT, f"a free identifier, too rare to learn from: {_values_words(column)}")
    return ColumnRole(CATEGORY, _category_words(column))


def _role_of_identifier(column: ColumnStatistics, pattern: str | None = None) -> ColumnRole:
    """The id, the group or the category of a column that identifies something, by its name or its cells."""
    kind = pattern or "identifiers (by the column's name)"
    if column.values.num_repeated == 0 and column.num_empty == 0 and pattern not in PERSONAL_PATTERNS:
        return ColumnRole(ID, f"{kind}: a different one in every row")
    if column.distinct_share >= UNIQUE_SHARE:
        return ColumnRole(LEFT_OUT, f"{kind}: {_values_words(column)}")
    if column.num_distinct <= MAX_CODES and column.distinct_share < 0.1 and pattern is None:
        return ColumnRole(CATEGORY, f"{kind}, but so few that they are categories: {_category_words(column)}")
    return ColumnRole(GROUP, f"{kind} that repeat: {_values_words(column)}")


def _codes(column: ColumnStatistics, why: str) -> ColumnRole:
    """Whole numbers that are names: categories, unless they hardly repeat."""
    if _is_unique(column) or column.distinct_share >= FREE_SHARE:
        return ColumnRole(ID if _is_unique(column) else LEFT_OUT, f"{why}: {_values_words(column)}")
    return ColumnRole(CATEGORY, f"{why}: {_category_words(column)}")


def has_leading_zeros(column: ColumnStatistics) -> bool:
    """Whether some cells are digits that begin with a zero, such as 02134."""
    found = sum(LEADING_ZERO.fullmatch(cell) is not None for cell in column.present_sample)
    return found > 0.01 * len(column.present_sample)


def _is_unique(column: ColumnStatistics) -> bool:
    """Whether no value repeats. Of more values than are kept, none of the sampled ones does."""
    return column.num_present >= MIN_ROWS_UNIQUE and column.values.num_repeated == 0


def _is_long_text(column: ColumnStatistics) -> bool:
    if column.mean_words < LONG_TEXT_WORDS and not (column.mean_characters >= LONG_TEXT_CHARACTERS):
        return False
    has_words = column.mean_words >= MIN_TEXT_WORDS
    return has_words and (column.num_distinct > FEW_TEMPLATES or column.distinct_share >= FREE_SHARE)


def _pattern(column: ColumnStatistics) -> str | None:
    """The kind of identifiers that nearly all cells are, by their form."""
    return next((name for name, pattern in PATTERNS.items() if _matches(column, pattern)), None)


def _matches(column: ColumnStatistics, pattern: re.Pattern[str]) -> bool:
    cells = column.present_sample
    return sum(pattern.fullmatch(cell.strip()) is not None for cell in cells) >= MATCHING_SHARE * len(cells)


def _without_leak(column: ColumnStatistics, proposed: ColumnRole, label: SampledLabel, date_order: str) -> ColumnRole:
    """The proposed role, or LEFT_OUT for an input that predicts the label almost alone or is computed from it."""
    if proposed.role == TEXT:
        found = leak_of(emptiness_of(column), label)
    elif proposed.role == DATE:
        found = leak_of(dates_of(column, date_order), label)
    else:
        found = leak_of(numbers_of(column) if proposed.role == NUMBER else categories_of(column), label)
    if found is None:
        return proposed
    found = f"whether it is empty {found}" if proposed.role == TEXT else found
    advice = f"if it is known before the label is, add it to {CONFIG_KEYS[proposed.role]}"
    return ColumnRole(LEFT_OUT, f"{found}; {advice} ({proposed.reason})")


# ---- one id, one group ----


def _keep_one_id(roles: dict[str, ColumnRole]) -> None:
    """Keep the first id, or the first that is called so; leave out the others."""
    names = [name for name, proposed in roles.items() if proposed.role == ID]
    for name in set(names).intersection(PREDICTION_COLUMNS):
        names.remove(name)
        roles[name] = ColumnRole(
            LEFT_OUT, f"an id, but the prediction file has a column of this name: {roles[name].reason}"
        )
    kept = next((name for name in names if is_identifier(name)), names[0] if names else None)
    for name in names:
        if name != kept:
            other = f"another id than {format_for_message(kept)}: {roles[name].reason}"
            roles[name] = ColumnRole(LEFT_OUT, other)


def _keep_one_group(roles: dict[str, ColumnRole], table: TableStatistics) -> None:
    """Keep the group of the fewest values, as an order belongs to one customer; leave out the others."""
    names = [name for name, proposed in roles.items() if proposed.role == GROUP]
    kept = min(names, key=lambda name: table.columns[name].num_distinct, default=None)
    for name in names:
        if name != kept:
            other = f"could be group_name instead of {format_for_message(kept)}, which has fewer values"
            roles[name] = ColumnRole(LEFT_OUT, f"{roles[name].reason}; {other}")


# ---- reasons ----


def _in_words(number: float) -> str:
    return f"{number:.0f}" if number % 1 == 0 and abs(number) < 1e15 else f"{number:.6g}"


def _empty_share(column: ColumnStatistics) -> str:
    return f"; {format_share(column.num_empty / column.num_rows)} empty" if column.num_empty else ""


def _values_words(column: ColumnStatistics) -> str:
    about = "" if column.values.is_exact else "about "
    return f"{about}{column.num_distinct:,} different values in {column.num_present:,} rows"


def _text_words(column: ColumnStatistics) -> str:
    about = "" if column.values.is_exact else "about "
    words = f"{column.mean_words:.0f} words on average, {about}{column.num_distinct:,} different texts"
    return f"{words} in {column.num_present:,} rows{_empty_share(column)}"


def _category_words(column: ColumnStatistics) -> str:
    counts = column.values.counts_by_text()
    some = ""
    if counts is not None:
        some = f", such as {', '.join(format_for_message(value, 30) for value in list(counts)[:3])}"
    return f"{_values_words(column)}{some}{_empty_share(column)}"
