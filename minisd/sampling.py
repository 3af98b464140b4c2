"""Prompt -> picture: the guided reverse process. The one sampler, for sample.py and for pictures drawn in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minisd.errors import NonFiniteError, UsageError
from minisd.samplers import sample_loop
from minisd.vae import latents_to_images
from minisd.weights import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to draw: everything but the prompt and the seed. Sizes in pixels."""

    height: int
    width: int
    negative_prompt: str = ""
    scheduler: str = "dpm++2m"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    karras: bool = False
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    eta: float = 0.0


def native_size(model: StableDiffusion) -> int:
    """Side of the square pictures a model was trained on, in pixels."""
    sample_size = model.unet.config.sample_size
    return (64 if sample_size is None else sample_size) * model.vae.pixels_per_latent


@torch.no_grad()
def denoise(model: StableDiffusion, prompt: str, seeds: Sequence[int], settings: SamplingSettings) -> Iterator[Tensor]:
    """Draw pictures of one prompt; yields the latents after every step, so that the caller owns the progress bar.

    Picture i starts from `torch.randn((1, 4, h, w), generator=torch.Generator().manual_seed(seeds[i]))`, float32 on the
    CPU, and whatever noise the sampler adds comes from the same generator: so a picture depends on its own seed only,
    and any other tool can be compared with it.

    Args:
        model: the loaded model, adapters and all.
        prompt: what to draw.
        seeds: one a picture, B of them.
        settings: how.

    Yields:
        Latents [B, 4, height / f, width / f].

    Raises:
        UsageError: a size that the VAE cannot decode, or an option that the sampler does not have.
        NonFiniteError: the latents are NaN or infinite in the end.
    """
    f = model.vae.pixels_per_latent
    if settings.height % f or settings.width % f:
        raise UsageError(f"--height {settings.height} --width {settings.width}: expected multiples of {f}.")
    parameter = next(model.unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, model.unet.config.in_channels, settings.height // f, settings.width // f)

    def draw_noise() -> Tensor:
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device, dtype)

    guided = settings.guidance_scale > 1
    captions = [settings.negative_prompt, prompt] if guided else [prompt]
    # [1 or 2, S, E] -> [(1 or 2) * B, S, E], all unconditional ones first
    encoder_hidden_states = model.text_encoder(captions).to(device, dtype).repeat_interleave(len(seeds), dim=0)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        """Classifier-free guidance: away from the negative prompt, towards the prompt (arXiv:2207.12598, eq. 6)."""
        sample = sample.repeat(2, 1, 1, 1) if guided else sample
        model_pred = model.unet(sample, timestep.expand(len(sample)), encoder_hidden_states)
        if not guided:
            return model_pred
        unconditional, conditional = model_pred.chunk(2)
        return unconditional + settings.guidance_scale * (conditional - unconditional)

    latents = start = draw_noise()
    for latents in sample_loop(
        settings.scheduler,
        predict,
        start,
        model.schedule,
        settings.num_inference_steps,
        spacing=settings.timestep_spacing,
        karras=settings.karras or None,
        eta=settings.eta,
        draw_noise=draw_noise,
    ):
        yield latents
    if not torch.isfinite(latents).all():
        raise NonFiniteError(f"the latents of {prompt!r} are not finite. Try --precision float32 or a lower guidance.")


def decode(model: StableDiffusion, latents: Tensor) -> Tensor:
    """Decode latents [B, 4, h, w] one by one, to save memory: [B, 3, H, W] float32 in [0, 1] on the CPU."""
    return torch.cat([latents_to_images(model.vae, single).cpu() for single in latents.split(1)])


def parameters_text(settings: SamplingSettings, prompt: str, seed: int, model: str, lora_labels: Sequence[str]) -> str:
    """How a picture was drawn, in the form that other tools read from a PNG's "parameters"."""
    sampler = settings.scheduler + (" karras" if settings.karras else "")
    lines = [prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    details = [
        f"Steps: {settings.num_inference_steps}, Sampler: {sampler}, CFG scale: {settings.guidance_scale:g}",
        f"Seed: {seed}, Size: {settings.width}x{settings.height}, Model: {Path(model).name}",
        *[f"Lora: {label}" for label in lora_labels],
    ]
    return "\n".join([*lines, ", ".join(details)])
