"""The pure pieces of a step."""

import math

import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.training import Precision, SampleDraws, diffusion_loss, draw_for, lr_at


def lr(step, warmup=0, steps=100, scheduler="cosine"):
    return lr_at(step, learning_rate=2e-4, warmup_steps=warmup, max_train_steps=steps, scheduler=scheduler)


@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_equals_diffusers_after_the_warmup(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, 100)
    for step in range(100):
        if step >= warmup:
            assert lr(step, warmup) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        scheduler.step()


def test_warmup_begins_above_zero_and_ends_at_the_top():
    assert lr(0, warmup=4) == pytest.approx(0.5e-4)
    assert lr(3, warmup=4) == pytest.approx(2e-4)
    assert lr(4, warmup=4) == pytest.approx(2e-4)
    assert lr(5, warmup=4) < 2e-4


def test_end_points():
    assert lr(0) == 2e-4
    assert lr(100) == pytest.approx(0, abs=1e-18)
    assert 0 < lr(99) < 1e-7
    assert lr(50) == pytest.approx(1e-4)
    assert lr(99, scheduler="constant") == 2e-4
    assert math.isfinite(lr(0, warmup=0, steps=1))


def test_precision_policy():
    assert Precision("no", "cpu").dtype == torch.float32
    assert Precision("bf16", "cpu").dtype == torch.bfloat16
    assert Precision("fp16", "cpu").scaler().is_enabled()
    assert not Precision("bf16", "cpu").scaler().is_enabled()


class _Echo(torch.nn.Module):
    """A network whose prediction is what a perfect one would say, off by `error`."""

    def __init__(self, answer, error):
        super().__init__()
        self.answer, self.error, self.seen = answer, error, None

    def forward(self, sample, timesteps, encoder_hidden_states):
        self.seen = sample
        return self.answer + self.error


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_squared_error_against_the_model_s_own_target(prediction_type):
    schedule = NoiseSchedule(NoiseScheduleConfig(prediction_type=prediction_type))
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    drawn = SampleDraws(noise, noise, torch.tensor([10, 900]))
    target = noise if prediction_type == "epsilon" else schedule.velocity(latents, noise, drawn.timesteps)
    net = _Echo(target, 0.5)
    loss = diffusion_loss(net, schedule, latents, drawn, torch.zeros(2, 77, 8), Precision("no", "cpu"))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25, rel=1e-5)
    assert torch.equal(net.seen, schedule.add_noise(latents, noise, drawn.timesteps))


def test_noise_is_added_and_compared_in_float32_under_bf16():
    """In bfloat16 alphas_cumprod rounds to 1 at t = 0 and no noise would be added at all."""
    schedule = NoiseSchedule(NoiseScheduleConfig())
    latents, noise = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    net = _Echo(noise, 0.0)
    loss = diffusion_loss(
        net,
        schedule,
        latents,
        SampleDraws(noise, noise, torch.tensor([0])),
        torch.zeros(1, 77, 8),
        Precision("bf16", "cpu"),
    )
    assert net.seen.dtype == torch.bfloat16
    assert net.seen.float().mean().item() == pytest.approx(0.02915, rel=1e-2)
    assert loss.dtype == torch.float32


def test_draws_of_a_micro_batch_are_those_of_its_samples():
    both = draw_for([5, 9], 1, (4, 8, 8), 1000, torch.device("cpu"))
    one = draw_for([9], 1, (4, 8, 8), 1000, torch.device("cpu"))
    assert torch.equal(both.noise[1], one.noise[0])
    assert torch.equal(both.posterior_noise[1], one.posterior_noise[0])
    assert both.timesteps[1] == one.timesteps[0]
    assert not torch.equal(one.noise, one.posterior_noise)
