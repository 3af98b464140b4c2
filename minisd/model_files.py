"""The two kinds of file a model is made of, JSON and safetensors, read with suspicion.

A file that is something else is named for what it is; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisd.errors import WeightsError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONVERT_HINT = (
    "Pickled weights can run code when opened, so minisd never opens them; convert the model with "
    "https://huggingface.co/spaces/safetensors/convert, or with diffusers' save_pretrained on a machine you can lose"
)

_MAX_JSON_BYTES = 16_000_000
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_TENSORS = 20_000  # SDXL has 1,680; opening 200,000 takes seconds


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header: dtype in the format's spelling ("F32", "BF16", ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds, before any of it is loaded."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. NaN and Infinity, which JSON does not have, are refused.

    Raises:
        WeightsError: the file is missing, too large, not JSON, or not an object.
    """
    if _size_of(path) > _MAX_JSON_BYTES:
        raise WeightsError(f"{path}: a configuration of more than {_MAX_JSON_BYTES} bytes is not read.")
    try:
        with _opened(path) as file:
            value = json.loads(file.read(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({str(error)[:100]}). Download it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_header(path: Path, *, convert_hint: str = CONVERT_HINT) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    The library checks offsets and dtypes when the file is opened; here is what it does not see (a key given twice) or
    reports misleadingly (an HTML page as "header too large").

    Args:
        path: the file.
        convert_hint: what to do about a file that is pickled.

    Raises:
        WeightsError: the file is missing, truncated, damaged, or something else than safetensors.
    """
    size = _size_of(path)
    with _opened(path) as file:
        start = file.read(512)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise WeightsError(f"{path}: {_what_it_is(start, convert_hint)}")
        if 8 + length > size:
            raise WeightsError(f"{path}: truncated inside its header, at {size} bytes. Download it again.")
        if length > _MAX_HEADER_BYTES:
            raise WeightsError(f"{path}: the header has {length} bytes, the format allows {_MAX_HEADER_BYTES}.")
        file.seek(8)
        raw = file.read(length)
    try:
        header, end = _parse_header(raw)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path}: the header is damaged ({str(error)[:100]}). Download it again.") from error
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise WeightsError(f"{path}: {state}: expected {expected} bytes, got {size}. Download it again.")
    return header


def read_tensors(path: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Load the named tensors of a safetensors file one after the other, as stored, on the CPU.

    Raises:
        WeightsError: the file is damaged.
    """
    try:
        # "pread" copies: a mapped file that is truncated or replaced later would kill the process (SIGBUS).
        with safe_open(str(path), framework="pt", backend="pread") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged ({str(error)[:200]}). Download it again.") from error


def sha256_of(path: Path) -> str:
    """Hash a file, in hex digits; one that was hashed before and is unchanged is not read again.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        status = path.stat()
        return _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Size and time of change are there for the cache to notice that it is another file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_of(path: Path) -> int:
    """Size in bytes of a regular file; opening a pipe instead would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise WeightsError(f"{path}: cannot be read: {reason}.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a special file"
        raise WeightsError(f"{path}: expected a file, got {kind}.")
    return status.st_size


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}.") from error


def _what_it_is(start: bytes, convert_hint: str) -> str:
    """Name the contents of a file that does not begin like safetensors."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty. Download it again."
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its repository."
    if start.startswith(b"PK\x03\x04"):
        return f"a zip archive, as torch.save writes it. {convert_hint}."
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a Python pickle. {convert_hint}."
    if text.startswith(b"<"):
        return "an HTML page, saved in place of the weights (a login or error page?). Download it again."
    if text.startswith(b"{"):
        return "JSON text, not weights (an error message of the server?). Download it again."
    return "not a safetensors file, or its beginning is damaged. Download it again."


def _parse_header(raw: bytes) -> tuple[Header, int]:
    """Parse a safetensors header into its tensors and the end of their data, in bytes after the header.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError: it is of another form.
    """
    entries = json.loads(raw, object_pairs_hook=_without_duplicates)
    metadata = entries.pop("__metadata__", None) or {}
    if any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    if len(entries) > _MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, more than any model has")
    tensors = {name: TensorInfo(str(e["dtype"]), tuple(int(n) for n in e["shape"])) for name, e in entries.items()}
    end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    return Header(tensors, metadata), end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; of a key given twice, other readers silently take the last."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {name!r} twice")
        result[name] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
