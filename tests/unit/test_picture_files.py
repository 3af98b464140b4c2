import io
import os
import pickle
import socket
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from minisd.errors import DataError
from minisd.picture_files import MAX_PIXELS, PictureError, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _pixels(path: Path) -> list[tuple[int, int, int]]:
    image = load_image(path)
    assert type(image) is Image.Image  # and not that of a file, with all it carries
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
    "empty": (b"", "not a picture"),
    "one byte": (b"x", "not a picture"),
    "text": (b"a castle by day\n", "not a picture"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not a picture"),
    "zip": (b"PK\x03\x04" + bytes(40), "not a picture"),
    "heic": (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(40), "not a picture"),
    "bmp junk": (b"BM" + b"junk" * 20, "damaged"),
    "png header only": (_png_header(8, 8), "damaged"),
    "zero wide": (_png_header(0, 8), "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    data, status = BAD[name]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(PictureError, match=r"a\.png'.*(Replace|Export) it") as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.exit_code == 3
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker
    assert (str(again), again.status, again.reason) == (str(caught.value), status, caught.value.reason)


def test_text_bombs_are_refused_and_many_chunks_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "x" * (2**20 + 1), zip=True)
    Image.new("RGB", (4, 4)).save(path, pnginfo=text)
    with pytest.raises(PictureError, match="damaged or unsupported picture"):
        load_image(path)
    text = PngImagePlugin.PngInfo()
    for index in range(20_000):
        text.add_text(f"k{index}", "x")
    Image.new("RGB", (4, 4), RED).save(path, pnginfo=text)
    assert set(_pixels(path)) == {RED}


def test_the_background_and_the_shape_may_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (40, 10), (255, 0, 0, 51)).save(path)
    assert load_image(path, background="black").getcolors() == [(400, (51, 0, 0))]
    assert load_image(path, background="#0000ff", max_aspect=4).getcolors() == [(400, (51, 0, 204))]
    with pytest.raises(PictureError, match=r"40 x 10 pixels, expected sides of at most 3\.9:1") as caught:
        load_image(path, max_aspect=3.9)
    assert caught.value.status == "too narrow"


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
