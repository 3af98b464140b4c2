"""Train a LoRA into the attention projections of Stable Diffusion's UNet.

    python train.py --data DIR                                      one process
    torchrun --nproc-per-node=2 train.py --data DIR --output OUT    one process a GPU (gloo on CPU)

The loop is in `train`. A step is one optimizer update; a micro-step is one forward and backward pass. Everything random
about a sample is a function of (seed, its position in the run): see minisd/draws.py.
"""

import sys

from minisd.config import TrainConfig, as_json, parse_args

CONFIG = parse_args(TrainConfig) if __name__ == "__main__" else None  # before torch: --help and refusals at once

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minisd import draws
from minisd.atomic import write_atomically
from minisd.data import CaptionedImages, check_pictures, read_dataset, training_batches
from minisd.distributed import Distributed, process_group, sum_gradients, sum_over_ranks, wait_for_all
from minisd.errors import NonFiniteError, UsageError, run_script
from minisd.hub import resolve_model
from minisd.lora import TARGETS, inject_lora, lora_parameters, lora_weights
from minisd.lora_file import save_lora
from minisd.lora_info import LoRAInfo, base_model_version
from minisd.run_state import (
    Progress,
    checkpoint_to_resume,
    describe_run,
    restore_run,
    rewind_metrics,
    save_run,
    set_aside,
)
from minisd.sampling import native_size
from minisd.training import Precision, diffusion_loss, draw_for, lr_at
from minisd.vae import scale_latents
from minisd.weights import StableDiffusion, load_model

log = logging.getLogger("train")


def train(config: TrainConfig, dist: Distributed) -> Path:
    """Train an adapter; returns the path of the LoRA file.

    Args:
        config: the options.
        dist: this process among the others. All run this function; the main one writes.

    Raises:
        MinisdError: bad data, weights, checkpoint or settings, a full disk, or a loss that is not finite.
    """
    # --- data and plan ---
    examples = read_dataset(config.data)
    check_pictures(examples[dist.rank :: dist.world_size])
    images_per_step = dist.world_size * config.gradient_accumulation_steps * config.train_batch_size
    max_train_steps = steps_of_run(config, len(examples), images_per_step)
    if dist.is_main:
        resolve_model(config.model, revision=config.revision, variant=config.variant)  # downloads once, for all
    wait_for_all(dist)

    # --- model, adapter, optimizer ---
    precision = Precision(config.mixed_precision, dist.device.type)
    model = load_model(
        config.model, revision=config.revision, variant=config.variant, dtype=precision.dtype, device=dist.device
    )
    unet, vae, schedule = model.unet.train(), model.vae, model.schedule.to(dist.device)
    adapted = add_adapter(config, unet)
    parameters = [parameter for _, parameter in lora_parameters(unet)]  # a list: AdamW would use an iterator up
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = precision.scaler()

    # --- where the run stands ---
    resolution = resolution_of(config, model)
    side = resolution // vae.pixels_per_latent
    latent_shape = (vae.config.latent_channels, side, side)
    description = describe_run(config, examples, images_per_step, max_train_steps)
    info = lora_info(config, model, resolution, max_train_steps)
    progress = start_or_resume(config, dist, description, unet, optimizer, scaler)
    log.info(plan_of(config, len(examples), len(adapted), images_per_step, max_train_steps, progress))

    # --- the loop ---
    dataset = CaptionedImages(
        examples, resolution, center_crop=config.center_crop, random_flip=config.random_flip, seed=config.seed
    )
    batches = training_batches(dataset, config, dist, progress.step, max_train_steps)
    bar = tqdm(total=max_train_steps, initial=progress.step, desc="train", unit="step", disable=not dist.is_main)
    while progress.step < max_train_steps:
        started = time.monotonic()
        lr = lr_at(
            progress.step - progress.skipped_steps,
            learning_rate=config.learning_rate,
            warmup_steps=config.lr_warmup_steps,
            max_train_steps=max_train_steps,
            scheduler=config.lr_scheduler,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss_sum = torch.zeros((), device=dist.device)  # stays on the device: nothing waits inside an accumulation
        positions: list[int] = []
        for _ in range(config.gradient_accumulation_steps):
            batch = next(batches)
            positions += batch.positions
            drawn = draw_for(
                batch.positions, config.seed, latent_shape, schedule.config.num_train_timesteps, dist.device
            )
            with torch.no_grad():
                posterior = vae.encode(batch.pixel_values.to(dist.device, precision.dtype))
                latents = scale_latents(vae, posterior, drawn.posterior_noise)  # [B, 4, h, w] float32
                encoder_hidden_states = model.text_encoder(batch.captions)  # [B, S, E]
            torch.manual_seed(draws.dropout_seed(config.seed, batch.positions[0]))
            loss = diffusion_loss(unet, schedule, latents, drawn, encoder_hidden_states, precision)
            # The mean over the step's images: over the micro-batch already, over micro-steps and ranks by division.
            loss = loss / (config.gradient_accumulation_steps * dist.world_size)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()

        sum_gradients(dist, parameters)
        scaler.unscale_(optimizer)  # so that the true gradients are clipped, not the scaled ones
        max_norm = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        mean_loss = sum_over_ranks(dist, loss_sum).item()
        if not math.isfinite(mean_loss) or (not math.isfinite(grad_norm) and not scaler.is_enabled()):
            raise non_finite(progress.step, mean_loss, grad_norm, [dataset.path_of(position) for position in positions])
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.skipped_steps += scaler.get_scale() < scale  # float16 overflow: no update, and the rate waits too

        if dist.is_main:
            seconds = time.monotonic() - started
            append_metrics(config.output, progress, mean_loss, lr, grad_norm, images_per_step, seconds)
            rate = f"{images_per_step / seconds:.1f}/s"
            bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{lr:.2e}", images=rate, refresh=False)
            bar.update()
            if progress.step % config.checkpointing_steps == 0 or progress.step == max_train_steps:
                save_run(config, progress, description, unet, optimizer, scaler, info)
    bar.close()

    path = config.output / "lora.safetensors"
    if dist.is_main:
        save_lora(path, lora_weights(unet), info)
        log.info("wrote %s", path)
    wait_for_all(dist)
    return path


def add_adapter(config: TrainConfig, unet: nn.Module) -> list[str]:
    """Put the new adapter into the UNet; returns the paths of its layers. Raises UsageError for an impossible rank."""
    try:
        return inject_lora(
            unet,
            TARGETS[config.lora_targets],
            rank=config.rank,
            alpha=config.scale_alpha,
            dropout=config.lora_dropout,
            seed=config.seed,
        )
    except ValueError as error:
        raise UsageError(f"--rank {config.rank}, --lora-targets {config.lora_targets}: {error}.") from error


def resolution_of(config: TrainConfig, model: StableDiffusion) -> int:
    """Side of the training pictures in pixels. Raises UsageError if the VAE cannot halve it often enough."""
    resolution = native_size(model) if config.resolution is None else config.resolution
    if resolution % model.vae.pixels_per_latent:
        raise UsageError(f"--resolution {resolution}: expected a multiple of {model.vae.pixels_per_latent}.")
    return resolution


def start_or_resume(
    config: TrainConfig,
    dist: Distributed,
    description: Mapping[str, Any],
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put back the checkpoint that is asked for, if any, and make the output folder ready."""
    checkpoint = checkpoint_to_resume(config)
    progress = Progress()
    if checkpoint is not None:
        progress = restore_run(checkpoint, description, unet, optimizer, scaler)
    wait_for_all(dist)  # all have read before one writes
    if dist.is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            set_aside(config.output)
        else:
            rewind_metrics(config.output / "metrics.jsonl", progress.step)
        write_atomically(config.output / "config.json", as_json(config).encode())
    return progress


def steps_of_run(config: TrainConfig, images: int, images_per_step: int) -> int:
    """Length of the run in optimizer steps."""
    if config.num_train_epochs is not None:
        return math.ceil(config.num_train_epochs * images / images_per_step)
    return 2000 if config.max_train_steps is None else config.max_train_steps


def plan_of(
    config: TrainConfig, images: int, layers: int, images_per_step: int, max_train_steps: int, progress: Progress
) -> str:
    """The plan in words, for the user to check before anything runs."""
    epochs = max_train_steps * images_per_step / images
    start = f"resuming at step {progress.step}" if progress.step else "from step 0"
    return (
        f"{images} images, {images_per_step} a step, {max_train_steps} steps ({epochs:.1f} epochs), {start}; rank "
        f"{config.rank}, alpha / rank {config.scale_alpha / config.rank:g}, in {layers} layers"
    )


def lora_info(config: TrainConfig, model: StableDiffusion, resolution: int, max_train_steps: int) -> LoRAInfo:
    """What the LoRA file says of itself: enough to use it and to make it again, and no paths."""
    left_out = {"data", "output", "debug", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
                "dataloader_num_workers", "trigger"}  # fmt: skip
    recipe = {name: value for name, value in asdict(config).items() if name not in left_out and value is not None}
    prediction_type = model.schedule.config.prediction_type
    return LoRAInfo(
        base_model=model.name,
        base_model_version=base_model_version(model.unet.config.cross_attention_dim, prediction_type),
        rank=config.rank,
        alpha=config.scale_alpha,
        targets=TARGETS[config.lora_targets],
        trigger="" if config.trigger is None else config.trigger,
        prediction_type=prediction_type,
        resolution=resolution,
        steps=max_train_steps,
        seed=config.seed,
        recipe=recipe,
    )


def append_metrics(
    output: Path, progress: Progress, loss: float, lr: float, grad_norm: float, images_per_step: int, seconds: float
) -> None:
    """Add the line of a step to metrics.jsonl."""
    line = {
        "step": progress.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "images_seen": progress.step * images_per_step,
        "skipped": progress.skipped_steps,
        "seconds": round(seconds, 4),
    }
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def non_finite(step: int, loss: float, grad_norm: float, files: list[Path]) -> NonFiniteError:
    """The refusal to go on after a loss or a gradient that is no number. The last checkpoint is untouched."""
    names = ", ".join(path.name for path in files)
    return NonFiniteError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm} (this process's pictures: {names}). Nothing was "
        "updated. Lower --learning-rate, or use --mixed-precision bf16 or no."
    )


def main(config: TrainConfig) -> None:
    """Join the other processes and train."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with process_group() as dist:
        if not dist.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        train(config, dist)


if __name__ == "__main__":
    assert CONFIG is not None
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug, prefix=rank))
