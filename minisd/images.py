"""Pictures in and out: RGB to the tensors the model wants, tensors to PNG files with their recipe.

Shapes: B pictures, H W their height and width.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from minisd.atomic import write_atomically
from minisd.buckets import Geometry
from minisd.errors import NonFiniteError, UsageError
from minisd.picture_files import load_image
from minisd.picture_record import KEYWORD, MAX_BYTES

log = logging.getLogger(__name__)

# The default of diffusers' training scripts since 2025 (huggingface/diffusers#11206): keeps fine detail when a photo
# is made several times smaller. Applied to the PIL image, where every filter is antialiased.
INTERPOLATION = v2.InterpolationMode.LANCZOS
_MAX_PARAMETERS = 32 * 1024


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
        PictureError: as `load_image`.
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
