"""Every sampler against diffusers, along the whole way: timesteps, inputs of the network, latents, noise drawn."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.samplers import KARRAS_SAMPLERS, SAMPLERS, ddim, ddpm, sample_loop

pytestmark = pytest.mark.filterwarnings("ignore:__array__")  # diffusers with numpy 2

# No test here may skip for want of diffusers: a missing oracle fails the run.
ORACLES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}
SD15 = NoiseScheduleConfig(set_alpha_to_one=False)
SPACINGS = ["leading", "linspace", "trailing"]
# name, karras, eta
VARIANTS = [
    ("ddpm", False, 0.0),
    ("ddim", False, 0.0),
    ("ddim", False, 0.7),
    ("euler", False, 0.0),
    ("euler", True, 0.0),
    ("euler-a", False, 0.0),
    ("dpm++2m", False, 0.0),
    ("dpm++2m", True, 0.0),
]


class Recorder:
    """A network with a nonlinear output that depends on the timestep, which remembers what it was given."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.samples.append(sample.clone())
        self.timesteps.append(timestep)
        # Rounded, so that Euler's Karras timesteps, equal to 1e-4 only, give the same output on both sides.
        return torch.tanh(sample.roll(1, -1)) * (0.2 + round(float(timestep)) / 1000)


def make_noise(latents: Tensor, seed: int) -> tuple[torch.Generator, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda: torch.randn(latents.shape, generator=generator, dtype=latents.dtype)


def make_oracle(name: str, config: NoiseScheduleConfig, spacing: str, karras: bool) -> diffusers.SchedulerMixin:
    options = {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "steps_offset": config.steps_offset,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
    }
    if name in ("ddpm", "ddim"):
        options["clip_sample"] = False
    if name == "ddim":
        options["set_alpha_to_one"] = config.set_alpha_to_one
    if name in KARRAS_SAMPLERS:
        options["use_karras_sigmas"] = karras
    return ORACLES[name](**options)


def assert_same_way(
    name: str, config: NoiseScheduleConfig, spacing: str, karras: bool, eta: float, steps: int, dtype: torch.dtype
) -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)

    oracle, their_model, expected = make_oracle(name, config, spacing, karras), Recorder(), []
    their_generator, _ = make_noise(latents, 5)
    oracle.set_timesteps(steps)
    if name in ("euler", "euler-a", "dpm++2m"):
        # Left alone, it looks its first step up by timestep, and where two round to the same it skips one.
        oracle.set_begin_index(0)
    sample = latents * oracle.init_noise_sigma
    options = {"eta": eta} if name == "ddim" else {}
    if name in ("ddpm", "ddim", "euler-a"):
        options["generator"] = their_generator
    for timestep in oracle.timesteps:
        output = their_model(oracle.scale_model_input(sample, timestep), timestep)
        sample = oracle.step(output, timestep, sample, **options).prev_sample
        expected.append(sample)

    our_model = Recorder()
    generator, draw_noise = make_noise(latents, 5)
    schedule = NoiseSchedule(config)
    got = list(
        sample_loop(
            name, our_model, latents, schedule, steps, spacing=spacing, karras=karras, eta=eta, draw_noise=draw_noise
        )
    )

    # Diffusers takes logarithms of float32 sigmas in float32 on the way to Euler's Karras timesteps; the rest is exact.
    inexact = 1e-4 if name == "euler" and karras else 0.0
    torch.testing.assert_close(
        torch.stack(our_model.timesteps), torch.stack(their_model.timesteps), rtol=0, atol=inexact
    )
    # Euler and DPM-Solver++ cast the latents to float32 in every step whatever they are, in diffusers and here: the
    # float64 tolerance holds because the roundings are the same.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    where = f"{name} {spacing} {steps} steps: "
    for i in range(steps):
        for ours, theirs in [(our_model.samples[i], their_model.samples[i]), (got[i], expected[i])]:
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{where}step {i}: {text}"
            )
    # As many draws: the next number of both generators is the same.
    assert torch.equal(generator.get_state(), their_generator.get_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "karras", "eta"), VARIANTS)
def test_trajectory_equals_the_oracle(name, karras, eta, spacing, prediction_type, dtype):
    if name == "euler-a" and prediction_type == "sample":
        return  # not in diffusers; test_euler_ancestral_of_x0_models covers it
    config = NoiseScheduleConfig(set_alpha_to_one=False, prediction_type=prediction_type)
    for steps in (4, 10, 20, 25, 50):
        assert_same_way(name, config, spacing, karras, eta, steps, dtype)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "karras", "eta"), VARIANTS)
def test_one_step_odd_steps_and_other_configs(name, karras, eta, spacing):
    for steps in (1, 2, 3, 48, 167):
        assert_same_way(name, SD15, spacing, karras, eta, steps, torch.float64)
    # alpha 1 at DDIM's end, no offset, the cosine schedule
    config = NoiseScheduleConfig(set_alpha_to_one=True, steps_offset=0, beta_schedule="squaredcos_cap_v2")
    if (name, karras) != ("dpm++2m", True):  # sampler_grids.dpm_grid says why
        assert_same_way(name, config, spacing, karras, eta, 20, torch.float64)
    config = NoiseScheduleConfig(set_alpha_to_one=False, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert_same_way(name, config, spacing, karras, eta, 20, torch.float64)


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++2m"])
def test_half_precision_latents_keep_their_dtype_and_equal_the_oracle(name):
    assert_same_way(name, SD15, "leading", False, 0.0, 20, torch.float16)


def test_euler_ancestral_of_x0_models():
    """An x0 network with the same belief as an epsilon network takes the same way."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    ways = []
    for prediction_type in ("epsilon", "sample"):
        schedule = NoiseSchedule(NoiseScheduleConfig(prediction_type=prediction_type))

        def model(sample: Tensor, timestep: Tensor, schedule: NoiseSchedule = schedule) -> Tensor:
            epsilon = torch.tanh(sample)
            timesteps = timestep.round().long().view(1)
            if schedule.config.prediction_type == "epsilon":
                return epsilon
            abar = schedule.alphas_cumprod[timesteps]
            return (sample - (1 - abar).sqrt() * epsilon) / abar.sqrt()

        _, draw_noise = make_noise(latents, 5)
        ways.append(
            list(sample_loop("euler-a", model, latents, schedule, 10, spacing="trailing", draw_noise=draw_noise))
        )
    for epsilon_way, sample_way in zip(*ways, strict=True):
        torch.testing.assert_close(epsilon_way, sample_way, rtol=1e-4, atol=1e-3)


# Sum of |x| at the end, of diffusers 0.42.1: SD1.5's config, output = input t / (t + 1), generator of seed 0.
GOLDEN = [
    ("ddim", {}, {}, 20, 192.0829),
    ("ddim", {}, {"spacing": "trailing"}, 20, 190.5420),
    ("ddim", {"prediction_type": "v_prediction"}, {}, 20, 79.2295),
    (
        "ddim",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"spacing": "trailing"},
        20,
        70.7280,
    ),
    ("euler", {}, {}, 20, 189.6054),
    ("euler", {}, {"spacing": "leading"}, 20, 189.3475),
    ("euler", {"prediction_type": "v_prediction"}, {}, 20, 75.8329),
    ("euler", {}, {"karras": True}, 20, 191.9294),
    ("euler-a", {}, {}, 20, 265.2741),
    ("dpm++2m", {}, {}, 20, 190.4985),
    ("dpm++2m", {}, {}, 10, 184.0657),
    ("dpm++2m", {}, {"karras": True}, 20, 205.5888),
    ("dpm++2m", {"prediction_type": "v_prediction"}, {}, 20, 82.7924),
    ("ddpm", {}, {}, 20, 261.8940),
]


@pytest.mark.parametrize(("name", "fields", "options", "steps", "expected"), GOLDEN)
def test_golden_sums(name, fields, options, steps, expected):
    schedule = NoiseSchedule(NoiseScheduleConfig(set_alpha_to_one=False, **fields))
    latents = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    _, draw_noise = make_noise(latents, 0)
    *_, last = sample_loop(
        name, lambda x, t: x * t / (t + 1), latents, schedule, steps, draw_noise=draw_noise, **options
    )
    assert last.abs().sum().item() == pytest.approx(expected, abs=1e-3)


def test_ddim_with_all_the_noise_and_no_skipped_timestep_is_ddpm():
    schedule = NoiseSchedule(NoiseScheduleConfig(num_train_timesteps=50, steps_offset=0, set_alpha_to_one=True))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, draw = make_noise(latents, 5)
    _, draw_again = make_noise(latents, 5)
    ancestral = ddpm(Recorder(), latents, schedule, 50, spacing="trailing", draw_noise=draw)
    implicit = ddim(Recorder(), latents, schedule, 50, spacing="trailing", eta=1.0, draw_noise=draw_again)
    for ours, other in zip(ancestral, implicit, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_never_waits_for_the_device(name):
    latents = torch.ones(1, 4, 8, 8, device="cuda")
    schedule = NoiseSchedule(SD15).to("cuda")
    way = sample_loop(
        name, lambda x, t: x * t / (t + 1), latents, schedule, 10, draw_noise=lambda: torch.ones_like(latents)
    )
    next(way)  # the grid is made and moved here, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, last = way
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.isfinite().all()
