"""A file appears whole or not at all, whatever stops the program in between."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from minisd.errors import DiskError

log = logging.getLogger(__name__)

_STAGED = re.compile(r"\.tmp-.+-(\d+)", re.DOTALL)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under another name, make it durable, then give it its name, replacing an older file.

    A crash at any moment leaves the old file or the new one; at worst also ".tmp-NAME-PID" beside it.

    Args:
        path: in a folder that exists. The mode is the umask's.
        data: the whole contents.

    Raises:
        DiskError: it could not be written. An older file of that name is still there, the staged one is not.
    """
    staged = staging_name(path)
    try:
        try:
            write_synced(staged, data)
            staged.rename(path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        free = "Free some space or choose another folder"
        raise DiskError(f"{path}: cannot be written ({len(data)} bytes): {error.strerror}. {free}.") from error


def staging_name(path: Path) -> Path:
    """The name beside `path` that is for what is not whole: ".tmp-NAME-PID"."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and return when its content is on the disk. Raises OSError.

    By the calls of the operating system, so that a test can let each of them fail.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]  # it may write less, and does so at 2 GiB
        os.fsync(descriptor)  # the error of an earlier write may come only here, and only once
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: fsync of a file alone does not keep its name through a power cut.

    Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what died half-written in a folder: files and folders named as by `staging_name`, of no living process.

    Call it where this process itself has nothing staged. What cannot be deleted is named in a warning.
    """
    for path in folder.iterdir():
        staged = _STAGED.fullmatch(path.name)
        # Our own number is that of an earlier process, too: in a container it is the same again and again.
        if staged and (int(staged[1]) == os.getpid() or not _is_alive(int(staged[1]))):
            delete(path)


def delete(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder; a failure is a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("could not delete %s: %s", path, error.strerror)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
