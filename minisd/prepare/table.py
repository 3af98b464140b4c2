"""The tables of a dataset: metadata.csv (what is trained on) and rejected.csv (what is not, and why), a row a picture.

Read strictly (minisd/caption_table.py), written whole, with pandas. Captions are kept to the last character;
rejected.csv, which people open in a spreadsheet, has its formulas disarmed. Who writes holds the dataset's lock
(minisd/run_lock.py).
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pandas as pd

from minisd.atomic import sync_folder, write_atomically
from minisd.caption_table import read_records, resolve_inside
from minisd.errors import DataError, DiskError, one_line

DROPPED = "dropped"
_NUMBER = re.compile(r"[0-9]{0,9}")
# Columns with words from elsewhere, whose control characters are escaped. Captions and file names stay what they are.
_ESCAPED = ("source_url", "query", "reason", "original")
# What a spreadsheet takes for a formula, and the mark that says it is none.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
# Controls that turn the direction of what follows: https://unicode.org/reports/tr9/.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A row of metadata.csv or rejected.csv; what is not known is empty, or 0.

    file_name: relative to the table's folder, with forward slashes; empty for what was never in the dataset.
    text: the caption, exactly.
    width, height, sha256: of that file, to notice that it was changed; of what was left out, the size of the original.
    dhash: of the original, see examine.Examined.
    source_url, query, fetched_at: where `collect` has it from; ISO 8601, UTC.
    caption_source: "sidecar", "table", "blip" or "edited"; empty if there was never a caption.
    status: "ok" or "check" in the dataset, else why it was left out, in a word or two: "too small".
    reason: the same in one sentence, with figures.
    original, original_sha256: its name in the folder it is from, and the SHA-256 of that file.
    duplicate_of: the file_name of the picture that was kept in its place.
    others: columns of somebody else's table, which are kept: (name, cell).
    """

    file_name: str = ""
    text: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    dhash: str = ""
    source_url: str = ""
    query: str = ""
    caption_source: str = ""
    status: str = ""
    reason: str = ""
    original: str = ""
    original_sha256: str = ""
    fetched_at: str = ""
    duplicate_of: str = ""
    others: tuple[tuple[str, str], ...] = ()


def with_flags(picture: Picture, flags: Sequence[str]) -> Picture:
    """The row with what is odd about its caption, unless `status` has a word of somebody else's."""
    if picture.status not in ("", "ok", "check"):
        return picture
    return replace(picture, status="check" if flags else "ok", reason="; ".join(flags))


COLUMNS = tuple(field.name for field in fields(Picture) if field.name != "others")


def table_path(data: Path) -> Path:
    """The table of a dataset: DATA/train/metadata.csv, or DATA/metadata.csv of a flat folder. Raises DataError."""
    found = _tables(data)
    if len(found) == 1:
        return found[0]
    got = "both" if found else "neither"
    fix = "Delete one of them" if found else "Make it with: python prepare_data.py clean --from PICTURES --output DATA"
    raise DataError(f"{str(data)!r}: expected train/metadata.csv or metadata.csv, got {got}. {fix}.")


def _tables(data: Path) -> list[Path]:
    return [path for path in (data / "train" / "metadata.csv", data / "metadata.csv") if os.path.lexists(path)]


def read_pictures(data: Path) -> list[Picture]:
    """Read the pictures of a dataset, in the order of their table; none if all were taken out.

    Raises:
        DataError: no table, or one that is damaged, or names a picture twice; names the line.
    """
    table = table_path(data)
    pictures = []
    lines: dict[str, int] = {}
    for record in read_records(table):
        where = f"{str(table)!r}, line {record.line}"
        picture = _picture(record.fields, where)
        if picture.file_name in lines:
            first = lines[picture.file_name]
            raise DataError(f"{where}: {picture.file_name!r} has a row already, in line {first}. Delete one of them.")
        lines[picture.file_name] = record.line
        pictures.append(picture)
    return pictures


def write_pictures(data: Path, pictures: Sequence[Picture]) -> None:
    """Write a dataset's table, whole or not at all; where there is none, DATA/train/metadata.csv.

    Every cell is quoted, so that no caption can be taken for a number, a missing value or two rows. NULs and halves of
    surrogate pairs, which a text file cannot hold, are left out; addresses and names from elsewhere have their control
    characters escaped. pandas reads it back exactly with
    `read_csv(..., dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")`.

    Raises:
        DataError: a cell is longer than a CSV reader takes.
        DiskError: it cannot be written; the old table is still there.
    """
    table = table_path(data) if _tables(data) else data / "train" / "metadata.csv"
    _write(table, [_row(picture) for picture in pictures])


def read_rejected(data: Path) -> list[Picture]:
    """Read what was left out of a dataset, from DATA/rejected.csv; nothing if there is no such file.

    A picture that is in the dataset all the same, because dropping.drop was interrupted, is not among them.

    Raises:
        DataError: a table is damaged; names the line.
    """
    rejected = all_rejected(data)
    if not _tables(data) or not any(picture.status == DROPPED for picture in rejected):
        return rejected
    kept = {picture.file_name for picture in read_pictures(data)}
    return [picture for picture in rejected if picture.status != DROPPED or picture.file_name not in kept]


def all_rejected(data: Path) -> list[Picture]:
    """The rows of rejected.csv as they are, those of pictures that are in the dataset all the same, too."""
    table = data / "rejected.csv"
    if not os.path.lexists(table):
        return []
    rejected = []
    for record in read_records(table):
        cells = {name.removeprefix("'"): cell.removeprefix("'") for name, cell in record.fields.items()}
        rejected.append(_picture(cells, f"{str(table)!r}, line {record.line}"))
    return rejected


def write_rejected(data: Path, rejected: Sequence[Picture]) -> None:
    """Write DATA/rejected.csv, whole or not at all, such that it can be opened in a spreadsheet.

    Cells that begin like a formula get a "'" in front, which `read_rejected` takes off. Raises as `write_pictures`.
    """

    def disarmed(cell: str) -> str:
        return f"'{cell}" if cell.startswith(_FORMULA) else cell

    rows = [{disarmed(name): disarmed(cell) for name, cell in _row(picture).items()} for picture in rejected]
    _write(data / "rejected.csv", rows)


def _picture(cells: dict[str, str], where: str) -> Picture:
    """A row from its cells; columns of ours that the table does not have are empty."""
    for name in ("width", "height"):
        if not _NUMBER.fullmatch(cells.get(name, "")):
            got = cells[name][:80]
            raise DataError(f"{where}: expected a {name} in pixels, got {got!r}. Correct it, or empty the cell.")
    ours = {name: cells[name] for name in COLUMNS if name in cells and name not in ("width", "height")}
    others = tuple((name, cell) for name, cell in cells.items() if name not in COLUMNS)
    width, height = (int(cells.get(name) or 0) for name in ("width", "height"))
    return Picture(**ours, width=width, height=height, others=others)


def _row(picture: Picture) -> dict[str, str]:
    """The cells of a row, as text that a file can hold."""
    cells = {name: str(getattr(picture, name) or "") for name in COLUMNS} | dict(picture.others)
    cells |= {name: one_line(cells[name]) for name in _ESCAPED}
    return {name: cell.replace("\0", "").encode("utf-8", "ignore").decode("utf-8") for name, cell in cells.items()}


def _write(table: Path, rows: list[dict[str, str]]) -> None:
    longest = csv.field_size_limit()
    for row in rows:
        for name, cell in row.items():
            if len(cell) > longest:
                what = row["file_name"] or row["original"]
                raise DataError(f"{what!r}: expected a {name} of at most {longest} characters, got {len(cell)}.")
    columns = dict.fromkeys((*COLUMNS, *(name for row in rows for name in row)))
    # Of Python's own strings: pandas' would not hold every character, and take time to say so.
    frame = pd.DataFrame([[row.get(name, "") for name in columns] for row in rows], columns=[*columns], dtype=object)
    make_folder(table.parent)
    text = frame.to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")
    write_atomically(table, text.encode())


def make_folder(folder: Path) -> None:
    """Make a folder if it is not there, durably. Raises DiskError."""
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made: {error.strerror}. Choose another folder.") from error


def picture_path(data: Path, file_name: str) -> Path:
    """The file of a picture in the dataset. Raises DataError if there is none, or the name leads outside."""
    table = table_path(data)
    return resolve_inside(data.resolve(), table.parent.resolve(), file_name, repr(str(table)))


def dropped_path(data: Path, file_name: str) -> Path:
    """The file of a picture that was taken out. Raises as `picture_path`."""
    folder = data / DROPPED
    if not os.path.lexists(folder / file_name):
        return picture_path(data, file_name)  # its move was interrupted
    return resolve_inside(data.resolve(), folder.resolve(), file_name, repr(str(folder)))


def one_line_caption(text: str) -> str:
    """A caption as a machine or a person at a keyboard may write it: in one line, spaces single, nothing invisible.

    Control characters, those that turn the direction of writing, and halves of surrogate pairs are taken out.
    """
    visible = (c for c in text if c.isspace() or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI))
    return " ".join("".join(visible).split())
