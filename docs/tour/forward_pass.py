"""One forward pass of the pocket model's UNet: a table of its layers, and a picture of what flows through them.

    python docs/tour/forward_pass.py --timestep 400

The table has a line a layer: the shape that comes out, its parameters and its floating point operations in millions (a
multiplication and an addition are two). The picture has a tile a layer, those of one resolution in a row: what comes
out, the three directions in which its channels differ most shown as red, green and blue. Above them are the skips,
below them the share of all parameters and of all operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from minisd.buckets import square_geometry  # noqa: E402
from minisd.images import to_pil, to_pixel_values  # noqa: E402
from minisd.layers import Downsample2D, ResnetBlock2D, Upsample2D  # noqa: E402
from minisd.pocket import scenes  # noqa: E402
from minisd.unet import Transformer2DModel, UNet2DConditionModel, UNetUpBlock  # noqa: E402
from minisd.vae import latents_to_images  # noqa: E402
from minisd.weights import load_model  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# The layers that are counted, each with its colour in the diagrams.
COLOURS: dict[type[nn.Module], str] = {
    ResnetBlock2D: "#bcd3ee",
    Transformer2DModel: "#f6cf8f",
    Downsample2D: "#bfe3c7",
    Upsample2D: "#bfe3c7",
    nn.Conv2d: "#d9d5e8",
}
SCENE = scenes.Scene("castle", "red", "day", seed=0)


@dataclass(frozen=True)
class Layer:
    """One layer of a UNet as a forward pass met it.

    Attributes:
        path: of the module.
        module: itself.
        output: what came out, [B, C, H, W].
        skip: path of the layer whose output was put beside its input; None for most.
    """

    path: str
    module: nn.Module
    output: Tensor
    skip: str | None


@contextmanager
def recorded(unet: UNet2DConditionModel) -> Iterator[list[Layer]]:
    """Record the layers of a UNet in the order in which they run, and which skips the way up takes off the list.

    A skip is known by being the same tensor: it is what the code does, not what it is meant to do.
    """
    layers: list[Layer] = []
    taken: dict[str, str] = {}

    def layer_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers.append(Layer(path, module, output, taken.get(path)))

        return hook

    def up_hook(path: str) -> Callable[..., None]:
        def hook(module: UNetUpBlock, inputs: tuple[Any, ...]) -> None:
            made_by = {id(layer.output): layer.path for layer in layers}
            for index, skip in zip(range(len(module.resnets)), reversed(inputs[1]), strict=False):
                taken[f"{path}.resnets.{index}"] = made_by[id(skip)]

        return hook

    handles = []
    counted: list[str] = []
    for path, module in unet.named_modules():
        if isinstance(module, tuple(COLOURS)) and not any(path.startswith(f"{outer}.") for outer in counted):
            counted.append(path)
            handles.append(module.register_forward_hook(layer_hook(path)))
        if isinstance(module, UNetUpBlock):
            handles.append(module.register_forward_pre_hook(up_hook(path)))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def shape_of(tensor: Tensor) -> str:
    """The shape of one picture's tensor, without the batch."""
    return " x ".join(str(side) for side in tensor.shape[1:])


def flops_by_path(counter: FlopCounterMode) -> dict[str, int]:
    """Operations of each module, by its path in the network."""
    counts = counter.get_flop_counts()
    return {path.partition(".")[2]: sum(operations.values()) for path, operations in counts.items()}


def as_colours(features: Tensor) -> Tensor:
    """The three directions in which the channels of [C, H, W] differ most, as [H, W, 3] in [0, 1]."""
    flat = features.flatten(1).T  # [H * W, C]
    flat = flat - flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    # A direction has no sign of its own; without this the colours would be a matter of the machine's rounding.
    directions = directions[:3] * directions[:3].sum(dim=1, keepdim=True).sign()
    mapped = flat @ directions.T
    low, high = mapped.quantile(0.02, dim=0), mapped.quantile(0.98, dim=0)
    return ((mapped - low) / (high - low)).clamp(0, 1).unflatten(0, features.shape[1:])


def print_table(layers: Sequence[Layer], flops: dict[str, int], unet: nn.Module) -> None:
    """Print a line a layer, and the sums."""
    print(f"{'layer':29} {'class':18} {'output':>14} {'parameters':>11} {'MFLOPs':>8}  skip")
    rows = [("time_embedding", unet.time_embedding, "", "")]
    for layer in layers:
        rows.append((layer.path, layer.module, shape_of(layer.output), f"+ {layer.skip}" if layer.skip else ""))
    for path, module, shape, skip in rows:
        count, cost = parameters(module), flops[path] / 1e6
        print(f"{path:29} {type(module).__name__:18} {shape:>14} {count:11,} {cost:8.2f}  {skip}".rstrip())
    print(f"{'in all':29} {'':18} {'':>14} {parameters(unet):11,} {flops[''] / 1e6:8.2f}")


def draw(layers: Sequence[Layer], flops: dict[str, int], pictures: dict[str, Image.Image], output: Path) -> None:
    """Draw a tile a layer, the skips between them, and below what each layer holds and costs.

    Args:
        layers: as they ran.
        flops: operations by path.
        pictures: some with a title each, for the space between the way down and the way up.
        output: where the PNG goes.
    """
    sides = sorted({layer.output.shape[-1] for layer in layers}, reverse=True)
    places = {layer.path: (index, -2.1 * sides.index(layer.output.shape[-1])) for index, layer in enumerate(layers)}
    width, height = 15, 3.0 + 1.65 * len(sides)
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0.01, 2.1 / height, 0.98, 1 - 2.2 / height))
    axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=(-2.1 * len(sides) + 1.3, 1.4))
    axes.set_aspect("equal")
    axes.axis("off")
    for layer in layers:
        _tile(axes, layer, *places[layer.path])
    for number, layer in enumerate(layer for layer in layers if layer.skip is not None):
        (x0, y), (x1, _) = places[layer.skip], places[layer.path]
        above = y + 1.15 + 0.12 * (number % 2)
        axes.plot([x0, x0, x1], [y + 0.97, above, above], color="#777", linewidth=0.9)
        axes.annotate(
            "", (x1, y + 0.93), (x1, above), arrowprops={"arrowstyle": "-|>", "color": "#777", "linewidth": 0.9}
        )
    inner = [x for x, y in places.values() if y < 0]  # below, so that there is room above
    step = (inner[-1] - inner[0]) / len(pictures)
    for number, (title, picture) in enumerate(pictures.items()):
        x = inner[0] + step * (number + 0.5)
        axes.imshow(picture, extent=(x - 0.55, x + 0.55, -0.55, 0.55), interpolation="nearest")
        axes.text(x, 0.62, title, ha="center", va="bottom", fontsize=8.5)
    _bars(figure, layers, flops, (0.01, 0.25 / height, 0.98, 1.9 / height))
    figure.savefig(output, dpi=90)
    plt.close(figure)


def _tile(axes: Axes, layer: Layer, x: float, y: float) -> None:
    """One layer: its name on the colour of its kind, what comes out of it, and the shape of that."""
    half = 0.46
    axes.imshow(as_colours(layer.output[0]), extent=(x - half, x + half, y - half, y + half), interpolation="nearest")
    colour = next(colour for kind, colour in COLOURS.items() if isinstance(layer.module, kind))
    block, _, name = layer.path.partition(".")
    if name[:1].isdigit():  # "up_blocks.1" + "resnets.0"
        block, name = f"{block}.{name[0]}", name[2:]
    label = f"{block}\n{name}".strip()
    axes.add_patch(Rectangle((x - half, y + half), 2 * half, 0.46, facecolor=colour))
    axes.text(x, y + half + 0.22, label, ha="center", va="center", fontsize=6.6, linespacing=1.3)
    axes.text(x, y - half - 0.05, shape_of(layer.output), ha="center", va="top", fontsize=7.5, color="#444")


def _bars(figure: Figure, layers: Sequence[Layer], flops: dict[str, int], place: tuple[float, ...]) -> None:
    """Two bars a layer: its share of all parameters and of all operations, in per cent."""
    bars = figure.add_axes(place)
    for offset, values, label, colour in (
        (-0.2, [parameters(layer.module) for layer in layers], "parameters", "#5b7fb5"),
        (0.2, [flops[layer.path] for layer in layers], "operations", "#d98f3d"),
    ):
        shares = [100 * value / sum(values) for value in values]
        drawn = bars.bar([x + offset for x in range(len(layers))], shares, 0.38, color=colour, label=f"% of {label}")
        bars.bar_label(drawn, fmt="%.0f", fontsize=7, color="#444")
    bars.set(xlim=(-0.6, len(layers) - 0.4), yticks=[], xticks=[])
    bars.spines[["top", "left", "right"]].set_visible(False)
    bars.legend(loc="upper left", frameon=False, fontsize=9)


@dataclass(frozen=True, kw_only=True)
class ForwardPassConfig:
    """Print and draw one forward pass of the pocket model's UNet."""

    timestep: int = 400
    """How noisy the latents are, from 0 to 999."""
    output: Path = ROOT / "docs" / "tour" / "forward_pass.png"
    """Where the picture goes."""


@torch.no_grad()
def main() -> None:
    """Run the pass, print the table, draw the picture."""
    config = tyro.cli(ForwardPassConfig)
    model = load_model("pocket")
    pixels = to_pixel_values(scenes.draw(SCENE), square_geometry((64, 64), 64), crop=None, flip=False)
    latents = model.vae.encode(pixels[None]).mean * model.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([config.timestep])
    prompt = model.text_encoder([scenes.caption(SCENE)]).hidden_states
    noisy_latents = model.schedule.add_noise(latents, noise, timesteps)
    counter = FlopCounterMode(display=False)
    # The CPU's fused attention would not be counted; in single products it is.
    with recorded(model.unet) as layers, sdpa_kernel(SDPBackend.MATH), counter:
        output = model.unet(noisy_latents, timesteps, prompt)
    flops = flops_by_path(counter)
    print_table(layers, flops, model.unet)
    original = model.schedule.predict_original(output, noisy_latents, timesteps)
    shown = to_pil(latents_to_images(model.vae, torch.cat([latents, noisy_latents, original])))
    titles = (f'"{scenes.caption(SCENE)}"', f"noised to t = {config.timestep}", "x_0, as this one pass guesses it")
    draw(layers, flops, dict(zip(titles, shown, strict=True)), config.output)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
