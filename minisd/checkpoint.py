"""The state of a training run on disk: written whole or not at all, checked when read.

A checkpoint is a folder OUTPUT/checkpoints/step-000500/ with

    lora.safetensors     the adapter, an ordinary LoRA file
    optim.safetensors    Adam's moments and step counts, by parameter name
    state.json           the step, the loss scale, and what the run is (see run_state.py)
    manifest.json        sizes and SHA-256 of the others, written last

It is staged beside, every file and the folder synced, read back, and renamed. Neither safetensors nor torch notices a
flipped bit, so nothing is loaded that the manifest does not vouch for. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from minisd.atomic import delete, remove_leftovers, staging_name, sync_folder, write_synced
from minisd.errors import CheckpointError, DiskError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_OLDER = "Use an older checkpoint"


def check_space(folder: Path, needed: int) -> None:
    """Find out now, not after hours of work, whether there is room for `needed` bytes in a folder, existing or not.

    Raises:
        DiskError: there is less. Quotas are not seen here.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskError(f"{folder}: {needed} bytes are needed, {free} are free. Free some, or choose another --output.")


def save_checkpoint(folder: Path, step: int, files: Mapping[str, bytes]) -> Path:
    """Write a checkpoint of `step` into `folder` and verify it.

    Args:
        folder: OUTPUT/checkpoints; made if missing.
        step: optimizer updates made so far.
        files: file name -> content.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: it could not be written; earlier checkpoints are untouched.
        CheckpointError: what was read back is not what was written.
    """
    final = folder / f"step-{step:06d}"
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2).encode()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        _write(final, {**files, MANIFEST: manifest})
    except OSError as error:
        raise _disk_error(final, sum(map(len, files.values())) + len(manifest), error) from error
    return final


def _write(final: Path, files: Mapping[str, bytes]) -> None:
    staging = staging_name(final)
    delete(staging)  # of a crashed process that had our number
    try:
        staging.mkdir()
        for name, data in files.items():
            write_synced(staging / name, data)
        sync_folder(staging)
        verify_checkpoint(staging)
        aside = _set_aside(final) if final.exists() else None  # a damaged one that this run has come past again
        staging.rename(final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if aside is not None:
        delete(aside)


def _set_aside(path: Path) -> Path:
    """Take a checkpoint's name from it in one operation; what deletes it may then be killed half-way."""
    aside = staging_name(path.with_name(f"{path.name}-old"))
    delete(aside)
    path.rename(aside)
    return aside


def _disk_error(path: Path, needed: int, error: OSError) -> DiskError:
    try:
        free = f"{shutil.disk_usage(path.parent).free} are free"
    except OSError:
        free = "its folder is gone"
    kept = checkpoints_in(path.parent)
    last = f"the newest checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
    return DiskError(
        f"{path}: cannot be written: {error.strerror} ({needed} bytes are needed, {free}); {last}. Free some space and "
        "start the same command again."
    )


def verify_checkpoint(path: Path) -> int:
    """Check a checkpoint against its manifest; returns its step.

    Raises:
        CheckpointError: a file is missing, extra, cut short or changed, naming it and why.
    """
    step, entries = _read_manifest(path)
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{path / MANIFEST}: of step {step}, expected {int(named[1])} by the folder. {_OLDER}.")
    odd = {file.name for file in path.iterdir()} ^ {MANIFEST, *entries}
    if odd:
        name = min(odd)
        how = "missing" if name in entries else "not part of the checkpoint"
        raise CheckpointError(f"{path / name}: {how}. {_OLDER}.")
    for name, (size, digest) in entries.items():
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file}: expected a file. {_OLDER}.")
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}. {_OLDER}.") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            found = f"{len(data)} bytes" if len(data) != size else "other content"
            raise CheckpointError(f"{file}: expected {size} bytes as saved, got {found}. {_OLDER}.")
    return step


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and size and SHA-256 of each file by name. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, step = manifest["format"], int(manifest["step"])
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError as error:
        what = f"not a checkpoint (no {MANIFEST})" if path.exists() else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}. Give a folder named step-NNNNNN.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}. Give a folder named step-NNNNNN.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: damaged. {_OLDER}.") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {version!r}, this minisd reads {FORMAT}.")
    return step, entries


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first, sound or not. Other entries are not ours."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir()]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint; None if there are none at all.

    Raises:
        CheckpointError: there are some, but none is sound. Starting over silently would lose the run.
    """
    candidates = checkpoints_in(folder)
    for path in reversed(candidates):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"{folder}: none of {len(candidates)} checkpoints is sound. Restore one, or start anew with "
            "--resume-from-checkpoint never."
        )
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` sound checkpoints, and what dead processes left half-written.

    A damaged one does not count towards those kept, and stays for whoever wants to look at it. What cannot be deleted
    is named in a warning.

    Args:
        folder: OUTPUT/checkpoints.
        keep: at least 1.
    """
    sound = []
    for path in checkpoints_in(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue
        sound.append(path)
    for path in sound[:-keep]:
        try:
            _set_aside(path)
        except OSError as error:
            log.warning("could not delete %s: %s", path, error.strerror)
    remove_leftovers(folder)
