"""What one LoRA module adds to one attention map: the map of each word without it, with it, and the difference.

    python docs/tour/lora_attention.py --lora demo/lora/lora.safetensors

The module is the projection to queries or keys of an attention over the prompt. All other modules of the LoRA are off:
what comes before it is the base's. Without --lora, a short one is trained on the demo's pictures first, which takes a
minute or two.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from minisd.buckets import square_geometry  # noqa: E402
from minisd.images import to_pixel_values  # noqa: E402
from minisd.layers import Attention  # noqa: E402
from minisd.lora import lora_weights, set_lora_scale  # noqa: E402
from minisd.lora_layers import LoRALinear  # noqa: E402
from minisd.lora_reader import add_lora_to, load_lora  # noqa: E402
from minisd.pocket import scenes  # noqa: E402
from minisd.pocket.demo import training_options, write_dataset  # noqa: E402
from minisd.weights import StableDiffusion, load_model  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SCENE = scenes.Scene("castle", "red", "day", seed=0)


@dataclass(frozen=True, kw_only=True)
class LoRAAttentionConfig:
    """Show what one LoRA module adds to one attention map of the pocket model."""

    lora: Path | None = None
    """A LoRA for the pocket model; trained here if not given."""
    module: str = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    """Path of the module: attn2.to_q or attn2.to_k of some block."""
    timestep: int = 500
    """How noisy the latents are, from 0 to 999."""
    steps: int = 300
    """Training steps where --lora is not given."""
    output: Path = ROOT / "docs" / "tour" / "lora_attention.png"
    """Where the picture goes."""


def train(folder: Path, steps: int) -> Path:
    """Train a LoRA on the demo's pictures with the demo's options; returns its file."""
    write_dataset(folder / "data")
    words = []
    for name, value in training_options(steps).items():
        words += [f"--{name}".replace("_", "-"), *([] if value is True else [str(value)])]
    command = [sys.executable, "train.py", "--data", str(folder / "data"), "--output", str(folder / "lora"), *words]
    subprocess.run([*command, "--report-to", "none"], check=True, cwd=ROOT)
    return folder / "lora" / "lora.safetensors"


def attention_map(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """How much each position looks at each token: softmax(q k^T / sqrt(d)), mean of the heads.

    Args:
        attention: an attention over the prompt.
        x: its tokens [1, N, E].
        context: the prompt [1, S, E].

    Returns:
        [N, S]; each row sums to 1.
    """
    q, k = (
        projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # [1, N, h * d] -> [1, h, N, d]
        for projected in (attention.to_q(x), attention.to_k(context))
    )
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)[0]


def maps_without_and_with(model: StableDiffusion, module: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The map of the attention of a module, without the LoRA and with this one module of it, [N, S] each."""
    attention = model.unet.get_submodule(module.rpartition(".")[0])
    layer = model.unet.get_submodule(module)
    assert isinstance(attention, Attention)
    assert isinstance(layer, LoRALinear)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = attention.register_forward_hook(lambda _, given, output: seen.append((given[0], given[1])))
    set_lora_scale(model.unet, "style", 0.0)
    model.unet(*inputs)
    handle.remove()
    without = attention_map(attention, *seen[0])
    layer.adapter("style").lora_scale = 1.0
    return without, attention_map(attention, *seen[0])


def columns_of(model: StableDiffusion, caption: str) -> dict[str, slice]:
    """The tokens of a caption by their words, the start mark before and the end mark with its padding behind."""
    clip = model.text_encoder.clips[0]
    ids = clip.tokens(caption)
    words = [word.removesuffix("</w>") for word in clip.tokenizer.convert_ids_to_tokens(ids)]
    places = {f"{index} {word}": slice(index, index + 1) for index, word in enumerate(words, start=1)}
    return {"0 start": slice(0, 1), **places, "end and padding": slice(len(ids) + 1, None)}


def draw(maps: tuple[Tensor, Tensor], columns: dict[str, slice], change: Tensor, title: str, output: Path) -> None:
    """Draw the change of the weight, and a column a word: the map without it, with it, and the difference.

    Args:
        maps: without and with, [N, S] each.
        columns: words and their tokens.
        change: (alpha / r) B A, [out, in].
        title: above all.
        output: where the PNG goes.
    """
    side = int(len(maps[0]) ** 0.5)
    ratios = [3.2, *[1] * len(columns)]
    figure, axes = plt.subplots(3, len(ratios), figsize=(15, 4.3), width_ratios=ratios, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for row in range(3):
        axes[row, 0].remove()
    weight = figure.add_subplot(axes[0, 0].get_gridspec()[:, 0])
    singular = torch.linalg.svdvals(change)
    share = singular[0] ** 2 / singular.square().sum()
    _show(weight, change, change.abs().max().item(), f"in; the largest direction holds {share:.0%} of it")
    weight.set(title=f"(alpha / r) B A, {' x '.join(str(n) for n in change.shape)}", ylabel="out")
    for column, (word, tokens) in enumerate(columns.items(), start=1):
        without, with_it = (whole[:, tokens].sum(dim=1).view(side, side) for whole in maps)
        high = max(without.max().item(), with_it.max().item())
        _show(axes[0, column], without, high, f"{without.mean():.1%}")
        _show(axes[1, column], with_it, high, f"{with_it.mean():.1%}")
        added = with_it - without
        _show(axes[2, column], added, added.abs().max().item(), f"{100 * added.mean():+.1f}")
        axes[0, column].set_title(word, fontsize=9)
    for row, words in enumerate(("without", "with it", "added")):
        axes[row, 1].set_ylabel(words, fontsize=11)
    figure.savefig(output, dpi=90)
    plt.close(figure)


def _show(axes: Axes, values: Tensor, most: float, label: str) -> None:
    """A matrix in colours: from 0 up in the colours of a fire, with a sign in blue and red."""
    signed = bool((values < 0).any())
    axes.imshow(values, vmin=-most if signed else 0, vmax=most, cmap="RdBu_r" if signed else "magma")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label, fontsize=8)


@torch.no_grad()
def main() -> None:
    """Load or train the LoRA, compute both maps, draw."""
    config = tyro.cli(LoRAAttentionConfig)
    model = load_model("pocket")
    networks = {"unet": model.unet}
    with tempfile.TemporaryDirectory() as folder:
        path = train(Path(folder), config.steps) if config.lora is None else config.lora
        add_lora_to(networks, load_lora(path, networks), name="style")
    caption = f"8bit {scenes.caption(SCENE)}"
    pixels = to_pixel_values(scenes.draw(SCENE, "8bit"), square_geometry((64, 64), 64), crop=None, flip=False)
    latents = model.vae.encode(pixels[None]).mean * model.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([config.timestep])
    inputs = model.schedule.add_noise(latents, noise, timesteps), timesteps, model.text_encoder([caption]).hidden_states
    maps = maps_without_and_with(model, config.module, inputs)
    columns = columns_of(model, caption)
    print("word                without    with")
    for word, tokens in columns.items():
        without, with_it = (100 * whole[:, tokens].sum(dim=1).mean() for whole in maps)
        print(f"{word:18} {without:6.1f} %  {with_it:5.1f} %")
    weights = lora_weights(model.unet, "style")[config.module]
    change = weights.alpha / weights.rank * weights.product(torch.float32)
    draw(maps, columns, change, f"{config.module} at t = {config.timestep}", config.output)
    print(f"wrote {config.output}")


if __name__ == "__main__":
    main()
