"""What prepare_data.py does to one picture: look at it, write it as a PNG, make a preview."""

from __future__ import annotations

import hashlib
import io
import os
import random
import time
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from minisd.buckets import bucket_geometry, default_step
from minisd.errors import DiskError
from minisd.picture_files import PictureError, load_image
from minisd.prepare.examine import Examined, examine, preview, suffix_of, write_png
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Rules

RULES = Rules(min_side=16)


def _noise() -> Image.Image:
    """Cells of 5 x 4 pixels, so that a JPEG keeps them more or less."""
    cells = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((300, 240), Image.Resampling.NEAREST)


def _save(image: Image.Image, path: Path, kind: str) -> None:
    image.save(path, kind, **({"save_all": True} if kind == "MPO" else {}))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("MPO", ".jpg"),
        ("GIF", ".gif"),
        ("WEBP", ".webp"),
        ("BMP", ".bmp"),
        ("TIFF", ".tif"),
        ("AVIF", ".avif"),
    ],
)
def test_what_is_known_of_a_picture_is_read_from_its_content(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / "a.lie"
    _save(_noise(), path, kind)
    data, image = path.read_bytes(), load_image(path)
    found = examine(path, RULES)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.width, found.height, found.size_bytes, found.suffix) == (300, 240, len(data), suffix)
    bits, _, cells = found.dhash.partition("-")
    assert imagehash.hex_to_hash(bits) == imagehash.dhash(image)
    means = np.asarray(image, float).reshape(3, 80, 3, 100, 3).mean((1, 3))
    assert np.abs(np.frombuffer(bytes.fromhex(cells), np.uint8).reshape(3, 3, 3) - means).max() < 1


def test_content_that_is_no_picture_has_no_suffix() -> None:
    for start in (b"", b"B", b"<html>", b"%PDF-1.7", b"\xff\xd8", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x1cftypheic"):
        assert suffix_of(start) == ""


def test_rules_refuse_a_picture_with_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for size, status, reason in (
        ((255, 300), "too small", "255 x 300 pixels, expected sides of at least 256"),
        ((1, 1), "too small", "1 x 1 pixels, expected sides of at least 256"),
        ((256, 1025), "too narrow", "256 x 1025 pixels, expected sides of at most 4:1"),
        ((10000, 1), "too narrow", "10000 x 1 pixels, expected sides of at most 4:1"),
    ):
        Image.new("RGB", size).save(path)
        with pytest.raises(PictureError) as caught:
            examine(path, Rules())
        assert (caught.value.status, caught.value.reason) == (status, reason)
    for size in ((256, 256), (256, 1024), (1024, 256)):
        Image.new("RGB", size).save(path)
        assert (examine(path, Rules()).width, examine(path, Rules()).height) == size
    with path.open("wb") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(PictureError, match="536870913 bytes, expected at most 536870912"):
        examine(path, Rules())


def test_a_png_has_the_pixels_as_training_reads_them_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jpg", tmp_path / "b.png"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"
    _noise().save(source, exif=exif, comment="a secret")
    written = write_png(source, target, RULES)
    assert (written.width, written.height) == (240, 300)
    assert written.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    with Image.open(target) as image:
        assert (image.format, image.mode, image.info, dict(image.getexif())) == ("PNG", "RGB", {}, {})
        assert np.array_equal(np.asarray(image), np.asarray(load_image(source)))
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(source, "PNG")
    for background, colour in (("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#0a0B0c", (10, 11, 12))):
        write_png(source, target, Rules(min_side=16, background=background))
        assert load_image(target).getcolors() == [(64 * 64, colour)]
    with pytest.raises(DiskError, match="nowhere"):
        write_png(source, tmp_path / "nowhere" / "b.png", RULES)


def test_a_picture_made_smaller_is_resized_no_more_in_training(tmp_path: Path) -> None:
    """At that resolution, whatever its shape; it is made from the whole picture at once, and never enlarged."""
    rng = random.Random(0)
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    moved = 0
    for resolution in (64, 100, 128):
        step = default_step(resolution, 8)
        # Shapes between two buckets, where rounding may move a picture from one to the other; and one below any bucket.
        sizes = [(331, 144), (1289, 885), (9, 9), *((rng.randint(40, 400), rng.randint(40, 400)) for _ in range(40))]
        for width, height in sizes:
            picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
            picture.save(source)
            written = write_png(source, target, Rules(min_side=1, max_aspect=16, resize=resolution))
            size = written.height, written.width
            assert written.width <= width
            assert written.height <= height
            wanted = picture.resize((written.width, written.height), Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(load_image(target)), np.asarray(wanted))
            if (width, height) == (9, 9) and step > 9:
                assert size == (9, 9)
                continue
            assert bucket_geometry(size, resolution, step, upscale=False).resized == size
            once = bucket_geometry((height, width), resolution, step, upscale=False).resized
            moved += once != size
            assert max(np.abs(np.subtract(once, size))) <= step
    assert 2 <= moved <= 10


def test_a_preview_is_a_small_jpeg(tmp_path: Path) -> None:
    _noise().save(tmp_path / "a.png")
    for longest, size in ((256, (256, 205)), (1000, (300, 240))):
        with Image.open(io.BytesIO(preview(tmp_path / "a.png", longest))) as image:
            assert (image.format, image.size) == ("JPEG", size)


def test_what_is_no_regular_file_is_unreadable_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    _noise().save(tmp_path / "forbidden.png")
    (tmp_path / "forbidden.png").chmod(0)
    paths = [*sorted(tmp_path.iterdir()), Path("/dev/zero")]
    started = time.monotonic()
    with GuardedPool(2) as pool:
        results = dict(zip(paths, pool.map(partial(examine, rules=RULES), paths), strict=True))
    assert time.monotonic() - started < 10
    if os.geteuid() == 0:  # who may read anything
        assert isinstance(results.pop(tmp_path / "forbidden.png"), Examined)
    for result in results.values():
        assert isinstance(result, PictureError)
        assert result.status == "unreadable"
        assert "expected a regular file" in result.reason
