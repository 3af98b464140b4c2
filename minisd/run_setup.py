"""What a run is made of, as its options say: adapters, sizes, noise schedule, and what the LoRA file will say of it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from minisd.buckets import Geometry, bucket_geometry, default_step, square_geometry
from minisd.config import TrainConfig
from minisd.ddpm import NoiseSchedule
from minisd.errors import DataError, UsageError
from minisd.held_out import Pictures
from minisd.lora import TARGETS, copy_lora_weights, inject_lora, lora_weights
from minisd.lora_info import LoRAInfo, base_model_version
from minisd.lora_reader import load_lora
from minisd.model_files import sha256_of
from minisd.sampling import native_size
from minisd.training import Precision
from minisd.weights import StableDiffusion, load_model, with_zero_terminal_snr

log = logging.getLogger(__name__)

# Options that say nothing about how the weights came to be: they have no place in the LoRA's recipe.
_NOT_IN_RECIPE = {"data", "output", "cache_dir", "debug", "resume_from_checkpoint", "allow_change", "init_lora",
                  "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers", "cache_latents",
                  "validation_prompts", "validation_steps", "validation_num_images", "validation_inference_steps",
                  "validation_guidance_scale", "validation_data", "report_to", "report", "push_to_hub", "hub_model_id",
                  "hub_private_repo", "hub_license", "preflight", "dist_timeout", "trigger",
                  "lora_format"}  # fmt: skip


def add_adapter(config: TrainConfig, unet: nn.Module) -> list[str]:
    """Put the new adapter into the UNet; returns the paths of its layers.

    Raises:
        UsageError: an impossible rank, or --init-lora is of another kind.
        WeightsError: --init-lora cannot be read.
    """
    targets = TARGETS[config.lora_targets]
    try:
        paths = inject_lora(
            unet, targets, rank=config.rank, alpha=config.scale_alpha, dropout=config.lora_dropout, seed=config.seed
        )
    except ValueError as error:
        raise UsageError(f"--rank {config.rank}, --lora-targets {config.lora_targets}: {error}.") from error
    if config.init_lora is not None:
        _start_from(config.init_lora, unet)
    return paths


def _start_from(path: Path, unet: nn.Module) -> None:
    """Copy the weights of a LoRA file into the new adapter."""
    weights, current = load_lora(path, {"unet": unet}).parts["unet"], lora_weights(unet)
    if {name: (w.rank, w.alpha) for name, w in weights.items()} != {n: (w.rank, w.alpha) for n, w in current.items()}:
        kinds = sorted({(w.rank, w.alpha) for w in weights.values()})
        raise UsageError(
            f"--init-lora {path}: it has {len(weights)} layers with (rank, alpha) {kinds}, this run {len(current)} of "
            "its own. Give the same --rank, --alpha and --lora-targets."
        )
    try:
        copy_lora_weights(weights, unet)
    except ValueError as error:
        raise UsageError(f"--init-lora {path}: {error}.") from error
    log.info("starting from the weights of %s with a fresh optimizer; this is not a resumed run", path)


def base_model(config: TrainConfig, device: torch.device) -> StableDiffusion:
    """Load the model in the run's precision, with the noise schedule to train on.

    Raises:
        WeightsError: it cannot be loaded.
        NetworkError: it cannot be downloaded.
        UsageError: an epsilon model is to learn from pure noise, which has no epsilon to tell from x_0.
    """
    model = load_model(
        config.model,
        revision=config.revision,
        variant=config.variant,
        prediction_type=config.prediction_type,
        dtype=Precision(config.mixed_precision, device.type).dtype,
        device=device,
    )
    if config.zero_terminal_snr:
        return with_zero_terminal_snr(model)
    schedule = model.schedule.config
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise UsageError(f"{model.name}: zero terminal SNR with epsilon prediction cannot be trained. Correct its "
                         "scheduler_config.json.")  # fmt: skip
    return model


def resolution_of(config: TrainConfig, model: StableDiffusion) -> int:
    """Side of a square training picture in pixels. Raises UsageError if the VAE cannot halve it often enough."""
    resolution = native_size(model) if config.resolution is None else config.resolution
    f = model.vae.pixels_per_latent
    for name, value in {"--resolution": resolution, "--bucket-step": config.bucket_step}.items():
        if value is not None and value % f:
            raise UsageError(f"{name} {value}: expected a multiple of {f}.")
    if config.bucket_step is not None and config.bucket_step > resolution:
        raise UsageError(f"--bucket-step {config.bucket_step}: expected at most the resolution, {resolution}.")
    return resolution


def geometries_of(config: TrainConfig, model: StableDiffusion, pictures: Pictures) -> list[Geometry]:
    """What is cut out of each picture.

    Raises:
        DataError: a picture is too small for any bucket; names it.
        UsageError: the VAE cannot halve the resolution often enough.
    """
    resolution = resolution_of(config, model)
    if not config.buckets:
        return [square_geometry(found.size, resolution) for found in pictures.surveys]
    step = config.bucket_step or default_step(resolution, model.vae.pixels_per_latent)
    geometries = []
    for example, found in zip(pictures.examples, pictures.surveys, strict=True):
        try:
            geometries.append(bucket_geometry(found.size, resolution, step, upscale=config.upscale))
        except DataError as error:
            raise DataError(f"{str(example.path)!r}: {error}") from error
    return geometries


def lora_info(
    config: TrainConfig, model: StableDiffusion, schedule: NoiseSchedule, resolution: int, max_train_steps: int
) -> LoRAInfo:
    """What the LoRA file says of itself: enough to use it and to make it again, and no paths."""
    recipe = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_RECIPE and value is not None}
    if config.init_lora is not None:
        recipe["init_lora_sha256"] = init_lora_sha256(config)
    prediction_type = schedule.config.prediction_type
    return LoRAInfo(
        base_model=model.name,
        base_commit=model.commit or "",
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


def init_lora_sha256(config: TrainConfig) -> str | None:
    """Hash of the LoRA to start from; of a folder of PEFT's, of the weights in it. None if there is none."""
    path = config.init_lora
    if path is None:
        return None
    return sha256_of(path / "adapter_model.safetensors" if path.is_dir() else path)
