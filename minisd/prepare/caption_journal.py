"""What `caption` has said so far: DATA/captions/rank-K.jsonl, a line of JSON for each picture, while it runs.

Each process writes a file of its own, whole, every few seconds. A run that was stopped leaves them; the next one, of as
many processes as it likes, takes them over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minisd.atomic import remove_leftovers, write_atomically
from minisd.caption_table import read_text
from minisd.errors import DataError, DiskError


@dataclass(frozen=True, kw_only=True)
class Said:
    """The caption that was written for a picture."""

    file_name: str
    """As in the table."""
    sha256: str
    """Of the picture's file, as in the table: a caption is not for another file of that name."""
    text: str
    """Ready for the table; "" if there was nothing to say."""
    settings: str
    """A hash of the options that it depends on."""


_FIELDS = {field.name for field in fields(Said)}


def read_said(data: Path) -> list[Said]:
    """Read the files of all processes, in the order of their names.

    Raises:
        DataError: a file is not what `write_said` writes; names the line.
    """
    said = []
    for path in sorted((data / "captions").glob("rank-*.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict) or {*entry} != _FIELDS or {type(cell) for cell in entry.values()} != {str}:
                raise DataError(
                    f"{str(path)!r}, line {number}: not a line that caption writes. Delete the file; its captions will "
                    "be written anew."
                )
            said.append(Said(**entry))
    return said


def write_said(data: Path, rank: int, said: Sequence[Said]) -> None:
    """Write the file of one process, whole or not at all. Raises DiskError."""
    folder = data / "captions"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}. Choose another --data.") from error
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in said)
    write_atomically(folder / f"rank-{rank}.jsonl", lines.encode("ascii"))


def delete_said(data: Path, *, keep: str = "") -> None:
    """Delete the files of all processes, or all but the one named, and what died half-written. Raises DiskError."""
    folder = data / "captions"
    if not folder.is_dir():
        return
    remove_leftovers(folder)
    for path in folder.glob("rank-*.jsonl"):
        if path.name != keep:
            try:
                path.unlink()
            except OSError as error:
                raise DiskError(f"{path}: cannot be deleted: {error.strerror}.") from error
    with suppress(OSError):  # it is not empty
        folder.rmdir()
