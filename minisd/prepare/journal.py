"""What `collect` tried and what came of it: RAW/collected.jsonl, one line of JSON for each address, in order.

A line is on the disk before the next picture is judged, so a run that was killed goes on where it was; the half line
such a run may leave is no line. A file is whole before the line that names it is written.
"""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from minisd.atomic import sync_folder
from minisd.errors import DataError, DiskError

NAME = "collected.jsonl"
KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class Found:
    """One address that was tried."""

    url: str
    """As the search gave it."""
    query: str
    """The search it was found with."""
    fetched_at: str
    """ISO 8601, UTC."""
    status: str
    """KEPT, or why it is left out: a word such as "unreachable" or "near-duplicate"."""
    reason: str = ""
    """The same in one sentence with the figures; "" if kept."""
    file_name: str = ""
    """In the journal's folder; "" if nothing was saved. A near-duplicate is saved: it may be the better copy."""
    sha256: str = ""
    """Of what was fetched, 64 hex digits; "" if nothing was."""
    width: int = 0
    """Of the upright picture, in pixels; 0 if unknown, as the height."""
    height: int = 0
    dhash: str = ""
    """As in examine.Examined; "" if unknown."""
    size_bytes: int = 0
    """Of what was fetched."""


_HASHED = re.compile("[0-9a-f]{64} [0-9a-f]{16}-[0-9a-f]{54}")
_TYPES = {field.name: int if field.type == "int" else str for field in fields(Found)}


def read_journal(raw: Path) -> list[Found]:
    """Read RAW/collected.jsonl: of each address the last line, in the order of these lines; [] if there is no journal.

    Raises:
        DataError: a line, other than a half one at the end, is not what Journal writes.
    """
    path = raw / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{str(path)!r}: cannot be read: {error.strerror}. Check its permissions.") from error
    found: dict[str, Found] = {}
    for number, line in enumerate(data[: _whole(data)].splitlines(), start=1):
        entry = _parse(line)
        if entry is None:
            raise DataError(
                f"{str(path)!r} line {number}: not a line that collect writes. Take the line out, or move the folder "
                "away and collect anew."
            )
        found.pop(entry.url, None)
        found[entry.url] = entry
    return list(found.values())


class Journal:
    """Appends to RAW/collected.jsonl; to be used in a `with`. Safe with several threads, not with several processes.

    Raises:
        DiskError: on opening and on appending: the file cannot be written.
    """

    def __init__(self, raw: Path) -> None:
        self._path = raw / NAME
        self._lock = threading.Lock()

    def __enter__(self) -> Journal:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            whole = _whole(self._path.read_bytes())
            os.ftruncate(self._descriptor, whole)  # or the next line would be glued to half a line
            sync_folder(self._path.parent)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def append(self, found: Found) -> None:
        """Write a line, and return when it is on the disk. Raises DiskError."""
        left = memoryview(json.dumps(asdict(found)).encode("ascii") + b"\n")
        with self._lock:
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._failure(error) from error

    def _failure(self, error: OSError) -> DiskError:
        return DiskError(
            f"{self._path}: cannot be written: {error.strerror}. Free some space or choose another folder."
        )


def _whole(data: bytes) -> int:
    """The length of the part that consists of whole lines."""
    return data.rfind(b"\n") + 1


def _parse(line: bytes) -> Found | None:
    """The entry on a line, or None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != _TYPES:
        return None
    found = Found(**entry)
    # A name must not lead out of the folder, and what is saved was hashed.
    saved = "/" not in found.file_name and _HASHED.fullmatch(f"{found.sha256} {found.dhash}")
    return found if saved or not found.file_name else None
