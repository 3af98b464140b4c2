"""The reverse process: from noise to latents in a few network calls. One function for each sampler.

A sampler is a generator that yields the latents after every step, so that its caller owns the progress bar. It calls
`draw_noise` exactly when diffusers draws, so that one `torch.Generator` gives the same picture in both.

Two views of one process meet here. DDPM and DDIM keep x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, of variance 1. Euler
works on x_t / sqrt(abar) = x_0 + sigma eps, with sigma = sqrt((1 - abar) / abar): there the path to follow is a plain
differential equation (Karras et al., arXiv:2206.00364, section 2). DPM-Solver++ keeps the former and counts in sigmas.

The factors of a step are 0-d float32 tensors: no step waits for the device, and the latents keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from minisd.ddpm import (
    NoiseSchedule,
    NoiseScheduleConfig,
    PredictionType,
    TimestepSpacing,
    epsilon_from_output,
    original_from_output,
)
from minisd.errors import UsageError
from minisd.sampler_grids import dpm_grid, euler_grid, timestep_grid

# (sample [B, 4, h, w], timestep 0-d) -> the network's output, [B, 4, h, w]: eps, v or x_0. Euler's may be fractional.
Model = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]  # a fresh standard normal draw with the shape, dtype and device of the latents


def default_spacing(config: NoiseScheduleConfig, sampler: str) -> TimestepSpacing:
    """Return the spacing diffusers ends up with for a model's folder and a sampler.

    A spacing written in the folder's file holds for every sampler. Otherwise each takes its own class's default:
    `from_config` hands on what the file says, never what it leaves out. So Euler takes SD1.5 (PNDM, whose default is
    "leading") on "linspace", and SDXL (an explicit "leading") on "leading".
    """
    if config.timestep_spacing is not None:
        return config.timestep_spacing
    return "leading" if sampler in ("ddpm", "ddim") else "linspace"


def ddpm(
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing,
    draw_noise: Noise,
) -> Iterator[Tensor]:
    """Walk the original ancestral chain over some of its timesteps: DDPM, arXiv:2006.11239, algorithm 2.

    Args:
        model: the network, guidance included.
        latents: standard normal, [B, 4, h, w].
        schedule: of the model.
        num_inference_steps: network calls, from 1.
        spacing: how the timesteps are chosen.
        draw_noise: called once after each network call but at t = 0.

    Yields:
        The latents after each step, [B, 4, h, w] in the dtype of `latents`.

    Raises:
        UsageError: `num_inference_steps` is impossible.
    """
    timesteps = timestep_grid(schedule.config, num_inference_steps, spacing).round().long()
    visited = [*timesteps.tolist(), -1]
    for i, timestep in enumerate(timesteps.to(latents.device)):
        output = model(latents, timestep)
        noise = draw_noise() if visited[i] > 0 else None
        latents = schedule.step(output, visited[i], visited[i + 1], latents, noise)
        yield latents


def ddim(
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing,
    eta: float = 0.0,
    draw_noise: Noise,
) -> Iterator[Tensor]:
    """Step as if no timestep had been skipped, with less noise or none: DDIM, arXiv:2010.02502, eq. 12 and 16.

    Args: see `ddpm`; and
        eta: share of DDPM's noise, from 0 (the latents alone decide the picture) to 1.
        draw_noise: called once after each network call, the last included, and never when `eta` is 0.
    """
    config, alphas_cumprod = schedule.config, schedule.alphas_cumprod
    timesteps = timestep_grid(config, num_inference_steps, spacing).round().long()
    stride = config.num_train_timesteps // num_inference_steps  # diffusers' way back, not the next of a linspace grid
    final = alphas_cumprod[0] if config.set_alpha_to_one is False else torch.ones_like(alphas_cumprod[0])
    for t, timestep in zip(timesteps.tolist(), timesteps.to(latents.device), strict=True):
        output = model(latents, timestep)
        abar, abar_prev = alphas_cumprod[t], alphas_cumprod[t - stride] if t >= stride else final
        factors = abar.sqrt(), (1 - abar).sqrt()
        original = original_from_output(output, latents, factors, config.prediction_type)
        epsilon = epsilon_from_output(output, latents, factors, config.prediction_type)
        std = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        latents = abar_prev.sqrt() * original + (1 - abar_prev - std**2).sqrt() * epsilon
        if eta > 0:
            latents = latents + std * draw_noise()
        yield latents


def _denoised(output: Tensor, sample: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return the x_0 that the output implies for sample = x_0 + sigma eps (v is that of the scaled sample)."""
    if prediction_type == "epsilon":
        return sample - sigma * output
    if prediction_type == "v_prediction":
        return output * (-sigma / (sigma**2 + 1).sqrt()) + sample / (sigma**2 + 1)
    return output


def euler(
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing,
    karras: bool = False,
) -> Iterator[Tensor]:
    """Follow dx/dsigma = (x - x_0) / sigma in straight steps: arXiv:2206.00364, algorithm 2 without its churn.

    Args: see `ddpm`; and
        karras: take the noise levels of `karras_sigmas`, between the same two ends.
    """
    timesteps, sigmas, scale = euler_grid(schedule, num_inference_steps, spacing, karras=karras)
    latents = latents * scale
    for i, timestep in enumerate(timesteps.to(latents.device)):
        sigma = sigmas[i]
        output = model(latents / (sigma**2 + 1).sqrt(), timestep)
        sample = latents.float()  # a step in half precision would lose what it adds
        slope = (sample - _denoised(output, sample, sigma, schedule.config.prediction_type)) / sigma
        latents = (sample + slope * (sigmas[i + 1] - sigma)).to(output.dtype)
        yield latents


def euler_ancestral(
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing,
    draw_noise: Noise,
) -> Iterator[Tensor]:
    """Step below the next noise level and add fresh noise up to it: k-diffusion's sample_euler_ancestral.

    Args: see `ddpm`; and
        draw_noise: called once after each network call, the last included, where it is multiplied by 0.
    """
    timesteps, sigmas, scale = euler_grid(schedule, num_inference_steps, spacing, karras=False)
    latents = latents * scale
    for i, timestep in enumerate(timesteps.to(latents.device)):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        output = model(latents / (sigma**2 + 1).sqrt(), timestep)
        sample = latents.float()
        # up^2 + down^2 = to^2, with DDPM's posterior variance as up^2.
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2).sqrt()
        sigma_down = (sigma_to**2 - sigma_up**2).sqrt()
        slope = (sample - _denoised(output, sample, sigma, schedule.config.prediction_type)) / sigma
        latents = (sample + slope * (sigma_down - sigma) + draw_noise() * sigma_up).to(output.dtype)
        yield latents


def dpmpp_2m(
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing,
    karras: bool = False,
) -> Iterator[Tensor]:
    """Extrapolate x_0 from the last two network calls: DPM-Solver++ (2M), arXiv:2211.01095, algorithm 2.

    Args: see `ddpm`; and
        karras: take the noise levels of `karras_sigmas` over the whole table; `spacing` then means nothing.
    """
    timesteps, sigmas = dpm_grid(schedule, num_inference_steps, spacing, karras=karras)
    alphas = 1 / (sigmas**2 + 1).sqrt()  # sqrt(abar), and spreads sqrt(1 - abar)
    spreads = sigmas * alphas
    lambdas = alphas.log() - spreads.log()  # half the log SNR; infinite at the end
    previous: Tensor | None = None
    for i, timestep in enumerate(timesteps.to(latents.device)):
        output = model(latents, timestep)
        original = original_from_output(output, latents, (alphas[i], spreads[i]), schedule.config.prediction_type)
        h = lambdas[i + 1] - lambdas[i]
        factor = alphas[i + 1] * (torch.exp(-h) - 1)
        stepped = (spreads[i + 1] / spreads[i]) * latents.float() - factor * original
        # First order where there is no second point: at the start, and at the end where h is infinite.
        if previous is not None and i < num_inference_steps - 1:
            slope = (1 / ((lambdas[i] - lambdas[i - 1]) / h)) * (original - previous)
            stepped = stepped - 0.5 * factor * slope
        previous, latents = original, stepped.to(output.dtype)
        yield latents


SAMPLERS: Mapping[str, Callable[..., Iterator[Tensor]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler-a": euler_ancestral,
    "dpm++2m": dpmpp_2m,
}
KARRAS_SAMPLERS = ("euler", "dpm++2m")


def sample_loop(
    name: str,
    model: Model,
    latents: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    spacing: TimestepSpacing | None = None,
    karras: bool | None = None,
    eta: float = 0.0,
    draw_noise: Noise,
) -> Iterator[Tensor]:
    """Run a sampler by name. No spacing is `default_spacing`; no `karras` is the config's, where the sampler has it.

    Raises:
        UsageError: no such sampler, it has no such option, or (at the first step) an impossible number of steps.
    """
    if name not in SAMPLERS:
        raise UsageError(f"--scheduler is {name}; choose one of {', '.join(SAMPLERS)}")
    if karras and name not in KARRAS_SAMPLERS:
        raise UsageError(f"--karras means nothing to {name}; samplers that take it: {', '.join(KARRAS_SAMPLERS)}")
    if eta and name != "ddim":
        raise UsageError(f"eta is {eta}, which means nothing to {name}; the sampler that takes it: ddim")
    grid = spacing if spacing is not None else default_spacing(schedule.config, name)
    if name == "ddim":
        return ddim(model, latents, schedule, num_inference_steps, spacing=grid, eta=eta, draw_noise=draw_noise)
    if name in KARRAS_SAMPLERS:
        use = schedule.config.use_karras_sigmas if karras is None else karras
        return SAMPLERS[name](model, latents, schedule, num_inference_steps, spacing=grid, karras=use)
    return SAMPLERS[name](model, latents, schedule, num_inference_steps, spacing=grid, draw_noise=draw_noise)
