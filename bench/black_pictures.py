"""The pocket model with a VAE that overflows float16, as Stable Diffusion XL's does, and what is made of it.

    python bench/black_pictures.py --output .cache/overflowing

writes the model folder, draws one picture with diffusers in float16 and in float32, and says what came out. What minisd
does with the folder: docs/troubleshooting.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from minisd.images import image_grid  # noqa: E402
from minisd.model_writer import write_model_folder  # noqa: E402
from minisd.vae import Decoder, Encoder  # noqa: E402
from minisd.weights import load_model  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class BlackPicturesConfig:
    """Write a model whose VAE overflows float16, and draw with it."""

    output: Path = ROOT / ".cache" / "overflowing"
    """Model folder to write; must not exist."""
    factor: float = 1e5
    """How many times larger the activations between the VAE's blocks are made."""
    prompt: str = "illustration of a red car by day"
    """What diffusers draws."""
    picture: Path | None = None
    """Where to write both pictures, float16 on the left."""


def main() -> None:
    """Write, draw, and print."""
    config = tyro.cli(BlackPicturesConfig)
    model = load_model("pocket")
    with torch.no_grad():
        for half in (model.vae.encoder, model.vae.decoder):
            enlarge_stream(half, config.factor)
    write_model_folder(model, config.output)
    pictures = []
    for dtype in (torch.float16, torch.float32):
        pipe = StableDiffusionPipeline.from_pretrained(config.output, torch_dtype=dtype)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # sample.py's default
        seeded = torch.Generator().manual_seed(0)
        picture = pipe(config.prompt, generator=seeded, num_inference_steps=25).images[0]
        levels = [high for _, high in picture.getextrema()]
        print(f"diffusers in {dtype}: the brightest red, green and blue are {levels}, of 255")
        pictures.append(picture.resize((192, 192), Image.Resampling.NEAREST))
    if config.picture is not None:
        image_grid(pictures, columns=2).save(config.picture, optimize=True)


def enlarge_stream(half: Encoder | Decoder, factor: float) -> None:
    """Multiply what flows from block to block, in place. Every block normalises it: the output stays what it was."""
    half.conv_in.weight *= factor
    half.conv_in.bias *= factor
    for path, module in half.named_modules():
        name = path.rpartition(".")[2]
        if name == "conv2" or path.endswith("to_out.0"):  # what a block adds to the stream
            assert isinstance(module, nn.Conv2d | nn.Linear)
            module.weight *= factor
            module.bias *= factor
        elif name == "conv_shortcut" or (name == "conv" and "samplers." in path):  # what the stream goes through
            assert isinstance(module, nn.Conv2d)
            module.bias *= factor


if __name__ == "__main__":
    main()
