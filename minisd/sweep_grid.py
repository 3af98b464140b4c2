"""One picture of many: a LoRA's strengths from left to right, prompts from top to bottom, with their names beside."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Multiples of each LoRA's own strength.
SWEEP = (0.0, 0.4, 0.7, 1.0, 1.3)
_MARGIN = 8


def labelled_grid(
    images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[tuple[str, str]]
) -> Image.Image:
    """Lay pictures out row by row on white, with a heading over each column and one to the left of each row.

    Args:
        images: as many as columns times rows.
        columns: headings.
        rows: headings of two parts: the first is wrapped, and cut where the row ends; the second is a last line.
    """
    assert len(images) == len(columns) * len(rows)
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    font = ImageFont.load_default(size=max(10, width // 24))
    letter, line = font.getbbox("n")[2], 1.3 * font.getbbox("Ag")[3]
    left, top = max(width // 2, 120), int(line + 2 * _MARGIN)
    grid = Image.new("RGB", (left + len(columns) * width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(grid)
    for index, heading in enumerate(columns):
        draw.text((left + index * width + width // 2, top // 2), heading, "black", font, anchor="mm")
    letters, lines = int((left - 2 * _MARGIN) / letter), int((height - 2 * _MARGIN) / line)
    for index, (heading, last) in enumerate(rows):
        wrapped = [*textwrap.wrap(heading, letters, max_lines=max(lines - 1, 1), placeholder=" ..."), last]
        place = (_MARGIN, top + index * height + _MARGIN)
        draw.multiline_text(place, "\n".join(wrapped), "black", font, spacing=0.3 * font.getbbox("Ag")[3])
    for index, image in enumerate(images):
        row, column = divmod(index, len(columns))
        grid.paste(image, (left + column * width, top + row * height))
    return grid
