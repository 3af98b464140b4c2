"""Sums and lower ranks of LoRAs, against the whole products that the code never forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisd.lora_layers import LoRAWeights
from minisd.lora_resize import Kept, change_norm, concatenate, resize

SHAPES = [(24, 16), (16, 24), (12, 8, 3, 3), (12, 8, 1, 1)]


def random(shape: tuple[int, ...], rank: int, alpha: float, seed: int = 0) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    out, *inner = shape
    down = torch.randn(rank, *inner, generator=generator)
    return LoRAWeights(down, torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator), alpha)


def change(lora: LoRAWeights) -> Tensor:
    return lora.alpha / lora.rank * lora.product(torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_of_loras_is_the_sum_of_their_changes(shape: tuple[int, ...]) -> None:
    one, two, three = random(shape, 2, 3.0), random(shape, 4, 0.7, seed=1), random(shape, 1, 1.0, seed=2)
    total = concatenate([(one, 0.8), (two, -1.5), (three, 0.0)], alpha=5.0)
    assert (total.rank, total.alpha, total.down.dtype, total.up.dtype) == (7, 5.0, torch.float32, torch.float32)
    torch.testing.assert_close(change(total), 0.8 * change(one) - 1.5 * change(two), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_nearest_and_says_what_it_keeps(shape: tuple[int, ...], rank: int) -> None:
    lora = random(shape, 6, 2.5)
    smaller, kept = resize(lora, rank)
    whole = change(lora).flatten(1)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    nearest = left[:, :rank] * values[:rank] @ right[:rank]
    assert (smaller.rank, smaller.alpha, smaller.shape, smaller.down.dtype) == (rank, 2.5, lora.shape, torch.float32)
    torch.testing.assert_close(change(smaller).flatten(1), nearest, rtol=0, atol=1e-5)
    energy = values.square()
    assert kept.share == pytest.approx(float(energy[:rank].sum() / energy.sum()), rel=1e-12)
    # By the theorem of Eckart and Young what is lost is what the remaining singular values have.
    lost = (change(smaller).flatten(1) - whole).square().sum() / whole.square().sum()
    assert 1 - kept.share == pytest.approx(float(lost), abs=1e-6)
    assert change_norm(lora) == pytest.approx(float(whole.norm()), rel=1e-12)


def test_a_rank_that_is_high_enough_changes_nothing() -> None:
    lora = random((24, 16), 4, 8.0)
    for rank in (4, 5, 100):
        same, kept = resize(lora, rank)
        assert same is lora
        assert kept.share == 1.0
    # Where less is needed than is there, nothing is lost either.
    twice, alone = concatenate([(lora, 1.0), (lora, 1.0)], alpha=8.0), change(lora)
    halved, kept = resize(twice, 4)
    assert kept.share == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(change(halved), 2 * alone, rtol=0, atol=1e-5)
    wide, kept = resize(random((4, 5), 30, 1.0), 20)  # more than the layer has
    assert (wide.rank, kept.share) == (4, 1.0)
    torch.testing.assert_close(change(wide), change(random((4, 5), 30, 1.0)), rtol=0, atol=1e-5)


def test_nothing_is_all_kept_of_nothing() -> None:
    lora = LoRAWeights(torch.ones(3, 4), torch.zeros(5, 3), 1.0)
    smaller, kept = resize(lora, 1)
    assert kept == Kept(0.0, 0.0)
    assert kept.share == 1.0
    assert not change(smaller).any()
    assert change_norm(lora) == 0


def test_half_precision_stays() -> None:
    lora = random((24, 16), 4, 2.0)
    half = LoRAWeights(lora.down.half(), lora.up.half(), 2.0)
    smaller, _ = resize(half, 2)
    assert (smaller.down.dtype, smaller.up.dtype) == (torch.float16, torch.float16)


def test_refusals() -> None:
    lora = random((5, 4), 2, 1.0)
    dora = LoRAWeights(lora.down, lora.up, 1.0, torch.ones(5))
    with pytest.raises(ValueError, match="a DoRA cannot be added to another LoRA"):
        concatenate([(lora, 1.0), (dora, 1.0)], alpha=1.0)
    with pytest.raises(ValueError, match="a DoRA cannot be resized"):
        resize(dora, 1)
    with pytest.raises(ValueError, match="a rank is at least 1, got 0"):
        resize(lora, 0)
