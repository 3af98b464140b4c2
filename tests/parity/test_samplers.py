"""Every sampler against diffusers, along the whole way: timesteps, inputs of the network, latents, noise drawn."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.samplers import KARRAS_SAMPLERS, SAMPLERS, default_spacing, number_of_calls, sample_loop
from tests.parity.test_ddpm import BETAS, HUB

pytestmark = pytest.mark.filterwarnings("ignore:__array__")  # diffusers with numpy 2

# No test here may skip for want of diffusers: a missing oracle fails the run.
ORACLES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++2m-sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
SD15 = NoiseScheduleConfig(set_alpha_to_one=False)
SPACINGS = ["leading", "linspace", "trailing"]
ZERO_SNR = NoiseScheduleConfig(set_alpha_to_one=False, prediction_type="v_prediction", rescale_betas_zero_snr=True)


@dataclass(frozen=True)
class Case:
    name: str
    spacing: str | None = None  # LCM's alone is its own
    karras: bool = False
    eta: float = 0.0

    def __str__(self) -> str:
        return "-".join([self.name, *[str(x) for x in (self.spacing, self.karras and "karras", self.eta) if x]])


CASES = [
    *(Case(name, spacing) for name in SAMPLERS if name != "lcm" for spacing in SPACINGS),
    *(Case(name, spacing, karras=True) for name in KARRAS_SAMPLERS for spacing in SPACINGS),
    *(Case("ddim", spacing, eta=0.7) for spacing in SPACINGS),
    Case("lcm"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


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


def make_oracle(case: Case, config: NoiseScheduleConfig) -> diffusers.SchedulerMixin:
    options = {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "prediction_type": config.prediction_type,
        "steps_offset": config.steps_offset,
        "timestep_spacing": case.spacing,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "set_alpha_to_one": config.set_alpha_to_one,
        "use_karras_sigmas": case.karras,
        "clip_sample": False,
        "skip_prk_steps": True,
        "algorithm_type": "sde-dpmsolver++" if case.name == "dpm++2m-sde" else "dpmsolver++",
    }
    known = inspect.signature(ORACLES[case.name].__init__).parameters
    oracle = ORACLES[case.name](**{name: value for name, value in options.items() if name in known})
    if case.name == "heun" and config.rescale_betas_zero_snr:  # has no such option: give it Euler's table
        oracle.alphas_cumprod = make_oracle(replace(case, name="euler"), config).alphas_cumprod
    return oracle


def assert_same_way(
    case: Case,
    config: NoiseScheduleConfig,
    steps: int,
    dtype: torch.dtype = torch.float64,
    strength: float | None = None,
    oracle: diffusers.SchedulerMixin | None = None,
) -> None:
    """Hold the whole way to diffusers': text to image, or with a strength its StableDiffusionImg2ImgPipeline."""
    draws = torch.Generator().manual_seed(1)
    noise, image = (torch.randn(2, 4, 4, 4, generator=draws, dtype=dtype) for _ in range(2))
    # DPM-Solver++'s SDE draws in float32 whatever the latents are, the others in their dtype.
    as_drawn = noise.float() if case.name == "dpm++2m-sde" else noise

    oracle, their_model, expected = oracle or make_oracle(case, config), Recorder(), []
    their_generator, _ = make_noise(noise, 5)
    oracle.set_timesteps(steps)
    if strength is not None:
        pipeline = SimpleNamespace(scheduler=oracle)
        timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
        sample = oracle.add_noise(image, noise, timesteps[:1].repeat(2))
    else:
        timesteps, sample = oracle.timesteps, noise * oracle.init_noise_sigma
        if hasattr(oracle, "set_begin_index"):
            # Left alone, it looks its first step up by timestep, and where two round to the same it skips one.
            oracle.set_begin_index(0)
    accepted = inspect.signature(oracle.step).parameters
    options = {"eta": case.eta} if "eta" in accepted else {}
    if "generator" in accepted:
        options["generator"] = their_generator
    for timestep in timesteps:
        output = their_model(oracle.scale_model_input(sample, timestep), timestep)
        sample = oracle.step(output, timestep, sample, **options).prev_sample
        expected.append(sample)

    our_model = Recorder()
    generator, draw_noise = make_noise(as_drawn, 5)
    way = sample_loop(
        case.name,
        our_model,
        noise,
        NoiseSchedule(config),
        steps,
        image_latents=None if strength is None else image,
        strength=1.0 if strength is None else strength,
        spacing=case.spacing,
        karras=case.karras,
        eta=case.eta,
        draw_noise=draw_noise,
    )
    got = list(way)

    assert len(got) == len(our_model.samples) == len(expected) == number_of_calls(case.name, steps, strength or 1.0)
    # Diffusers takes logarithms of float32 sigmas in float32 on the way to these timesteps; the rest is exact.
    inexact = 1e-4 if case.karras and case.name in ("euler", "heun") else 0.0
    torch.testing.assert_close(
        torch.stack(our_model.timesteps), torch.stack(their_model.timesteps), rtol=0, atol=inexact
    )
    # Euler and DPM-Solver++ cast the latents to float32 in every step whatever they are, in diffusers and here: the
    # float64 tolerance holds because the roundings are the same.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for i in range(len(expected)):
        for ours, theirs in [(our_model.samples[i], their_model.samples[i]), (got[i], expected[i])]:
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, i=i: f"{case} {steps} steps, strength {strength}, call {i}: {text}",
            )
    # As many draws: the next number of both generators is the same.
    assert torch.equal(generator.get_state(), their_generator.get_state())


def exists_in_diffusers(case: Case, config: NoiseScheduleConfig) -> bool:
    if case.name in ("pndm", "euler-a") and config.prediction_type == "sample":
        return False  # test_prediction_types_with_the_same_belief_take_the_same_way covers them
    if case.name == "pndm" and config.rescale_betas_zero_snr:
        return False  # refused
    # sampler_grids.dpm_grid says why
    return not (case.karras and case.name.startswith("dpm++2m") and config.beta_schedule == "squaredcos_cap_v2")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@every_case
def test_text_to_image_equals_the_oracle(case, prediction_type):
    config = NoiseScheduleConfig(set_alpha_to_one=False, prediction_type=prediction_type)
    if exists_in_diffusers(case, config):
        for steps in (1, 2, 3, 4, 10, 25, 50):
            assert_same_way(case, config, steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@every_case
def test_image_to_image_equals_the_oracle(case, prediction_type):
    config = NoiseScheduleConfig(set_alpha_to_one=False, prediction_type=prediction_type)
    for steps in (1, 7, 20):
        assert_same_way(case, config, steps, strength=1.0)
    for steps, strength in [(2, 0.5), (3, 0.7), (10, 0.3), (10, 0.1), (20, 0.95), (25, 0.75)]:
        assert_same_way(case, config, steps, strength=strength)


@every_case
def test_odd_steps_single_precision_and_other_configs(case):
    assert_same_way(case, SD15, 49)
    if case.name != "lcm":
        assert_same_way(case, SD15, 167)
    for strength in (None, 0.6):
        assert_same_way(case, SD15, 20, torch.float32, strength)
        # alpha 1 at DDIM's end, no offset, the cosine schedule
        cosine = NoiseScheduleConfig(set_alpha_to_one=True, steps_offset=0, beta_schedule="squaredcos_cap_v2")
        for config in (cosine, ZERO_SNR):
            if exists_in_diffusers(case, config):
                assert_same_way(case, config, 20, strength=strength)


MODELS = {**HUB, "says-little": {"_class_name": "DDIMScheduler", **BETAS, "steps_offset": 1}}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_published_model_with_its_scheduler_swapped(model, name):
    """What the model's file does not say, the default of the sampler's own class decides: spacing, alpha at the end."""
    of_the_folder = getattr(diffusers, MODELS[model]["_class_name"]).from_config(MODELS[model])
    options = {"algorithm_type": "sde-dpmsolver++"} if name == "dpm++2m-sde" else {}
    if name in ("ddpm", "ddim"):
        options["clip_sample"] = False  # which the pipeline's constructor sees to, and a swap forgets
    if name == "pndm":
        options["skip_prk_steps"] = True
    oracle = ORACLES[name].from_config(of_the_folder.config, **options)
    config = NoiseScheduleConfig.from_json(MODELS[model], xl=model == "sdxl")
    assert default_spacing(config, name) == oracle.config.timestep_spacing
    for steps, strength in [(25, None), (6, None), (25, 0.4)]:
        assert_same_way(Case(name), config, steps, strength=strength, oracle=oracle)


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_latents_keep_their_dtype_and_equal_the_oracle(name):
    assert_same_way(Case(name, None if name == "lcm" else "leading"), SD15, 20, torch.float16)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bfloat16_latents_keep_their_dtype(name, image):
    latents = torch.ones(1, 4, 4, 4, dtype=torch.bfloat16)
    options = {"image_latents": latents, "strength": 0.5} if image else {}
    for step in sample_loop(name, Recorder(), latents, NoiseSchedule(SD15), 6, draw_noise=lambda: latents, **options):
        assert step.dtype == torch.bfloat16


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
    ("pndm", {}, {}, 20, 202.4588),
    ("euler", {}, {}, 20, 189.6054),
    ("euler", {}, {"spacing": "leading"}, 20, 189.3475),
    ("euler", {"prediction_type": "v_prediction"}, {}, 20, 75.8329),
    ("euler", {}, {"karras": True}, 20, 191.9294),
    ("euler-a", {}, {}, 20, 265.2741),
    ("heun", {}, {}, 20, 220.2617),
    ("dpm++2m", {}, {}, 20, 190.4985),
    ("dpm++2m", {}, {}, 10, 184.0657),
    ("dpm++2m", {}, {"karras": True}, 20, 205.5888),
    ("dpm++2m", {"prediction_type": "v_prediction"}, {}, 20, 82.7924),
    ("dpm++2m-sde", {}, {}, 20, 287.0174),
    ("unipc", {}, {}, 20, 190.3589),
    ("ddpm", {}, {}, 20, 261.8940),
    ("lcm", {}, {}, 4, 189.0072),
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
