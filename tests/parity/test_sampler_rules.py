"""What the samplers promise beside diffusers' numbers: how many steps they take, and what they refuse."""

import pytest
import torch
from torch import Tensor

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import UsageError
from minisd.samplers import KARRAS_SAMPLERS, SAMPLERS, sample_loop
from tests.parity.test_samplers import SD15, SPACINGS, Recorder


@pytest.mark.parametrize("steps", [61, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trailing_visits_exactly_as_many_timesteps_as_asked(name, steps):
    """Of 61 steps diffusers makes 62, with a last timestep of -1."""
    model, latents = Recorder(), torch.zeros(1, 4, 2, 2)
    *_, last = sample_loop(
        name, model, latents, NoiseSchedule(SD15), steps, spacing="trailing", draw_noise=lambda: latents
    )
    assert len(model.timesteps) == steps
    assert min(model.timesteps) >= 0
    assert last.isfinite().all()


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_impossible_numbers_of_steps_are_refused_before_the_network_is_called(name, steps, spacing):
    model, latents = Recorder(), torch.zeros(1, 4, 2, 2)
    way = sample_loop(name, model, latents, NoiseSchedule(SD15), steps, spacing=spacing, draw_noise=lambda: latents)
    with pytest.raises(UsageError, match="--num-inference-steps is"):
        next(way)
    assert not model.samples


@pytest.mark.parametrize(("name", "spacing"), [("ddim", "leading"), ("euler", "leading"), ("dpm++2m", "linspace")])
def test_the_last_number_of_steps_that_a_grid_cannot_hold_is_refused(name, spacing):
    latents = torch.zeros(1, 4, 2, 2)
    way = sample_loop(name, Recorder(), latents, NoiseSchedule(SD15), 1000, spacing=spacing, draw_noise=lambda: latents)
    with pytest.raises(UsageError, match="--num-inference-steps is 1000"):
        next(way)


def test_options_that_mean_nothing_are_refused():
    latents = torch.zeros(1, 4, 2, 2)

    def run(name: str, **options: object) -> None:
        list(sample_loop(name, Recorder(), latents, NoiseSchedule(SD15), 2, draw_noise=lambda: latents, **options))

    for name in set(SAMPLERS) - set(KARRAS_SAMPLERS):
        with pytest.raises(UsageError, match=r"--karras means nothing to .*: euler, dpm\+\+2m"):
            run(name, karras=True)
    with pytest.raises(UsageError, match="eta is 1"):
        run("euler", eta=1.0)
    with pytest.raises(UsageError, match="choose one of ddpm, ddim, euler"):
        run("plms")


def test_a_model_that_asks_for_karras_gets_it_where_it_exists():
    latents = torch.ones(1, 4, 2, 2)
    asks = NoiseSchedule(NoiseScheduleConfig(use_karras_sigmas=True))

    def last(name: str, schedule: NoiseSchedule, karras: bool | None) -> Tensor:
        *_, end = sample_loop(name, Recorder(), latents, schedule, 5, karras=karras, draw_noise=lambda: latents)
        return end

    for name in KARRAS_SAMPLERS:
        assert torch.equal(last(name, asks, None), last(name, NoiseSchedule(SD15), True))
        assert torch.equal(last(name, asks, False), last(name, NoiseSchedule(SD15), None))
    assert torch.equal(last("ddpm", asks, None), last("ddpm", NoiseSchedule(SD15), None))
