"""A file appears whole or not at all, whatever stops the program in between."""

from __future__ import annotations

import os
from pathlib import Path

from minisd.errors import DiskError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under another name, make it durable, then give it its name, replacing an older file.

    A crash at any moment leaves the old file or the new one; at worst also ".tmp-NAME-PID" beside it.

    Args:
        path: in a folder that exists. The mode is the umask's.
        data: the whole contents.

    Raises:
        DiskError: it could not be written. An older file of that name is still there, the staged one is not.
    """
    staged = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        try:
            write_synced(staged, data)
            staged.replace(path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        free = "Free some space or choose another folder"
        raise DiskError(f"{path}: cannot be written ({len(data)} bytes): {error.strerror}. {free}.") from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and return when its content is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: fsync of a file alone does not keep its name through a power cut.

    Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
