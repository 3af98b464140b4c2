"""Measure the pocket model on pixels: does it draw what the caption says, and does a LoRA change style, not content?

python -m minisd.pocket.measure                                    the base, on 100 prompts
python -m minisd.pocket.measure --lora demo/lora/lora.safetensors  a LoRA, on 30 captions it was not trained on
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from PIL import Image
from tqdm import tqdm

from minisd.images import image_grid, to_pil
from minisd.lora_reader import add_lora_to, load_lora
from minisd.pocket import scenes
from minisd.pocket.demo import PICTURES, SEED
from minisd.sampling import SamplingSettings, decode, denoise, native_size
from minisd.weights import StableDiffusion, load_model

# Series of scenes that neither pretraining (0, 1) nor the demo's dataset has drawn from.
TEST_SERIES = 1000


@dataclass(frozen=True)
class Figures:
    """What was counted on a set of pictures, and the pictures.

    Args:
        colour: share whose subject has the colour named.
        time: share whose sky shows the time of day named.
        both: share with both.
        blockiness: mean share of the edges that lie on the borders of aligned 4 x 4 blocks.
        images: the pictures, in order.
    """

    colour: float
    time: float
    both: float
    blockiness: float
    images: list[Image.Image]

    def __str__(self) -> str:
        return (
            f"colour {self.colour:.0%}, time of day {self.time:.0%}, both {self.both:.0%}, "
            f"blockiness {self.blockiness:.3f}"
        )


def figures_of(images: Sequence[Image.Image], shown: Sequence[scenes.Scene]) -> Figures:
    """Read colour, time of day and blockiness off the pictures of some scenes."""
    colour = [scenes.subject_colour(image) == scene.colour for image, scene in zip(images, shown, strict=True)]
    time = [scenes.time_of_day(image) == scene.time for image, scene in zip(images, shown, strict=True)]
    both = [a and b for a, b in zip(colour, time, strict=True)]
    count = len(images)
    blocks = sum(scenes.blockiness(image) for image in images) / count
    return Figures(sum(colour) / count, sum(time) / count, sum(both) / count, blocks, list(images))


def draw_scenes(model: StableDiffusion, shown: Sequence[scenes.Scene], prefix: str = "") -> list[Image.Image]:
    """Let the model draw each scene from its caption with sample.py's defaults; picture i from seed i."""
    size = native_size(model)
    settings = SamplingSettings(height=size, width=size)
    images = []
    for seed, scene in enumerate(tqdm(shown, desc="draw", unit="picture")):
        *_, latents = denoise(model, prefix + scenes.caption(scene), [seed], settings)
        images += to_pil(decode(model, latents))
    return images


def scenes_to_ask(count: int) -> list[scenes.Scene]:
    """Fixed scenes to ask the base for, each subject, colour and time about equally often."""
    return [scenes.scene_at(index, TEST_SERIES) for index in range(count)]


def held_out_scenes(count: int) -> list[scenes.Scene]:
    """Fixed scenes whose captions are all different and not among those of the demo's dataset."""
    trained = {scenes.caption(scenes.scene_at(index, SEED)) for index in range(PICTURES)}
    series = (scenes.scene_at(index, TEST_SERIES) for index in range(100_000))
    by_caption: dict[str, scenes.Scene] = {}
    fresh: Iterable[scenes.Scene] = (
        by_caption.setdefault(text, scene)
        for scene in series
        if (text := scenes.caption(scene)) not in trained and text not in by_caption
    )
    return list(islice(fresh, count))


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measure the pocket model, or a LoRA for it."""

    model: str = "pocket"
    """The model, a name as for sample.py."""
    lora: Path | None = None
    """A LoRA trained on eight-bit pictures."""
    count: int | None = None
    """Pictures; 100 for the base and 30 for a LoRA if not given."""
    output: Path | None = None
    """Where to write a grid of the pictures, four times enlarged."""


def main() -> None:
    """Print the figures, and those of the real drawings beside them."""
    config = tyro.cli(MeasureConfig)
    model = load_model(config.model)
    if config.lora is None:
        shown, prefix, style = scenes_to_ask(100 if config.count is None else config.count), "", "plain"
    else:
        networks = {"unet": model.unet}
        add_lora_to(networks, load_lora(config.lora, networks), name="style")
        shown, prefix, style = held_out_scenes(30 if config.count is None else config.count), "8bit ", "8bit"
    model.unet.eval()
    figures = figures_of(draw_scenes(model, shown, prefix), shown)
    real = figures_of([scenes.draw(scene, style) for scene in shown], shown)
    print(f"drawn by the model: {figures}")
    print(f"real {style} drawings: {real}")
    if config.output is not None:
        grid = image_grid(figures.images, columns=10)
        grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST).save(config.output)


if __name__ == "__main__":
    main()
