"""Picture files: any of them to RGB.

A picture comes from anywhere, so it is read with suspicion: a regular file, a known format, a size checked before a
pixel is decoded, and every pixel decoded before it is used.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

from minisd.errors import DataError, one_line

MAX_PIXELS = 64 * 2**20
# Beyond this a centre square shows almost nothing of the picture, and its resized long side may not fit in memory.
MAX_ASPECT = 16
# Pillow knows some fifty formats; one of them starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # what phones write
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
_SMALLER = "Make it smaller, or leave it out."


class PictureError(DataError):
    """A file that cannot be used as a picture.

    Args:
        status: the kind of refusal in a word or two: "not a picture", "damaged", "too large", "unreadable" ...
        reason: one sentence without the path: what was got, what is wanted.
        path: the file, for the message; None if it is named elsewhere.
        fix: what to do about it.
    """

    def __init__(
        self, status: str, reason: str, path: Path | None = None, fix: str = "Replace it, or leave it out."
    ) -> None:
        super().__init__(status, reason, path, fix)
        self.status, self.reason, self.path, self.fix = status, reason, path, fix

    def __str__(self) -> str:
        where = "" if self.path is None else f"{str(self.path)!r}: "
        return f"{where}{self.reason}. {self.fix}"


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading if it is a regular file; a pipe would make the run wait for ever.

    The last part of the path is not followed if it is a link: resolve it first, and check where it leads.

    Raises:
        PictureError: the file is missing, not readable, or not a regular file ("unreadable").
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        odd = {errno.ELOOP: "is a link", errno.ENXIO: "is a socket"}
        reason = odd.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise PictureError("unreadable", f"{reason}, expected a regular file", path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PictureError("unreadable", "is a folder, a pipe or a device, expected a regular file", path)
    return os.fdopen(descriptor, "rb")


def load_image(path: Path, *, background: str = "white", max_aspect: float = MAX_ASPECT) -> Image.Image:
    """Read a picture: every pixel decoded, upright, in sRGB, over a colour where it is transparent.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour; of an animation the first frame is used; an
    embedded colour profile is converted from, and ignored if it is broken.

    Args:
        path: the file.
        background: the colour, a name or #RRGGBB.
        max_aspect: how many times the other a side may be.

    Returns:
        An RGB image, 8 bits a channel, without metadata.

    Raises:
        PictureError: the file is not a whole picture of a known format, or too large; names the file.
    """
    with open_regular(path) as file:
        return decode(file, path, background=background, max_aspect=max_aspect)


def decode(file: BinaryIO, path: Path, *, background: str, max_aspect: float) -> Image.Image:
    """Read a picture from an open file, as `load_image` does.

    Args:
        file: at its beginning.
        path: what it is called, for the message.
        background: as there.
        max_aspect: as there.

    Raises:
        PictureError: as there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and large pictures, which are refused below
            image: Image.Image = Image.open(file, formats=FORMATS)
            _check_size(path, image.size, max_aspect)
            image.load()
            image = _upright(image)  # by the same name: of the largest there is no room for three
            return _to_rgb(image, background)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(12)
        if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
            raise PictureError(
                "not a picture", "not a picture that can be read: HEIC", path, "Export it as JPEG."
            ) from error
        got = "not a picture" if start else "not a picture but an empty file"
        raise PictureError("not a picture", f"{got}: expected {', '.join(FORMATS)} by content", path) from error
    except Image.DecompressionBombError as error:
        raise PictureError(
            "too large", f"a decompression bomb: expected at most {MAX_PIXELS} pixels", path, _SMALLER
        ) from error
    except MemoryError as error:
        raise PictureError("too large", "takes more memory to decode than there is", path, _SMALLER) from error
    # Decoders raise what they like on damaged files: OSError, SyntaxError, ValueError, struct.error, EOFError ...
    except Exception as error:
        detail = one_line(str(error)) or type(error).__name__
        raise PictureError("damaged", f"damaged or unsupported picture: {detail}", path) from error


def _check_size(path: Path, size: tuple[int, int], max_aspect: float) -> None:
    """Refuse a picture by the size in its header."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise PictureError(
            "too large",
            f"{width} x {height} pixels, expected at most {MAX_PIXELS}",
            path,
            _SMALLER,
        )
    if max(size) > max_aspect * min(size):
        raise PictureError(
            "too narrow",
            f"{width} x {height} pixels, expected sides of at most {max_aspect:g}:1",
            path,
            "Crop it, or leave it out.",
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF data, and fails where it is broken."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Convert any mode to RGB: colour profile first, then the background behind what is transparent.

    Copies no more often than it must: the largest pictures fill the memory of a worker that reads them.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a channel have no defined white; save it as an 8-bit PNG")
    alpha = _converted(image, "RGBA").getchannel("A") if image.has_transparency_data else None
    profile = image.info.get("icc_profile")
    # A profile describes the channels of the file, so grey and CMYK are kept until it has been applied.
    channels = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    # Via RGBA, because a palette's own transparency makes a plain convert warn or fail.
    rgb = _converted(_converted(image, "RGBA") if alpha and channels == "RGB" else image, channels)
    rgb = _to_srgb(rgb, profile) if profile else _converted(rgb, "RGB")
    if rgb is image:
        rgb = image.copy()  # without what the file's own class carries
    rgb.info.clear()  # or the old profile would travel into files we write
    if alpha is not None:
        rgb.paste(background, mask=ImageChops.invert(alpha))
    return rgb


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """An image in a mode; itself if it has it already."""
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an embedded ICC profile to sRGB; most pictures are in sRGB already and stay as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return _converted(image, "RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # damaged, or made for other channels
        converted = None
    return _converted(image, "RGB") if converted is None else converted
