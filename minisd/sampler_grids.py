"""What a sampler is asked to do, and which timesteps and which noise levels it visits.

sigma is the noise-to-signal ratio sqrt((1 - abar) / abar) of a timestep: 0.029 to 14.6 for Stable Diffusion. The grids
are computed in float64 where numpy does so in diffusers, so that the rounded results are the same; n below is
num_inference_steps and T num_train_timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig, TimestepSpacing
from minisd.errors import UsageError

# (sample [B, 4, h, w], timestep 0-d) -> the network's output, [B, 4, h, w]: eps, v or x_0. Euler's may be fractional.
Model = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]  # a fresh standard normal draw with the shape, dtype and device of the latents

LCM_TRAINING_STEPS = 50  # timesteps that latent consistency models are distilled on: arXiv:2310.04378, section 4.3


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One walk from noise to a picture: all that a sampler needs beside the network.

    Args:
        schedule: of the model.
        num_inference_steps: steps from pure noise to the end of the grid, from 1.
        spacing: how the timesteps are chosen.
        karras: take the noise levels of `karras_sigmas` instead, between the same two ends.
        eta: share of DDPM's noise that DDIM adds, from 0 (the latents alone decide the picture) to 1.
        noise: standard normal, [B, 4, h, w].
        image_latents: the pictures to begin with, scaled as the network knows them, [B, 4, h, w]; None to begin with
            the noise alone.
        first_step: index of the first step to take; the steps before it are left out. 0 without pictures.
        draw_noise: called when the sampler adds noise, and then exactly when diffusers draws.
    """

    schedule: NoiseSchedule
    num_inference_steps: int
    spacing: TimestepSpacing
    karras: bool
    eta: float
    noise: Tensor
    image_latents: Tensor | None
    first_step: int
    draw_noise: Noise

    @property
    def steps(self) -> range:
        """Indices of the steps to take."""
        return range(self.first_step, self.num_inference_steps)


def check_steps(num_inference_steps: int, most: int) -> None:
    """Raise UsageError unless there are 1 to `most` steps."""
    if not 1 <= num_inference_steps <= most:
        raise UsageError(f"--num-inference-steps is {num_inference_steps}; this model and sampler take 1 to {most}")


def timestep_grid(config: NoiseScheduleConfig, num_inference_steps: int, spacing: TimestepSpacing) -> Tensor:
    """Choose the timesteps to visit, [n] float64 in [0, T), falling: arXiv:2305.08891, table 2.

    Only "linspace" gives fractions, which Euler keeps and the others round.

    Raises:
        UsageError: there are not that many timesteps.
    """
    total = config.num_train_timesteps
    check_steps(num_inference_steps, total)
    index = torch.arange(num_inference_steps, dtype=torch.float64)
    if spacing == "linspace":
        return (index * ((total - 1) / max(num_inference_steps - 1, 1))).flip(0)
    if spacing == "trailing":
        # total - i total / n, with numpy.arange's rounding of the stride, which decides the halves. Where that makes
        # diffusers add a timestep of -1 (61 steps, and 61 numbers above), this keeps to n.
        stride = (total - total / num_inference_steps) - total
        return (total + index * stride).round() - 1
    timesteps = (index * (total // num_inference_steps) + config.steps_offset).flip(0)
    if timesteps[0] >= total:
        raise UsageError(
            f"--num-inference-steps is {num_inference_steps}: too many for --timestep-spacing leading, which would"
            f" start at timestep {int(timesteps[0])} of {total}; take fewer, or trailing"
        )
    return timesteps


def sigma_table(schedule: NoiseSchedule) -> Tensor:
    """Return sigma of each training timestep, [T] float32 on the CPU, rising."""
    alphas_cumprod = schedule.alphas_cumprod.cpu().clone()
    if schedule.config.rescale_betas_zero_snr:
        alphas_cumprod[-1] = 2**-24  # diffusers' way to keep the last sigma finite: 4096
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def sigmas_at(timesteps: Tensor, table: Tensor) -> Tensor:
    """Interpolate the table, linearly in sigma, at float64 timesteps [n]. Returns float64."""
    low = timesteps.long().clamp(max=len(table) - 2)
    table = table.double()
    return table[low] + (timesteps - low) * (table[low + 1] - table[low])


def timesteps_at(sigmas: Tensor, table: Tensor) -> Tensor:
    """Invert the table, linearly in log sigma, at float64 sigmas [n]. Returns float64.

    Diffusers takes the table's logarithms in float32, so that its timesteps are off by up to 1e-4.
    """
    log_table, log_sigmas = table.double().log(), sigmas.log()
    low = (torch.searchsorted(log_table, log_sigmas, right=True) - 1).clamp(0, len(table) - 2)
    return low + ((log_sigmas - log_table[low]) / (log_table[low + 1] - log_table[low])).clamp(0, 1)


def karras_sigmas(sigma_max: float, sigma_min: float, num_inference_steps: int) -> Tensor:
    """Space noise levels evenly in sigma^(1/7): Karras et al., arXiv:2206.00364, eq. 5. [n] float64, falling."""
    ramp = torch.arange(num_inference_steps, dtype=torch.float64) * (1 / max(num_inference_steps - 1, 1))
    high, low = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    return (high + ramp * (low - high)) ** 7


def lcm_grid(config: NoiseScheduleConfig, num_inference_steps: int) -> Tensor:
    """Spread the steps over those that a latent consistency model was distilled on: [n] int64, falling from T - 1.

    Raises:
        UsageError: there are not that many timesteps.
    """
    trained = min(LCM_TRAINING_STEPS, config.num_train_timesteps)
    check_steps(num_inference_steps, trained)
    stride = config.num_train_timesteps // trained
    index = torch.arange(num_inference_steps, dtype=torch.float64) * (trained / num_inference_steps)
    return (trained - index.floor().long()) * stride - 1


def euler_grid(walk: Walk) -> tuple[Tensor, Tensor, Tensor]:
    """Return timesteps [n] float32, sigmas [n + 1] float32 ending in 0, and the 0-d scale of the first latents."""
    table = sigma_table(walk.schedule)
    timesteps = timestep_grid(walk.schedule.config, walk.num_inference_steps, walk.spacing).float()
    sigmas = sigmas_at(timesteps.double(), table)
    if walk.karras:
        # Between the ends of the grid, not of the table: with leading spacing they differ.
        sigmas = karras_sigmas(sigmas[0].item(), sigmas[-1].item(), walk.num_inference_steps)
        timesteps = timesteps_at(sigmas, table).float()
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
    # x_T of variance 1 is of variance sigma^2 + 1 once divided by sqrt(abar). Where the grid starts at T - 1, diffusers
    # drops the 1, as k-diffusion does.
    highest = sigmas.max()
    return timesteps, sigmas, (highest**2 + 1).sqrt() if walk.spacing == "leading" else highest


def dpm_grid(walk: Walk) -> tuple[Tensor, Tensor]:
    """Return timesteps [n] int64 and sigmas [n + 1] float32 ending in 0, by the rules of diffusers' multistep classes.

    With `karras` the noise levels lie between the ends of the table, and the spacing means nothing.
    """
    config, table, n = walk.schedule.config, sigma_table(walk.schedule), walk.num_inference_steps
    # Leading and linspace choose one more timestep and drop the lowest: the step to sigma 0 takes its place.
    extra = 0 if walk.karras or walk.spacing == "trailing" else 1
    check_steps(n, config.num_train_timesteps - extra)
    if walk.karras:
        sigmas = karras_sigmas(table[-1].item(), table[0].item(), n)
        # DPMSolverMultistepScheduler rounds down for the cosine schedule alone, where its first timestep, 998 or 999,
        # is then an accident of float32.
        timesteps = timesteps_at(sigmas, table).round()
    else:
        timesteps = timestep_grid(config, n + extra, walk.spacing)[:n].round()
        sigmas = sigmas_at(timesteps, table)
    return timesteps.long(), torch.cat([sigmas, sigmas.new_zeros(1)]).float()
