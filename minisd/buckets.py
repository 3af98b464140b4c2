"""Aspect-ratio buckets: which part of a picture is trained on, at which size.

A bucket is a size (height, width) with about resolution^2 pixels; a picture goes into the one whose shape is nearest to
its own, is made just large enough to cover it, and loses what sticks out. All sizes here are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from minisd.errors import DataError

Size = tuple[int, int]

# Of every published model: for who looks at pictures before a model is chosen.
PIXELS_PER_LATENT = 8
# No side of a bucket is longer than this many times the resolution, so no shape is beyond 4:1.
_LONGEST = 2


@dataclass(frozen=True)
class Geometry:
    """What is done to a picture: resize it to `resized`, then cut `size` out of that."""

    resized: Size
    size: Size

    def corner(self, crop: tuple[float, float] | None) -> tuple[int, int]:
        """Top and left of the part that is cut out, in pixels of the resized picture.

        Args:
            crop: how far down and right it lies, fractions in [0, 1) of the room there is; None: in the middle, rounded
                as torchvision's center_crop does.
        """
        rooms = [resized - size for resized, size in zip(self.resized, self.size, strict=True)]
        if crop is None:
            return round(rooms[0] / 2), round(rooms[1] / 2)
        # + 1: a side of R fits in one of length N at N - R + 1 places, both borders among them.
        return int(crop[0] * (rooms[0] + 1)), int(crop[1] * (rooms[1] + 1))

    @property
    def cropped_share(self) -> float:
        """The share of the picture that is cut away, from 0 up to 1."""
        return 1 - math.prod(self.size) / math.prod(self.resized)


def square_geometry(picture: Size, resolution: int) -> Geometry:
    """The shorter side becomes the resolution, and a square is cut out: diffusers' training scripts, to the pixel."""
    short, long = min(picture), max(picture)
    longer = int(resolution * long / short)  # cut off, not rounded, as in torchvision's resize
    resized = (resolution, longer) if picture[0] <= picture[1] else (longer, resolution)
    return Geometry(resized, (resolution, resolution))


@lru_cache(maxsize=8)
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All bucket sizes: sides multiples of `step`, at most resolution^2 pixels, shapes from 1:4 to 4:1.

    For each width there is one bucket, the highest that fits, and for square pictures there is the largest square.
    """
    longest = _LONGEST * resolution // step * step
    sizes = {
        (height, width)
        for width in range(step, longest + 1, step)
        if step <= (height := min(resolution**2 // width // step * step, longest))
    }
    sizes |= {(width, height) for height, width in sizes} | {(resolution // step * step,) * 2}
    return tuple(sorted(size for size in sizes if max(size) <= 4 * min(size)))


def bucket_geometry(picture: Size, resolution: int, step: int, *, upscale: bool) -> Geometry:
    """Choose the bucket of a picture.

    A picture too small to cover its bucket gets a smaller one of its own instead, cut from its pixels as they are,
    unless `upscale`: enlarging would teach the blur.

    Args:
        picture: its size.
        resolution: side of the square that is as large as a bucket, in pixels.
        step: what the sides of buckets are multiples of, in pixels (--bucket-step).
        upscale: whether pictures may be enlarged.

    Raises:
        DataError: a side is below `step` and `upscale` is off. The message names no file.
    """
    shape = _shape(picture)
    # The larger of two equally near ones, then the squarer: nothing that depends on which side is which.
    size = min(
        bucket_sizes(resolution, step), key=lambda size: (abs(_shape(size) - shape), -math.prod(size), max(size))
    )
    scale = max(size[0] / picture[0], size[1] / picture[1])
    if scale > 1 and not upscale:
        longest = _LONGEST * resolution // step * step
        own = (min(picture[0] // step * step, longest), min(picture[1] // step * step, longest))
        if min(own) < step:
            raise DataError(
                f"{picture[1]} x {picture[0]} pixels, expected at least {step} x {step}. Take it out, or add --upscale."
            )
        return Geometry(picture, own)
    resized = (max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale)))
    return Geometry(resized, size)


def _shape(size: Size) -> float:
    """Height to width on a logarithmic scale; a difference and not the logarithm of a quotient, so exactly odd."""
    return math.log(size[0]) - math.log(size[1])


def default_step(resolution: int, pixels_per_latent: int) -> int:
    """What bucket sides are multiples of: 64 pixels as in other trainers, fewer below a resolution of 512.

    A UNet takes latents of any size, so all that is needed is a whole number of latents.
    """
    return max(min(64, resolution // 8) // pixels_per_latent, 1) * pixels_per_latent
