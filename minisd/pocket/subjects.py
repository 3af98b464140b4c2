"""What the pocket model's pictures are about: twelve subjects, each drawn by a few shapes with a `Pen`."""

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

SIZE, CELL, OVER = 64, 4, 3  # picture side and eight-bit cell, in pixels; supersampling of the role map

# Roles: what a spot of the picture is, whatever its colour. Those below BACK belong to the subject;
# SKY + k is the sky at height k, from 0 at the top to 63 at the horizon.
INK, MAIN, SHADE, LIGHT, GLASS, WOOD, STEM, FLAME, SNOW = range(9)
BACK, GROUND, GROUND2, WATER, WATER2, ORB, CLOUD, SKY = 16, 16, 17, 18, 19, 20, 21, 64


class Pen:
    """Draws roles in subject units: x right of the subject's middle, y up from its foot, in pixels at scale 1."""

    def __init__(self, x: float, foot: float, scale: float, snap: bool) -> None:
        self.x, self.foot, self.scale, self.snap = x, foot, scale, snap
        self.image = Image.new("L", (SIZE * OVER, SIZE * OVER), SKY)
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (self.x + self.scale * x) * OVER, (self.foot - self.scale * y) * OVER

    def rect(self, role: int, x0: float, y0: float, x1: float, y1: float) -> None:
        """Fill a box; in the eight-bit look it falls on whole cells, at least one."""
        (left, bottom), (right, top) = self._at(x0, y0), self._at(x1, y1)
        if self.snap:
            cell = CELL * OVER
            left, top = round(left / cell) * cell, round(top / cell) * cell
            right, bottom = max(left + cell, round(right / cell) * cell), max(top + cell, round(bottom / cell) * cell)
        self.draw.rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=role)

    def poly(self, role: int, *points: tuple[float, float]) -> None:
        """Fill a polygon."""
        self.draw.polygon([self._at(*p) for p in points], fill=role)

    def oval(self, role: int, x: float, y: float, rx: float, ry: float) -> None:
        """Fill an ellipse around (x, y)."""
        self.draw.ellipse((*self._at(x - rx, y + ry), *self._at(x + rx, y - ry)), fill=role)


def _city(pen: Pen, rng: random.Random) -> None:
    heights = [rng.randint(18, 26), rng.randint(30, 38), rng.randint(22, 30), rng.randint(36, 44)]
    if rng.random() < 0.5:
        heights.reverse()
    pen.rect(SHADE, 20, 0, 28, rng.randint(12, 20))
    for i, height in enumerate(heights):
        left = -28 + 12 * i
        pen.rect((MAIN, SHADE)[i % 2], left, 0, left + 12, height)
        for y in range(4, height - 5, 8):
            for x in (4,) if pen.snap else (2, 7):  # one column is all that twelve pixels hold in cells of four
                pen.rect(GLASS, left + x, y, left + x + 3, y + 4)


def _house(pen: Pen, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    pen.rect(SHADE, 9 * side - 3, 24, 9 * side + 3, 40)
    pen.rect(MAIN, -19, 0, 19, 22)
    pen.poly(SHADE, (-24, 21), (-11, 38), (11, 38), (24, 21))
    pen.rect(WOOD, -4, 0, 4, 13)
    for x in (-16, 8):
        pen.rect(GLASS, x, 8, x + 8, 16)


def _tree(pen: Pen, rng: random.Random) -> None:
    pen.rect(WOOD, -4, 0, 4, 18)
    r = rng.uniform(10, 12)
    for x, y, role in ((-12, 21, SHADE), (12, 21, SHADE), (0, 18, MAIN), (-8, 30, MAIN), (8, 30, MAIN), (0, 34, MAIN)):
        pen.oval(role, x, y, r, 0.9 * r)
    pen.oval(LIGHT, rng.choice((-6, 6)), 34, 4, 3)


def _mountain(pen: Pen, rng: random.Random) -> None:
    side, top = rng.choice((-1, 1)), rng.uniform(38, 44)
    pen.poly(SHADE, (30 * side, 0), (14 * side, 26), (-4 * side, 0))
    pen.poly(MAIN, (-29 * side, 0), (-5 * side, top), (20 * side, 0))
    pen.poly(SHADE, (-5 * side, top), (20 * side, 0), (4 * side, 0))
    x = -5 * side
    pen.poly(SNOW, (x, top), (x - 8, top - 14), (x - 3, top - 11), (x, top - 15), (x + 4, top - 11), (x + 8, top - 14))


def _boat(pen: Pen, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    pen.rect(WOOD, -1.2, 8, 1.2, 44)
    pen.poly(MAIN, (2.5 * side, 13), (2.5 * side, 43), (22 * side, 13))
    pen.poly(LIGHT, (-2.5 * side, 13), (-2.5 * side, 38), (-17 * side, 13))
    pen.poly(SHADE, (-24, 11), (24, 11), (16, 0), (-16, 0))


def _car(pen: Pen, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    pen.poly(MAIN, (-18 * side, 20), (-12 * side, 34), (8 * side, 34), (17 * side, 20))
    pen.poly(GLASS, (-13 * side, 20), (-9 * side, 30), (-4 * side, 30), (-4 * side, 20))
    pen.poly(GLASS, (0, 20), (0, 30), (6 * side, 30), (12 * side, 20))
    pen.rect(MAIN, -28, 5, 28, 21)
    pen.rect(SHADE, -28, 5, 28, 9)
    for x in (-15, 15):
        pen.oval(INK, x, 5, 6.5, 6.5)
        pen.oval(SNOW, x, 5, 2.5, 2.5)
    pen.rect(FLAME, *((25, 13, 28, 17) if side > 0 else (-28, 13, -25, 17)))


def _castle(pen: Pen, rng: random.Random) -> None:
    top = rng.randint(32, 36)
    pen.rect(MAIN, -14, 0, 14, 22)
    for x in (-12, -4, 4):
        pen.rect(MAIN, x, 22, x + 4, 26)
    for left in (-24, 12):
        pen.rect(SHADE, left, 0, left + 12, top)
        for x in (left, left + 8):
            pen.rect(SHADE, x, top, x + 4, top + 4)
        pen.rect(GLASS, left + 4, top - 12, left + 8, top - 5)
    pen.rect(WOOD, -5, 0, 5, 10)
    pen.oval(WOOD, 0, 10, 5, 5)


def _rocket(pen: Pen, rng: random.Random) -> None:
    pen.poly(FLAME, (-8, 8), (0, rng.uniform(-3, 1)), (8, 8))
    for side in (-1, 1):
        pen.poly(SHADE, (11 * side, 24), (24 * side, 10), (24 * side, 2), (11 * side, 9))
    pen.poly(MAIN, (-11, 7), (-12.5, 20), (-12, 33), (-8, 41), (0, 48), (8, 41), (12, 33), (12.5, 20), (11, 7))
    pen.poly(SHADE, (-10.5, 36), (-8, 41), (0, 48), (8, 41), (10.5, 36))
    pen.oval(GLASS, 0, 28, 5.5, 5.5)


def _flower(pen: Pen, rng: random.Random) -> None:
    pen.rect(STEM, -1.7, 0, 1.7, 24)
    side = rng.choice((-1, 1))
    pen.poly(STEM, (0, 1), (8 * side, 9), (18 * side, 8), (10 * side, 1))
    for x, y, role in ((-8, 21, SHADE), (8, 21, SHADE), (-13, 32, MAIN), (13, 32, MAIN), (0, 40, MAIN)):
        pen.oval(role, x, y, 9, 9)
    pen.oval(INK, 0, 30, 6.5, 6.5)


def _fish(pen: Pen, rng: random.Random) -> None:
    side, lift = rng.choice((-1, 1)), rng.choice((0, 4))
    pen.poly(SHADE, (-10 * side, lift + 18), (-28 * side, lift + 32), (-23 * side, lift + 18), (-28 * side, lift + 4))
    pen.poly(SHADE, (-8 * side, lift + 28), (-2 * side, lift + 40), (12 * side, lift + 30))
    pen.oval(MAIN, 5 * side, lift + 18, 22, 15)
    pen.poly(LIGHT, (5 * side, lift + 16), (-6 * side, lift + 22), (-6 * side, lift + 9))
    pen.oval(SNOW, 16 * side, lift + 23, 4.5, 4.5)
    pen.rect(INK, *((16, lift + 20, 19, lift + 24) if side > 0 else (-19, lift + 20, -16, lift + 24)))


def _lighthouse(pen: Pen, rng: random.Random) -> None:
    pen.oval(WOOD, 0, 0, 25, 7)
    rows = ((4, 12, MAIN), (12, 18, LIGHT), (18, 26, MAIN), (26, 32, LIGHT))
    for low, high, role in rows:
        w0, w1 = 14 - low / 6, 14 - high / 6
        pen.poly(role, (-w0, low), (-w1, high), (w1, high), (w0, low))
    pen.rect(INK, -11, 32, 11, 34)
    pen.rect(FLAME, -6, 34, 6, 40)
    pen.poly(MAIN, (-10, 40), (0, 48), (10, 40))
    if rng.random() < 0.5:
        pen.rect(GLASS, -2, 20, 2, 25)


def _cup(pen: Pen, rng: random.Random) -> None:
    side = rng.choice((-1, 1))
    pen.oval(MAIN, 17 * side, 19, 11, 11)
    pen.oval(SKY + 50, 18 * side, 19, 6, 6)
    pen.poly(MAIN, (-18, 34), (18, 34), (14, 2), (-14, 2))
    pen.oval(MAIN, 0, 3, 14, 3)
    pen.oval(LIGHT, 0, 34, 18, 3)
    pen.oval(WOOD, 0, 34, 14, 2)


SUBJECTS: dict[str, Callable[[Pen, random.Random], None]] = {
    "city view": _city, "house": _house, "tree": _tree, "mountain": _mountain, "boat": _boat, "car": _car,
    "castle": _castle, "rocket": _rocket, "flower": _flower, "fish": _fish, "lighthouse": _lighthouse, "cup": _cup,
}  # fmt: skip
