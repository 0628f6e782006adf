"""Records of a CSV or TSV file, with checks of row lengths and quoting.

What spreadsheets add is handled too: a first line `sep=;`, columns without a name, and rows of separators at the end.
"""

import csv
import logging
from collections.abc import Iterator, Sequence
from operator import itemgetter

from mmbert_core.runtime.errors import InputError, format_for_message
from mmbert_core.tables.lines import MAX_CELL_CHARACTERS, BadLine, row_location, text_lines

AUTO, STANDARD, NONE = "auto", "standard", "none"  # values of tsv_quoting
TAB = "\t"
SEPARATORS = {  # separator that a file may have instead of the expected one -> its name, advice
    ";": ("semicolons", "save the file with commas (CSV UTF-8), or with tabs as .tsv"),
    "\t": ("tabs", "name the file .tsv"),
    "|": ("vertical bars", "save the file with commas (CSV UTF-8), or with tabs as .tsv"),
    ",": ("commas", "name the file .csv"),
}

logger = logging.getLogger(__name__)

Record = tuple[int, list[str]]  # line on which it begins, cells


def csv_header(path: str, delimiter: str, tsv_quoting: str) -> list[str] | None:
    """Column names, without empty ones at the end; None for an empty file.

    Raises `InputError` for an unreadable header, and for a first line `sep=;`, which Excel writes.
    """
    first = next(_records(path, delimiter, tsv_quoting), None)
    if first is None:
        return None
    header = first[1]
    if header[0].lower().startswith("sep=") and not any(header[1:]):
        found = f"expected column names, found {header[0]!r}, a line for spreadsheets"
        advice = f"remove it, and separate cells by {'tabs' if delimiter == TAB else 'commas'}"
        raise InputError(f"{row_location(path, 0, first[0])}: {found}: {advice}")
    return _strip_unnamed(header)


def csv_rows(
    path: str, delimiter: str, columns: Sequence[str], tsv_quoting: str
) -> Iterator[tuple[int, Sequence[str]]]:
    """(line, cells of `columns`) of each row.

    Raises `InputError` for a row of another length than the header, broken quoting, and a line between rows that
    is blank or has separators only.
    """
    records = _records(path, delimiter, tsv_quoting)
    _, header = next(records)
    num_named = len(_strip_unnamed(header))
    if num_named < len(header):
        logger.info("%s: %d columns without a name at the end are ignored", path, len(header) - num_named)
    indices = [header.index(column) for column in columns]
    # itemgetter of one index gives the cell itself, not a row of one cell
    pick = itemgetter(*indices) if len(indices) > 1 else lambda cells: [cells[index] for index in indices]
    for row, (line, cells) in enumerate(records, start=1):
        if len(cells) != len(header):
            raise InputError(
                f"{row_location(path, row, line)}: expected {len(header)} cells as in the header, found {len(cells)}"
            )
        if num_named < len(header) - 1 and any(cells[num_named:]):
            found = format_for_message(next(filter(None, cells[num_named:])))
            expected = "expected no cell under the empty names at the end of the header"
            raise InputError(f"{row_location(path, row, line)}: {expected}, found {found}")
        yield line, pick(cells)


def _strip_unnamed(header: list[str]) -> list[str]:
    """The header without the empty names at its end."""
    count = len(header)
    while count > 1 and not header[count - 1]:
        count -= 1
    return header[:count]


def _records(path: str, delimiter: str, tsv_quoting: str) -> Iterator[Record]:
    """The header, then the rows. Raises `InputError`.

    Blank lines and, with several columns, lines of separators alone are allowed only at the end.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    is_auto = delimiter == TAB and tsv_quoting == AUTO
    quoting = csv.QUOTE_NONE if delimiter == TAB and tsv_quoting == NONE else csv.QUOTE_MINIMAL
    line_cells: list[int] = []  # of each line of the current record, without quoting: its cells
    lines = _count_cells(text_lines(path), line_cells) if is_auto else text_lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
    row = num_columns = 0
    blank_line, blank_kind = 0, ""  # the first line without cells
    num_separator_rows = 0
    while True:
        line = reader.line_num + 1
        line_cells.clear()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            other = _other_separator(path, delimiter) if row == 0 else None
            raise InputError(f"{row_location(path, row, line)}: {other or _explain(str(error), is_auto)}") from None
        except BadLine as error:
            raise InputError(f"{row_location(path, row, reader.line_num + 1)}: {error}") from None
        if not cells or (num_columns > 1 and not any(cells)):
            if not blank_line:
                blank_line, blank_kind = line, "separators alone" if cells else "a blank line"
            num_separator_rows += bool(cells)
            continue
        if blank_line:
            hints = {0: "remove it", 1: 'an empty cell alone is written ""'}
            hint = hints.get(num_columns, "remove it, or give the row an id")
            raise InputError(f"{row_location(path, row, blank_line)}: expected a row, found {blank_kind} ({hint})")
        if is_auto and len(line_cells) > 1 and num_columns:
            _check_quoted_lines(line_cells, num_columns, row_location(path, row, line))
        yield line, cells
        num_columns = num_columns or len(cells)
        row += 1
    if num_separator_rows:
        logger.info("%s: %d rows of separators alone at the end are ignored", path, num_separator_rows)


def _count_cells(lines: Iterator[str], line_cells: list[int]) -> Iterator[str]:
    """The same lines; appends to `line_cells` how many cells each has without quoting, 0 for a blank line."""
    for text in lines:
        line_cells.append(0 if text[0] in "\r\n" else text.count(TAB) + 1)
        yield text


def _check_quoted_lines(line_cells: Sequence[int], num_columns: int, prefix: str) -> None:
    """Raise `InputError` if the lines of a quoted cell may be rows, so that its quote may be an ordinary character."""
    if num_columns == 1:
        is_ambiguous = 0 not in line_cells  # a blank line cannot be a row
    else:
        is_ambiguous = line_cells[0] == num_columns and num_columns in line_cells[1:]
    if is_ambiguous:
        raise InputError(
            f"{prefix}: a quote opens a cell that ends {len(line_cells) - 1} lines later, "
            f"and lines in it have {num_columns} cells as rows do; "
            "if the file has no quoting: tsv_quoting none (--tsv_quoting none); if cells do have line breaks: standard"
        )


def _other_separator(path: str, delimiter: str) -> str | None:
    """A message for an unreadable header whose quoted names have another separator between them; None for others."""
    header = next(text_lines(path))
    if f'"{delimiter}"' in header:
        return None
    for other, (name, advice) in SEPARATORS.items():
        if other != delimiter and f'"{other}"' in header:
            return f"cells seem to be separated by {name}; {advice}"
    return None


def _explain(message: str, is_auto: bool) -> str:
    """An error of the csv module in the user's terms."""
    advice = "; if the file has no quoting: tsv_quoting none (--tsv_quoting none)" if is_auto else ""
    if "end of data" in message:
        return f"the quoted cell that begins here is never closed{advice}"
    if "field limit" in message:
        expected = f"expected cells of at most {MAX_CELL_CHARACTERS:,} characters"
        return f"{expected}, found a longer one (a quote that is never closed?){advice}"
    if "new-line character" in message:
        return r"broken quoting (a carriage return outside quotes; lines end with \n or \r\n)"
    return f"broken quoting ({message}){advice}"
