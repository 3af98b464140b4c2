"""Mutate pictures: `python -m tests.faults.fuzz_pictures FOLDER careful|careless FIRST COUNT`.

Every mutant is either decoded to RGB or refused by a PictureError in one clear line. Prints as JSON how many did which,
and what went wrong. A program of its own, so that a signal is seen for what it is: one mutant may take 20 s, and the
memory is that of a worker of guarded.GuardedPool. A mutant follows from its number alone.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from minisd.errors import one_line
from minisd.picture_files import MAX_PIXELS, PictureError
from minisd.prepare.examine import examine
from minisd.prepare.guarded import SECONDS
from minisd.prepare.options import Rules

Read = Callable[[Path], None]
RULES = Rules(min_side=1, max_aspect=16)
STATUSES = ("not a picture", "damaged", "too large", "too narrow")
_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "AVIF": ("RGB", "RGBA"),
}
_COMPRESSIONS = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
_NUMBERS = (0, 1, 2, 3, 7, 8, 24, 127, 128, 255, 256, 1023, 8192, 12_000, 32_767, 65_535, 2**24, 2**31 - 1, 2**32 - 1)

_TEXT_BOMB = b"k\0\0" + zlib.compress(bytes(2**21))


def corpus() -> list[bytes]:
    """A small picture in each format and mode; some animated, tilted, compressed otherwise, or with a profile."""
    colours = np.random.default_rng(0).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    base = Image.fromarray(colours).resize((24, 28), Image.Resampling.BICUBIC)
    found = [_file(_in_mode(base, mode), kind) for kind, modes in _MODES.items() for mode in modes]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"n\0o\0n\0e")
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "words " * 20, zip=True)
    text.add_itxt("other", "words")
    frames = [base.rotate(angle) for angle in (90, 180)]
    for kind in ("PNG", "GIF", "WEBP", "TIFF", "AVIF", "MPO"):
        found.append(_file(base, kind, save_all=True, append_images=frames))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        found.append(_file(base, kind, exif=exif, icc_profile=profile))
    found.append(_file(base, "PNG", pnginfo=text, interlace=1))
    found.append(_file(base.convert("P"), "PNG", transparency=bytes(range(0, 250, 10))))
    found.append(_file(base, "PNG", transparency=(1, 2, 3)))
    found.append(_file(base, "JPEG", progressive=True, subsampling=0))
    found += [
        _file(base.convert("1" if name == "group4" else "RGB"), "TIFF", compression=name) for name in _COMPRESSIONS
    ]
    return found


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        made = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
        assert made is not None
        made.info.clear()
        return made
    if mode in ("LA", "RGBA"):
        image = image.copy()
        image.putalpha(image.getchannel("R"))
    return image.convert(mode)


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def mutant(number: int, originals: list[bytes]) -> bytes:
    """The mutant of that number."""
    generator = random.Random(number)
    data = generator.choice(originals)
    for _ in range(generator.choice((1, 1, 2, 4))):
        change = generator.choice((_bits, _bits, _number, _number, _cut, _splice, _chunk))
        data = change(generator, data, originals)
    return _checksums(data) if generator.random() < 0.8 else data


def _place(generator: random.Random, data: bytes) -> int:
    """Anywhere, mostly near the front, where the header is."""
    return min(generator.randrange(1 + len(data)) for _ in range(generator.choice((1, 2, 4))))


def _bits(generator: random.Random, data: bytes, originals: list[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(generator.choice((1, 1, 3, 10))):
        changed[min(_place(generator, data), len(changed) - 1)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _number(generator: random.Random, data: bytes, originals: list[bytes]) -> bytes:
    """Write a number that stands for a size, an offset or a count, in either order of bytes."""
    width, place = generator.choice((1, 2, 4)), _place(generator, data)
    number = generator.choice(_NUMBERS) & (1 << 8 * width) - 1
    return data[:place] + number.to_bytes(width, generator.choice(("big", "little"))) + data[place + width :]


def _cut(generator: random.Random, data: bytes, originals: list[bytes]) -> bytes:
    start = generator.randrange(1 + len(data))
    return generator.choice((data[:start], data[:start] + data[start + generator.randrange(1, 20) :]))


def _splice(generator: random.Random, data: bytes, originals: list[bytes]) -> bytes:
    """Go on with another file, repeat a piece, or put noise in."""
    other, start = generator.choice(originals), _place(generator, data)
    piece = data[start : start + generator.randrange(1, 60)]
    rest = generator.choice((other[_place(generator, other) :], piece * 20 + data[start:], generator.randbytes(9)))
    return data[:start] + rest


def _chunk(generator: random.Random, data: bytes, originals: list[bytes]) -> bytes:
    """Add a chunk to a PNG, or a segment to a JPEG: text bombs, profiles and EXIF that are none."""
    junk = generator.choice((b"", _TEXT_BOMB, b"Exif\0\0II*\0\xff\xff\xff\xff", b"icc\0\0junk"))
    if data.startswith(b"\xff\xd8"):
        junk = junk[:60_000]
        return (
            data[:2]
            + b"\xff"
            + generator.choice((b"\xe1", b"\xe2", b"\xfe", b"\xc2"))
            + _length(">H", junk, 2)
            + data[2:]
        )
    name = generator.choice((b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"IEND", b"IHDR"))
    place = generator.choice((8, 33))
    return data[:place] + struct.pack(">I", len(junk)) + name + junk + bytes(4) + data[place:]


def _length(kind: str, body: bytes, more: int) -> bytes:
    return struct.pack(kind, len(body) + more) + body


def _checksums(data: bytes) -> bytes:
    """Make the checksums of a PNG right again: without them nothing behind them would be reached."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    found, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : end]
        found.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place = end + 4
    return b"".join(found) + data[place:]


def _check_refusal(path: Path, error: PictureError) -> None:
    message = str(error)
    assert error.status in STATUSES, message
    assert message.startswith(repr(str(path))), message
    assert message.endswith("leave it out."), message
    assert one_line(message) == message, message
    assert 40 < len(message) < 400, message


def read_carefully(path: Path) -> None:
    """Read a picture as prepare_data.py does; what is accepted must be sound, what is refused told clearly."""
    try:
        found = examine(path, RULES)
    except PictureError as error:
        _check_refusal(path, error)
        raise
    assert found.width * found.height <= MAX_PIXELS
    assert len(found.dhash) == 71
    assert found.suffix, "a picture of an unknown kind"


def read_carelessly(path: Path) -> None:
    """What many a script does."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise PictureError("damaged", str(error)) from error
    assert pixels.ndim == 3
    assert pixels.size <= 3 * MAX_PIXELS


def run(folder: Path, read: Read, first: int, count: int) -> dict[str, Any]:
    """Try `count` mutants from number `first`."""
    originals, outcomes, wrong, slowest = corpus(), Counter[str](), [], 0.0
    for number in range(first, first + count):
        path = folder / f"{number % 8}.png"
        path.write_bytes(mutant(number, originals))
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nothing handles it: a mutant that takes longer ends the program
        try:
            read(path)
            outcomes["decoded"] += 1
        except PictureError as error:
            outcomes[error.status] += 1
        except Exception as error:
            wrong.append(f"mutant {number}: {type(error).__name__}: {str(error)[:200]}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.monotonic() - started)
    # Not getrusage: its maximum is that of the process that started this one, if that was larger.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    figures = {"peak MiB": peak, "slowest": round(slowest, 2)}
    return {"outcomes": outcomes, "wrong": wrong[:20], "number of wrong": len(wrong), **figures}


if __name__ == "__main__":
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 544 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    reads: dict[str, Read] = {"careful": read_carefully, "careless": read_carelessly}
    print(json.dumps(run(Path(sys.argv[1]), reads[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4]))))
