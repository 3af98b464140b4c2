import io
import os
import socket
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image, ImageCms, ImageFile, PngImagePlugin
from torchvision.transforms import v2

from minisd.buckets import Geometry, square_geometry
from minisd.errors import DataError, DiskError, NonFiniteError, UsageError
from minisd.images import (
    INTERPOLATION,
    MAX_PIXELS,
    image_grid,
    load_image,
    load_init_image,
    save_png,
    to_pil,
    to_pixel_values,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _square(image: Image.Image, resolution: int) -> Geometry:
    return square_geometry((image.height, image.width), resolution)


def _pixels(path: Path) -> list[tuple[int, int, int]]:
    image = load_image(path)
    assert image.mode == "RGB"
    assert not image.info
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start_of_pixels = struct.pack(">I", 100) + b"IDAT"
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + start_of_pixels
    )


# --- reading ---


@pytest.mark.parametrize(
    ("orientation", "wanted"),
    [
        # The picture 1 2 3 / 4 5 6 as each tag says to show it (EXIF 2.3, table 6).
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
        (0, [[1, 2, 3], [4, 5, 6]]),
        (9, [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, wanted: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png")
    assert np.asarray(image)[..., 0].tolist() == wanted
    assert not image.getexif()


def test_a_picture_with_broken_exif_is_upright(tmp_path: Path) -> None:
    data = _jpeg(_noise(16, 8))
    for exif in (b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"):
        block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        (tmp_path / "a.jpg").write_bytes(data[:2] + block + data[2:])
        assert load_image(tmp_path / "a.jpg").size == (16, 8)


def test_every_mode_becomes_rgb_over_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(path)
    assert _pixels(path) == [(0, 0, 0), WHITE]
    Image.fromarray(np.array([[0, 100]], np.uint8)).save(path)
    assert _pixels(path) == [(0, 0, 0), (100, 100, 100)]
    Image.merge("LA", [Image.fromarray(np.array([row], np.uint8)) for row in ([0, 0, 100], [0, 51, 255])]).save(path)
    assert _pixels(path) == [WHITE, (204, 204, 204), (100, 100, 100)]
    # The hidden colour of a transparent pixel stays hidden.
    Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 51], [255, 0, 0, 255]]], np.uint8)).save(path)
    assert _pixels(path) == [WHITE, (255, 204, 204), RED]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.save(path)
    assert _pixels(path) == [RED, GREEN, BLUE]
    palette.save(path, transparency=bytes([0, 51]))
    assert _pixels(path) == [WHITE, (204, 255, 204), BLUE]
    palette.save(path, transparency=1)
    assert _pixels(path) == [RED, WHITE, BLUE]
    Image.fromarray(np.array([[RED, GREEN]], np.uint8)).save(path, transparency=RED)
    assert _pixels(path) == [WHITE, GREEN]
    Image.fromarray(np.array([[0, 256, 40000, 65535]], np.uint16)).save(path)  # 40000 would be clipped to white
    assert Image.open(path).mode == "I;16"
    assert [pixel[0] for pixel in _pixels(path)] == [0, 1, 156, 255]
    Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8), "CMYK").save(
        tmp_path / "a.tif"
    )
    assert _pixels(tmp_path / "a.tif") == [WHITE, RED, (0, 0, 0)]


def test_32_bit_pictures_are_refused(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="8-bit PNG"):
            load_image(tmp_path / "a.tif")


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    for suffix in ("gif", "png", "webp", "tif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert set(_pixels(tmp_path / f"a.{suffix}")) == {RED}


def test_type_is_by_content_and_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert set(_pixels(tmp_path / "a.jpg")) == {RED}
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.eps")
    with pytest.raises(DataError, match="not a picture"):
        load_image(tmp_path / "a.eps")


def test_a_colour_profile_is_converted_from_and_a_broken_one_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (2, 2), (200, 60, 20))
    # Lab as a profile no RGB picture can have; sRGB, which must change nothing; junk.
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (lab, srgb, b"junk", b"\0" * 128):
        image.save(path, icc_profile=profile)
        assert set(_pixels(path)) == {(200, 60, 20)}
    image.save(path, icc_profile=_swapped_primaries(srgb))
    assert set(_pixels(path)) == {(60, 200, 20)}
    image.convert("RGBA").save(path, icc_profile=_swapped_primaries(srgb))
    assert set(_pixels(path)) == {(60, 200, 20)}


def _swapped_primaries(profile: bytes) -> bytes:
    """An sRGB profile whose red and green tags have changed places, under another name."""
    swapped = profile.replace(b"rXYZ", b"####").replace(b"gXYZ", b"rXYZ").replace(b"####", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "none".encode("utf-16-be")).replace(b"sRGB built-in", b"none")
    assert swapped != profile
    return swapped


BAD = {
    "empty": b"",
    "one byte": b"x",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "bmp junk": b"BM" + b"junk" * 20,
    "png header only": _png_header(8, 8),
    "zero wide": _png_header(0, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(BAD[name])
    with pytest.raises(DataError, match=r"a\.png'.*Replace it") as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    path = tmp_path / f"a.{suffix}"
    _noise(64, 64).save(path)
    data = path.read_bytes()
    load_image(path)
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=f"a.{suffix}"):
            load_image(path)


def test_mutants_of_a_picture_decode_or_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for suffix in ("jpg", "png", "webp", "gif", "tif"):
        path = tmp_path / f"a.{suffix}"
        _noise(24, 24).save(path)
        original = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            data = original.copy()
            data[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(data.tobytes())
            try:
                assert load_image(path).mode == "RGB"
            except DataError:
                refused += 1
    assert refused > 20


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    # There is no pixel behind these headers: a decoder that was started would say "truncated".
    for width, height in ((12000, 12000), (60000, 60000), (MAX_PIXELS // 8192 + 1, 8192)):
        (tmp_path / "a.png").write_bytes(_png_header(width, height))
        with pytest.raises(DataError, match=r"a\.png.*(at most 67108864|decompression bomb)"):
            load_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(_png_header(10000, 10))
    with pytest.raises(DataError, match="at most 16:1"):
        load_image(tmp_path / "a.png")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    _noise(4, 4).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    here = Path.cwd()
    os.chdir(tmp_path)  # the path of a socket is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(here)
    names = ["folder.png", "pipe.png", "dangling.png", "link.png", "socket.png", "missing.png"]
    errors: list[str] = []

    def read_all() -> None:
        for name in names:
            try:
                load_image(tmp_path / name)
            except DataError as error:
                errors.append(str(error))

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == len(names)
    assert all(name in error and "expected a regular file" in error for name, error in zip(names, errors, strict=True))


def test_control_characters_of_a_name_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\n.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\\x1b\[31m\\n\.png"):
        load_image(tmp_path / "a\x1b[31m\n.png")


# --- tensors ---


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (65, 200), (333, 250), (31, 17), (640, 479)])
def test_centre_crop_equals_diffusers_training_transforms_to_the_bit(size: tuple[int, int]) -> None:
    image = _noise(*size)
    new = v2.Compose(
        [
            v2.Resize(64, interpolation=INTERPOLATION),
            v2.CenterCrop(64),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    old = v1.Compose(
        [
            v1.Resize(64, interpolation=v1.InterpolationMode.LANCZOS),
            v1.CenterCrop(64),
            v1.ToTensor(),
            v1.Normalize([0.5], [0.5]),
        ]
    )
    pixels = to_pixel_values(image, _square(image, 64), crop=None, flip=False)
    assert type(pixels) is torch.Tensor
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, old(image))
    assert torch.allclose(pixels, new(image), rtol=0, atol=2**-22)  # v2 scales by 1 / 255, ToTensor divides by 255
    assert torch.equal(to_pixel_values(image, _square(image, 64), crop=None, flip=True), old(image).flip(-1))


def test_range_is_minus_one_to_one() -> None:
    for colour, value in ((0, -1.0), (255, 1.0)):
        image = Image.new("RGB", (40, 50), (colour,) * 3)
        pixels = to_pixel_values(image, _square(image, 32), crop=None, flip=False)
        assert (pixels == value).all()


def test_crop_reaches_both_borders_and_every_place_equally() -> None:
    # Each pixel of the wide picture names its column: no resizing, so the cut shows where it lies.
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8), (8, 20))
    for wide, name in ((columns, "left"), (columns.T, "top")):
        image = Image.fromarray(np.ascontiguousarray(wide)).convert("RGB")
        starts = []
        for i in range(1300):
            crop = (0.5, i / 1300) if name == "left" else (i / 1300, 0.5)
            pixels = to_pixel_values(image, _square(image, 8), crop=crop, flip=False)
            values = ((pixels[0] + 1) * 127.5).round().int()
            values = values if name == "left" else values.T
            assert values[0].tolist() == list(range(int(values[0, 0]), int(values[0, 0]) + 8))
            starts.append(int(values[0, 0]))
        assert np.bincount(starts).tolist() == [100] * 13
    last = to_pixel_values(image, _square(image, 8), crop=(1 - 2**-53, 1 - 2**-53), flip=False)
    assert round(float((last[0, 0, 0] + 1) * 127.5)) == 12


def test_a_geometry_is_carried_out_as_it_says() -> None:
    """Resized to (height, width) in that order, as Pillow does it; the cut is a part of it, and in the middle."""
    image = _noise(90, 64)
    resized = np.asarray(image.resize((60, 40), Image.Resampling.LANCZOS))
    for size in ((40, 60), (32, 56), (40, 8), (8, 60)):
        geometry = Geometry((40, 60), size)
        for crop, top, left in (
            (None, (40 - size[0]) // 2, (60 - size[1]) // 2),
            ((0.0, 0.0), 0, 0),
            ((0.999999, 0.999999), 40 - size[0], 60 - size[1]),
        ):
            pixels = to_pixel_values(image, geometry, crop=crop, flip=False)
            assert pixels.shape == (3, *size)
            wanted = resized[top : top + size[0], left : left + size[1]]
            assert np.array_equal(np.asarray(to_pil((pixels[None] + 1) / 2)[0]), wanted)


def test_a_picture_that_is_not_resized_keeps_its_pixels() -> None:
    image = _noise(90, 64)
    pixels = to_pixel_values(image, Geometry((64, 90), (64, 88)), crop=None, flip=False)
    assert np.array_equal(np.asarray(to_pil((pixels[None] + 1) / 2)[0]), np.asarray(image)[:, 1:89])


def test_flip_mirrors_what_was_cropped() -> None:
    image = _noise(90, 64)
    for geometry in (_square(image, 64), Geometry((64, 90), (48, 72))):
        plain = to_pixel_values(image, geometry, crop=(0.3, 0.9), flip=False)
        assert torch.equal(to_pixel_values(image, geometry, crop=(0.3, 0.9), flip=True), plain.flip(-1))


def test_to_pil_rounds_to_the_nearest_level() -> None:
    levels = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(2, 3, 16, 16) / 255
    for nudge in (-0.49, 0.0, 0.49):
        pictures = to_pil(levels + nudge / 255)
        assert len(pictures) == 2
        assert np.asarray(pictures[1])[..., 2].ravel().tolist() == list(range(256))
    random = torch.rand(1, 3, 8, 8)
    reference = (random.permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    assert np.array_equal(np.asarray(to_pil(random)[0]), reference[0])
    assert np.asarray(to_pil(torch.tensor([-0.1, 1.1]).view(1, 1, 1, 2).expand(1, 3, 1, 2))[0])[0].tolist() == [
        [0, 0, 0],
        [255, 255, 255],
    ]
    with pytest.raises(NonFiniteError):
        to_pil(torch.full((1, 3, 2, 2), torch.nan))


def test_a_picture_survives_the_way_in_and_out() -> None:
    image = _noise(32, 32)
    pixels = to_pixel_values(image, _square(image, 32), crop=None, flip=False)
    assert np.array_equal(np.asarray(to_pil((pixels[None] + 1) / 2)[0]), np.asarray(image))


def test_grid_goes_row_by_row() -> None:
    grid = np.asarray(image_grid([Image.new("RGB", (2, 1), colour) for colour in (RED, GREEN, BLUE)], columns=2))
    assert grid.tolist() == [[list(c) for c in (RED, RED, GREEN, GREEN)], [list(c) for c in (BLUE, BLUE, WHITE, WHITE)]]


def test_pictures_of_several_sizes_share_a_grid() -> None:
    grid = image_grid([Image.new("RGB", size, "red") for size in ((3, 1), (1, 2), (2, 2))], columns=2)
    assert grid.size == (6, 4)
    reds = (np.asarray(grid)[..., 1] == 0).astype(int)
    assert reds.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


# --- a picture to begin with ---


@pytest.mark.parametrize(
    ("size", "resized", "cut"),
    [((90, 60), (96, 64), (16, 0, 80, 64)), ((60, 90), (32, 48), (0, 8, 32, 40)), ((33, 16), (33, 16), (1, 0, 32, 16))],
)
def test_a_picture_to_begin_with_covers_the_size_and_is_cut_to_its_middle(
    tmp_path: Path, size: tuple[int, int], resized: tuple[int, int], cut: tuple[int, int, int, int]
) -> None:
    image = _noise(*size)
    image.save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    pixels = load_init_image(tmp_path / "link.png", cut[3] - cut[1], cut[2] - cut[0])
    assert (pixels.dtype, len(pixels)) == (torch.float32, 1)
    expected = np.asarray(image.resize(resized, Image.Resampling.LANCZOS).crop(cut))
    assert np.array_equal(np.asarray(to_pil((pixels + 1) / 2)[0]), expected)


# --- writing ---


@pytest.mark.parametrize("text", ["", "a prompt\nSteps: 25, Seed: 1", "caf\xe9", "\u732b \U0001f408"])
def test_png_carries_its_recipe(tmp_path: Path, text: str) -> None:
    image = _noise(8, 8)
    save_png(image, tmp_path / "a.png", parameters=text)
    with Image.open(tmp_path / "a.png") as read:
        assert isinstance(read, PngImagePlugin.PngImageFile)
        assert read.text == {"parameters": text}
        assert np.array_equal(np.asarray(read), np.asarray(image))


def test_png_text_is_cleaned_and_capped(tmp_path: Path) -> None:
    save_png(_noise(8, 8), tmp_path / "a.png", parameters="a\0b\ud800" + "\u732b" * 100_000)
    with Image.open(tmp_path / "a.png") as read:
        text = read.info["parameters"]
    assert text.startswith("ab?\u732b")
    assert 32 * 1024 - 3 <= len(text.encode()) <= 32 * 1024


def test_png_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--overwrite"):
        save_png(_noise(8, 8), path, parameters="")
    assert path.read_bytes() == b"precious"
    save_png(_noise(8, 8), path, parameters="", overwrite=True)
    load_image(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_png_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"nowhere.*a\.png"):
        save_png(_noise(8, 8), tmp_path / "nowhere" / "a.png", parameters="")
