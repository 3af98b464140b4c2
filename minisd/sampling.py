"""Prompt -> picture: the guided reverse process. The one sampler, for sample.py and for pictures drawn in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from minisd.errors import NonFiniteError, UsageError
from minisd.guidance import Conditioning, Guidance, guided_model
from minisd.samplers import number_of_calls, sample_loop
from minisd.vae import latents_to_images, scale_latents
from minisd.vae_tiling import decode_tiled
from minisd.weights import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to draw: everything but the prompt and the seed. Sizes in pixels.

    Attributes:
        height, width: of the pictures; multiples of the VAE's pixels per latent.
        negative_prompt: what to keep away from; None is not given, which is not the same as "" to an XL model.
        scheduler: the sampler, one of samplers.SAMPLERS.
        num_inference_steps: from 1; for how many calls of the network see `network_calls`.
        guidance_scale: s of arXiv:2207.12598 (there 1 + w); 1 and below is no guidance.
        guidance_rescale: share of arXiv:2305.08891, eq. 16, from 0 to 1.
        guidance_interval: guide there only, shares of the way from pure noise (0) to the picture (1).
        karras: noise levels of arXiv:2206.00364, eq. 5; False leaves it to the model.
        timestep_spacing: how the timesteps are chosen; None leaves it to the model and the sampler.
        eta: share of DDPM's noise that DDIM adds, from 0 to 1; of "ddim" only.
        clip_skip: last layers of the text encoder that are left out.
        strength: of image to image, above 0 and at most 1; 1 without a picture to begin with.
    """

    height: int
    width: int
    negative_prompt: str | None = None
    scheduler: str = "dpm++2m"
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    karras: bool = False
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    eta: float = 0.0
    clip_skip: int = 0
    strength: float = 1.0

    @property
    def network_calls(self) -> int:
        """Calls of the network for one batch of pictures. Raises UsageError if the options go not together."""
        return number_of_calls(self.scheduler, self.num_inference_steps, self.strength)


def native_size(model: StableDiffusion) -> int:
    """Side of the square pictures a model was trained on, in pixels."""
    sample_size = model.unet.config.sample_size
    return (64 if sample_size is None else sample_size) * model.vae.pixels_per_latent


def check_size(model: StableDiffusion, height: int, width: int) -> None:
    """Raise UsageError unless pictures of this size are a whole number of latents."""
    f = model.vae.pixels_per_latent
    if height % f or width % f:
        raise UsageError(f"--height {height} --width {width}: expected multiples of {f}.")


@torch.no_grad()
def denoise(
    model: StableDiffusion,
    prompt: str,
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    init_image: Tensor | None = None,
) -> Iterator[Tensor]:
    """Draw pictures of one prompt; yields the latents after every network call: the caller owns the progress bar.

    Picture i starts from `torch.randn((1, 4, h, w), generator=torch.Generator().manual_seed(seeds[i]))`, float32 on the
    CPU, and whatever noise the sampler adds comes from the same generator: so a picture depends on its own seed only,
    and any other tool can be compared with it. From a picture, the noise of the VAE is drawn before that.

    Args:
        model: the loaded model, adapters and all.
        prompt: what to draw; `(word:1.2)` is read as in prompts.parse_weights.
        seeds: one a picture, B of them.
        settings: how.
        init_image: a picture to begin with instead of noise alone, [1, 3, height, width] float32 in [-1, 1].

    Yields:
        Latents [B, 4, height / f, width / f].

    Raises:
        UsageError: a size that the VAE cannot decode, a prompt that is too long, or an option that the sampler does not
            have.
        NonFiniteError: the latents are NaN or infinite in the end.
    """
    check_size(model, settings.height, settings.width)
    f = model.vae.pixels_per_latent
    parameter = next(model.unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, model.unet.config.in_channels, settings.height // f, settings.width // f)

    def draw_noise() -> Tensor:
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device, dtype)

    image_latents = None if init_image is None else _encoded(model, init_image, draw_noise())
    predict = guided_model(
        model.unet,
        *_conditionings(model, prompt, len(seeds), settings),
        Guidance(scale=settings.guidance_scale, rescale=settings.guidance_rescale, interval=settings.guidance_interval),
        model.schedule.config.num_train_timesteps,
    )
    for latents in sample_loop(
        settings.scheduler,
        predict,
        draw_noise(),
        model.schedule,
        settings.num_inference_steps,
        image_latents=image_latents,
        strength=settings.strength,
        spacing=settings.timestep_spacing,
        karras=settings.karras or None,
        eta=settings.eta,
        draw_noise=draw_noise,
    ):
        yield latents
    if not torch.isfinite(latents).all():
        raise NonFiniteError(f"the latents of {prompt[:50]!r} are not finite. Try --precision float32, less guidance.")


def _encoded(model: StableDiffusion, init_image: Tensor, noise: Tensor) -> Tensor:
    """Latents of a picture, drawn from the VAE's distribution with noise [B, 4, h, w]: of its shape and dtype."""
    weight = model.vae.quant_conv.weight
    posterior = model.vae.encode(init_image.to(weight.device, weight.dtype))
    return scale_latents(model.vae, posterior, noise.to(weight.dtype)).to(noise.dtype)


def _conditionings(
    model: StableDiffusion, prompt: str, batch_size: int, settings: SamplingSettings
) -> tuple[Conditioning, Conditioning | None]:
    """What the UNet is told of the prompt, and of the negative one where there is guidance; each `batch_size` times."""
    parameter = next(model.unet.parameters())
    # Below that the negative prompt is not read at all, as in diffusers.
    captions = [prompt, settings.negative_prompt] if settings.guidance_scale > 1 else [prompt]
    embeddings = model.text_encoder(captions, weighted=True, clip_skip=settings.clip_skip)
    time_ids = None
    if embeddings.pooled is not None:
        # Of the picture as it was, its cut's top left corner, and the picture as it is: nothing was cut off.
        size = (settings.height, settings.width)
        # In float32, as in training: bfloat16 has no 1025.
        time_ids = torch.tensor([[*size, 0, 0, *size]] * batch_size, dtype=torch.float32, device=parameter.device)

    def told(index: int) -> Conditioning:
        one = slice(index, index + 1)
        hidden_states = embeddings.hidden_states[one].to(parameter).repeat(batch_size, 1, 1)  # [B, S, E]
        pooled = None if embeddings.pooled is None else embeddings.pooled[one].to(parameter).repeat(batch_size, 1)
        return Conditioning(hidden_states, pooled, time_ids)

    return told(0), told(1) if len(captions) > 1 else None


@torch.no_grad()
def decode(model: StableDiffusion, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Decode latents [B, 4, h, w] one by one, to save memory: [B, 3, H, W] float32 in [0, 1], on the VAE's device.

    Args:
        model: its VAE may have another dtype than the latents.
        latents: as `denoise` yields them.
        tiled: decode what is larger than the model's own size in tiles of that size.
    """
    way = partial(decode_tiled, model.vae, tile_size=native_size(model)) if tiled else None
    return torch.cat([latents_to_images(model.vae, single, way) for single in latents.split(1)])
