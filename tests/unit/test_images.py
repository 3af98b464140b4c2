from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image, PngImagePlugin
from torchvision.transforms import v2

from minisd.buckets import Geometry, square_geometry
from minisd.errors import DiskError, NonFiniteError, UsageError
from minisd.images import (
    INTERPOLATION,
    image_grid,
    load_init_image,
    save_png,
    to_pil,
    to_pixel_values,
)
from minisd.picture_files import load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _square(image: Image.Image, resolution: int) -> Geometry:
    return square_geometry((image.height, image.width), resolution)


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
