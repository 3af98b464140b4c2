"""What a training run is, where it stands, and how it goes on: the content of its checkpoints and of metrics.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from minisd.atomic import remove_leftovers, write_atomically
from minisd.checkpoint import (
    check_space,
    checkpoints_in,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from minisd.command_line import as_json
from minisd.config import TrainConfig
from minisd.distributed import Distributed, gather, wait_for_all
from minisd.errors import CheckpointError, DiskError, NonFiniteError, UsageError
from minisd.held_out import Pictures
from minisd.lora import copy_lora_weights, lora_parameters, lora_weights
from minisd.lora_info import LoRAInfo
from minisd.lora_reader import load_lora
from minisd.lora_writer import lora_bytes
from minisd.optimizer import load_optimizer, optimizer_tensors
from minisd.run_setup import init_lora_sha256

log = logging.getLogger(__name__)

# Options that may differ when a run is resumed: they change where it writes, what it shows and how fast it goes, and
# with train_batch_size, gradient_accumulation_steps and global_batch_size only how a step is split (the images a step
# are compared). What the trigger does is in the captions, which are compared.
_FREE = {"data", "output", "revision", "variant", "cache_dir", "cache_latents", "train_batch_size", "trigger", "debug",
         "gradient_accumulation_steps", "global_batch_size", "num_train_epochs", "max_train_steps", "alpha",
         "dataloader_num_workers", "gradient_checkpointing", "checkpointing_steps", "checkpoints_total_limit",
         "resume_from_checkpoint", "allow_change", "validation_prompts", "validation_steps", "validation_num_images",
         "validation_inference_steps", "validation_guidance_scale", "validation_data", "report_to", "report",
         "push_to_hub", "hub_model_id", "hub_private_repo", "hub_license", "preflight", "dist_timeout", "model",
         "init_lora", "lora_format"}  # fmt: skip
# What a run leaves in OUTPUT, beside the cache, which any run may use.
_WRITTEN = ("checkpoints", "metrics.jsonl", "config.json", "lora.safetensors", "samples", "tensorboard",
            "wandb_run_id", "bad_batch.json", "pictures.csv", "validation.jsonl", "probe.json", "evaluation",
            "report.html")  # fmt: skip
_LARGEST_WEIGHT = 1e4  # beyond it a LoRA is of no use, and float16 is near its end


@dataclass
class Progress:
    """Where a run stands: optimizer steps gone through, how many of them float16 overflow made void, and how many of
    those were the last ones.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def describe_run(
    config: TrainConfig,
    pictures: Pictures,
    *,
    resolution: int,
    images_per_step: int,
    steps: int,
    weights: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same when a run is resumed, for its result to be that of an uninterrupted run.

    Args:
        config: the options.
        pictures: that are trained on.
        resolution: the model's own if the option is not given.
        images_per_step: pictures in a step.
        steps: length of the run.
        weights: network -> weights.weights_id of it.
    """
    digest = hashlib.sha256()
    for example, survey in zip(pictures.examples, pictures.surveys, strict=True):
        digest.update(json.dumps([example.path.name, survey.sha256, example.captions]).encode())
    options = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {
        **options,
        "resolution": resolution,
        "alpha": config.scale_alpha,
        "validation_split": config.validation_split or None,  # as a checkpoint from before there was this option
        "init_lora": init_lora_sha256(config),
        "images_per_step": images_per_step,
        "max_train_steps": steps,
        "dataset": digest.hexdigest(),
        **{f"model_{name}": identity for name, identity in weights.items()},
    }


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
    present = [path for name in _WRITTEN if (path := output / name).exists()]
    if not present:
        return
    present += [card for card in [output / "README.md"] if card.exists()]  # alone it may be the user's own
    number = 1
    while (output / f"old-{number}").exists():
        number += 1
    (output / f"old-{number}").mkdir()
    for path in present:
        path.rename(output / f"old-{number}" / path.name)
    log.info("set an earlier run aside: %s", output / f"old-{number}")


@dataclass(frozen=True)
class TrainingState:
    """Everything a checkpoint holds, by reference: what is saved is what it is at that moment."""

    unet: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    description: Mapping[str, Any]
    info: LoRAInfo


def save_run(config: TrainConfig, state: TrainingState, circumstances: Mapping[str, Any]) -> Path:
    """Write a checkpoint of the run and drop those beyond --checkpoints-total-limit. On the main rank only.

    Args:
        config: where to, and how many are kept.
        state: of the run, between two steps.
        circumstances: what does not decide the result and is good to know: processes, torch's version ...

    Raises:
        NonFiniteError: a weight is not finite, or absurdly large; nothing is saved.
        DiskError: it could not be written; the checkpoints before it are untouched.
    """
    parameters = lora_parameters(state.unet)
    for name, parameter in parameters:
        if not (parameter.detach().abs().max() <= _LARGEST_WEIGHT):  # NaN is not
            raise NonFiniteError(
                f"step {state.progress.step}: {name} is not finite or beyond {_LARGEST_WEIGHT:g}; not saved. Lower "
                "--learning-rate."
            )
    content = {
        "progress": asdict(state.progress),
        "loss_scale": state.scaler.state_dict(),
        "run": dict(state.description),
        "circumstances": dict(circumstances),
    }
    files = {
        "lora.safetensors": lora_bytes({"unet": lora_weights(state.unet)}, state.info),
        "optim.safetensors": safetensors.torch.save(optimizer_tensors(state.optimizer, parameters)),
        "state.json": json.dumps(content, indent=2).encode(),
    }
    folder = config.output / "checkpoints"
    check_space(folder, int(1.2 * sum(map(len, files.values()))))
    path = save_checkpoint(folder, state.progress.step, files)
    prune_checkpoints(folder, config.checkpoints_total_limit)
    return path


def restore_run(checkpoint: Path, state: TrainingState, allow_change: Collection[str]) -> None:
    """Put a verified checkpoint back into the adapters, Adam, the loss scale and the progress.

    Raises:
        UsageError: the checkpoint is of a run with other settings, and they are not all in allow_change; names them.
        CheckpointError: its content does not fit the adapters.
    """
    saved = json.loads((checkpoint / "state.json").read_bytes())
    _compare(checkpoint, saved["run"], state.description, allow_change)
    parameters = lora_parameters(state.unet)
    weights = load_lora(checkpoint / "lora.safetensors", {"unet": state.unet}).parts["unet"]
    current = lora_weights(state.unet)
    if {n: (w.down.shape, w.up.shape) for n, w in weights.items()} != {
        n: (w.down.shape, w.up.shape) for n, w in current.items()
    }:
        raise CheckpointError(f"{checkpoint}: its adapters are for other layers than this run's, or of another rank.")
    copy_lora_weights(weights, state.unet)
    moments = safetensors.torch.load((checkpoint / "optim.safetensors").read_bytes())
    load_optimizer(state.optimizer, parameters, moments)
    if saved["loss_scale"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(saved["loss_scale"])
    for name, value in saved["progress"].items():
        setattr(state.progress, name, value)


def start_or_resume(config: TrainConfig, dist: Distributed, state: TrainingState) -> None:
    """Put back the checkpoint that is asked for, if any, and make the output folder ready. All processes together.

    Raises:
        UsageError: the checkpoint is of a run with other settings.
        CheckpointError: there are checkpoints, and none that can be used.
        DiskError: there is no room for what the run will write, or the processes do not share the output folder.
    """
    checkpoint = checkpoint_to_resume(config)
    seen = gather(dist, [str(checkpoint), (config.output / "run.lock").exists()])
    if any(other != seen[0] for other in seen):
        raise DiskError(f"{config.output}: not the same for all processes. Put --output on a disk that they share.")
    if checkpoint is not None:
        restore_run(checkpoint, state, config.allow_change)
    wait_for_all(dist)  # all have read before one writes
    if dist.is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(config.output)
        weights = sum(parameter.nbytes for _, parameter in lora_parameters(state.unet))
        to_come = config.checkpoints_total_limit + 1 - len(checkpoints_in(config.output / "checkpoints"))
        check_space(config.output, int(1.2 * 3 * weights * max(1, to_come)))  # weights and Adam's two moments
        if checkpoint is None:
            set_aside(config.output)
        else:
            for name in ("metrics.jsonl", "validation.jsonl"):
                rewind_metrics(config.output / name, state.progress.step)
        write_if_new(config.output / "config.json", as_json(config).encode())


def _compare(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: Collection[str]) -> None:
    """Refuse a checkpoint of another run; what is allowed to differ is logged."""
    unknown = sorted(set(allow_change) - now.keys())
    if unknown:
        raise UsageError(f"--allow-change {unknown[0]}: expected one of {', '.join(sorted(now))}.")
    odd = {
        key: f"{key} was {saved.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    }
    refused = [text for key, text in odd.items() if key not in allow_change]
    if refused:
        options = " ".join(f"--allow-change {key}" for key in odd if key not in allow_change)
        raise UsageError(
            f"{checkpoint} is of a run with other settings: {'; '.join(refused)}. Use the same settings; or another "
            f"--output; or --resume-from-checkpoint never to start anew; or {options} to go on all the same."
        )
    for text in odd.values():
        log.warning("resuming with a change, as allowed: %s", text)


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl, or validation.jsonl, after `step`: a run that was killed had gone on past its
    last checkpoint.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the line being written when the run was killed
            break
    write_if_new(path, "".join(kept).encode())


def write_if_new(path: Path, data: bytes) -> None:
    """Write a file unless that is what it holds: a run that is complete is not touched. Raises DiskError."""
    if not (path.exists() and path.read_bytes() == data):
        write_atomically(path, data)
