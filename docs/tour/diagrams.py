"""Draw the diagrams of docs/tour.md from the code itself: docs/tour/whole.svg and docs/tour/unet.svg.

    python docs/tour/diagrams.py

Names, shapes, numbers of parameters and skips are read off the classes and functions, and off the modules of Stable
Diffusion 1.5, built on the meta device: no weights are needed. Drawn again, a diagram that no longer fits differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from forward_pass import COLOURS, Layer, parameters, recorded, shape_of  # noqa: E402
from svg import BOLD, LEFT, MONO, QUIET, RIGHT, arrow, box, in_words, svg, text  # noqa: E402

from minisd.data import read_dataset  # noqa: E402
from minisd.ddpm import NoiseSchedule  # noqa: E402
from minisd.families import network_on_meta, published_configs  # noqa: E402
from minisd.layers import Downsample2D, ResnetBlock2D  # noqa: E402
from minisd.lora_layers import LoRALayer  # noqa: E402
from minisd.lora_targets import TARGETS, chosen_layers, initial_weights  # noqa: E402
from minisd.lora_writer import lora_bytes  # noqa: E402
from minisd.samplers import SAMPLERS, sample_loop  # noqa: E402
from minisd.sampling import denoise  # noqa: E402
from minisd.text import TextEncoder  # noqa: E402
from minisd.training import diffusion_loss  # noqa: E402
from minisd.unet import Transformer2DModel, UNet2DConditionModel  # noqa: E402
from minisd.vae import AutoencoderKL, latents_to_images  # noqa: E402

FROZEN, LEARNT, FUNCTION = "#dfe7f1", "#f5b9b2", "#ffffff"
RANK = 16  # train.py's default


@dataclass(frozen=True)
class Step:
    """A box of the diagram of the whole.

    Attributes:
        title: what it does, in words.
        code: the function or class that does it; its name and file are read off it.
        note: a third line.
        x, y, fill: its middle and its colour.
    """

    title: str
    code: Callable[..., object]
    note: str
    x: float
    y: float
    fill: str = FUNCTION

    def drawn(self) -> str:
        """The box with its lines."""
        lines = [
            text(self.x, self.y - 22, self.title, 13, more=BOLD),
            text(self.x, self.y - 4, self.code.__qualname__, 11, more=MONO),
            text(self.x, self.y + 12, self.code.__module__.replace(".", "/") + ".py", 10.5, QUIET, MONO),
            text(self.x, self.y + 29, self.note, 11, QUIET),
        ]
        return "\n".join([box(self.x - 92, self.y - 42, 184, 82, self.fill), *lines])


def whole_svg() -> str:
    """The diagram of the whole: training above, drawing below, the networks that both use between."""
    configs = published_configs("sd1")
    unet, vae, clip = (network_on_meta(part, configs.networks[part]) for part in ("unet", "vae", "text_encoder"))
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(unet, UNet2DConditionModel)
    side = (unet.config.sample_size or 0) * vae.pixels_per_latent
    pixels = torch.empty(1, 3, side, side, device="meta")
    latents = vae.encode(pixels).mean
    text_config = configs.networks["text_encoder"]
    prompt = f"{text_config['max_position_embeddings']} x {text_config['hidden_size']}"
    adapted = chosen_layers(unet, TARGETS["attn"])
    adapters = (initial_weights(layer, path, RANK, RANK, seed=0) for path, layer in adapted.items())
    learnt = sum(lora.down.numel() + lora.up.numel() for lora in adapters)
    picture, latent = shape_of(pixels), shape_of(latents)
    a, b, c, d, e = 116, 374, 632, 890, 1148
    top, middle, bottom, down = 142, 316, 488, 232
    half = in_words(parameters(vae.encoder)), in_words(parameters(vae.decoder))
    steps = (
        Step("Pictures and captions", read_dataset, "a folder with a table", a, top),
        Step("Encode", AutoencoderKL.encode, f"{half[0]} parameters, frozen", b, top, FROZEN),
        Step("Add noise", NoiseSchedule.add_noise, "at a random time t", c, top),
        Step("How wrong is it?", diffusion_loss, "mean squared error", e, top),
        Step("Read the words", TextEncoder, f"CLIP, {in_words(parameters(clip))}, frozen", b, middle, FROZEN),
        Step("Save", lora_bytes, "lora.safetensors", e, middle),
        Step("Noise of a seed", denoise, "torch.randn", a, bottom),
        Step("A step to less noise", sample_loop, f"{len(SAMPLERS)} samplers, some 25 steps", c, bottom),
        Step("Decode", latents_to_images, f"{half[1]} parameters, frozen", e, bottom, FROZEN),
    )
    dashed = ' stroke-dasharray="5 4"'
    parts = [
        box(12, 52, 1312, 142, "#f3efe3", dashed),
        text(24, 42, "Training: one micro-step of train.py", 14, more=LEFT + BOLD),
        box(12, 426, 1312, 150, "#eaf1e6", dashed),
        text(24, 416, "Drawing: sample.py", 14, more=LEFT + BOLD),
        _unet_box(unet, d, (top - 56, middle, bottom + 52), learnt, len(adapted)),
        *(step.drawn() for step in steps),
        # training
        arrow((a + 92, top), (b - 92, top)),
        text((a + b) / 2, top - 8, picture, 10, QUIET),
        arrow((b + 92, top), (c - 92, top)),
        text((b + c) / 2, top - 8, latent, 10, QUIET),
        arrow((c + 92, top), (d - 92, top)),
        text((c + d) / 2, top - 8, latent, 10, QUIET),
        arrow((d + 92, top), (e - 92, top)),
        text((d + e) / 2, top - 8, latent, 10, QUIET),
        arrow((c, top - 42), (c, top - 68), (e, top - 68), (e, top - 42)),
        text(c + 10, top - 74, "the noise that was added", 11, QUIET, LEFT),
        arrow((e, top + 40), (e, down), (d + 118, down), (d + 118, middle - 18), (d + 78, middle - 18), more=dashed),
        text(e + 10, down + 4, "gradient, AdamW", 11, QUIET, LEFT),
        arrow((d + 78, middle), (e - 92, middle)),
        # the words, for both
        arrow((a, top + 40), (a, middle), (b - 92, middle)),
        text(a + 12, middle - 8, "captions, prompts", 11, QUIET, LEFT),
        arrow((b + 92, middle), (d - 92, middle)),
        text(c, middle - 8, f"encoder_hidden_states, {prompt}", 11, QUIET),
        # drawing
        arrow((a + 92, bottom), (c - 92, bottom)),
        text(b, bottom - 8, latent, 10, QUIET),
        arrow((c + 92, bottom - 16), (d - 92, bottom - 16)),
        text((c + d) / 2, bottom - 22, "latents", 10, QUIET),
        arrow((d - 92, bottom + 16), (c + 92, bottom + 16)),
        text((c + d) / 2, bottom + 29, "noise in them", 10, QUIET),
        arrow((c, bottom + 40), (c, bottom + 70), (e, bottom + 70), (e, bottom + 40)),
        text(c + 10, bottom + 64, latent, 10, QUIET, LEFT),
        arrow((e + 92, bottom), (e + 172, bottom)),
        text(e + 131, bottom - 8, picture, 10, QUIET),
    ]
    return svg(1336, 596, parts, "The whole of minisd, with the sizes of Stable Diffusion 1.5")


def _unet_box(unet: nn.Module, x: float, heights: tuple[float, ...], learnt: int, layers: int) -> str:
    """The denoiser, which both ways go through, with the adapters in it."""
    top, middle, bottom = heights
    return "\n".join(
        (
            box(x - 92, top, 184, bottom - top, FROZEN),
            text(x, top + 100, "Predict the noise", 13, more=BOLD),
            text(x, top + 118, UNet2DConditionModel.__qualname__, 11, more=MONO),
            text(x, top + 134, "minisd/unet.py", 10.5, QUIET, MONO),
            text(x, top + 151, f"{in_words(parameters(unet))} parameters, frozen", 11, QUIET),
            box(x - 78, middle - 38, 156, 98, LEARNT),
            text(x, middle - 18, "+ (alpha / r) B A x", 13, more=BOLD),
            text(x, middle, LoRALayer.__qualname__, 11, more=MONO),
            text(x, middle + 16, "minisd/lora_layers.py", 10.5, QUIET, MONO),
            text(x, middle + 33, f"{in_words(learnt)} at rank {RANK}, learnt,", 11, QUIET),
            text(x, middle + 49, f"beside {layers} layers", 11, QUIET),
        )
    )


def unet_svg() -> str:
    """The diagram of the UNet: down on the left, up on the right, a line for each skip."""
    configs = published_configs("sd1")
    unet = network_on_meta("unet", configs.networks["unet"])
    assert isinstance(unet, UNet2DConditionModel)
    size, width = unet.config.sample_size or 0, unet.config.cross_attention_dim
    tokens = configs.networks["text_encoder"]["max_position_embeddings"]
    with recorded(unet) as layers:
        unet(
            torch.empty(1, unet.config.in_channels, size, size, device="meta"),
            torch.empty(1, device="meta"),
            torch.empty(1, tokens, width, device="meta"),
        )
    return _drawn_unet(layers, f"{unet.config.in_channels} x {size} x {size}", f"{tokens} x {width}", unet)


CHIP, ROW, LEFT_AT, RIGHT_AT = 24, 34, 110, 640  # height of a layer, distance of rows, where the ways begin


def _drawn_unet(layers: Sequence[Layer], sample: str, prompt: str, unet: nn.Module) -> str:
    """The layers of a UNet, in the order in which they ran, as an SVG of its shape."""
    units: list[list[Layer]] = []  # a residual block and the transformer behind it, or one layer
    for layer in layers:
        if isinstance(layer.module, Transformer2DModel):
            units[-1].append(layer)
        else:
            units.append([layer])
    skips = {unit[0].skip for unit in units} - {None}
    rows = {unit[-1].path: row for unit, row in zip(units, _rows(units, skips), strict=True)}
    bottom = 96 + ROW * max(rows.values())
    middle_at = (LEFT_AT + RIGHT_AT + 230) / 2
    parts = [
        text(24, 32, "The UNet of Stable Diffusion 1.5", 16, more=LEFT + BOLD),
        text(24, 52, f"{in_words(parameters(unet))} parameters in {len(layers)} layers", 12, QUIET, LEFT),
        text(LEFT_AT + 115, 96, f"noisy latents {sample}", 12, more=BOLD),
        arrow((LEFT_AT + 115, 102), (LEFT_AT + 115, bottom), (middle_at - 172, bottom)),
        arrow((middle_at + 172, bottom), (RIGHT_AT + 115, bottom), (RIGHT_AT + 115, 97 + CHIP / 2)),
    ]
    for unit in units:
        last, row = unit[-1], rows[unit[-1].path]
        y = 96 + ROW * row
        if last.path in skips:
            parts += _chips(unit, LEFT_AT, y)
            parts.append(text(LEFT_AT - 10, y + 4, shape_of(last.output), 11, QUIET, RIGHT))
        elif not last.path.startswith("mid_block"):
            parts += _chips(unit, RIGHT_AT, y)
            parts.append(text(RIGHT_AT + 240, y + 4, shape_of(last.output), 11, QUIET, LEFT))
        if unit[0].skip is not None:
            source = next(layer for layer in layers if layer.path == unit[0].skip)
            parts.append(arrow((LEFT_AT + 230, y), (RIGHT_AT, y), more=' stroke-dasharray="2 4"'))
            parts.append(text(middle_at, y - 4, f"+ {source.output.shape[1]} channels", 10, QUIET))
    middle = [layer for unit in units if unit[-1].path.startswith("mid_block") for layer in unit]
    parts += _chips(middle, middle_at - 57.5 * len(middle), bottom)
    parts.append(text(middle_at, bottom + 28, shape_of(middle[-1].output), 11, QUIET))
    parts += _legend(24, bottom + 62, prompt)
    return svg(RIGHT_AT + 340, bottom + 120, parts, "The UNet of Stable Diffusion 1.5")


def _rows(units: Sequence[Sequence[Layer]], skips: set[str | None]) -> list[int]:
    """The row of each unit: a source of a skip has its own, what takes it the same, an upsampler one below its size."""
    row_of: dict[str, int] = {}
    upsampled: dict[int, int] = {}  # side -> the row for the layer that enlarges to it
    row, side = 0, None
    for unit in units:
        last = unit[-1]
        if last.path in skips:
            if side not in (None, last.output.shape[-1]):
                row += 1
                upsampled[side] = row
            row, side = row + 1, last.output.shape[-1]
            row_of[last.path] = row
    lowest = row + 1
    rows = []
    for unit in units:
        last, skip = unit[-1], unit[0].skip
        if last.path.startswith("mid_block"):
            rows.append(lowest)
        elif skip is not None or last.path in row_of:
            rows.append(row_of[skip or last.path])
        else:
            rows.append(upsampled[last.output.shape[-1]] if "upsamplers" in last.path else 0)
    return rows


def _chips(unit: Sequence[Layer], x: float, y: float) -> list[str]:
    """The layers of a unit side by side, 230 wide or 115 for each."""
    parts, width = [], 115 if len(unit) > 2 else 230 / len(unit)
    for index, layer in enumerate(unit):
        colour = next(colour for kind, colour in COLOURS.items() if isinstance(layer.module, kind))
        block, _, name = layer.path.partition(".")
        if len(unit) == 1:
            label = layer.path
        elif index == 0:
            label = f"{block.partition('_')[0]}.{name}"  # "down.0.resnets.1": there is no room for more
        else:
            label = ".".join(layer.path.split(".")[-2:])
        parts.append(box(x + width * index, y - CHIP / 2, width, CHIP, colour))
        parts.append(text(x + width * (index + 0.5), y + 4, label, 10.5))
    return parts


def _legend(x: float, y: float, prompt: str) -> list[str]:
    """What the colours stand for, and which layers the time and the prompt go to."""
    parts = []
    notes = {
        ResnetBlock2D: "takes the time t, through time_embedding",
        Transformer2DModel: f"takes the prompt, {prompt}",
    }
    for index, (kind, colour) in enumerate((kind, colour) for kind, colour in COLOURS.items() if kind in notes):
        parts.append(box(x, y + 24 * index - 12, 26, 17, colour))
        parts.append(text(x + 36, y + 24 * index + 1, f"{kind.__name__}: {notes[kind]}", 12, more=LEFT))
    others = ((Downsample2D, "Downsample2D, Upsample2D: half and twice the size"), (nn.Conv2d, "Conv2d"))
    for index, (kind, words) in enumerate(others):
        parts.append(box(x + 470, y + 24 * index - 12, 26, 17, COLOURS[kind]))
        parts.append(text(x + 506, y + 24 * index + 1, words, 12, more=LEFT))
    return parts


@dataclass(frozen=True, kw_only=True)
class DiagramsConfig:
    """Draw the diagrams of docs/tour.md."""

    output: Path = ROOT / "docs" / "tour"
    """Folder for whole.svg and unet.svg."""


def main() -> None:
    """Draw both."""
    config = tyro.cli(DiagramsConfig)
    for name, drawing in (("whole.svg", whole_svg()), ("unet.svg", unet_svg())):
        (config.output / name).write_text(drawing, encoding="utf-8")
        print(f"wrote {config.output / name}")


if __name__ == "__main__":
    main()
