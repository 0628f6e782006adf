"""Lines of a text file, decoded and of bounded length. Files that are not text are recognised, for the message."""

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from mmbert_core.runtime.errors import InputError
from mmbert_core.tables.cells import text_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LATIN = "Windows-1252"  # Latin-1 with curly quotes: the usual encoding of text that is not Unicode
MAX_LINE_BYTES = 2**27  # without a limit, a file without line breaks would fill the memory
MAX_CELL_CHARACTERS = 2**26  # a book has a few million

EXCEL = "the file is an Excel workbook: save the sheet as CSV UTF-8"
OPEN_DOCUMENT = "the file is an OpenDocument spreadsheet: save the sheet as CSV UTF-8"
ZIP = "the file is a ZIP archive: unpack it"
ZIP_MEMBER = b"PK\x03\x04"  # before each file of an archive
SIGNATURES = {  # first bytes of a file -> its kind and what to do; no header begins with them
    b"\x1f\x8b": "the file is packed by gzip: its name should end in .gz",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": EXCEL,  # .xls
    b"PK\x05\x06": ZIP,
    b"BZh91AY&SY": "the file is packed by bzip2: unpack it",
    b"\xfd7zXZ\x00": "the file is packed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "the file is packed by zstd: unpack it",
    b"7z\xbc\xaf\x27\x1c": "the file is a 7z archive: unpack it",
    b"Rar!\x1a\x07": "the file is a RAR archive: unpack it",
    b"PAR1\x15": "the file is Parquet: its name should end in .parquet",
    b"ARROW1\x00\x00": "the file is Arrow or Feather: save it as Parquet or CSV",
    b"Obj\x01": "the file is Avro: save it as Parquet or CSV",
    b"SQLite format 3\x00": "the file is an SQLite database: save the table as CSV",
    b"\x89HDF\r\n\x1a\n": "the file is HDF5: save the table as Parquet or CSV",
    b"\x93NUMPY": "the file is a NumPy array: save the table as CSV",
    b"\x80\x04\x95": "the file is a Python pickle: save the table as Parquet or CSV",
    b"\x80\x05\x95": "the file is a Python pickle: save the table as Parquet or CSV",
    b"%PDF-": "the file is a PDF document: save the table as CSV",
    b"{\\rtf": "the file is an RTF document: save the table as CSV UTF-8",
    b"\x89PNG\r\n": "the file is a picture (PNG)",
    b"\xff\xd8\xff": "the file is a picture (JPEG)",
    b"<!doctype": "the file is an HTML page, not the table that it may show: save the table as CSV UTF-8",
    b"<html": "the file is an HTML page, not the table that it may show: save the table as CSV UTF-8",
    b"<?xml": "the file is XML: save the table as CSV UTF-8",
}


class BadLine(Exception):
    """A line that cannot be read as text. The reader that catches it adds the row and the line number."""


def bounded_text_of(value: Any) -> str:
    """`text_of`, which also raises `ValueError` for more than MAX_CELL_CHARACTERS."""
    text = text_of(value)
    if len(text) > MAX_CELL_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, more than {MAX_CELL_CHARACTERS:,}")
    return text


def row_location(path: str, row: int, line: int = 0) -> str:
    """File and row at the beginning of a message: `reviews.csv row 17 (line 23)`.

    Row 0 is the header; line 0 means a format without lines.
    """
    name = "header" if row == 0 else f"row {row}"
    return f"{path} {name} (line {line})" if line else f"{path} {name}"


def is_gzip_name(path: str) -> bool:
    return path.lower().endswith(".gz")


def open_bytes(path: str) -> BinaryIO:
    """The bytes of a file, decompressed where its name ends in .gz. Raises `InputError` when it cannot be opened."""
    try:
        return gzip.open(path, "rb") if is_gzip_name(path) else open(path, "rb", buffering=1 << 20)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def text_lines(path: str) -> Iterator[str]:
    """Lines with their line breaks, decoded one by one so that a message can give the position of an invalid byte.

    Raises `BadLine` for a file that is not text, bytes that are not UTF-8, a NUL byte, and a line of more than
    MAX_LINE_BYTES, of which no more is read.
    """
    offset = 0  # bytes of the decompressed file before this line
    other_encoding = LATIN  # named in the advice if a line is not UTF-8
    with open_bytes(path) as stream:
        try:
            for raw in iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""):
                if offset == 0:
                    # an archive's time stamp may hold a line break: the name behind it tells a workbook
                    start = raw + stream.read(512) if raw.startswith(ZIP_MEMBER) else raw
                    if kind := kind_of(start):
                        raise BadLine(f"expected text; {kind}")
                    other_encoding = _wide_encoding(raw) or other_encoding
                if len(raw) > MAX_LINE_BYTES:
                    raise BadLine(
                        f"expected lines of at most {MAX_LINE_BYTES:,} bytes, found a longer one: is one record a line?"
                    )
                try:
                    text = raw.decode("utf-8") if offset else ""
                except UnicodeDecodeError:
                    text = ""
                if not text or "\0" in text:  # the first line (it may have a byte order mark), or an invalid one
                    text = _decode(raw, offset, other_encoding)
                if text:
                    yield text
                offset += len(raw)
        except (EOFError, zlib.error, OSError) as error:
            raise BadLine(f"the file cannot be read to its end ({error})") from None


def kind_of(start: bytes) -> str:
    """The kind of a file by its first bytes, and what to do with it; "" for text."""
    if start.startswith(ZIP_MEMBER):
        name = start[30:]  # of the first file in the archive
        if name.startswith((b"[Content_Types].xml", b"xl/", b"docProps/", b"_rels/")):
            return EXCEL
        return OPEN_DOCUMENT if name.startswith(b"mimetypeapplication/vnd.oasis") else ZIP
    markup = start[:64].lstrip(BYTE_ORDER_MARK + b" \t\r\n").lower()
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature) or (signature.startswith(b"<") and markup.startswith(signature)):
            return kind
    return ""


def _decode(raw: bytes, offset: int, other_encoding: str) -> str:
    """The text of a line that begins `offset` bytes into the file. Raises `BadLine`."""
    skipped = len(BYTE_ORDER_MARK) if offset == 0 and raw.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = raw[skipped:].decode("utf-8") if skipped else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        index = error.start + skipped
        found = f"found byte 0x{raw[index]:02x} at byte {offset + index} of the file"
        raise BadLine(f"expected UTF-8, {found}; {_advice(other_encoding)}") from None
    if "\0" in text:
        advice = f"; {_advice(other_encoding)}" if other_encoding != LATIN else ""
        index = offset + skipped + raw[skipped:].index(0)
        raise BadLine(f"expected text, found a NUL byte at byte {index} of the file{advice}")
    return text


def _wide_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32, by the byte order mark or the NUL byte of the first letter; "" for any other encoding."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    return {(False, True): "UTF-16LE", (True, False): "UTF-16BE"}.get(tuple(byte == 0 for byte in start[:2]), "")


def _advice(encoding: str) -> str:
    name = f"Latin-1 or {encoding}" if encoding == LATIN else encoding
    return f"if the file is {name}, convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
