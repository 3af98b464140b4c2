"""Samplers on x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, of variance 1 at every timestep: DDPM, DDIM, PNDM, LCM.

Each is a generator that yields the latents, [B, 4, h, w] in the dtype of the noise, after every call of the network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minisd.ddpm import epsilon_from_output, original_from_output
from minisd.errors import UsageError
from minisd.sampler_grids import Model, Walk, lcm_grid, timestep_grid


def _grid(walk: Walk) -> Tensor:
    return timestep_grid(walk.schedule.config, walk.num_inference_steps, walk.spacing).round().long()


def _first_latents(walk: Walk, timesteps: Tensor) -> Tensor:
    """Return the noise, or the pictures with as much of it as the first timestep to visit has."""
    if walk.image_latents is None:
        return walk.noise
    device = walk.noise.device
    first = timesteps[walk.first_step : walk.first_step + 1].to(device)
    return walk.schedule.to(device).add_noise(walk.image_latents, walk.noise, first)


def ddpm(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Walk the original ancestral chain over some of its timesteps: DDPM, arXiv:2006.11239, algorithm 2.

    Draws noise after each network call but at t = 0.
    """
    timesteps = _grid(walk)
    latents = _first_latents(walk, timesteps)
    visited = [*timesteps.tolist(), -1]
    timesteps = timesteps.to(latents.device)
    for i in walk.steps:
        output = model(latents, timesteps[i])
        noise = walk.draw_noise() if visited[i] > 0 else None
        latents = walk.schedule.step(output, visited[i], visited[i + 1], latents, noise)
        yield latents


def ddim(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Step as if no timestep had been skipped, with less noise or none: DDIM, arXiv:2010.02502, eq. 12 and 16.

    Draws noise after each network call, the last included, and never when `eta` is 0.
    """
    config, alphas_cumprod = walk.schedule.config, walk.schedule.alphas_cumprod
    timesteps = _grid(walk)
    latents = _first_latents(walk, timesteps)
    visited = timesteps.tolist()
    timesteps = timesteps.to(latents.device)
    # Diffusers' way back, not to the next timestep of a linspace grid.
    stride = config.num_train_timesteps // walk.num_inference_steps
    final = alphas_cumprod[0] if config.set_alpha_to_one is False else torch.ones_like(alphas_cumprod[0])
    for i in walk.steps:
        t, output = visited[i], model(latents, timesteps[i])
        abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t - stride] if t >= stride else final
        factors = abar.sqrt(), (1 - abar).sqrt()
        original = original_from_output(output, latents, factors, config.prediction_type)
        epsilon = epsilon_from_output(output, latents, factors, config.prediction_type)
        std = walk.eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        latents = abar_prev.sqrt() * original + (1 - abar_prev - std**2).sqrt() * epsilon
        if walk.eta > 0:
            latents = latents + std * walk.draw_noise()
        yield latents


def _extrapolated(outputs: list[Tensor]) -> Tensor:
    """Guess the mean of the outputs on the way to the next timestep from the last one to four: Adams-Bashforth."""
    if len(outputs) == 1:
        return outputs[-1]
    if len(outputs) == 2:
        return (3 * outputs[-1] - outputs[-2]) / 2
    if len(outputs) == 3:
        return (23 * outputs[-1] - 16 * outputs[-2] + 5 * outputs[-3]) / 12
    return (1 / 24) * (55 * outputs[-1] - 59 * outputs[-2] + 37 * outputs[-3] - 9 * outputs[-4])


def pndm(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Step like DDIM, with an output extrapolated from the last four: PNDM, arXiv:2202.09778, eq. 9 and 12.

    This is PLMS, diffusers' PNDM without its Runge-Kutta steps, as Stable Diffusion was published. The first step is
    taken twice, the second time with the mean of the outputs at both of its ends: n + 1 network calls, or 1 if n is 1.

    With pictures to begin with, diffusers cuts its list of timesteps, the repeated one included, yet takes the first
    step twice wherever it begins: after it the timesteps are one ahead of the latents. So they are here.

    Raises:
        UsageError: the model's last timestep is pure noise, by whose signal the step divides.
    """
    config, alphas_cumprod = walk.schedule.config, walk.schedule.alphas_cumprod
    if config.rescale_betas_zero_snr:
        raise UsageError("--scheduler pndm cannot start a model with rescale_betas_zero_snr; take ddim or dpm++2m")
    timesteps = _grid(walk)
    timesteps = torch.cat([timesteps[:2], timesteps[1:]])  # [n] -> [n + 1], the second one twice
    latents = start = _first_latents(walk, timesteps)
    visited = timesteps[walk.first_step :].tolist()
    timesteps = timesteps[walk.first_step :].to(latents.device)
    stride = config.num_train_timesteps // walk.num_inference_steps
    final = torch.ones_like(alphas_cumprod[0]) if config.set_alpha_to_one else alphas_cumprod[0]
    outputs: list[Tensor] = []
    for i, timestep in enumerate(timesteps):
        t, t_prev = visited[i], visited[i] - stride
        output = model(latents, timestep)
        if i == 1:
            t, t_prev, latents = t + stride, t, start
            output = (output + outputs[-1]) / 2
        else:
            outputs = [*outputs[-3:], output]
            output = _extrapolated(outputs)
        abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t_prev] if t_prev >= 0 else final
        epsilon = epsilon_from_output(output, latents, (abar.sqrt(), (1 - abar).sqrt()), config.prediction_type)
        divisor = abar * (1 - abar_prev).sqrt() + (abar * (1 - abar) * abar_prev).sqrt()
        latents = (abar_prev / abar).sqrt() * latents - (abar_prev - abar) * epsilon / divisor
        yield latents


def lcm(model: Model, walk: Walk) -> Iterator[Tensor]:
    """Jump to x_0 and add noise again, over and over: latent consistency models, arXiv:2310.04378.

    The jump is held to the identity at t = 0 by c_skip and c_out: consistency models, arXiv:2303.01469, eq. 5, on ten
    times the timestep and with sigma_data 0.5. At most 50 steps, and no choice of spacing: the timesteps are among
    those of the distillation. Draws noise after each network call but the last.

    For models with an LCM-LoRA, which are guided like any other (with a scale of 1 to 2). The embedding of the guidance
    scale of a whole distilled UNet (time_cond_proj_dim) is not supported.
    """
    config, alphas_cumprod = walk.schedule.config, walk.schedule.alphas_cumprod
    timesteps = lcm_grid(config, walk.num_inference_steps)
    latents = _first_latents(walk, timesteps)
    visited, scaled = timesteps.tolist(), timesteps * 10.0
    timesteps = timesteps.to(latents.device)
    for i in walk.steps:
        output = model(latents, timesteps[i])
        abar = alphas_cumprod[visited[i]]
        original = original_from_output(output, latents, (abar.sqrt(), (1 - abar).sqrt()), config.prediction_type)
        c_skip, c_out = 0.25 / (scaled[i] ** 2 + 0.25), scaled[i] / (scaled[i] ** 2 + 0.25).sqrt()
        latents = c_out * original + c_skip * latents
        if i + 1 < walk.num_inference_steps:
            abar_next = alphas_cumprod[visited[i + 1]]
            latents = abar_next.sqrt() * latents + (1 - abar_next).sqrt() * walk.draw_noise()
        yield latents
