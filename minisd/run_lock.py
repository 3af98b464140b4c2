"""One run at a time writes into an output folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from minisd.errors import DiskError, OutputInUseError, UsageError

log = logging.getLogger(__name__)


@contextmanager
def output_lock(output: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold OUTPUT/run.lock, which says who does: {"pid", "host", "started"}. The folder is made if missing.

    The lock goes with the process, however that ends. It is a POSIX record lock and not flock(2), whose lock would be
    shared with forked children: a DataLoader worker lives a few seconds longer than a parent that was killed.

    Args:
        output: the run's folder.
        patience: seconds to wait for another run to end: one whose torchrun was killed may still be saving.

    Raises:
        OutputInUseError: another run has it, naming its process and host.
        UsageError: there is a file in the place of the folder.
        DiskError: the folder or the file cannot be made.
    """
    path = output / "run.lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--output {str(output)!r}: expected a folder, got a file. Choose another name.") from error
    except OSError as error:
        raise DiskError(f"{error.filename}: {error.strerror}. Choose another folder.") from error
    try:
        _acquire(descriptor, path, patience)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": datetime.now(UTC).isoformat()}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        except OSError as error:
            raise DiskError(f"{path}: cannot be written: {error.strerror}. Free some space.") from error
        yield
    finally:
        os.close(descriptor)  # the file stays: to remove it would let two runs lock two files of one name


def _acquire(descriptor: int, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, as POSIX leaves open
            holder = _holder(descriptor)
            if time.monotonic() >= deadline:
                raise OutputInUseError(
                    f"{path.parent}: in use by {holder}. Wait for it, stop it, or choose another folder."
                ) from error
        except OSError as error:
            log.warning("%s: no locks here (%s): start no second run in this folder", path, error.strerror)
            return
        if not told:
            log.warning("%s: waiting for %s to end", path.parent, holder)
            told = True
        time.sleep(0.1)


def _holder(descriptor: int) -> str:
    """Who wrote the file, in words. It may be just being written."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(content['pid'])} on {content['host']} (since {content['started']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
