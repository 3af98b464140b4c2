"""Files that appear whole or not at all: write beside, sync, rename, sync the folder.

A rename is atomic but not durable: without the syncs a power cut can leave the new name on an empty file.
"""

from __future__ import annotations

import os
from pathlib import Path

from minisd.errors import DiskError


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`, replacing what was there, or leave everything as it was.

    Raises:
        DiskError: the disk is full, the folder missing or not writable; names the path.
    """
    staging = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_synced(staging, data)
        staging.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}. Free some space or choose another folder.") from error
    finally:
        staging.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and return when it is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
