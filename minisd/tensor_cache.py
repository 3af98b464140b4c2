"""Tensors on disk by key: what is costly to compute and follows from its key alone is computed once.

A cache is a folder of shards, safetensors files that are written whole and never changed, each with many tensors and
their SHA-256. One file a tensor would do for a hundred pictures; a million pictures are about four thousand shards of
64 MiB (at 512 pixels in half precision). Only the shards' headers are held in memory, some 300 bytes a tensor; the
operating system decides how much of the rest stays there.

A key must name everything the tensor depends on. Then nothing in a cache is ever out of date, several runs may share
one, and any shard may be deleted at any time but during a run.
"""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minisd.atomic import write_atomically
from minisd.errors import DiskError, WeightsError
from minisd.model_files import read_header

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
_MOST_TENSORS = 4096  # in a shard: a header with too many is refused by read_header


class TensorCache:
    """The tensors in a folder.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, str]] = {}  # key -> shard, SHA-256
        self._shards: set[Path] = set()  # whose headers have been read
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}. Choose another --cache-dir.") from error
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that other processes have written. A damaged one is passed over, with a warning."""
        for path in sorted({*self.folder.glob("*.safetensors")} - self._shards):
            try:
                header = read_header(path)
            except WeightsError as error:
                log.warning("damaged shard passed over, what it held is made anew, so delete it: %s", error)
                continue
            sums = header.metadata
            self._places |= {key: (path, sums[key]) for key in header.tensors if key in sums}
            self._shards.add(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        """Read a tensor, on the CPU.

        Raises:
            KeyError: it is not there.
            DiskError: its bytes are not those that were written.
        """
        path, expected = self._places[key]
        try:
            tensor: Tensor = _open(path).get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise DiskError(f"{path}: {error}. Start again: what is missing is made anew.") from error
        if _sha256(tensor) != expected:
            raise DiskError(f"{path}: damaged since it was written. Delete it and start again: it is made anew.")
        return tensor

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor; it is there after the next `flush`, which comes by itself every 64 MiB.

        Raises:
            DiskError: it cannot be written.
        """
        # A copy: it may be changed or be part of another one, which safetensors refuses.
        self._pending[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= SHARD_BYTES or len(self._pending) >= _MOST_TENSORS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added. Shards are named by their content: no two writers are in each other's way.

        Raises:
            DiskError: it cannot be written.
        """
        if not self._pending:
            return
        sums = {key: _sha256(tensor) for key, tensor in self._pending.items()}
        name = hashlib.sha256(repr(sums).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        write_atomically(path, safetensors.torch.save(self._pending, metadata=sums))
        self._places |= {key: (path, digest) for key, digest in sums.items()}
        self._shards.add(path)
        self._pending, self._pending_bytes = {}, 0
        _open.cache_clear()  # a damaged shard of that name may have been open


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


@lru_cache(maxsize=32)  # files that are open; opening one again costs a millisecond
def _open(path: Path) -> Any:
    """Open a shard for reading. "pread" copies: a mapped file that is cut short would kill the process."""
    return safetensors.safe_open(path, framework="pt", backend="pread").__enter__()  # type: ignore[no-untyped-call]
