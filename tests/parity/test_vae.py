"""The autoencoder against diffusers' on the same weights: both directions, sampling, and the way to pictures."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from minisd.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian, latents_to_images, scale_latents
from tests.tiny import randomise

CHANNELS = {
    "f8": (8, 16, 24, 24),  # as published: four levels, the last two of the same width
    "f4": (16, 16, 32),
}
SCALING_FACTOR = 0.13025  # not the default, so that a forgotten field shows

Pair = tuple[AutoencoderKL, ReferenceVAE]


def _pair(name: str, dtype: torch.dtype) -> Pair:
    """Ours and diffusers', with the same weights, by way of what a model folder holds: a JSON file and a state dict."""
    channels = CHANNELS[name]
    torch.manual_seed(0)
    reference = ReferenceVAE(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2 if name == "f8" else 1,
        norm_num_groups=4,
        scaling_factor=SCALING_FACTOR,
    )
    randomise(reference)
    reference.to(dtype).requires_grad_(True)
    ours = AutoencoderKL(AutoencoderKLConfig.from_json(json.loads(reference.to_json_string()))).to(dtype)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


@pytest.fixture(scope="module", params=list(CHANNELS))
def double(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param, torch.float64)


@pytest.fixture(scope="module", params=list(CHANNELS))
def single(request: pytest.FixtureRequest) -> Pair:
    return _pair(request.param, torch.float32)


def _noise(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LATENT_SIZES = pytest.mark.parametrize("size", [(8, 8), (5, 9), (12, 4)], ids=lambda size: f"{size[0]}x{size[1]}")


def _check_encode(pair: Pair, size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    ours, reference = pair
    height, width = (side * ours.pixels_per_latent for side in size)
    pixel_values = _noise(2, 3, height, width, dtype=dtype)
    expected, actual = reference.encode(pixel_values).latent_dist, ours.encode(pixel_values)
    assert actual.mean.shape == (2, 4, *size)
    assert expected.mean.std() > 0.1
    torch.testing.assert_close(actual.mean, expected.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual.logvar, expected.logvar, rtol=0, atol=tolerance)


@LATENT_SIZES
@torch.no_grad()
def test_encode_in_float64(double: Pair, size: tuple[int, int]) -> None:
    _check_encode(double, size, torch.float64, 1e-10)


@torch.no_grad()
def test_encode_in_float32(single: Pair) -> None:
    _check_encode(single, (5, 9), torch.float32, 1e-5)


def _check_decode(pair: Pair, size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    ours, reference = pair
    latents = _noise(2, 4, *size, dtype=dtype)
    expected, actual = reference.decode(latents).sample, ours.decode(latents)
    assert actual.shape == (2, 3, *(side * ours.pixels_per_latent for side in size))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@LATENT_SIZES
@torch.no_grad()
def test_decode_in_float64(double: Pair, size: tuple[int, int]) -> None:
    _check_decode(double, size, torch.float64, 1e-10)


@torch.no_grad()
def test_decode_in_float32(single: Pair) -> None:
    _check_decode(single, (5, 9), torch.float32, 1e-5)


def test_gradients(double: Pair) -> None:
    ours, reference = double
    side = 8 * ours.pixels_per_latent
    pixel_values = _noise(1, 3, side, side, dtype=torch.float64)
    weights = _noise(1, 3, side, side, dtype=torch.float64, seed=2)

    def gradients(network: nn.Module, mean: Tensor, logvar: Tensor, pictures: Tensor) -> dict[str, Tensor]:
        loss = mean.square().sum() + logvar.sin().sum() + (pictures * weights).sum()
        wanted = {"pixel_values": inputs} | dict(network.named_parameters())
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    inputs = pixel_values.clone().requires_grad_()
    posterior = reference.encode(inputs).latent_dist
    expected = gradients(reference, posterior.mean, posterior.logvar, reference.decode(posterior.mean).sample)
    inputs = pixel_values.clone().requires_grad_()
    ours_posterior = ours.encode(inputs)
    actual = gradients(ours, ours_posterior.mean, ours_posterior.logvar, ours.decode(ours_posterior.mean))
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        if not key.endswith("to_k.bias"):  # shifts all scores of a query alike, which softmax does not see
            assert gradient.abs().max() > 1e-6, key
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@torch.no_grad()
def test_logvar_is_clamped_at_both_ends() -> None:
    ours, reference = _pair("f4", torch.float64)
    # The rows of quant_conv after the first four make the logvar; these push channels beyond either bound.
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -1000.0, -30.0, 20.0, 1000.0], dtype=torch.float64)
    for network in (ours, reference):
        network.quant_conv.bias.copy_(bias)
    pixel_values = _noise(2, 3, 32, 32, dtype=torch.float64)
    expected, actual = reference.encode(pixel_values).latent_dist, ours.encode(pixel_values)
    torch.testing.assert_close(actual.logvar, expected.logvar, rtol=0, atol=1e-10)
    assert (actual.logvar[:, 0] == -30).all()
    assert (actual.logvar[:, 3] == 20).all()
    for channel, bound in ((1, -30), (2, 20)):  # some clamped, some not
        clamped = actual.logvar[:, channel] == bound
        assert clamped.any()
        assert not clamped.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sample_equals_diffusers_with_the_same_noise(dtype: torch.dtype) -> None:
    moments = 15 * _noise(2, 8, 6, 10, dtype=dtype)
    theirs = DiagonalGaussianDistribution(moments)
    expected = theirs.sample(generator=torch.Generator().manual_seed(7))
    noise = torch.randn(theirs.mean.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    assert torch.equal(DiagonalGaussian(theirs.mean, theirs.logvar).sample(noise), expected)


@torch.no_grad()
def test_scale_latents_equals_diffusers(double: Pair) -> None:
    ours, reference = double
    pixel_values = _noise(1, 3, 64, 96, dtype=torch.float64)
    expected = reference.encode(pixel_values).latent_dist.sample(generator=torch.Generator().manual_seed(7))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    actual = scale_latents(ours, ours.encode(pixel_values), noise)
    torch.testing.assert_close(actual, expected * reference.config.scaling_factor, rtol=0, atol=1e-10)
    assert reference.config.scaling_factor == SCALING_FACTOR


def test_latents_to_images_equals_diffusers_image_processor(single: Pair) -> None:
    ours, reference = single
    latents = _noise(2, 4, 5, 9, dtype=torch.float32)
    with torch.no_grad():
        decoded = reference.decode(latents / reference.config.scaling_factor).sample
    assert decoded.min() < -1  # the clamp has something to do at either end
    assert decoded.max() > 1
    expected = VaeImageProcessor().postprocess(decoded, output_type="pt")
    images = latents_to_images(ours, latents)
    assert not images.requires_grad
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_latents_to_images_of_a_half_precision_vae_are_float32() -> None:
    ours, _ = _pair("f4", torch.float32)
    latents = _noise(1, 4, 8, 8, dtype=torch.float32)
    exact = latents_to_images(ours, latents)
    images = latents_to_images(ours.bfloat16(), latents)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, exact, rtol=0, atol=0.1)
