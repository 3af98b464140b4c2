"""Laws of the buckets: a picture is covered, not stretched, not enlarged, and cut as little as the sizes allow."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from torchvision.transforms.functional import _compute_resized_output_size as torchvision_size

from minisd.buckets import Geometry, Size, bucket_geometry, bucket_sizes, default_step, square_geometry
from minisd.errors import DataError

SETTINGS = [(512, 64), (768, 64), (512, 8), (560, 64), (96, 64), (64, 8), (64, 64), (24, 8), (1024, 128)]


def _pictures(count: int, longest: int = 3000) -> list[Size]:
    """Random sizes (height, width), of every shape, small ones and squares among them."""
    rng = random.Random(0)
    pictures = []
    for _ in range(count):
        height = round(math.exp(rng.uniform(math.log(4), math.log(longest))))
        width = round(height * math.exp(rng.uniform(-3, 3))) if rng.random() < 0.95 else height
        pictures.append((height, max(width, 4)))
    return pictures


def _distance(a: Size, b: Size) -> Fraction:
    """How many times more oblong one shape is than the other, exactly."""
    quotient = Fraction(a[0], a[1]) / Fraction(b[0], b[1])
    return max(quotient, 1 / quotient)


# --- sizes ---


@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_sizes_keep_their_promises(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert min(height, width) >= step
        assert height * width <= resolution**2
        assert max(height, width) <= 4 * min(height, width)
        assert max(height, width) <= 2 * resolution
        assert (width, height) in sizes
    square = resolution // step * step
    assert (square, square) in sizes
    # None is missing: for each width, the highest that fits is there if its shape is allowed.
    for width in range(step, 2 * resolution + 1, step):
        height = min(resolution**2 // width // step * step, 2 * resolution // step * step)
        assert ((height, width) in sizes) == (height >= step and max(height, width) <= 4 * min(height, width))


def test_the_sizes_of_stable_diffusion_are_those_of_other_trainers() -> None:
    assert (512, 512) in bucket_sizes(512, 64)
    # kohya's sd-scripts and NovelAI: 768 x 320, 704 x 320, 640 x 384, 576 x 448.
    for size in ((768, 320), (704, 320), (640, 384), (576, 448)):
        assert {size, size[::-1]} <= set(bucket_sizes(512, 64))


# --- the choice ---


@pytest.mark.parametrize("upscale", [False, True])
@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_a_picture_is_covered_not_stretched_and_not_enlarged(resolution: int, step: int, upscale: bool) -> None:
    small = 0
    for picture in _pictures(1500):
        if min(picture) < step and not upscale:
            with pytest.raises(DataError, match=rf"^{picture[1]} x {picture[0]} pixels, .*{step} x {step}.*--upscale"):
                bucket_geometry(picture, resolution, step, upscale=False)
            small += 1
            continue
        got = bucket_geometry(picture, resolution, step, upscale=upscale)
        (height, width), (tall, wide) = got.size, got.resized
        assert (height <= tall, width <= wide) == (True, True)  # the cut lies inside
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        if upscale:
            assert got.size in bucket_sizes(resolution, step)
        else:
            assert (tall <= picture[0], wide <= picture[1]) == (True, True)
        # One factor for both sides, but for the rounding to whole pixels; and no larger than needed, but for that.
        low = max(Fraction(tall - 1, picture[0]), Fraction(wide - 1, picture[1]))
        high = min(Fraction(tall + 1, picture[0]), Fraction(wide + 1, picture[1]))
        assert low < high
        assert height == tall or width == wide or got.resized == picture
        assert bucket_geometry(picture[::-1], resolution, step, upscale=upscale) == Geometry(
            got.resized[::-1], got.size[::-1]
        )
    assert small > 0 or upscale


@pytest.mark.parametrize(("resolution", "step"), SETTINGS)
def test_the_bucket_is_the_one_of_the_nearest_shape(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    for picture in _pictures(500):
        nearest = min(_distance(size, picture) for size in sizes)
        candidates = [size for size in sizes if _distance(size, picture) <= nearest * (1 + Fraction(1, 10**12))]
        got = bucket_geometry(picture, resolution, step, upscale=True).size
        assert got in candidates
        assert math.prod(got) == max(math.prod(size) for size in candidates)
        if got[0] <= picture[0] and got[1] <= picture[1]:  # enlarging is not needed, so the option changes nothing
            assert bucket_geometry(picture, resolution, step, upscale=False).size == got


def test_a_picture_that_has_the_size_of_a_bucket_is_left_as_it_is() -> None:
    for resolution, step in SETTINGS:
        for size in bucket_sizes(resolution, step):
            got = bucket_geometry(size, resolution, step, upscale=False)
            assert got.resized == size
            assert _distance(got.size, size) == 1


def test_a_small_picture_keeps_its_pixels_and_loses_less_than_a_step() -> None:
    for picture in [(300, 400), (64, 64), (511, 511), (100, 250), (447, 600)]:
        got = bucket_geometry(picture, 512, 64, upscale=False)
        assert got.resized == picture
        assert all(0 <= side - cut < 64 for side, cut in zip(picture, got.size, strict=True))


def test_a_square_picture_has_a_square_bucket() -> None:
    for resolution, step in SETTINGS:
        side = resolution // step * step
        assert bucket_geometry((2000, 2000), resolution, step, upscale=False) == Geometry((side, side), (side, side))


def test_the_share_that_is_cut_away_is_that_of_the_pixels() -> None:
    for picture in _pictures(200, longest=300):
        got = bucket_geometry(picture, 64, 8, upscale=True)
        inside = sum(1 for _ in range(got.size[0]) for _ in range(got.size[1]))
        outside = got.resized[0] * got.resized[1] - inside
        assert got.cropped_share == pytest.approx(outside / (inside + outside), abs=1e-12)
        assert 0 <= got.cropped_share < 1
    assert Geometry((100, 50), (50, 50)).cropped_share == 0.5


def test_buckets_cut_less_than_squares() -> None:
    """What they are for: most pictures of a camera (4:3, 3:2, 16:9, upright or not) lose less than a tenth."""
    for long, short in ((4, 3), (3, 2), (16, 9)):
        for picture in ((1000 * short // long, 1000), (1000, 1000 * short // long)):
            bucketed = bucket_geometry(picture, 512, 64, upscale=False).cropped_share
            assert bucketed < 0.1 < square_geometry(picture, 512).cropped_share


# --- squares, and steps ---


def test_squares_are_those_of_torchvision() -> None:
    rng = random.Random(1)
    pictures = _pictures(3000) + [(rng.randrange(1, 5000), rng.randrange(1, 5000)) for _ in range(3000)]
    for picture in pictures:
        for resolution in (64, 512, 768):
            got = square_geometry(picture, resolution)
            assert list(got.resized) == torchvision_size(picture, [resolution])
            assert got.size == (resolution, resolution)


def test_default_step() -> None:
    assert [default_step(resolution, 8) for resolution in (512, 768, 1024)] == [64, 64, 64]
    assert [default_step(resolution, 4) for resolution in (64, 128, 256)] == [8, 16, 32]
    assert [default_step(resolution, 8) for resolution in (8, 64, 120, 256)] == [8, 8, 8, 32]
    for resolution in range(8, 1100, 8):
        for pixels_per_latent in (1, 2, 4, 8):
            step = default_step(resolution, pixels_per_latent)
            assert step % pixels_per_latent == 0
            assert pixels_per_latent <= step <= max(64, pixels_per_latent)
