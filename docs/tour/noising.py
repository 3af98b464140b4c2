"""A picture noised, and a picture drawn out of noise: docs/tour/noising.png.

    python docs/tour/noising.py --colour blue --subject boat --time sunset

Above, how much of the picture and how much of the noise is left at each timestep. The first two rows go from left to
right: a drawing with more and more noise added (`NoiseSchedule.add_noise`), and what the pocket model's UNet takes the
drawing for when it sees that, in one call. The last two go from right to left: noise that no picture was in, on its way
through DDIM with the same caption, and what the UNet takes it for at each of the same times.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from minisd import draws  # noqa: E402
from minisd.buckets import square_geometry  # noqa: E402
from minisd.ddpm import NoiseSchedule  # noqa: E402
from minisd.images import to_pil, to_pixel_values  # noqa: E402
from minisd.pocket import scenes  # noqa: E402
from minisd.sampling import SamplingSettings, decode, denoise, native_size  # noqa: E402
from minisd.vae import scale_latents  # noqa: E402
from minisd.weights import StableDiffusion, load_model  # noqa: E402

STEPS = 20  # of DDIM: it visits the timesteps 951, 901 ... 1
TIMES = (1, 51, 151, 301, 451, 601, 801, 951)  # those that are shown
ROWS = (
    ("a drawing, noised", "left to right"),
    ("what the UNet\ntakes it for", "one call each"),
    ("drawn from noise", "right to left"),
    ("what the UNet\ntakes it for", "at that time"),
)
TILE, GAP, LEFT, TOP, CURVES = 128, 6, 150, 34, 130  # pixels
LINE = "#b8bec8"


@dataclass(frozen=True, kw_only=True)
class NoisingConfig:
    """Show a picture being noised, and another being drawn out of noise, step by step."""

    subject: str = "castle"
    """What is drawn, a subject of minisd/pocket/scenes.py."""
    colour: str = "yellow"
    """Its colour."""
    time: str = "sunset"
    """Time of day: day, sunset or night."""
    seed: int = 0
    """Of the scene's details and of the noise."""
    output: Path = ROOT / "docs" / "tour" / "noising.png"
    """The picture to write."""


@torch.no_grad()
def noised(model: StableDiffusion, scene: scenes.Scene, noise: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """A scene at the times shown, and the x_0 that one call of the UNet finds in each: two tensors [8, 4, h, w].

    Args:
        model: the pocket model.
        scene: what to draw.
        noise: standard normal, [1, 4, h, w].
        prompt: embedded caption, [1, S, E].
    """
    geometry = square_geometry((scenes.SIZE, scenes.SIZE), native_size(model))
    pixels = to_pixel_values(scenes.draw(scene), geometry, crop=None, flip=False)
    latents = scale_latents(model.vae, model.vae.encode(pixels[None]), torch.zeros_like(noise))
    count, timesteps = len(TIMES), torch.tensor(TIMES)
    noisy = model.schedule.add_noise(latents.repeat(count, 1, 1, 1), noise.repeat(count, 1, 1, 1), timesteps)
    return noisy, guessed(model, noisy, timesteps, prompt)


@torch.no_grad()
def drawn(model: StableDiffusion, caption: str, noise: Tensor, seed: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """The way of DDIM from noise to a picture at the times shown, and the x_0 found there: two tensors [8, 4, h, w]."""
    size = native_size(model)
    settings = SamplingSettings(
        height=size, width=size, scheduler="ddim", num_inference_steps=STEPS, guidance_scale=1,
        timestep_spacing="leading",
    )  # fmt: skip
    way = [noise, *denoise(model, caption, [seed], settings)]  # way[i] is at 951 - 50 i; the last is the picture
    stride = model.schedule.config.num_train_timesteps // STEPS
    visited = torch.cat([way[STEPS - 1 - (t - 1) // stride] for t in TIMES])
    guesses = guessed(model, visited, torch.tensor(TIMES), prompt)
    return visited, guesses


def guessed(model: StableDiffusion, noisy: Tensor, timesteps: Tensor, prompt: Tensor) -> Tensor:
    """The x_0 that the UNet's prediction implies, for latents [B, 4, h, w] at timesteps [B]."""
    output = model.unet(noisy, timesteps, prompt.repeat(len(noisy), 1, 1))
    return model.schedule.predict_original(output, noisy, timesteps)


def picture(rows: Sequence[Sequence[Image.Image]], schedule: NoiseSchedule, caption: str) -> Image.Image:
    """The curves, and below them the rows of pictures, a column a timestep."""
    width = LEFT + len(TIMES) * (TILE + GAP) + GAP
    height = TOP + CURVES + 40 + len(rows) * (TILE + GAP) + GAP
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / width, 1 - (y + h) / height, w / width, h / height

    middles = [(LEFT + column * (TILE + GAP) + TILE / 2) / width for column in range(len(TIMES))]
    figure.text(LEFT / width, 1 - 20 / height, f'"{caption}"', fontsize=11, weight="bold")
    axes = figure.add_axes(place(LEFT, TOP, width - LEFT - GAP, CURVES))
    t = torch.arange(len(schedule.alphas_cumprod))
    axes.plot(t, schedule.alphas_cumprod.sqrt(), color="#2b6cb0", label=r"of the picture: $\sqrt{\bar\alpha_t}$")
    axes.plot(t, (1 - schedule.alphas_cumprod).sqrt(), color="#c05621", label=r"of the noise: $\sqrt{1-\bar\alpha_t}$")
    for time in TIMES:
        axes.axvline(time, color=LINE, linewidth=0.8, zorder=0)
    axes.set(xlim=(-8, len(t) + 8), ylim=(0, 1.05), xticks=[], yticks=[0, 0.5, 1])
    axes.tick_params(labelsize=8)
    axes.legend(loc="center right", bbox_to_anchor=(0.97, 0.55), fontsize=9, framealpha=1)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    for middle, time in zip(middles, TIMES, strict=True):
        x, y = figure.transFigure.inverted().transform(axes.transData.transform((time, 0)))
        ends = [x, middle], [y, 1 - (TOP + CURVES + 20) / height]
        figure.add_artist(Line2D(*ends, color=LINE, linewidth=0.8))
        figure.text(middle, 1 - (TOP + CURVES + 34) / height, f"t = {time}", fontsize=9, ha="center")
    for row, (images, (title, direction)) in enumerate(zip(rows, ROWS, strict=True)):
        y = TOP + CURVES + 40 + row * (TILE + GAP)
        figure.text(10 / width, 1 - (y + TILE / 2) / height, title, fontsize=9, va="bottom", weight="bold")
        figure.text(10 / width, 1 - (y + TILE / 2 + 4) / height, direction, fontsize=9, va="top", color="#5b6472")
        for column, image in enumerate(images):
            axes = figure.add_axes(place(LEFT + column * (TILE + GAP), y, TILE, TILE))
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return Image.open(data).convert("RGB")


def main() -> None:
    """Draw it."""
    config = tyro.cli(NoisingConfig)
    model = load_model("pocket")
    scene = scenes.Scene(config.subject, config.colour, config.time, config.seed)
    caption = scenes.caption(scene)
    prompt = model.text_encoder([caption]).hidden_states  # [1, 77, 64]
    side = native_size(model) // model.vae.pixels_per_latent
    own = draws.noise(config.seed, 0, (4, side, side))[None]
    start = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(config.seed))  # as denoise does
    shown = (*noised(model, scene, own, prompt), *drawn(model, caption, start, config.seed, prompt))
    rows = [to_pil(decode(model, latents)) for latents in shown]
    # A palette of its own makes the file a third as large, and nobody sees it.
    picture(rows, model.schedule, caption).quantize(256, dither=Image.Dither.NONE).save(config.output, optimize=True)
    print(f"wrote {config.output.name}: rows of t = {', '.join(map(str, TIMES))}")


if __name__ == "__main__":
    main()
