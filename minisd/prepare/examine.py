"""What is done to one picture, in a worker of guarded.GuardedPool: look at it, write it as a PNG, make a preview."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagehash
from PIL import Image

from minisd.atomic import write_atomically
from minisd.buckets import PIXELS_PER_LATENT, bucket_geometry, default_step
from minisd.picture_files import FORMATS, PictureError, decode, load_image, open_regular
from minisd.prepare.options import Rules

HASH_DIGITS = 16
MAX_BYTES = 512 * 2**20  # 64 bits a pixel, of as many pixels as are allowed
_CELLS = (3, 3)


@dataclass(frozen=True)
class Examined:
    """What is known of a picture that was decoded: all a decision needs."""

    sha256: str
    """Of the file, in hex."""
    width: int
    """In pixels, upright."""
    height: int
    dhash: str
    """Of the upright RGB picture, to find copies (duplicates.py): 16 hex digits, whose 64 bits say where a tiny
    grey version is brighter than one pixel to the left (imagehash.dhash); a dash; the mean colours of 3 x 3 cells, row
    by row, in 54 hex digits."""
    suffix: str
    """By content: ".png", ".jpg" ..."""
    size_bytes: int
    animated: bool = False
    """Whether there are more frames than the one that is looked at."""


@dataclass(frozen=True)
class Written:
    """The PNG that was written: SHA-256 of the file in hex, and its size in pixels."""

    sha256: str
    width: int
    height: int


def examine(path: Path, rules: Rules) -> Examined:
    """Decode a picture wholly and hash it.

    Raises:
        PictureError: it cannot be used, or not by the rules.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > MAX_BYTES:
            raise PictureError("too large", f"{size_bytes} bytes, expected at most {MAX_BYTES}", path)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        suffix = suffix_of(file.read(32))
        file.seek(0)
        image = decode(file, path, background=rules.background, max_aspect=rules.max_aspect)
        animated = _is_animated(file)
    if (refused := unfit(image.width, image.height, rules)) is not None:
        raise PictureError(*refused, path)
    return Examined(sha256, image.width, image.height, _dhash(image), suffix, size_bytes, animated)


def unfit(width: int, height: int, rules: Rules) -> tuple[str, str] | None:
    """Status and reason if the rules leave out a picture of this size in pixels, else None."""
    if max(width, height) > rules.max_aspect * min(width, height):
        return "too narrow", f"{width} x {height} pixels, expected sides of at most {rules.max_aspect:g}:1"
    if min(width, height) < rules.min_side:
        return "too small", f"{width} x {height} pixels, expected sides of at least {rules.min_side}"
    return None


def write_png(source: Path, target: Path, rules: Rules) -> Written:
    """Write a picture as an RGB PNG without metadata, upright, made smaller if the rules say so.

    Raises:
        PictureError: it cannot be used.
        DiskError: it cannot be written.
    """
    image = load_image(source, background=rules.background, max_aspect=rules.max_aspect)
    if rules.resize is not None:
        image = _resized(image, rules.resize)
    data = io.BytesIO()
    # Of photos and drawings as small as the best of the other settings, and in half their time.
    image.save(data, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    write_atomically(target, data.getvalue())
    return Written(hashlib.sha256(data.getvalue()).hexdigest(), image.width, image.height)


def preview(path: Path, longest: int) -> bytes:
    """A small version as a JPEG, its longer side at most `longest` pixels.

    Raises:
        PictureError: it cannot be used.
    """
    image = load_image(path)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80, optimize=True)
    return data.getvalue()


def suffix_of(start: bytes) -> str:
    """The suffix that belongs to a file's first 32 bytes, of the formats that load_image reads; "" for others."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if start.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return ".gif"
    if start.startswith(b"BM"):
        return ".bmp"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return ".webp"
    if start.startswith(
        (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")
    ):  # the last two are wrong, and read
        return ".tif"
    # Among the brands of an ISO media file, of which HEIC is one, too.
    return ".avif" if start[4:8] == b"ftyp" and (b"avif" in start[8:] or b"avis" in start[8:]) else ""


def _is_animated(file: BinaryIO) -> bool:
    """Whether an open file, which was decoded, has more than one picture. Damage to the others does not matter."""
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _dhash(image: Image.Image) -> str:
    cells = image.resize(_CELLS, Image.Resampling.BOX)
    return f"{imagehash.dhash(image)}-{cells.tobytes().hex()}"


def _resized(image: Image.Image, resolution: int) -> Image.Image:
    """Make a larger picture as small as training at this resolution would make it."""
    step = default_step(resolution, PIXELS_PER_LATENT)
    size = None
    smaller = image.height, image.width
    # More than once if the rounding of its sides brings it nearer to another bucket.
    while smaller != size and min(smaller) >= step:
        size = smaller
        smaller = bucket_geometry(size, resolution, step, upscale=False).resized
    height, width = smaller
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.LANCZOS)
