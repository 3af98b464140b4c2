import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minisd.pocket.scenes import (
    COLOURS,
    STYLES,
    SUBJECTS,
    TIMES,
    Scene,
    blockiness,
    caption,
    draw,
    scene_at,
    subject_colour,
    time_of_day,
)

SCENES = [scene_at(i, 11) for i in range(600)]


def _worn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), float)
    return Image.fromarray((soft + rng.normal(0, 10, soft.shape)).clip(0, 255).astype(np.uint8))


def test_captions_read_as_english() -> None:
    assert caption(Scene("house", "red", "night", 0)) == "illustration of a red house at night"
    assert caption(Scene("city view", "blue", "sunset", 0)) == "illustration of a blue city view at sunset"
    assert caption(Scene("car", "orange", "day", 0)) == "illustration of an orange car by day"


def test_scene_at_is_pure_and_reaches_every_combination() -> None:
    assert [scene_at(i, 3) for i in range(20)] == [scene_at(i, 3) for i in range(20)]
    assert scene_at(0, 3) != scene_at(0, 4)
    seen = {(s.subject, s.colour, s.time) for s in (scene_at(i, 0) for i in range(4000))}
    assert seen == set(itertools.product(SUBJECTS, COLOURS, TIMES))


@pytest.mark.parametrize("style", STYLES)
def test_draw_is_deterministic_and_the_seed_moves_things(style: str) -> None:
    for subject in SUBJECTS:
        pictures = [draw(Scene(subject, "red", "day", seed), style) for seed in range(6)]
        assert all(p.size == (64, 64) and p.mode == "RGB" for p in pictures)
        assert pictures[0].tobytes() == draw(Scene(subject, "red", "day", 0), style).tobytes()
        assert len({p.tobytes() for p in pictures}) > 3


def test_draw_refuses_an_unknown_style() -> None:
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        draw(SCENES[0], "oil")


def test_8bit_pictures_are_flat_on_every_cell_with_few_colours() -> None:
    for scene in SCENES[:100]:
        pixels = np.asarray(draw(scene, "8bit"))
        assert (pixels == pixels[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) <= 20


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("worn", [False, True])
def test_colour_and_time_are_read_off_the_pixels(style: str, worn: bool) -> None:
    rng = np.random.default_rng(0)
    pictures = [draw(s, style) for s in SCENES]
    if worn:
        pictures = [_worn(p, rng) for p in pictures]
    colours = np.mean([subject_colour(p) == s.colour for p, s in zip(pictures, SCENES, strict=True)])
    times = np.mean([time_of_day(p) == s.time for p, s in zip(pictures, SCENES, strict=True)])
    assert colours >= (0.97 if worn else 0.99)
    assert times == 1.0


def test_blockiness_tells_the_styles_apart() -> None:
    plain = [blockiness(draw(s)) for s in SCENES[:200]]
    flat = [blockiness(draw(s, "8bit")) for s in SCENES[:200]]
    assert min(flat) > 1 - 1e-9
    assert np.mean(plain) < 0.35
    assert max(plain) < 0.6
    assert blockiness(Image.new("RGB", (64, 64), "red")) == 0.0
