"""Whether what a model is made of belongs together, before anything is computed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from minisd.ddpm import NoiseSchedule
from minisd.errors import UsageError, WeightsError
from minisd.families import ModelConfigs
from minisd.text import TextEncoder
from minisd.unet_config import UNetConfig
from minisd.vae import AutoencoderKLConfig


def check_prediction(
    folder: Path,
    configs: ModelConfigs,
    schedule: NoiseSchedule,
    asked: Literal["epsilon", "v_prediction"] | None,
) -> None:
    """Refuse a model folder that says something else than the user, or something that no published model is.

    Raises:
        UsageError: the user says otherwise.
        WeightsError: Stable Diffusion 1.x that predicts v, which the user does not confirm.
    """
    path, said = folder / "scheduler" / "scheduler_config.json", schedule.config.prediction_type
    if asked is not None and asked != said:
        raise UsageError(f"--prediction-type {asked}: {path} says {said}. Leave it out, or correct that file.")
    if asked is None and said == "v_prediction" and configs.networks["unet"].get("cross_attention_dim") == 768:
        raise WeightsError(
            f"{path}: it says v_prediction, which no Stable Diffusion 1.x was published with. If this one was trained "
            "so, add --prediction-type v_prediction; else the file is of another model."
        )


def check_parts(source: Path, unet: UNetConfig, vae: AutoencoderKLConfig, text: TextEncoder) -> None:
    """Raise WeightsError if the parts of the model in `source` are of different models."""
    reads = "the UNet reads"
    if not unet.is_xl and text.pooled_width is not None:
        misfit = "the UNet is of Stable Diffusion 1.x or 2.x, with the two text encoders of SDXL"
    elif unet.cross_attention_dim != text.width:
        misfit = f"{reads} prompts {unet.cross_attention_dim} wide, the text encoder writes {text.width}"
    elif text.pooled_width is not None and unet.pooled_width != text.pooled_width:
        misfit = f"{reads} a pooled prompt {unet.pooled_width} wide, the text encoder writes {text.pooled_width}"
    elif unet.in_channels != vae.latent_channels:
        misfit = f"{reads} latents of {unet.in_channels} channels, the VAE writes {vae.latent_channels}"
    else:
        return
    raise WeightsError(f"{source}: {misfit}. Its parts are of different models.")
