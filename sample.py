"""Draw pictures: python sample.py --prompt "8bit illustration of city view".

With no --lora, the LoRA that train.py wrote last to its default output is used, if there is one; with no --model, the
base model that the LoRA names. What was chosen is printed, and written into every picture.
"""

import sys

from minisd.command_line import parse_args
from minisd.config import DEFAULT_MODEL, DEFAULT_OUTPUT, SampleConfig

CONFIG = parse_args(SampleConfig) if __name__ == "__main__" else None  # before torch: --help and refusals at once

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from minisd.errors import UsageError, WeightsError, run_script
from minisd.images import image_grid, save_png, to_pil
from minisd.lora import add_lora
from minisd.lora_file import load_lora, read_lora_info
from minisd.sampling import SamplingSettings, decode, denoise, native_size, parameters_text
from minisd.weights import load_model, with_zero_terminal_snr

log = logging.getLogger("sample")


@dataclass(frozen=True)
class LoRAChoice:
    """A LoRA file and its strength."""

    path: Path
    scale: float

    @property
    def label(self) -> str:
        """Name, strength and the start of the file's SHA-256, for the picture's text. No folder: it is private."""
        return f"{self.path.stem}:{self.scale:g} ({hashlib.sha256(self.path.read_bytes()).hexdigest()[:10]})"


def chosen_loras(config: SampleConfig) -> list[LoRAChoice]:
    """The LoRAs asked for, or the one trained last. Raises UsageError for a strength that is no number."""
    if config.lora == ("none",):
        return []
    if not config.lora:
        trained = DEFAULT_OUTPUT / "lora.safetensors"
        return [LoRAChoice(trained, 1.0)] if trained.is_file() else []
    choices = []
    for text in config.lora:
        path, colon, scale = text.rpartition(":")
        if not colon or Path(text).is_file():
            path, scale = text, "1"
        try:
            choices.append(LoRAChoice(Path(path), float(scale)))
        except ValueError as error:
            raise UsageError(f"--lora {text}: expected PATH or PATH:SCALE, such as style.safetensors:0.8.") from error
        if not choices[-1].path.is_file():
            raise WeightsError(f"--lora {path}: no such file.")
    return choices


def prompts_of(config: SampleConfig) -> list[str]:
    """The prompts of the command line, then those of the file, one a line, empty lines left out."""
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        try:
            lines = config.prompts_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--prompts-file {config.prompts_file}: expected a text file in UTF-8 ({error})."
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError("there is no prompt in --prompts-file. Write one a line.")
    return prompts


def sample(config: SampleConfig) -> list[Path]:
    """Draw the pictures and their grid; returns the paths of the pictures.

    Raises:
        MinisdError: bad options, weights or LoRA, a picture that is there already, or latents that are not finite.
    """
    prompts, loras = prompts_of(config), chosen_loras(config)
    paths = [config.output / f"{index:03d}.png" for index in range(len(prompts) * config.num_images)]
    grid_path = config.output / "grid.png"
    existing = [path for path in (*paths, grid_path) if path.exists()]
    if existing and not config.overwrite:
        raise UsageError(f"{existing[0]} is there already. Choose another --output, or --overwrite.")

    infos = [read_lora_info(lora.path) for lora in loras]
    named = [info.base_model for info in infos if info.base_model]
    name = config.model if config.model is not None else named[0] if named else DEFAULT_MODEL
    for lora in loras:
        log.info("LoRA: %s, strength %g", lora.path, lora.scale)
    log.info("model: %s", name)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, auto if config.precision == "auto" else config.precision)
    model = load_model(name, revision=config.revision, variant=config.variant, dtype=dtype, device=device)
    if any(info.recipe.get("zero_terminal_snr") for info in infos):
        log.info("noise schedule: zero terminal SNR, as the LoRA was trained")
        model = with_zero_terminal_snr(model)
    for index, lora in enumerate(loras):
        weights, _ = load_lora(lora.path, model.unet)
        add_lora(model.unet, weights, name=f"lora{index}", lora_scale=lora.scale)
    model.unet.to(dtype).eval()

    size = native_size(model)
    settings = SamplingSettings(
        height=size if config.height is None else config.height,
        width=size if config.width is None else config.width,
        negative_prompt=config.negative_prompt,
        scheduler=config.scheduler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        karras=config.karras,
        timestep_spacing=config.timestep_spacing,
        eta=config.eta,
    )
    labels = [lora.label for lora in loras]  # once: each hashes its whole file
    config.output.mkdir(parents=True, exist_ok=True)
    images: list[Image.Image] = []
    all_seeds = [config.seed + index for index in range(config.num_images)]
    batches = [
        (prompt, all_seeds[i : i + config.batch_size])
        for prompt in prompts
        for i in range(0, len(all_seeds), config.batch_size)
    ]
    with tqdm(total=len(batches) * settings.num_inference_steps, desc="sample", unit="step") as bar:
        for prompt, seeds in batches:
            for latents in denoise(model, prompt, seeds, settings):  # noqa: B007 (the last ones are decoded below)
                bar.update()
            for seed, image in zip(seeds, to_pil(decode(model, latents)), strict=True):
                text = parameters_text(settings, prompt, seed, name, labels)
                save_png(image, paths[len(images)], parameters=text, overwrite=config.overwrite)
                images.append(image)
    save_png(image_grid(images, columns=config.num_images), grid_path, parameters="", overwrite=config.overwrite)
    log.info("wrote %s and grid.png", ", ".join(str(path) for path in paths))
    return paths


def main(config: SampleConfig) -> None:
    """Draw, with a line for each choice that was made."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sample(config)


if __name__ == "__main__":
    assert CONFIG is not None
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug))
