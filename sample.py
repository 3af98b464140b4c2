"""Draw pictures: python sample.py --prompt "8bit illustration of city view".

With no --lora, the LoRA that train.py wrote last to its default output is used, if there is one and it is for the
model; with no --model, the base model that the LoRA names. What was chosen is printed, and written into every picture.
"""

import sys

from minisd.command_line import parse_args
from minisd.sample_config import SampleConfig

CONFIG = parse_args(SampleConfig) if __name__ == "__main__" else None  # before torch: --help and refusals at once

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minisd.errors import UsageError, run_script
from minisd.images import image_grid, load_init_image, save_png, to_pil
from minisd.lora import set_lora_scale
from minisd.lora_choice import chosen_loras
from minisd.picture_record import read_record
from minisd.picture_text import origin_of, picture_texts
from minisd.prompt_files import one_config_a_prompt
from minisd.sample_plan import Batch, plan
from minisd.sample_setup import (
    check_early,
    check_output,
    checked_init_image,
    merged_doras,
    prepared_model,
    resolved,
    settings_of,
)
from minisd.sampling import decode, denoise
from minisd.sweep_grid import SWEEP, labelled_grid
from minisd.weights import StableDiffusion

log = logging.getLogger("sample")


def sample(config: SampleConfig) -> list[Path]:
    """Draw the pictures and their grid; returns the paths of the pictures.

    Raises:
        MinisdError: bad options, weights or LoRA, a picture that is there already, or latents that are not finite.
    """
    again = None if config.from_png is None else read_record(config.from_png)
    configs, loras = one_config_a_prompt(config), chosen_loras(config, again)
    if config.strength_sweep and not loras:
        raise UsageError("--strength-sweep varies the strength of LoRAs, and there is none. Give --lora PATH.")
    batches = plan(configs, again, SWEEP if config.strength_sweep else (1.0,))
    paths = [config.output / f"{number:03d}.png" for number in range(sum(len(batch.numbers) for batch in batches))]
    grid_path = config.output / "grid.png"
    check_output(config, [*paths, grid_path])
    check_early(configs)
    init_image_sha256 = checked_init_image(config, again)

    model, parts = prepared_model(config, loras, again)
    origin = origin_of(model, config.variant, init_image_sha256)
    if again is not None:
        for difference in origin.differences(again.origin):
            log.warning("%s: %s; it may come out a little different, or more", config.from_png, difference)
    batches = [replace(batch, config=resolved(batch.config, model)) for batch in batches]
    calls = sum(settings_of(batch.config).network_calls for batch in batches)
    pictures: dict[int, Image.Image] = {}
    with tqdm(total=calls, desc="sample", unit="call") as bar:
        for batch in batches:
            for index, lora in enumerate(loras):
                for part in parts[index]:
                    set_lora_scale(model.networks()[part], f"lora{index}", lora.lora_scale * batch.lora_factor)
            with merged_doras(model):
                latents = drawn(model, batch, bar.update)
            for place, number in batch.numbers.items():
                image = to_pil(decode(model, latents[place : place + 1], tiled=batch.config.vae_tiling))[0]
                parameters, record = picture_texts(model, batch, place, loras, origin)
                config.output.mkdir(parents=True, exist_ok=True)
                save_png(image, paths[number], parameters=parameters, record=record, overwrite=config.overwrite)
                pictures[number] = image
    images = [pictures[number] for number in range(len(paths))]
    if config.strength_sweep:
        rows = [(one.prompt[0], f"seed {one.seed + i}") for one in configs for i in range(config.num_images)]
        grid = labelled_grid(images, [f"LoRA x {factor:g}" for factor in SWEEP], rows)
    else:
        grid = image_grid(images, columns=config.num_images)
    save_png(grid, grid_path, parameters="", overwrite=config.overwrite)
    log.info("wrote %s and grid.png", ", ".join(str(path) for path in paths))
    return paths


def drawn(model: StableDiffusion, batch: Batch, on_call: Callable[[], object]) -> Tensor:
    """Draw a batch: latents [B, 4, height / f, width / f].

    Raises:
        MinisdError: as `denoise`, or the picture to begin with cannot be read.
    """
    config, settings = batch.config, settings_of(batch.config)
    init_image = None
    if config.init_image is not None:
        init_image = load_init_image(config.init_image, settings.height, settings.width)
    for latents in denoise(model, config.prompt[0], batch.seeds, settings, init_image=init_image):  # noqa: B007
        on_call()
    return latents


def main(config: SampleConfig) -> None:
    """Draw, with a line for each choice that was made."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sample(config)


if __name__ == "__main__":
    assert CONFIG is not None
    sys.exit(run_script(partial(main, CONFIG), debug=CONFIG.debug))
