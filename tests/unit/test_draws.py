"""Laws of the draws: pure, independent of each other, uniform or normal, and as documented."""

import hashlib
import time

import torch

from minisd import draws


def test_same_seed_and_position_draw_the_same():
    assert torch.equal(draws.noise(3, 7, (4, 8, 8)), draws.noise(3, 7, (4, 8, 8)))
    assert draws.timestep(3, 7, 1000) == draws.timestep(3, 7, 1000)
    torch.manual_seed(123)  # the global generator has no part in it
    before = torch.get_rng_state()
    draws.noise(3, 7, (4, 8, 8))
    draws.crop(3, 7)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_position_and_purpose_each_matter():
    shape = (4, 16, 16)
    tensors = [
        draws.noise(0, 0, shape), draws.noise(0, 1, shape), draws.noise(1, 0, shape),
        draws.posterior_noise(0, 0, shape),
    ]  # fmt: skip
    for i, a in enumerate(tensors):
        for b in tensors[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 0.15


def test_draws_follow_the_docstring():
    digest = hashlib.sha256(b"minisd/1/noise/5/42").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**64 // 2)
    assert torch.equal(draws.noise(5, 42, (4, 4, 4)), torch.randn((4, 4, 4), generator=generator))


def test_distributions():
    times = torch.tensor([draws.timestep(0, p, 1000) for p in range(4000)])
    assert times.min() >= 0
    assert times.max() <= 999
    assert abs(times.float().mean() - 499.5) < 20
    assert times.unique().numel() > 950
    assert abs(sum(draws.flip(0, p) for p in range(4000)) / 4000 - 0.5) < 0.04
    assert abs(sum(draws.caption_dropout(0, p) < 0.1 for p in range(4000)) / 4000 - 0.1) < 0.02
    crops = torch.tensor([draws.crop(0, p) for p in range(2000)])
    assert crops.min() >= 0
    assert crops.max() < 1
    assert (crops.mean(0) - 0.5).abs().max() < 0.04
    noise = torch.cat([draws.noise(0, p, (4, 16, 16)).flatten() for p in range(50)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_permutation_holds_every_image_once_and_differs_between_epochs():
    orders = [draws.permutation(0, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_sample_of_stable_diffusion_is_drawn_fast():
    """A bound a hundred times above what it takes: it is there for an accident, such as a device round trip."""
    started = time.perf_counter()
    for position in range(20):
        draws.noise(0, position, (4, 64, 64))
        draws.posterior_noise(0, position, (4, 64, 64))
        draws.timestep(0, position, 1000)
    assert (time.perf_counter() - started) / 20 < 0.1
