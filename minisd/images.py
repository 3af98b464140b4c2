"""Pictures in and out: any file to RGB, RGB to the tensors the model wants, tensors to PNG files with their recipe.

A picture comes from anywhere, so it is read with suspicion: a regular file, a known format, a size checked before a
pixel is decoded, and every pixel decoded before it is used.

Shapes: B pictures, H W their height and width.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from minisd.atomic import write_atomically
from minisd.buckets import Geometry
from minisd.errors import DataError, NonFiniteError, UsageError, one_line
from minisd.picture_record import KEYWORD, MAX_BYTES

log = logging.getLogger(__name__)

# The default of diffusers' training scripts since 2025 (huggingface/diffusers#11206): keeps fine detail when a photo
# is made several times smaller. Applied to the PIL image, where every filter is antialiased.
INTERPOLATION = v2.InterpolationMode.LANCZOS
MAX_PIXELS = 64 * 2**20
# Beyond this a centre square shows almost nothing of the picture, and its resized long side may not fit in memory.
MAX_ASPECT = 16
# Pillow knows some fifty formats; one of them starts Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_FIX = "Replace it, or leave it out."
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_MAX_PARAMETERS = 32 * 1024


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading if it is a regular file; a pipe would make the run wait for ever.

    The last part of the path is not followed if it is a link: resolve it first, and check where it leads.

    Raises:
        DataError: the file is missing, not readable, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        odd = {errno.ELOOP: "is a link", errno.ENXIO: "is a socket"}
        reason = odd.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise DataError(f"{str(path)!r}: {reason}, expected a regular file. {_FIX}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{str(path)!r}: is a folder, a pipe or a device, expected a regular file. {_FIX}")
    return os.fdopen(descriptor, "rb")


def load_image(path: Path) -> Image.Image:
    """Read a picture: every pixel decoded, upright, in sRGB, over white where it is transparent.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour; of an animation the first frame is used; an
    embedded colour profile is converted from, and ignored if it is broken.

    Returns:
        An RGB image, 8 bits a channel, without metadata.

    Raises:
        DataError: the file is not a whole picture of a known format, or too large; names the file.
    """
    with open_regular(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about odd metadata, and large pictures, which are refused below
                with Image.open(file, formats=_FORMATS) as image:
                    _check_size(path, image.size)
                    image.load()
                    return _to_rgb(_upright(image))
        except DataError:
            raise
        except UnidentifiedImageError as error:
            wanted = ", ".join(_FORMATS)
            raise DataError(f"{str(path)!r}: not a picture: expected {wanted} by content. {_FIX}") from error
        # Decoders raise what they like on damaged files: OSError, SyntaxError, ValueError, struct.error, EOFError ...
        except Exception as error:
            detail = one_line(str(error)) or type(error).__name__
            raise DataError(f"{str(path)!r}: damaged or unsupported picture: {detail}. {_FIX}") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    """Refuse a picture by the size in its header."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{str(path)!r}: {width} x {height} pixels, expected at most {MAX_PIXELS}. Make it smaller, or leave it "
            "out."
        )
    if max(size) > MAX_ASPECT * min(size):
        raise DataError(
            f"{str(path)!r}: {width} x {height} pixels, expected sides of at most {MAX_ASPECT}:1. Crop it, or leave it "
            "out."
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF data, and fails where it is broken."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: colour profile first, then white behind what is transparent."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel have no defined white; save it as an 8-bit PNG")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    profile = image.info.get("icc_profile")
    # A profile describes the channels of the file, so grey and CMYK are kept until it has been applied.
    channels = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    # Via RGBA, because a palette's own transparency makes a plain convert warn or fail.
    source = image.convert("RGBA").convert("RGB") if alpha and channels == "RGB" else image.convert(channels)
    rgb = _to_srgb(source, profile) if profile else source.convert("RGB")
    if alpha is None:
        rgb.info.clear()  # or the old profile would travel into files we write
        return rgb
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgb, mask=alpha)
    return canvas


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an embedded ICC profile to sRGB; most pictures are in sRGB already and stay as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged, or made for other channels
        converted = None
    return image.convert("RGB") if converted is None else converted


def to_pixel_values(image: Image.Image, geometry: Geometry, *, crop: tuple[float, float] | None, flip: bool) -> Tensor:
    """Resize a picture, cut H x W out, mirror it, and scale it to [-1, 1].

    With buckets.square_geometry the same operations in the same order as diffusers' train_text_to_image_lora.py, to the
    bit.

    Args:
        image: RGB, any size.
        geometry: sizes to resize to and to cut out.
        crop: where the cut lies, as in `Geometry.corner`.
        flip: mirror left and right.

    Returns:
        [3, H, W] float32 in [-1, 1].
    """
    image = tvf.resize(image, list(geometry.resized), interpolation=INTERPOLATION)
    image = tvf.crop(image, *geometry.corner(crop), *geometry.size)
    if flip:
        image = tvf.horizontal_flip(image)
    # Division as in ToTensor: v2.ToDtype(scale=True) multiplies by 1 / 255, which is another float32 now and then.
    return tvf.normalize(tvf.pil_to_tensor(image).float() / 255, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def load_init_image(path: Path, height: int, width: int) -> Tensor:
    """Read a picture to begin with: made just large enough to cover the size, and cut to its middle.

    Returns:
        [1, 3, height, width] float32 in [-1, 1].

    Raises:
        DataError: as `load_image`.
    """
    image = load_image(path.resolve())
    scale = max(height / image.height, width / image.width)
    resized = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    return to_pixel_values(image, Geometry(resized, (height, width)), crop=None, flip=False)[None]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of a batch [B, 3, H, W] in [0, 1], rounded to the nearest of 256 levels.

    Raises:
        NonFiniteError: a value is NaN or infinite; it would be saved as a black picture.
    """
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError("a picture has NaN or infinite values. Try float32 as precision, or another LoRA scale.")
    levels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in levels]


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side, row by row, each in the top left corner of a cell as large as the largest of them needs.

    What is left over is white.
    """
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def save_png(
    image: Image.Image, path: Path, *, parameters: str, record: str | None = None, overwrite: bool = False
) -> None:
    """Write a PNG, whole or not at all, with its recipe in the text chunk `parameters` that web UIs read.

    The text is tEXt where Latin-1 can hold it and iTXt (UTF-8) elsewhere; NULs, which end a PNG text, are left out, and
    so is what goes beyond 32 KiB.

    Args:
        image: the picture.
        path: where.
        parameters: the recipe.
        record: JSON for the chunk `minisd` (picture_record.py), as iTXt. Half of it would be of no use: one that is too
            long is left out, with a warning.
        overwrite: replace a file that is there.

    Raises:
        UsageError: the file exists and `overwrite` is False.
        DiskError: it cannot be written.
    """
    if not overwrite and os.path.lexists(path):
        raise UsageError(f"{path}: exists already. Choose another --output, or give --overwrite.")
    text = parameters.replace("\0", "").encode("utf-8", "replace")[:_MAX_PARAMETERS].decode("utf-8", "ignore")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    if record is not None and len(record.encode()) > MAX_BYTES:
        log.warning("%s: its prompt is too long for a record in the picture; --from-png cannot repeat it", path)
    elif record is not None:
        chunks.add_itxt(KEYWORD, record)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=chunks)
    write_atomically(path, data.getvalue())
