"""The pure pieces of a step."""

import math
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import compute_snr

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.errors import UsageError
from minisd.latent_cache import encode_moments
from minisd.lora import inject_lora, lora_parameters
from minisd.optimizer import make_optimizer
from minisd.training import (
    Precision,
    diffusion_loss,
    latents_of,
    lr_at,
    recompute_activations,
    snr_weights,
)
from minisd.weights import load_unet, load_vae

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


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
    modes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for mode, dtype in modes.items():
        precision = Precision(mode, "cpu")
        assert precision.dtype == dtype
        assert precision.scaler().is_enabled() == (mode == "fp16")  # bfloat16 has float32's range
    with pytest.raises(KeyError):
        _ = Precision("fp8", "cpu").dtype


class _Echo(torch.nn.Module):
    """A network whose prediction is `answer`, and that remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen, self.read = answer, None, None

    def forward(self, sample, timesteps, encoder_hidden_states):
        self.seen, self.read = sample, encoder_hidden_states
        assert not torch.is_autocast_enabled("cpu")
        return self.answer


def _schedule(prediction_type, **options):
    return NoiseSchedule(NoiseScheduleConfig(prediction_type=prediction_type, **options))


def _batch(timesteps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise, answer = (torch.randn(len(timesteps), 4, 8, 8, generator=generator) for _ in range(3))
    return latents, noise, torch.tensor(timesteps), answer


def _loss(net, schedule, latents, noise, timesteps, dtype=torch.float32, snr_gamma=None):
    prompt = torch.zeros(len(latents), 77, 8)
    return diffusion_loss(
        net, schedule, latents, noise, timesteps, [prompt.to(dtype)], dtype=dtype, snr_gamma=snr_gamma
    )


# --- loss ---


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_the_mean_squared_error_against_the_model_s_own_target(prediction_type):
    schedule = _schedule(prediction_type)
    latents, noise, timesteps, _ = _batch([10, 900])
    targets = {"epsilon": noise, "v_prediction": schedule.velocity(latents, noise, timesteps), "sample": latents}
    net = _Echo(targets[prediction_type] + 0.5)
    loss = _loss(net, schedule, latents, noise, timesteps)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.25, rel=1e-5)
    assert torch.equal(net.seen, schedule.add_noise(latents, noise, timesteps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_added_and_compared_in_float32_whatever_the_network_runs_in(dtype):
    """In bfloat16 alphas_cumprod rounds to 1 at t = 0 and no noise would be added at all."""
    latents, noise = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    net = _Echo(noise.to(dtype))
    loss = _loss(net, _schedule("epsilon"), latents, noise, torch.tensor([0]), dtype=dtype)
    assert net.seen.dtype == net.read.dtype == dtype
    assert net.seen.float().mean().item() == pytest.approx(0.02915, rel=1e-2)
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    # 1 + 2^-12 is 1 in either dtype: a target that had been rounded too would be met exactly.
    target = noise * (1 + 2**-12)
    loss = _loss(_Echo(noise.to(dtype)), _schedule("epsilon"), latents, target, torch.tensor([0]), dtype=dtype)
    assert loss.item() == pytest.approx(2**-24)


# --- min-SNR ---


def test_snr_weights_by_hand():
    snr = torch.tensor([0.0, 0.5, 4.0, 5.0, 20.0])
    by_hand = {
        "epsilon": [1, 1, 1, 1, 5 / 20],  # min(SNR, 5) / SNR
        "v_prediction": [0, 0.5 / 1.5, 4 / 5, 5 / 6, 5 / 21],  # min(SNR, 5) / (SNR + 1)
        "sample": [0, 0.5, 4, 5, 5],  # min(SNR, 5)
    }
    for prediction_type, weights in by_hand.items():
        assert snr_weights(snr, 5.0, prediction_type).tolist() == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_weights_count_an_error_in_the_picture_alike_whatever_is_predicted(prediction_type):
    """The law behind the divisors: an x_0 that is off by d costs min(SNR, gamma) d^2, in each parametrisation."""
    schedule = _schedule(prediction_type)
    for t in (0, 100, 500, 900):
        latents, noise, timesteps, _ = (value.double() if i != 2 else value for i, value in enumerate(_batch([t])))
        sample, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
        error = 1e-2 * torch.ones_like(target)
        moved = schedule.predict_original(target + error, sample, timesteps)
        cost = (snr_weights(schedule.snr(timesteps), 5.0, prediction_type) * error.square().mean()).item()
        in_x0 = (moved - latents).square().mean().item()
        assert cost == pytest.approx(min(schedule.snr(timesteps).item(), 5) * in_x0, rel=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_weighted_loss_is_the_mean_over_samples(prediction_type, gamma):
    schedule = _schedule(prediction_type)
    latents, noise, timesteps, answer = _batch([0, 3, 400, 750, 999])
    loss = _loss(_Echo(answer), schedule, latents, noise, timesteps, snr_gamma=gamma)
    one_by_one = []
    for i in range(5):
        single = latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1]
        plain = _loss(_Echo(answer[i : i + 1]), schedule, *single)
        one_by_one.append(plain * snr_weights(schedule.snr(single[2]), gamma, prediction_type))
    assert loss.item() == pytest.approx(torch.cat(one_by_one).mean().item(), rel=1e-6)
    assert loss.item() != pytest.approx(_loss(_Echo(answer), schedule, latents, noise, timesteps).item(), rel=1e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_weighted_loss_is_that_of_diffusers_training_script(prediction_type):
    schedule = _schedule(prediction_type)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, prediction_type=prediction_type)
    latents, noise, timesteps, answer = _batch([0, 1, 50, 300, 600, 999])
    # train_text_to_image_lora.py
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    losses = torch.nn.functional.mse_loss(answer.float(), target.float(), reduction="none")
    wanted = (losses.mean(dim=list(range(1, len(losses.shape)))) * weights).mean()
    loss = _loss(_Echo(answer), schedule, latents, noise, timesteps, snr_gamma=5.0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_pure_noise_at_the_end_of_a_schedule_makes_no_nan(prediction_type):
    schedule = _schedule(prediction_type, rescale_betas_zero_snr=True)
    assert schedule.snr(torch.tensor([999])).item() == 0
    latents, noise, timesteps, answer = _batch([999, 998, 0])
    answer.requires_grad_()
    loss = _loss(_Echo(answer), schedule, latents, noise, timesteps, snr_gamma=5.0)
    (gradient,) = torch.autograd.grad(loss, answer)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    # Of pure noise nothing of x_0 can be told: there the picture and the velocity teach nothing, as the limit says.
    assert (gradient[0].abs().max() == 0) == (prediction_type != "epsilon")


# --- latents ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_are_drawn_in_float32_from_moments_of_any_dtype(tiny_folder, dtype):
    vae = load_vae(tiny_folder, dtype=dtype)
    moments = encode_moments(vae, torch.rand(2, 3, 32, 48) * 2 - 1)
    assert moments.dtype == dtype
    noise = torch.randn(2, 4, 8, 12)
    latents = latents_of(vae, moments, noise)
    mean, logvar = moments[:, 0].float(), moments[:, 1].float()
    wanted = (mean + (0.5 * logvar).exp() * noise) * vae.config.scaling_factor
    assert latents.dtype == torch.float32
    assert torch.equal(latents, wanted)
    assert torch.equal(latents[1:], latents_of(vae, moments[1:], noise[1:]))


# --- optimizer ---


def test_adamw_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("adamw", [parameter], 2e-3, 0.1)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 2e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0]["params"] == [parameter]


def test_a_missing_bitsandbytes_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if not installed, on machines that have it, too
    with pytest.raises(UsageError, match=r"--optimizer adamw8bit needs .*pip install bitsandbytes"):
        make_optimizer("adamw8bit", [torch.nn.Parameter(torch.ones(3))], 1e-3, 0.0)


# --- checkpointing of activations ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_gradients_to_the_bit(tiny_folder, dropout, dtype):
    def gradients(recompute):
        unet = load_unet(tiny_folder, dtype=dtype).train()
        inject_lora(unet, ("to_q", "to_k", "to_v", "to_out.0"), rank=4, alpha=4, dropout=dropout)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(lora_parameters(unet)):
                if "up" in name:  # zero at first, and with it the gradient of the other one
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        blocks, calls = 0, []
        if recompute:
            recompute_activations(unet)
        for module in unet.modules():
            if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
                blocks += 1
                layer = next(m for m in module.modules() if isinstance(m, torch.nn.GroupNorm))
                layer.register_forward_pre_hook(lambda *_: calls.append(1))
        latents, noise, timesteps, _ = _batch([10, 700], seed=1)
        torch.manual_seed(5)
        prompt = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2))
        loss = diffusion_loss(unet, _schedule("epsilon"), latents, noise, timesteps, [prompt.to(dtype)], dtype=dtype)
        loss.backward()
        # Done, and to all: but for the first block, which comes before any adapter and has no gradient.
        assert len(calls) == (2 * blocks - 1 if recompute else blocks)
        return [loss.detach()] + [parameter.grad for _, parameter in lora_parameters(unet)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) > 20
    assert all(gradient.abs().max() > 0 for gradient in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputed_activations_are_no_matter_when_nothing_is_learnt(tiny_folder):
    unet = load_unet(tiny_folder)
    arguments = (torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 32))
    with torch.no_grad():
        plain = unet(*arguments)
        keys = list(unet.state_dict())
        recompute_activations(unet)
        assert torch.equal(unet(*arguments), plain)
    assert list(unet.state_dict()) == keys
