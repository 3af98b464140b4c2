"""The state of a training run on disk: written whole or not at all, checked when read.

A checkpoint is a folder OUTPUT/checkpoints/step-000500/ with

    lora.safetensors     the adapter, an ordinary LoRA file
    optim.safetensors    Adam's moments and step counts, by parameter name
    state.json           the step, the loss scale, and what the run is (see train.py)
    manifest.json        sizes and SHA-256 of the others, written last

It is staged beside, every file and the folder synced, renamed, and read back. Neither safetensors nor torch notices a
flipped bit, so nothing is loaded that the manifest does not vouch for. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.atomic import sync_folder, write_synced
from minisd.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_STAGING = re.compile(r"\.tmp-step-\d{6,}-(\d+)")


def save_checkpoint(folder: Path, step: int, files: Mapping[str, bytes]) -> Path:
    """Write a checkpoint of `step` into `folder` and verify it.

    Args:
        folder: OUTPUT/checkpoints; made if missing.
        step: optimizer updates made so far.
        files: file name -> content.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written; what was there before is untouched.
        CheckpointError: what was read back is not what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, staging = folder / f"step-{step:06d}", folder / f".tmp-step-{step:06d}-{os.getpid()}"
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=2).encode()
    try:
        staging.mkdir()
        for name, data in [*files.items(), (MANIFEST, manifest)]:
            write_synced(staging / name, data)
        sync_folder(staging)
        verify_checkpoint(staging)
        if final.exists():  # a damaged one that this run has come past again
            old = folder / f".tmp-step-{step:06d}-{os.getpid()}-old"
            final.rename(old)
            staging.rename(final)
            shutil.rmtree(old)
        else:
            staging.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def verify_checkpoint(path: Path) -> int:
    """Check a checkpoint against its manifest; returns its step.

    Raises:
        CheckpointError: a file is missing, cut short or changed, naming it and why.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, step, entries = manifest["format"], manifest["step"], manifest["files"].items()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not a checkpoint (no {MANIFEST}). Give a folder named step-NNNNNN.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: damaged. Use an older checkpoint.") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {version!r}, this minisd reads {FORMAT}.")
    for name, entry in entries:
        file = path / name
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}. Use an older checkpoint.") from error
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            found = f"{len(data)} bytes" if len(data) != entry["size"] else "other content"
            raise CheckpointError(
                f"{file}: expected {entry['size']} bytes as saved, got {found}. Use an older checkpoint."
            )
    return int(step)


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
    """Delete all but the newest `keep` sound checkpoints, and what dead processes left half-written."""
    sound = []
    for path in checkpoints_in(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError:
            continue  # it does not count towards those kept, and whoever wants to look at it may
        sound.append(path)
    stale = [path for path in folder.iterdir() if (m := _STAGING.match(path.name)) and not _is_alive(int(m[1]))]
    for path in sound[:-keep] + stale:
        try:
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            log.warning("could not delete %s: %s", path, error.strerror)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Adam's state as tensors named "{parameter}/{item}"; empty before the first update."""
    return {
        f"{name}/{item}": value
        for name, parameter in parameters
        for item, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """Put Adam's state back. torch's own load_state_dict takes wrong shapes silently and fails a step later.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    expected = {
        f"{name}/{item}": () if item == "step" else tuple(parameter.shape)
        for name, parameter in parameters
        for item in ("step", "exp_avg", "exp_avg_sq")
    }
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        odd = next(key for key in [*expected, *found] if found.get(key) != expected.get(key))
        raise CheckpointError(
            f"optim.safetensors: {odd}: expected shape {expected.get(odd)}, got {found.get(odd)}. "
            "It belongs to another run."
        )
    for name, parameter in parameters:
        moments = {item: tensors[f"{name}/{item}"].to(parameter.device) for item in ("exp_avg", "exp_avg_sq")}
        # The step count stays on the CPU, where AdamW made it: on the device every update would wait for it.
        optimizer.state[parameter] = {"step": tensors[f"{name}/step"].clone(), **moments}
