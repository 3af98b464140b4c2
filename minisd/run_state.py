"""What a training run is, where it stands, and how it goes on: the content of its checkpoints and of metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from minisd.atomic import write_atomically
from minisd.checkpoint import (
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from minisd.config import TrainConfig
from minisd.data import Example
from minisd.errors import CheckpointError, NonFiniteError, UsageError
from minisd.lora import lora_parameters, lora_weights
from minisd.lora_file import load_lora, lora_bytes
from minisd.lora_info import LoRAInfo

log = logging.getLogger(__name__)

# Options that may differ when a run is resumed: they change where it writes, what it keeps and how fast it goes, and
# with train_batch_size and gradient_accumulation_steps only how a step is split (the images a step are compared).
_FREE = {"data", "output", "revision", "variant", "train_batch_size", "gradient_accumulation_steps", "trigger", "debug",
         "num_train_epochs", "max_train_steps", "dataloader_num_workers", "checkpointing_steps",
         "checkpoints_total_limit", "resume_from_checkpoint"}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands: optimizer steps gone through, and how many of them float16 overflow made void."""

    step: int = 0
    skipped_steps: int = 0


def describe_run(config: TrainConfig, examples: Sequence[Example], images_per_step: int, steps: int) -> dict[str, Any]:
    """What must be the same when a run is resumed, for its result to be that of an uninterrupted run."""
    digest = hashlib.sha256()
    for example in examples:
        content = hashlib.sha256(example.path.read_bytes()).hexdigest()
        digest.update(f"{example.path.name}\0{content}\0{example.caption}\0".encode())
    options = {name: value for name, value in asdict(config).items() if name not in _FREE}
    options["alpha"] = config.scale_alpha
    return {**options, "images_per_step": images_per_step, "max_train_steps": steps, "dataset": digest.hexdigest()}


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """Find the checkpoint that --resume-from-checkpoint asks for; None for a run that starts anew.

    Raises:
        CheckpointError: the one named is damaged or missing, or all are damaged.
    """
    folder = config.output / "checkpoints"
    if config.resume_from_checkpoint == "latest":
        return newest_checkpoint(folder)
    if config.resume_from_checkpoint == "never":
        return None
    path = Path(config.resume_from_checkpoint)
    verify_checkpoint(path)
    return path


def set_aside(output: Path) -> None:
    """Move an earlier run's files in `output` to output/old-N, so that a new run neither mixes nor destroys them."""
    ours = [output / name for name in ("checkpoints", "metrics.jsonl", "config.json", "lora.safetensors")]
    present = [path for path in ours if path.exists()]
    if not present:
        return
    number = 1
    while (output / f"old-{number}").exists():
        number += 1
    (output / f"old-{number}").mkdir()
    for path in present:
        path.rename(output / f"old-{number}" / path.name)
    log.info("set an earlier run aside: %s", output / f"old-{number}")


def save_run(
    config: TrainConfig,
    progress: Progress,
    description: Mapping[str, Any],
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    info: LoRAInfo,
) -> Path:
    """Write a checkpoint of the run and drop those beyond --checkpoints-total-limit. On the main rank only."""
    parameters = lora_parameters(unet)
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"step {progress.step}: {name} is not finite; not saved. Lower the learning rate.")
    moments = {k: v.detach().cpu().contiguous() for k, v in optimizer_tensors(optimizer, parameters).items()}
    state = {"progress": asdict(progress), "loss_scale": scaler.state_dict(), "run": description}
    files = {
        "lora.safetensors": lora_bytes(lora_weights(unet), info),
        "optim.safetensors": safetensors.torch.save(moments),
        "state.json": json.dumps(state, indent=2).encode(),
    }
    folder = config.output / "checkpoints"
    path = save_checkpoint(folder, progress.step, files)
    prune_checkpoints(folder, config.checkpoints_total_limit)
    return path


def restore_run(
    checkpoint: Path,
    description: Mapping[str, Any],
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put a verified checkpoint back into the adapters, Adam and the loss scale.

    Raises:
        UsageError: the checkpoint is of a run with other settings, naming them.
        CheckpointError: its content does not fit the adapters.
    """
    state = json.loads((checkpoint / "state.json").read_bytes())
    saved = state["run"]
    odd = [f"{key} was {saved.get(key)!r}, now {description.get(key)!r}" for key in [*saved, *description]
           if saved.get(key) != description.get(key)]  # fmt: skip
    if odd:
        differences = "; ".join(dict.fromkeys(odd))
        raise UsageError(
            f"{checkpoint} is of a run with other settings: {differences}. Use the same settings, another --output, "
            "or --resume-from-checkpoint never."
        )
    parameters = lora_parameters(unet)
    weights, _ = load_lora(checkpoint / "lora.safetensors", unet)
    current = lora_weights(unet)
    if weights.keys() != current.keys():
        raise CheckpointError(f"{checkpoint}: its adapters are for other layers than this run's.")
    with torch.no_grad():
        for name, saved_weights in weights.items():
            current[name].down.copy_(saved_weights.down)
            current[name].up.copy_(saved_weights.up)
    load_optimizer(optimizer, parameters, safetensors.torch.load((checkpoint / "optim.safetensors").read_bytes()))
    if state["loss_scale"]:
        scaler.load_state_dict(state["loss_scale"])
    return Progress(**state["progress"])


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`: a run that was killed had gone on past its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the line being written when the run was killed
            break
    write_atomically(path, "".join(kept).encode())
