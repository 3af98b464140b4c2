"""The sinusoids of the diffusion time, cosines first."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from minisd.layers import timestep_embedding


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (1, [0.540302, 0.586504, 1.0, 0.841471, 0.809946, 0.000106]),
        (999, [0.99965, 0.802678, 0.994406, -0.026461, 0.596413, 0.105622]),
    ],
)
def test_columns_of_sd15(timestep: int, expected: list[float]) -> None:
    embedded = timestep_embedding(torch.tensor([timestep]), 320)
    assert embedded.shape == (1, 320)
    # Columns 0 and 160 are cos t and sin t: the frequency of the first pair is 1.
    torch.testing.assert_close(embedded[0, [0, 1, 159, 160, 161, 319]], torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "timesteps",
    [
        pytest.param(torch.tensor([0, 1, 500, 999]), id="int64"),
        pytest.param(torch.tensor([0.0, 0.37, 499.5, 998.25]), id="fractional"),
        pytest.param(torch.tensor([0.0, 0.37, 499.5, 998.25], dtype=torch.float64), id="float64"),
    ],
)
def test_equal_to_diffusers_bit_for_bit(timesteps: Tensor) -> None:
    expected = get_timestep_embedding(timesteps, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    embedded = timestep_embedding(timesteps, 320)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, expected)
