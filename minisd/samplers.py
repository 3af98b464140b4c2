"""The reverse process: from noise, or from a picture and noise, to latents in a few network calls.

The samplers are one function each, in three files by what they count in: vp_samplers (timesteps), sigma_samplers (noise
levels) and multistep_samplers (log signal-to-noise ratios). A sampler is a generator that yields the latents after
every network call, so that its caller owns the progress bar. It draws noise exactly when diffusers does, so that one
`torch.Generator` gives the same picture in both.

The factors of a step are 0-d float32 tensors: no step waits for the device, and the latents keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig, TimestepSpacing
from minisd.errors import UsageError
from minisd.multistep_samplers import dpmpp_2m, dpmpp_2m_sde, unipc
from minisd.sampler_grids import Model, Noise, Walk
from minisd.sigma_samplers import euler, euler_ancestral, heun
from minisd.vp_samplers import ddim, ddpm, lcm, pndm

SAMPLERS: Mapping[str, Callable[[Model, Walk], Iterator[Tensor]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler-a": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m-sde": dpmpp_2m_sde,
    "unipc": unipc,
    "lcm": lcm,
}
KARRAS_SAMPLERS = ("euler", "heun", "dpm++2m", "dpm++2m-sde", "unipc")


def default_spacing(config: NoiseScheduleConfig, sampler: str) -> TimestepSpacing:
    """Return the spacing diffusers ends up with for a model's folder and a sampler.

    A spacing written in the folder's file holds for every sampler. Otherwise each takes its own class's default:
    `from_config` hands on what the file says, never what it leaves out. So Euler takes SD1.5 (PNDM, whose default is
    "leading") on "linspace", and SDXL (an explicit "leading") on "leading".
    """
    if config.timestep_spacing is not None:
        return config.timestep_spacing
    return "leading" if sampler in ("ddpm", "ddim", "pndm", "lcm") else "linspace"


def _check_name(name: str) -> None:
    if name not in SAMPLERS:
        raise UsageError(f"--scheduler is {name}; choose one of {', '.join(SAMPLERS)}")


def _first_step(num_inference_steps: int, strength: float) -> int:
    """Return how many steps image to image leaves out, in the roundings of diffusers' pipeline."""
    if not 0 <= strength <= 1:
        raise UsageError(f"--strength is {strength}; expected above 0 and at most 1")
    taken = min(int(num_inference_steps * strength), num_inference_steps)
    if taken < 1:
        raise UsageError(
            f"--strength {strength} of --num-inference-steps {num_inference_steps} leaves no step to take;"
            " expected a product of at least 1"
        )
    return num_inference_steps - taken


def number_of_calls(name: str, num_inference_steps: int, strength: float = 1.0) -> int:
    """Return how often a sampler calls the network, which is how often it yields.

    Args:
        name: one of SAMPLERS.
        num_inference_steps: of the whole way, from 1.
        strength: of image to image, above 0 and at most 1; 1 for text to image.

    Raises:
        UsageError: no such sampler, or no step is left.
    """
    _check_name(name)
    taken = num_inference_steps - _first_step(num_inference_steps, strength)
    if name == "heun":
        return 2 * taken - 1
    return taken + 1 if name == "pndm" and num_inference_steps > 1 else taken


def sample_loop(
    name: str,
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    image_latents: Tensor | None = None,
    strength: float = 1.0,
    spacing: TimestepSpacing | None = None,
    karras: bool | None = None,
    eta: float = 0.0,
    draw_noise: Noise,
) -> Iterator[Tensor]:
    """Run a sampler by name.

    Args:
        name: one of SAMPLERS.
        model: the network, guidance included.
        noise: standard normal, [B, 4, h, w].
        schedule: of the model, on any device; on the CPU it costs a GPU the least.
        num_inference_steps: steps of the whole way, from 1.
        image_latents: pictures to begin with, scaled, in the shape and dtype of `noise`: image to image. None: text to
            image.
        strength: share of the way that is taken, above 0 and at most 1. With 1 the pictures are all but forgotten.
        spacing: how the timesteps are chosen; None is `default_spacing`.
        karras: noise levels spaced by arXiv:2206.00364, eq. 5; None is the model's, where the sampler has it.
        eta: share of DDPM's noise that DDIM adds, from 0 to 1.
        draw_noise: makes the noise that the sampler adds on its way.

    Yields:
        The latents after each network call, [B, 4, h, w] in the dtype of `noise`: `number_of_calls` of them.

    Raises:
        UsageError: no such sampler, it has no such option, no step is left, or (when the first latents are asked for)
            an impossible number of steps.
    """
    _check_name(name)
    if karras and name not in KARRAS_SAMPLERS:
        raise UsageError(f"--karras means nothing to {name}; samplers that take it: {', '.join(KARRAS_SAMPLERS)}")
    if eta and name != "ddim":
        raise UsageError(f"eta is {eta}, which means nothing to {name}; the sampler that takes it: ddim")
    if spacing is not None and name == "lcm":
        raise UsageError("--timestep-spacing means nothing to lcm, whose timesteps are those it was distilled on")
    if image_latents is None and strength != 1:
        raise UsageError(f"--strength is {strength}, which means nothing without --init-image")
    walk = Walk(
        schedule=schedule,
        num_inference_steps=num_inference_steps,
        spacing=spacing if spacing is not None else default_spacing(schedule.config, name),
        karras=name in KARRAS_SAMPLERS and (schedule.config.use_karras_sigmas if karras is None else karras),
        eta=eta,
        noise=noise,
        image_latents=image_latents,
        first_step=0 if image_latents is None else _first_step(num_inference_steps, strength),
        draw_noise=draw_noise,
    )
    return SAMPLERS[name](model, walk)
