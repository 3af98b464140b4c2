"""Samplers on x_t / sqrt(abar) = x_0 + sigma eps: Euler, Euler ancestral, Heun.

There the path to follow is a plain differential equation, dx/dsigma = (x - x_0) / sigma: Karras et al.,
arXiv:2206.00364, section 2. Each sampler is a generator that yields the latents, [B, 4, h, w] in the dtype of the
noise, after every call of the network.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from minisd.ddpm import PredictionType
from minisd.sampler_grids import Model, Walk, euler_grid


def _first_latents(walk: Walk, sigmas: Tensor, scale: Tensor) -> Tensor:
    """Return the noise at its scale, or the pictures with the noise of the first sigma to visit."""
    if walk.image_latents is None:
        return walk.noise * scale
    return walk.image_latents + sigmas[walk.first_step] * walk.noise


def _denoised(output: Tensor, sample: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return the x_0 that the output implies for sample = x_0 + sigma eps (v is that of the scaled sample)."""
    if prediction_type == "epsilon":
        return sample - sigma * output
    if prediction_type == "v_prediction":
        return output * (-sigma / (sigma**2 + 1).sqrt()) + sample / (sigma**2 + 1)
    return output


def euler(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Follow the path in straight steps: arXiv:2206.00364, algorithm 2 without its churn and its correction."""
    timesteps, sigmas, scale = euler_grid(walk)
    latents = _first_latents(walk, sigmas, scale)
    timesteps = timesteps.to(latents.device)
    for i in walk.steps:
        sigma = sigmas[i]
        output = model(latents / (sigma**2 + 1).sqrt(), timesteps[i])
        sample = latents.float()  # a step in half precision would lose what it adds
        slope = (sample - _denoised(output, sample, sigma, walk.schedule.config.prediction_type)) / sigma
        latents = (sample + slope * (sigmas[i + 1] - sigma)).to(output.dtype)
        yield latents


def euler_ancestral(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Step below the next noise level and add fresh noise up to it: k-diffusion's sample_euler_ancestral.

    Draws noise after each network call, the last included, where it is multiplied by 0.
    """
    timesteps, sigmas, scale = euler_grid(walk)
    latents = _first_latents(walk, sigmas, scale)
    timesteps = timesteps.to(latents.device)
    for i in walk.steps:
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        output = model(latents / (sigma**2 + 1).sqrt(), timesteps[i])
        sample = latents.float()
        # up^2 + down^2 = to^2, with DDPM's posterior variance as up^2.
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2).sqrt()
        sigma_down = (sigma_to**2 - sigma_up**2).sqrt()
        slope = (sample - _denoised(output, sample, sigma, walk.schedule.config.prediction_type)) / sigma
        latents = (sample + slope * (sigma_down - sigma) + walk.draw_noise() * sigma_up).to(output.dtype)
        yield latents


def heun(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Take Euler's step again with the mean of the slopes at both of its ends: arXiv:2206.00364, algorithm 1.

    Two network calls a step, and one for the last, which ends at sigma 0, where there is no slope.
    """
    prediction_type = walk.schedule.config.prediction_type
    timesteps, sigmas, scale = euler_grid(walk)
    latents = _first_latents(walk, sigmas, scale)
    timesteps = timesteps.to(latents.device)
    for i in walk.steps:
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        output = model(latents / (sigma**2 + 1).sqrt(), timesteps[i])
        slope = (latents - _denoised(output, latents, sigma, prediction_type)) / sigma
        sample = latents + slope * (sigma_to - sigma)
        yield sample
        if i + 1 < walk.num_inference_steps:
            output = model(sample / (sigma_to**2 + 1).sqrt(), timesteps[i + 1])
            slope_to = (sample - _denoised(output, sample, sigma_to, prediction_type)) / sigma_to
            latents = latents + (slope + slope_to) / 2 * (sigma_to - sigma)
            yield latents
