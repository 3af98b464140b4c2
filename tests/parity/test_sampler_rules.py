"""What the samplers promise beside diffusers' numbers: laws of theirs, how many steps they take, what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import UsageError
from minisd.samplers import KARRAS_SAMPLERS, SAMPLERS, number_of_calls, sample_loop
from tests.parity.test_samplers import SD15, SPACINGS, ZERO_SNR, Recorder, make_noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_with_the_same_belief_take_the_same_way(name):
    """Networks that know the picture, and tell it as noise, as velocity or as itself, all walk straight to it."""
    generator = torch.Generator().manual_seed(1)
    noise, picture = (torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    spacing = None if name == "lcm" else "leading"  # whole timesteps, from which abar is known
    ways = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule(NoiseScheduleConfig(set_alpha_to_one=True, prediction_type=prediction_type))

        def model(sample: Tensor, timestep: Tensor, schedule: NoiseSchedule = schedule) -> Tensor:
            abar = schedule.alphas_cumprod[timestep.long()].double()
            epsilon = (sample - abar.sqrt() * picture) / (1 - abar).sqrt()
            return schedule.target(picture, epsilon, timestep.long().view(1))

        _, draw_noise = make_noise(noise, 5)
        ways.append(
            torch.stack([*sample_loop(name, model, noise, schedule, 7, spacing=spacing, draw_noise=draw_noise)])
        )
    for way in ways[2:] if name == "pndm" else ways[1:]:  # PNDM mixes velocities of different timesteps
        torch.testing.assert_close(way, ways[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ways[0][-1], picture, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ways[0][0], picture, atol=0.1)


def test_ddim_with_all_the_noise_and_no_skipped_timestep_is_ddpm():
    schedule = NoiseSchedule(NoiseScheduleConfig(num_train_timesteps=50, steps_offset=0, set_alpha_to_one=True))
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ways = []
    for name, eta in [("ddpm", 0.0), ("ddim", 1.0)]:
        _, draw_noise = make_noise(latents, 5)
        ways.append(
            sample_loop(name, Recorder(), latents, schedule, 50, spacing="trailing", eta=eta, draw_noise=draw_noise)
        )
    for ours, other in zip(*ways, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(name, strength):
    generator = torch.Generator().manual_seed(1)
    noise, image = (torch.randn(3, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def way(pictures: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)[pictures]]
        options = {} if strength is None else {"image_latents": image[pictures], "strength": strength}
        return torch.stack(
            [
                *sample_loop(
                    name,
                    Recorder(),
                    noise[pictures],
                    NoiseSchedule(SD15),
                    8,
                    draw_noise=lambda: torch.cat([torch.randn(1, 4, 4, 4, generator=each) for each in generators]),
                    **options,
                )
            ]
        )

    torch.testing.assert_close(way(slice(0, 3))[:, 1:2], way(slice(1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [61, 1000])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
def test_trailing_visits_exactly_as_many_timesteps_as_asked(name, steps):
    """Of 61 steps diffusers makes 62, with a last timestep of -1."""
    model, latents = Recorder(), torch.zeros(1, 4, 2, 2)
    *_, last = sample_loop(
        name, model, latents, NoiseSchedule(SD15), steps, spacing="trailing", draw_noise=lambda: latents
    )
    assert len(model.timesteps) == number_of_calls(name, steps)
    assert len({float(timestep) for timestep in model.timesteps}) == steps
    assert min(model.timesteps) >= 0
    assert last.isfinite().all()


def test_number_of_calls():
    """One a step; two a step of Heun but the last; one more of PNDM, which repeats a step."""
    for name in SAMPLERS:
        extra = {"heun": (0, 24, 10), "pndm": (0, 1, 1)}.get(name, (0, 0, 0))
        got = number_of_calls(name, 1), number_of_calls(name, 25), number_of_calls(name, 25, 0.47)
        assert got == (1 + extra[0], 25 + extra[1], 11 + extra[2])


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_impossible_numbers_of_steps_are_refused_before_the_network_is_called(name, steps, spacing):
    model, latents = Recorder(), torch.zeros(1, 4, 2, 2)
    config = NoiseScheduleConfig(timestep_spacing=spacing)
    way = sample_loop(name, model, latents, NoiseSchedule(config), steps, draw_noise=lambda: latents)
    with pytest.raises(UsageError, match="--num-inference-steps is"):
        next(way)
    assert not model.samples


@pytest.mark.parametrize(
    ("name", "spacing", "steps"),
    [("ddim", "leading", 1000), ("euler", "leading", 1000), ("dpm++2m", "linspace", 1000), ("lcm", None, 51)],
)
def test_the_last_number_of_steps_that_a_grid_cannot_hold_is_refused(name, spacing, steps):
    latents = torch.zeros(1, 4, 2, 2)
    way = sample_loop(
        name, Recorder(), latents, NoiseSchedule(SD15), steps, spacing=spacing, draw_noise=lambda: latents
    )
    with pytest.raises(UsageError, match=f"--num-inference-steps is {steps}"):
        next(way)


def run(name: str, **options: object) -> list[Tensor]:
    latents = torch.ones(1, 4, 2, 2)
    return list(sample_loop(name, Recorder(), latents, NoiseSchedule(SD15), 5, draw_noise=lambda: latents, **options))


def test_options_that_mean_nothing_are_refused():
    for name in set(SAMPLERS) - set(KARRAS_SAMPLERS):
        with pytest.raises(
            UsageError, match=r"--karras means nothing to .*: euler, heun, dpm\+\+2m, dpm\+\+2m-sde, unipc"
        ):
            run(name, karras=True)
    for name in set(SAMPLERS) - {"ddim"}:
        with pytest.raises(UsageError, match="eta is 1"):
            run(name, eta=1.0)
    with pytest.raises(UsageError, match="--timestep-spacing means nothing to lcm"):
        run("lcm", spacing="leading")
    with pytest.raises(UsageError, match=r"--strength is 0.5.* --init-image"):
        run("euler", strength=0.5)


def test_an_unknown_sampler_is_answered_with_the_list():
    names = r"ddpm, ddim, pndm, euler, euler-a, heun, dpm\+\+2m, dpm\+\+2m-sde, unipc, lcm"
    with pytest.raises(UsageError, match=f"--scheduler is plms; choose one of {names}$"):
        run("plms")
    with pytest.raises(UsageError, match=names):
        number_of_calls("plms", 5)


@pytest.mark.parametrize("strength", [-0.1, 0.0, 0.19, 1.01, math.nan, math.inf])
def test_a_strength_that_leaves_no_step_or_is_no_share_is_refused(strength):
    for name in SAMPLERS:
        with pytest.raises(UsageError, match="--strength"):
            run(name, image_latents=torch.ones(1, 4, 2, 2), strength=strength)
        with pytest.raises(UsageError, match="--strength"):
            number_of_calls(name, 5, strength)


def test_pndm_refuses_a_model_whose_last_timestep_is_pure_noise():
    latents = torch.ones(1, 4, 2, 2)
    way = sample_loop("pndm", Recorder(), latents, NoiseSchedule(ZERO_SNR), 5, draw_noise=lambda: latents)
    with pytest.raises(UsageError, match="rescale_betas_zero_snr"):
        next(way)


def test_a_model_that_asks_for_karras_gets_it_where_it_exists():
    latents = torch.ones(1, 4, 2, 2)
    asks = NoiseSchedule(NoiseScheduleConfig(use_karras_sigmas=True))

    def last(name: str, schedule: NoiseSchedule, karras: bool | None) -> Tensor:
        *_, end = sample_loop(name, Recorder(), latents, schedule, 5, karras=karras, draw_noise=lambda: latents)
        return end

    for name in KARRAS_SAMPLERS:
        assert torch.equal(last(name, asks, None), last(name, NoiseSchedule(SD15), True))
        assert torch.equal(last(name, asks, False), last(name, NoiseSchedule(SD15), None))
        assert not torch.equal(last(name, asks, None), last(name, asks, False))
    assert torch.equal(last("ddpm", asks, None), last("ddpm", NoiseSchedule(SD15), None))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_looks_at_the_latents(name):
    """On the meta device there are no numbers: whatever would wait for them, or mix two devices, raises."""
    latents = torch.ones(1, 4, 4, 4, device="meta")
    way = sample_loop(name, lambda x, t: x * t, latents, NoiseSchedule(SD15), 8, draw_noise=lambda: latents)
    assert all(step.is_meta and step.dtype == torch.float32 for step in way)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_never_waits_for_the_device(name, strength):
    latents = torch.ones(1, 4, 8, 8, device="cuda")
    schedule = NoiseSchedule(SD15).to("cuda")
    options = {} if strength is None else {"image_latents": latents, "strength": strength}
    way = sample_loop(
        name,
        lambda x, t: x * t / (t + 1),
        latents,
        schedule,
        10,
        draw_noise=lambda: torch.ones_like(latents),
        **options,
    )
    next(way)  # the grid is made and moved here, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        *_, last = way
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last.isfinite().all()
