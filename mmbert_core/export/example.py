"""Score the rows of a CSV file with the exported model: python example.py new.csv predictions.tsv

Needs numpy, tokenizers, onnxruntime and the files next to it: model.onnx, preprocessing.json and, for texts,
tokenizer.json. Reads CSV in UTF-8, nothing else: convert TSV, JSONL, Parquet and gzipped files first.

N rows of a window, B rows of a batch, C chunks of a text, T tokens of a chunk, F numbers with indicators,
K categorical columns.
"""

import csv
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

WINDOW = 8192  # rows in memory at a time
MAX_ROWS, MAX_TOKENS = 256, 8192  # of a batch; tokens include padding

# suffixes that an output's name must not have
OTHER_FORMATS = frozenset(
    ".parquet .jsonl .ndjson .json .xlsx .xls .ods .feather .arrow .gz .zip .bz2 .xz .zst".split()
)

BOOLEANS = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
DIGITS = {"true": "1", "false": "0"}
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
POINT_IN_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
EPOCH, SECONDS_PER_DAY = datetime(1970, 1, 1), 86_400
MONTHS = "january february march april may june july august september october november december".split()
DATE = re.compile(
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,? )?"
    r"(?:([0-9]{4})([-/.])([0-9]{1,2})\2([0-9]{1,2})|([0-9]{4})([0-9]{2})([0-9]{2})"  # year, month, day
    r"|([0-9]{1,2})([-/.])([0-9]{1,2})\9([0-9]{4})"  # day and month, or month and day; year
    r"|([0-9]{1,2})[ -]([a-z]{3,9})[ -]([0-9]{4})|([a-z]{3,9}) ([0-9]{1,2}),? ([0-9]{4}))"  # with the month's name
    r"(?:(?:t|,? )([0-9]{1,2}):([0-9]{2})(?::([0-9]{2})(?:[.,][0-9]+)?)?(?: ?([ap])m)?"
    r"(?: ?(?:z|utc|gmt|[+-][0-9]{2}(?::?[0-9]{2})?))?)?"
)
DURATION = re.compile(r"(-?[0-9]+ days)(?: (\+?[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?)?()")

Row = dict[str, str]  # column -> cell
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # the model: its inputs by name -> probabilities [B] or [B, K]


def read_rows(path: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a CSV file with a header. Raises ValueError for a missing column and a row of another length."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="\n") as stream:  # line breaks inside cells are not changed
        reader = csv.reader(stream, strict=True)
        header = next(reader, [])
        for column in columns:
            if header.count(column) != 1:
                raise ValueError(f"{path}: expected the column {column!r} once, found it {header.count(column)} times")
        blank = False
        for cells in reader:
            if not cells:
                blank = True  # allowed at the end of the file only
                continue
            if blank or len(cells) != len(header):
                found = "a blank line" if blank else len(cells)
                raise ValueError(
                    f"{path}, before line {reader.line_num + 1}: expected rows of {len(header)} cells, found {found}"
                )
            if any("\0" in cell for cell in cells):
                raise ValueError(f"{path}, before line {reader.line_num + 1}: expected text, found a NUL byte")
            yield dict(zip(header, cells, strict=True))


# ---- cells to arrays ----


def normal_form(cell: str) -> str:
    """The spelling by which a category is looked up.

    Unicode NFC, true and false in lower case, 1.0 as 1, midnight as a date, fractions of a second without final zeros.
    """
    cell = BOOLEANS.get(cell, cell)
    if found := WHOLE_FLOAT.fullmatch(cell):
        return "0" if found[1] == "-0" else found[1]
    if found := POINT_IN_TIME.fullmatch(cell) or DURATION.fullmatch(cell):
        days, time, fraction, zone = found.groups(default="")
        time += fraction.rstrip("0").rstrip(".")
        return days if not zone and time in ("", "00:00:00") else f"{days} {time}{'+00:00' if zone == 'Z' else zone}"
    return unicodedata.normalize("NFC", cell)


def index_by_form(index_of: dict[str, int]) -> dict[str, int]:
    """Index by normal form. A column of true and false also accepts 1 and 0, and the other way round."""
    by_form = {normal_form(value): index for value, index in reversed(index_of.items())}
    has_words, has_digits = bool(by_form.keys() & DIGITS.keys()), bool(by_form.keys() & DIGITS.values())
    has_other_numbers = any(WHOLE_NUMBER.fullmatch(form) and form not in DIGITS.values() for form in by_form)
    if not has_digits:
        return by_form | {digit: by_form[word] for word, digit in DIGITS.items() if word in by_form}
    if not has_words and not has_other_numbers:
        return by_form | {word: by_form[digit] for word, digit in DIGITS.items() if digit in by_form}
    return by_form


def number_of(cell: str, column: str, missing_words: Sequence[str], largest: float) -> float:
    """The number in a cell; 1 and 0 for true and false; NaN for an empty cell and for words such as NA."""
    try:
        number = float(cell)
    except ValueError:
        if cell in BOOLEANS:
            return float(BOOLEANS[cell] == "true")
        if cell.strip().lower() in missing_words:
            return math.nan
        raise ValueError(f"column {column!r}: expected a number, found {cell!r:.60}") from None
    if "_" in cell or abs(number) > largest:
        raise ValueError(f"column {column!r}: expected a finite number, found {cell!r:.60}")
    return number


def seconds_of(cell: str, column: str, missing_words: Sequence[str], order: str) -> float:
    """Seconds from 1970-01-01 to a date with or without a time, as it is written; NaN for an empty cell."""
    text = cell.strip().lower()
    if text in missing_words:
        return math.nan
    found = DATE.fullmatch(text)
    groups = found.groups() if found else ("",) * 21
    year, month, day = (int(groups[index] or groups[index + more] or 0) for index, more in ((0, 4), (2, 3), (3, 3)))
    if groups[7]:
        first, second, year = int(groups[7]), int(groups[9]), int(groups[10])
        if order == "unambiguous" and first <= 12 and second <= 12 and first != second:
            raise ValueError(f"column {column!r}: expected day and month in an order that is known, found {cell!r:.60}")
        is_day_first = order == "day_first" or (order == "unambiguous" and first > 12)
        day, month = (first, second) if is_day_first else (second, first)
    elif name := groups[12] or groups[14]:
        day, year = int(groups[11] or groups[15]), int(groups[13] or groups[16])
        month = next((number for number, known in enumerate(MONTHS, start=1) if known.startswith(name)), 0)
    hour, minute, second = (int(group or 0) for group in groups[17:20])
    if groups[20]:  # am or pm
        hour = hour % 12 + 12 * (groups[20] == "p") if 1 <= hour <= 12 else 99
    try:
        return (datetime(year, month, day, hour, minute, second) - EPOCH).total_seconds()
    except ValueError:
        raise ValueError(f"column {column!r}: expected a date, found {cell!r:.60}") from None


def unit_of(seconds: np.ndarray, unit: str, newest: float) -> np.ndarray:
    """Age in days, month, weekday or hour of dates in `seconds` [N], NaN where missing."""
    if unit == "age in days":
        return (newest - seconds) / SECONDS_PER_DAY
    known = np.where(np.isnan(seconds), 0, seconds)
    days = np.floor(known / SECONDS_PER_DAY).astype(np.int64)
    numbers = {
        "month": days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12 + 1,
        "weekday": (days + EPOCH.weekday()) % 7,
        "hour": np.floor((known - days * SECONDS_PER_DAY) / 3600),
    }
    return np.where(np.isnan(seconds), math.nan, numbers[unit])


def numbers_of(rows: Sequence[Row], numbers: dict[str, Any]) -> np.ndarray:
    """float32 [N, F]: the columns, then the units of dates, medians for missing ones, then an indicator of each column.

    An indicator is 1 (missing) or 0.
    """
    missing_words, largest = numbers["missing_words"], numbers["largest"]
    raw = np.array(
        [[number_of(row[column], column, missing_words, largest) for column in numbers["columns"]] for row in rows]
    )
    for date in numbers.get("dates", ()):
        words, order = numbers["missing_dates"], numbers["date_order"]
        seconds = np.array([seconds_of(row[date["column"]], date["column"], words, order) for row in rows])
        units = [unit_of(seconds, unit, date["newest_seconds"]) for unit in date["units"]]
        raw = np.concatenate([raw, np.stack(units, axis=1)], axis=1)
    missing = np.isnan(raw)
    indicators = missing[:, np.array(numbers["has_indicator"])]
    return np.concatenate([np.where(missing, numbers["medians"], raw), indicators], axis=1).astype(np.float32)


def categories_of(rows: Sequence[Row], categories: dict[str, Any]) -> np.ndarray:
    """int64 [N, K]: an index for each value of the training rows, one for missing and one for unseen cells."""
    unseen = categories["unseen_index"]
    indices = []
    for column, values in zip(categories["columns"], categories["values"], strict=True):
        index_of = {value: index for index, value in enumerate(values, start=categories["first_index"])}
        index_of_form = index_by_form(index_of) | {"": categories["missing_index"]}
        cells = [row[column] for row in rows]
        # the unchanged spelling first: preprocessing.json of older versions has the training file's spelling
        indices.append(
            [index_of[cell] if cell in index_of else index_of_form.get(normal_form(cell), unseen) for cell in cells]
        )
    return np.array(indices, dtype=np.int64).T


def chunks_of(rows: Sequence[Row], text: dict[str, Any], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids of each row's text, in one or more chunks; tokenizer.json truncates at `max_length`."""
    keep_end = text.get("keep_end")
    texts = [text["separator"].join(filter(None, (row[column] for column in text["columns"]))) for row in rows]
    kept = slice(-text["max_characters"], None) if keep_end else slice(text["max_characters"])
    encodings = tokenizer.encode_batch_fast([joined[kept] for joined in texts])
    max_further_chunks = text["max_chunks"] - 1
    chunks = [
        [first.ids or text["ids_of_nothing"], *(further.ids for further in first.overflowing[:max_further_chunks])]
        for first in encodings
    ]
    if keep_end:  # the tokenizer counts chunks from the end of the text
        return [row[::-1] for row in chunks]
    return chunks


def padded(texts: Sequence[list[list[int]]], text: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [B, T], or [B, C, T] where a text may have several chunks."""
    num_chunks, num_tokens = max(map(len, texts)), max(len(ids) for chunks in texts for ids in chunks)
    input_ids = np.full((len(texts), num_chunks, num_tokens), text["pad_token_id"], dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, chunks in enumerate(texts):
        for chunk, ids in enumerate(chunks):
            input_ids[row, chunk, : len(ids)] = ids
            attention_mask[row, chunk, : len(ids)] = 1
    return (input_ids, attention_mask) if text["max_chunks"] > 1 else (input_ids[:, 0], attention_mask[:, 0])


# ---- scoring ----


def score(
    rows: Sequence[Row], settings: dict[str, Any], tokenizer: Tokenizer | None, run: Run, *, max_rows: int = MAX_ROWS
) -> np.ndarray:
    """Probabilities float32 in the order of the rows: of class 1 [N], or of all classes [N, number of classes]."""
    text, columns = settings["text"], {}
    chunks = chunks_of(rows, text, tokenizer) if text else []
    if settings["numbers"]["medians"]:
        columns["numbers"] = numbers_of(rows, settings["numbers"])
    if settings["categories"]["columns"]:
        columns["categories"] = categories_of(rows, settings["categories"])
    sizes = [len(of_row) * max(map(len, of_row)) for of_row in chunks] or [1] * len(rows)  # tokens of a row
    order = sorted(range(len(rows)), key=lambda row: -sizes[row])  # texts of similar length together: little padding
    shape = len(rows) if settings["is_binary"] else (len(rows), len(settings["classes"]))
    probabilities = np.empty(shape, dtype=np.float32)
    while order:
        count = max(1, min(max_rows, MAX_TOKENS // sizes[order[0]]))
        batch, order = order[:count], order[count:]
        inputs = {name: values[batch] for name, values in columns.items()}
        if text:
            inputs["input_ids"], inputs["attention_mask"] = padded([chunks[row] for row in batch], text)
        probabilities[batch] = run(inputs)
    return probabilities


def calibrated(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities float32 [N, number of classes] after their logits are divided by the temperature.

    `probabilities`: of all classes, or [N] of class 1 of two. Temperature 1 changes nothing. With any other, no result
    is exactly 0 or 1: an input of exactly 0 or 1 counts as rounded by float32.
    """
    p = probabilities.astype(np.float64)
    if temperature == 1:
        return (p if p.ndim == 2 else np.stack([1 - p, p], axis=1)).astype(np.float32)
    if p.ndim == 1:
        logits = np.log(np.maximum(p, 2.0**-150)) - np.log(np.maximum(1 - p, 2.0**-25))
        power = np.exp(-1 / temperature * np.abs(logits))  # probability ratio of the less likely class to the other
        by_class = np.stack([np.where(logits < 0, 1, power), np.where(logits < 0, power, 1)], axis=1)
        by_class = by_class / (1 + power)[:, None]
    else:
        logits = np.log(np.maximum(p, 2.0**-150))
        powers = np.exp(1 / temperature * (logits - logits.max(axis=1, keepdims=True)))
        by_class = powers / powers.sum(axis=1, keepdims=True)
    return np.clip(by_class.astype(np.float32), np.float32(2.0**-149), np.float32(1 - 2.0**-24))


def load_preprocessing(folder: Path) -> tuple[dict[str, Any], Tokenizer | None]:
    settings = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    if not settings["text"]:
        return settings, None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = settings["text"]["encode_special_tokens"]  # tokenizer.json has no field for it
    return settings, tokenizer


def load_model(folder: Path) -> Run:
    import onnxruntime  # here and not above: the other functions also serve other runtimes, without this one

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["probabilities"], inputs)[0]


# ---- the prediction file ----


def output_delimiter(output: str) -> str:
    """Comma for an output named .csv, else a tab. Raises ValueError for a name of another format."""
    suffix = Path(output).suffix.lower()
    if suffix in OTHER_FORMATS:
        raise ValueError(f"{output}: expected an output that ends in .tsv or .csv, found {suffix}")
    return "," if suffix == ".csv" else "\t"


def table_line(cells: Sequence[object], delimiter: str) -> str:
    """One line. Cells with the delimiter, tabs, line breaks or quotes are quoted, as the csv module reads them."""
    texts = [str(cell) for cell in cells]
    special = {*'\t\n\r"', delimiter}
    quoted = ('"' + text.replace('"', '""') + '"' if set(text) & special else text for text in texts)
    return delimiter.join(quoted) + "\n"


def main(source: str, output: str) -> None:
    folder, delimiter = Path(__file__).parent, output_delimiter(output)
    settings, tokenizer = load_preprocessing(folder)
    run = load_model(folder)
    classes, is_binary = settings["classes"], settings["is_binary"]
    ids = [settings["id"]] if settings["id"] else []
    texts = settings["text"]["columns"] if settings["text"] else []
    dates = [date["column"] for date in settings["numbers"].get("dates", ())]
    columns = [*ids, *texts, *settings["numbers"]["columns"], *dates, *settings["categories"]["columns"]]
    rows = read_rows(source, columns)
    if Path(output).exists() and Path(output).samefile(source):
        raise ValueError(f"{output}: is the input file; choose another output")
    partial = Path(f"{output}.part")  # an earlier output stays until this one is complete
    try:
        with open(partial, "w", encoding="utf-8", newline="") as stream:
            names = ["prob"] if is_binary else [f"prob_{name}" for name in classes]
            stream.write(table_line([*ids, *names, "pred", "prob_calibrated"], delimiter))
            while window := list(islice(rows, WINDOW)):
                preds = score(window, settings, tokenizer, run)
                if is_binary:
                    # float64: rounded to float32, the threshold could equal a probability
                    predicted = (preds > np.float64(settings["threshold"])).astype(int)
                else:
                    predicted = preds.argmax(axis=1)
                by_class = calibrated(preds, settings["temperature"])
                of_class = by_class[np.arange(len(window)), 1 if is_binary else predicted]
                for row, pred, index, calibrated_pred in zip(window, preds, predicted, of_class, strict=True):
                    cells = [*(row[name] for name in ids), *np.atleast_1d(pred), classes[index], calibrated_pred]
                    stream.write(table_line(cells, delimiter))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python example.py INPUT.csv OUTPUT.tsv")
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(f"error: {error}")
