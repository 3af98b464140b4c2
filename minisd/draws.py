"""Everything random about a training sample, as a function of (seed, position of the sample in the run).

There is no random state: a resumed run draws what the uninterrupted one would have drawn, and one process with four
micro-steps draws what four processes draw with one. A position counts samples from the start of the run: step s with
global batch size G holds the positions s * G to (s + 1) * G - 1.

To reimplement: each kind of draw has a key, the first 8 bytes (big-endian, shifted right by one bit) of
SHA-256("minisd/1/{purpose}/{seed}/{position}") with the purpose named below. The key seeds a new PyTorch CPU generator
(mt19937, `torch.Generator().manual_seed(key)`), and the draws of that kind are the generator's first outputs. (torch
uses the low 32 bits of a seed: among 100,000 samples, about one pair has the same noise.)
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(purpose: str, seed: int, position: int) -> torch.Generator:
    """The CPU generator of one kind of draw for one sample; about 20 microseconds."""
    digest = hashlib.sha256(f"minisd/1/{purpose}/{seed}/{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _uniform(purpose: str, seed: int, position: int, count: int) -> list[float]:
    values: list[float] = torch.rand(
        count, generator=generator_for(purpose, seed, position), dtype=torch.float64
    ).tolist()
    return values


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` images in an epoch. Purpose "epoch", with the epoch as position; `torch.randperm`."""
    order: list[int] = torch.randperm(count, generator=generator_for("epoch", seed, epoch)).tolist()
    return order


def batch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of an epoch's `count` batches. Purpose "batches", with the epoch as position; `torch.randperm`."""
    order: list[int] = torch.randperm(count, generator=generator_for("batches", seed, epoch)).tolist()
    return order


def noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Diffusion noise, standard normal float32 of the given shape [4, h, w]. Purpose "noise"; `torch.randn`."""
    return torch.randn(shape, generator=generator_for("noise", seed, position))


def posterior_noise(seed: int, position: int, shape: tuple[int, ...]) -> Tensor:
    """Noise that samples the VAE's posterior, standard normal float32 [4, h, w]. Purpose "posterior"; `torch.randn`."""
    return torch.randn(shape, generator=generator_for("posterior", seed, position))


def timestep(seed: int, position: int, num_train_timesteps: int) -> int:
    """Diffusion time, uniform in [0, num_train_timesteps). Purpose "timestep"; `torch.randint`."""
    return int(torch.randint(num_train_timesteps, (), generator=generator_for("timestep", seed, position)))


def flip(seed: int, position: int) -> bool:
    """Whether to mirror the picture, one in two. Purpose "flip"; `torch.rand` in float64 below 0.5."""
    return _uniform("flip", seed, position, 1)[0] < 0.5


def crop(seed: int, position: int) -> tuple[float, float]:
    """Where to crop, as fractions in [0, 1) of the free height and width. Purpose "crop"; two `torch.rand` float64."""
    top, left = _uniform("crop", seed, position, 2)
    return top, left


def caption_dropout(seed: int, position: int) -> float:
    """A number in [0, 1); a caption is left out where it is below the rate. Purpose "caption"; `torch.rand` float64."""
    return _uniform("caption", seed, position, 1)[0]


def caption_choice(seed: int, position: int, count: int) -> int:
    """Which of a picture's `count` captions. Purpose "choice"; `torch.randint`."""
    return int(torch.randint(count, (), generator=generator_for("choice", seed, position)))


def noise_offset(seed: int, position: int, channels: int) -> Tensor:
    """How far each channel of the noise is shifted, standard normal float32 [4, 1, 1], before it is multiplied by
    --noise-offset. Purpose "offset"; `torch.randn` of (channels, 1, 1).
    """
    return torch.randn((channels, 1, 1), generator=generator_for("offset", seed, position))


def dropout_seed(seed: int, position: int) -> int:
    """Seed of the adapters' dropout masks in the micro-batch that starts with this position. Purpose "dropout".

    The one draw that belongs to a micro-batch and not to a sample: with dropout, another split is another run.
    """
    return generator_for("dropout", seed, position).initial_seed()
