"""Caption tables, read strictly: metadata.csv and metadata.jsonl to rows of (line, file_name, captions).

Python's csv and json and not pandas, which reads the captions "NA" and "007" as numbers, and shifts the columns of a
row with a comma too many, without a word. A table may come from a stranger: its names are held inside the dataset.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.errors import DataError, one_line
from minisd.picture_files import open_regular

COLUMNS = ("file_name", "text")
_MAX_NAME_BYTES = 1024
# Empty, absolute, a folder, a drive letter, a backslash, a NUL, a part "..", or half a surrogate pair (from JSON).
_OUTSIDE = re.compile(r"\A\Z|\A/|/\Z|\A[A-Za-z]:|\\|\0|(\A|/)\.\.(/|\Z)|[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One row of a CSV table: the line it starts on (from 1), and each column's cell, exactly as written."""

    line: int
    fields: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One row of a table: the line it starts on (from 1), the name and its captions, exactly as written.

    sha256: of the file when the table was written, in hex; empty if the table has no such column, or nothing in it.
    """

    line: int
    file_name: str
    captions: tuple[str, ...]
    sha256: str = ""


def read_table(path: Path) -> list[Row]:
    """Read metadata.csv or metadata.jsonl, by its suffix. Columns other than those of Row are allowed, and ignored.

    Raises:
        DataError: not UTF-8, columns missing, a row with too many or too few fields ...; names the line.
    """
    if path.suffix == ".csv":
        records = ((record.line, record.fields) for record in read_records(path))
        rows = [Row(line, cells["file_name"], (cells["text"],), cells.get("sha256", "")) for line, cells in records]
    else:
        rows = list(_jsonl_rows(path, read_text(path)))
    if not rows:
        raise DataError(f"{str(path)!r}: expected a row for each picture, got none. Add rows {','.join(COLUMNS)}.")
    return rows


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be opened, or is not UTF-8 text; names the line.
    """
    with open_regular(path) as file:
        raw = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at, got = error.start, f"the byte 0x{raw[error.start]:02x}, perhaps Latin-1"
    else:
        at, got = text.find("\0"), "a NUL character"
        if at < 0:
            return text
        at = len(text[:at].encode())
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        got = "UTF-16"
    line = len((raw[:at] + b".").splitlines())
    raise DataError(f"{str(path)!r}, line {line}: expected text in UTF-8, got {got}. Save it as UTF-8.")


def read_records(path: Path) -> list[Record]:
    """Read a CSV table with all its columns, file_name and text among them; blank lines are skipped.

    Returns:
        In the order of the file; none if it has nothing but the names of its columns.

    Raises:
        DataError: not UTF-8, columns missing or twice, a row with too many or too few fields ...; names the line.
    """
    return list(_records(path, read_text(path)))


def _records(path: Path, text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    next_line = 1
    try:
        for fields in reader:
            line, next_line = next_line, reader.line_num + 1  # a quoted caption may go over several lines
            where = f"{str(path)!r}, line {line}"
            if not fields or (header and not any(fields)):  # a blank line, or commas alone, as spreadsheets append
                continue
            if not header:
                header = _checked_header(where, fields)
                continue
            if len(fields) != len(header):
                names = one_line(",".join(header)[:200])
                raise DataError(
                    f"{where}: expected {len(header)} fields ({names}), got {len(fields)}. Put a caption with commas "
                    'in double quotes: "a, b".'
                )
            yield Record(line, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{str(path)!r}, line {next_line}: not CSV: {error}. Close the quotes; double a quote inside quotes."
        ) from error
    if not header:
        raise DataError(f"{str(path)!r}: expected a first line {','.join(COLUMNS)}, got an empty file. Write it anew.")


def read_captions(path: Path) -> tuple[str, ...]:
    """Read the captions in a .txt file, one a line, without the spaces around them. Raises as `read_text`."""
    # Not splitlines, which also splits at characters that a caption may have, such as U+2028.
    lines = read_text(path).replace("\r", "\n").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def _checked_header(where: str, header: list[str]) -> list[str]:
    """The column names, if each is there once and ours are among them."""
    if len(set(header)) == len(header) and set(COLUMNS) <= set(header):
        return header
    fix = "Rename the columns, each once."
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        fix = "Separate the columns with commas."
    raise DataError(f"{where}: expected the columns {','.join(COLUMNS)}, got {','.join(header)[:200]!r}. {fix}")


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows of a file with one JSON object a line, its text one caption or a list of them; blank lines are skipped."""
    for line, source in enumerate(text.split("\n"), start=1):
        if not source.strip():
            continue
        where = f"{str(path)!r}, line {line}"
        wanted = 'expected {"file_name": "a.png", "text": "a caption"}'
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}; {wanted}, one a line.") from error
        record = record if isinstance(record, dict) else {}
        file_name, said = record.get("file_name"), record.get("text")
        captions: list[Any] = said if isinstance(said, list) and said else [said]
        if not isinstance(file_name, str) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{where}: {wanted}, both text, got {source.strip()[:80]!r}. Correct the line.")
        for caption in captions:
            # JSON can spell what UTF-8 text cannot hold, and no tokenizer takes.
            if "\0" in caption or any("\ud800" <= character <= "\udfff" for character in caption):
                raise DataError(
                    f"{where}: the caption has a NUL or half a surrogate pair: {caption[:80]!r}. Correct it."
                )
        sha256 = record.get("sha256")
        yield Row(line, file_name, tuple(captions), sha256 if isinstance(sha256, str) else "")


def check_inside(folder: Path, name: str, where: str) -> None:
    """Refuse a file name found in a dataset that is not one of a file below `folder`. Raises DataError."""
    if _OUTSIDE.search(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise DataError(
            f"{where}: {name[:80]!r} is outside the dataset: expected a path below {str(folder)!r} such as a.png or "
            "sub/a.png. Correct the name."
        )


def resolve_inside(root: Path, folder: Path, name: str, where: str, *, follow_symlinks: bool = False) -> Path:
    """Resolve a file name found in a dataset.

    Args:
        root: the dataset, resolved; the file must lie in it after all links have been followed.
        folder: what the name is relative to.
        name: the name, with forward slashes.
        where: begins the message of a refusal: the table and the line.
        follow_symlinks: let a link lead out of the dataset; the name itself may not.

    Returns:
        The path of a regular file, without links.

    Raises:
        DataError: the name leads outside, or to nothing, or to something else than a file.
    """
    check_inside(folder, name, where)
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise DataError(f"{where}: {name!r}: no such file. Correct the name, or take it out.") from error
    if not follow_symlinks and not path.is_relative_to(root):
        raise DataError(f"{where}: {name!r} is outside the dataset: a link leads there. Copy the files in (cp -rL).")
    if not path.is_file():
        raise DataError(f"{where}: {name!r} is a folder, a pipe or a device, expected a file. Take it out.")
    return path
