"""Tiled decoding against diffusers' enable_tiling, in float64."""

import pytest
import torch
from diffusers import AutoencoderKL

from minisd.sampling import decode
from minisd.vae_tiling import decode_tiled
from minisd.weights import load_model, load_vae

TILE = 64  # pixels, 16 latents


@pytest.fixture(scope="module")
def pair(tiny_folder):
    theirs = AutoencoderKL.from_pretrained(tiny_folder / "vae").double()
    theirs.enable_tiling()
    assert theirs.tile_sample_min_size == TILE
    return load_vae(tiny_folder, dtype=torch.float64), theirs


# One row, one column, tiles that fit and a last one of a single latent, and no tile at all.
@pytest.mark.parametrize("size", [(16, 16), (17, 12), (12, 40), (40, 12), (28, 33)])
def test_equals_diffusers(pair, size):
    ours, theirs = pair
    latents = torch.randn(1, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = theirs.decode(latents).sample, decode_tiled(ours, latents, TILE)
        whole = ours.decode(latents)
    assert actual.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert (actual - expected).abs().max() < 1e-10
    assert ((actual - whole).abs().max() > 1e-3) == (max(size) > 16)


def test_large_pictures_are_decoded_in_tiles_of_the_model_s_own_size(tiny_folder):
    """Of SDXL the VAE is float32 whatever the UNet is: the latents come in another dtype."""
    model = load_model(str(tiny_folder))
    latents = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    tiled = decode(model, latents, tiled=True)
    expected = decode_tiled(model.vae, latents / model.vae.config.scaling_factor, TILE)
    assert torch.equal(tiled, (expected / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(tiled, decode(model, latents))
    half = decode(model, latents.half())
    assert half.dtype == torch.float32
    assert torch.equal(half, decode(model, latents.half().float()))
