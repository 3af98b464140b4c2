"""The drawn world of the pocket model: captioned 64x64 scenes, their eight-bit look, and checks read off pixels.

A scene is drawn once as a map of *roles* (wall, window, sky row, ...); a style only decides how roles become
colours. So the plain and the eight-bit picture of one scene show the same thing in the same place, up to
the rounding to whole cells that keeps eight-bit edges clean.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minisd.pocket.subjects import (
    BACK,
    CELL,
    CLOUD,
    FLAME,
    GLASS,
    GROUND,
    GROUND2,
    INK,
    LIGHT,
    MAIN,
    ORB,
    OVER,
    SHADE,
    SIZE,
    SKY,
    SNOW,
    STEM,
    SUBJECTS,
    WATER,
    WATER2,
    WOOD,
    Pen,
)

__all__ = [
    "COLOURS", "SIZE", "STYLES", "SUBJECTS", "TIMES", "Scene", "blockiness", "caption", "draw", "named_in",
    "scene_at", "subject_colour", "time_of_day",
]  # fmt: skip

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (222, 32, 36), "orange": (255, 132, 0), "yellow": (255, 226, 32), "green": (32, 168, 56),
    "blue": (36, 84, 232), "purple": (136, 40, 196), "pink": (255, 120, 190), "white": (250, 250, 250),
}  # fmt: skip
# The same names as the few, full colours of an early home computer.
COLOURS_8BIT: dict[str, RGB] = {
    "red": (255, 0, 0), "orange": (255, 128, 0), "yellow": (255, 255, 0), "green": (0, 170, 0),
    "blue": (0, 85, 255), "purple": (170, 0, 255), "pink": (255, 85, 170), "white": (255, 255, 255),
}  # fmt: skip
TIMES: tuple[str, ...] = ("day", "sunset", "night")
STYLES: tuple[str, ...] = ("plain", "8bit")
_PHRASE = {"day": "by day", "sunset": "at sunset", "night": "at night"}

# Per time: sky from top to horizon, then ground, its stripes, water, its ripples, sun or moon, cloud or star, window.
# The background is kept greyish wherever its hue is also a subject's, so that the subject's colour stands out.
_SETTING: dict[str, tuple[RGB, ...]] = {
    "day": ((150, 212, 240), (214, 240, 246), (150, 154, 118), (132, 138, 104), (104, 158, 172), (150, 196, 204),
            (255, 244, 190), (238, 246, 250), (70, 84, 108)),
    "sunset": ((146, 92, 112), (252, 196, 150), (112, 92, 84), (94, 76, 74), (134, 100, 112), (200, 148, 134),
               (255, 240, 196), (206, 144, 134), (66, 52, 74)),
    "night": ((12, 16, 50), (34, 40, 88), (56, 62, 70), (44, 48, 58), (32, 50, 78), (64, 84, 112),
              (238, 236, 210), (228, 230, 240), (255, 236, 150)),
}  # fmt: skip
_SETTING_8BIT: dict[str, tuple[RGB, ...]] = {
    "day": ((85, 212, 255), (170, 255, 255), (170, 170, 85), (128, 128, 64), (85, 170, 170), (170, 212, 212),
            (255, 255, 170), (240, 255, 255), (64, 64, 96)),
    "sunset": ((128, 64, 96), (255, 190, 140), (128, 85, 85), (96, 64, 64), (128, 85, 106), (212, 150, 128),
               (255, 255, 190), (212, 140, 128), (64, 32, 64)),
    "night": ((0, 0, 64), (0, 0, 96), (64, 64, 85), (42, 42, 64), (0, 42, 85), (42, 85, 128),
              (255, 255, 212), (212, 212, 255), (255, 255, 128)),
}  # fmt: skip
_FIXED: dict[int, RGB] = {INK: (36, 28, 44), WOOD: (96, 68, 56), STEM: (66, 82, 60)}
_FIXED |= {FLAME: (255, 214, 120), SNOW: (246, 248, 252)}


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `seed` settles place, size and details."""

    subject: str
    colour: str
    time: str
    seed: int


_AT_SEA = ("boat", "fish", "lighthouse")


def caption(scene: Scene) -> str:
    """The scene in words, e.g. "illustration of an orange car by day"."""
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return f"illustration of {article} {scene.colour} {scene.subject} {_PHRASE[scene.time]}"


def named_in(text: str) -> tuple[str | None, str | None]:
    """The colour and the time of day that a caption names; None where it names none, or several."""
    colours = set(re.findall(r"[a-z]+", text.lower())) & set(COLOURS)
    times = {time for time, phrase in _PHRASE.items() if phrase in text.lower()}
    return colours.pop() if len(colours) == 1 else None, times.pop() if len(times) == 1 else None


def scene_at(index: int, seed: int) -> Scene:
    """The `index`-th scene of the endless random series `seed`."""
    rng = random.Random(f"{seed}:{index}")
    return Scene(rng.choice(list(SUBJECTS)), rng.choice(list(COLOURS)), rng.choice(TIMES), rng.getrandbits(31))


def _backdrop(pen: Pen, scene: Scene, rng: random.Random, horizon: int) -> None:
    """Sky with sun, moon, clouds or stars; then ground or water below `horizon` (a row of the picture)."""
    draw, step = pen.draw, CELL if pen.snap else 1
    for row in range(0, horizon, step):
        draw.rectangle((0, row * OVER, SIZE * OVER, (row + step) * OVER - 1), fill=SKY + row * 63 // horizon)

    def spot(role: int, x: float, y: float, rx: float, ry: float) -> None:
        if pen.snap:
            x, y = round(x / CELL) * CELL, round(y / CELL) * CELL
        draw.ellipse(((x - rx) * OVER, (y - ry) * OVER, (x + rx) * OVER, (y + ry) * OVER), fill=role)

    side = rng.choice((-1, 1))
    if scene.time == "night":
        for _ in range(7):
            x, y = rng.randrange(1, 15) * CELL, rng.randrange(0, 5) * CELL
            last = (CELL * OVER if pen.snap else 4) - 1
            draw.rectangle((x * OVER, y * OVER, x * OVER + last, y * OVER + last), fill=CLOUD)
    if scene.time == "sunset":
        spot(ORB, 32 + side * rng.uniform(22, 26), horizon - rng.uniform(2, 5), 8, 8)
    else:
        spot(ORB, 32 + side * rng.uniform(22, 24), rng.uniform(8, 9), 6.5, 6.5)
    if scene.time != "night" and rng.random() < 0.6:
        at, height = 32 - side * rng.uniform(18, 24), rng.uniform(6, 9)  # in a corner, clear of a white subject
        for dx, dy, rx in ((-5, 1, 4), (0, -1, 5), (6, 1, 4)):
            spot(CLOUD, at + dx, height + dy, rx, 3.5)
    base, stripe = (WATER, WATER2) if scene.subject in _AT_SEA else (GROUND, GROUND2)
    draw.rectangle((0, horizon * OVER, SIZE * OVER, SIZE * OVER), fill=base)
    for row in range(horizon + CELL, SIZE, CELL):
        for x in range(rng.randrange(8) * CELL - 32, SIZE, 24):
            draw.rectangle((x * OVER, row * OVER, (x + 8) * OVER - 1, (row + step) * OVER - 1), fill=stripe)


@lru_cache(maxsize=256)
def _palette(colour: str, time: str, style: str) -> bytes:
    """The 256 role colours of a style, as 768 bytes."""
    flat = style == "8bit"
    main = np.array((COLOURS_8BIT if flat else COLOURS)[colour], float)
    high, low, *rest = (_SETTING_8BIT if flat else _SETTING)[time]
    table = np.zeros((256, 3))
    for role, rgb in _FIXED.items():
        table[role] = rgb
    table[MAIN], table[SHADE], table[LIGHT] = main, 0.72 * main, 0.7 * main + 0.3 * 255
    table[GROUND : CLOUD + 1], table[GLASS] = rest[:6], rest[6]
    mix = np.linspace(0, 1, 64)[:, None]
    if flat:  # four bands of sky
        mix = np.floor(mix * 3.999) / 3
    table[SKY : SKY + 64] = (1 - mix) * np.array(high) + mix * np.array(low)
    return table.round().astype(np.uint8).tobytes()


def _roles(scene: Scene, snap: bool) -> NDArray[np.uint8]:
    """The scene's role map, (192, 192)."""
    rng = random.Random(scene.seed)
    x, foot, scale = 32 + rng.uniform(-3, 3), rng.uniform(53, 58), rng.uniform(0.92, 1.06)
    if snap:
        x, foot, scale = round(x / CELL) * CELL, round(foot / CELL) * CELL, 1.0  # clean edges need whole cells
    pen = Pen(x, foot, scale, snap)
    _backdrop(pen, scene, rng, 4 * rng.randint(11, 12))
    SUBJECTS[scene.subject](pen, rng)
    return np.asarray(pen.image)


def draw(scene: Scene, style: str = "plain") -> Image.Image:
    """Draw a scene as a 64x64 RGB picture.

    Args:
        scene: what to draw.
        style: "plain" (antialiased, outlined) or "8bit" (constant on every aligned 4x4 block).

    Raises:
        ValueError: for a style of another name.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    roles = _roles(scene, style == "8bit")
    if style == "8bit":
        kinds = np.unique(roles)
        n, side = SIZE // CELL, CELL * OVER
        votes = np.stack([(roles == k).reshape(n, side, n, side).sum((1, 3)) for k in kinds])
        picture = Image.fromarray(kinds[votes.argmax(0)], "P")
        picture.putpalette(_palette(scene.colour, scene.time, style))
        return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)
    roles = roles.copy()
    ours = roles < BACK
    edge = np.zeros_like(ours)
    edge[:-2] |= (roles[2:] != roles[:-2]) & (ours[2:] | ours[:-2])
    edge[:, :-2] |= (roles[:, 2:] != roles[:, :-2]) & (ours[:, 2:] | ours[:, :-2])
    roles[edge] = INK
    picture = Image.fromarray(roles, "P")
    picture.putpalette(_palette(scene.colour, scene.time, style))
    return picture.convert("RGB").reduce(OVER)


def _features(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lightness and two opponent hues, (..., 3): lightness counts half, since shading changes it first."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([(red + green + blue) / 6, red - green, (red + green) / 2 - blue], -1)


@lru_cache(maxsize=len(TIMES))
def _prototypes(time: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features of every colour a picture of `time` may hold, (K, 3), and whose they are, (K,): -1 is nobody's."""
    rows: list[NDArray[np.uint8]] = []
    owner: list[int] = []
    for style in STYLES:
        for i, colour in enumerate(COLOURS):
            table = np.frombuffer(_palette(colour, time, style), np.uint8).reshape(256, 3)
            rows += list(table[MAIN : LIGHT + 1])
            owner += [i] * 3
        others = [INK, GLASS, WOOD, STEM, FLAME, *range(GROUND, CLOUD), *range(SKY, SKY + 64, 7)]
        rows += list(table[others])
        owner += [-1] * len(others)
    return _features(np.stack(rows).astype(float)), np.array(owner)


def time_of_day(image: Image.Image) -> str:
    """The time a picture shows, from the colour of its uppermost sky."""
    top = np.median(np.asarray(image.convert("RGB"), float)[:8].reshape(-1, 3), axis=0)
    skies = [(time, sky[0]) for sky_of in (_SETTING, _SETTING_8BIT) for time, sky in sky_of.items()]
    return min(skies, key=lambda item: float(((np.array(item[1]) - top) ** 2).sum()))[0]


def subject_colour(image: Image.Image) -> str:
    """The name of the subject's colour: the commonest subject colour in the middle of a 64x64 picture."""
    middle = np.asarray(image.convert("RGB"), float)[16:56, 12:52].reshape(-1, 3)
    points, owner = _prototypes(time_of_day(image))
    nearest = owner[((points**2).sum(1) - 2 * _features(middle) @ points.T).argmin(1)]  # least squared distance
    return list(COLOURS)[int(np.bincount(nearest[nearest >= 0], minlength=len(COLOURS)).argmax())]


def blockiness(image: Image.Image) -> float:
    """Share of the edges that lie on the borders of aligned 4x4 blocks: 1.0 in true eight-bit pictures.

    An edge counts with the squared difference of the two pixels. Where they fall anywhere, as in plain pictures, the
    share is about a quarter. (The variance that constant blocks explain says less: 0.8 for a plain picture, and 0.9 for
    the same one blurred.)
    """
    pixels = np.asarray(image.convert("RGB"), float)
    across = (np.diff(pixels, axis=1) ** 2).sum((0, 2))
    down = (np.diff(pixels, axis=0) ** 2).sum((1, 2))
    edges = across + down  # between pixel i and pixel i + 1
    return float(edges[CELL - 1 :: CELL].sum() / max(edges.sum(), 1e-9))
