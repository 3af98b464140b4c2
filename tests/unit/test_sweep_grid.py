"""The labels beside the pictures of a strength sweep."""

import pytest
from PIL import Image, ImageDraw

from minisd.sweep_grid import labelled_grid


@pytest.mark.parametrize("size", [64, 512])
def test_a_long_prompt_is_cut_and_the_seed_below_it_is_not(monkeypatch, size):
    written = []
    original = ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda draw, place, text, *rest, **options: (
            written.append(text),
            original(draw, place, text, *rest, **options),
        ),
    )
    rows = [("a castle by the sea " * 100, "seed 7"), ("a cat", "seed 8")]
    grid = labelled_grid([Image.new("RGB", (size, size), "white")] * 4, ["LoRA x 0", "LoRA x 0.4"], rows)
    long, short = (text.splitlines() for text in written)
    assert (long[-2][-4:], long[-1]) == (" ...", "seed 7")
    assert short == ["a cat", "seed 8"]
    left, top = grid.width - 2 * size, grid.height - 2 * size
    rows_with_text = [y for y in range(size) if min(grid.crop((0, top + y, left, top + y + 1)).tobytes()) < 128]
    assert size // 2 < rows_with_text[-1] < size - 2  # most of the row, and no further
