"""Before the first picture: the model with its LoRAs, and the options with what the model decides filled in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minisd.config import DEFAULT_MODEL
from minisd.data import sha256_of_picture
from minisd.errors import DataError, DiskError, UsageError, one_line
from minisd.lora_choice import LoRAChoice
from minisd.lora_info import public_name
from minisd.lora_layers import LoRALayer
from minisd.lora_reader import add_lora_to, load_lora, read_lora_info
from minisd.picture_files import load_image
from minisd.picture_record import PictureRecord
from minisd.prompts import parse_weights
from minisd.sample_config import SampleConfig
from minisd.samplers import KARRAS_SAMPLERS, default_spacing, number_of_calls
from minisd.sampling import SamplingSettings, check_size, native_size
from minisd.weights import StableDiffusion, load_model, with_zero_terminal_snr

log = logging.getLogger(__name__)

_STRENGTH = 0.8  # of image to image, as in diffusers


def check_output(config: SampleConfig, paths: Sequence[Path]) -> None:
    """Refuse, before anything is drawn, an output that could not be written in the end.

    Args:
        config: names the folder.
        paths: of the pictures to be written.

    Raises:
        UsageError: the folder is a file, or a picture is there already.
        DiskError: the folder cannot be written to.
    """
    if config.output.is_file():
        raise UsageError(f"--output {config.output} is a file. Give a folder.")
    existing = [path for path in paths if path.exists()]
    if existing and not config.overwrite:
        raise UsageError(f"{existing[0]} is there already. Choose another --output, or --overwrite.")
    folder = config.output.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise DiskError(f"--output {config.output}: {there} cannot be written to. Choose another folder.")


def check_early(configs: Sequence[SampleConfig]) -> None:
    """Refuse what needs no model to be refused. Raises UsageError: a weight in a prompt, or no step is left to take."""
    for config in configs:
        for text in (*config.prompt, config.negative_prompt or ""):
            parse_weights(text)
        if config.init_image is not None:
            strength = _STRENGTH if config.strength is None else config.strength
            number_of_calls(config.scheduler, config.num_inference_steps, strength)


def checked_init_image(config: SampleConfig, again: PictureRecord | None) -> str:
    """The SHA-256 of --init-image, or "".

    Raises:
        UsageError: the picture to repeat began with another one, or --strength is given and there is none.
        DataError: it cannot be read as a picture.
    """
    if config.init_image is not None and not config.init_image.exists():
        raise DataError(f"--init-image {config.init_image}: no such file.")
    found = "" if config.init_image is None else sha256_of_picture(config.init_image.resolve())
    if again is not None and again.origin.init_image_sha256 not in ("", found):
        raise UsageError(
            f"--from-png {config.from_png}: it was drawn from a picture (sha256 {again.origin.init_image_sha256[:10]})."
            " Give that one with --init-image."
        )
    if config.strength is not None and not found:
        raise UsageError("--strength says how far to go from a picture. Give --init-image, or leave it out.")
    if config.init_image is not None:
        load_image(config.init_image.resolve())  # before the model, which takes a while
    return found


def prepared_model(
    config: SampleConfig, loras: Sequence[LoRAChoice], again: PictureRecord | None
) -> tuple[StableDiffusion, list[tuple[str, ...]]]:
    """Load the model and put the LoRAs into it; also returns the parts of the model that each of them adapts.

    Raises:
        UsageError: the model of the picture to repeat is not here, or a LoRA's words or schedule do not suit the model.
        WeightsError: the model or a LoRA cannot be read, or they do not fit together.
        NetworkError: the model has to be downloaded, and cannot be.
    """
    infos = [read_lora_info(lora.path) for lora in loras]
    named = [info.base_model for info in infos if info.base_model]
    name = config.model if config.model is not None else named[0] if named else DEFAULT_MODEL
    unasked = "" if config.lora or again is not None else " (trained last; --lora none draws without)"
    for choice in loras:
        log.info("LoRA: %s, strength %g%s", choice.path, choice.lora_scale, unasked)
    log.info("model: %s", name)
    if again is not None and again.has_local_model(name) and not (name == "pocket" or Path(name).exists()):
        raise UsageError(f"--from-png {config.from_png}: its model {name!r} is not here. Give its path with --model.")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "float16" if device == "cuda" else "float32"
    dtype = getattr(torch, auto if config.precision == "auto" else config.precision)
    model = load_model(
        name, revision=config.revision, variant=config.variant, prediction_type=config.prediction_type,
        dtype=dtype, device=device,
    )  # fmt: skip
    for info in infos:
        if info.base_model == name and info.base_commit not in ("", model.commit):
            log.warning(
                "a LoRA was trained on commit %s of %s, and this is %s: for the same weights add --revision %s",
                one_line(info.base_commit[:10]), name, (model.commit or "another copy")[:10],
                one_line(info.base_commit[:40]),
            )  # fmt: skip
    if any(info.recipe.get("zero_terminal_snr") for info in infos):
        log.info("noise schedule: zero terminal SNR, as the LoRA was trained")
        model = with_zero_terminal_snr(model)
    parts = []
    for index, choice in enumerate(loras):
        lora = load_lora(choice.path, model.networks(), allow_partial=config.allow_partial)
        add_lora_to(model.networks(), lora, name=f"lora{index}", lora_scale=choice.lora_scale)
        model.text_encoder.add_tokens(lora.embeddings)
        parts.append(tuple(lora.parts))
    for network in model.networks().values():
        network.to(dtype).eval()  # the adapters, too: or each call would cast them
    if config.compile:
        compile_networks(model)
    return model, parts


@contextmanager
def merged_doras(model: StableDiffusion) -> Iterator[None]:
    """Put DoRAs into the weights for a while: the same bits, and not every network call computes their norms anew."""
    layers = [
        layer
        for network in model.networks().values()
        for layer in network.modules()
        if isinstance(layer, LoRALayer) and any(adapter.magnitude is not None for adapter in layer.active)
    ]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def compile_networks(model: StableDiffusion) -> None:
    """Let torch.compile work on what takes the time, in place: names and adapters stay. It happens at the first call.

    A batch of another size is compiled anew: for sizes that may vary slower kernels are made.
    """
    if model.unet.conv_in.weight.device.type == "cuda":
        model.unet.to(memory_format=torch.channels_last)
        model.vae.to(memory_format=torch.channels_last)
    model.unet.compile(dynamic=False)
    model.vae.decoder.compile(dynamic=False)


def resolved(config: SampleConfig, model: StableDiffusion) -> SampleConfig:
    """The options with what the model and this machine decide filled in, and no path.

    Raises:
        UsageError: the size is not a whole number of latents.
    """
    size, schedule = native_size(model), model.schedule.config
    dtype: Any = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
    spacing = None if config.scheduler == "lcm" else default_spacing(schedule, config.scheduler)
    height = size if config.height is None else config.height
    width = size if config.width is None else config.width
    check_size(model, height, width)  # of all prompts, before the first is drawn
    return replace(
        config,
        model=public_name(model.name),
        revision=model.commit,
        height=height,
        width=width,
        timestep_spacing=spacing if config.timestep_spacing is None else config.timestep_spacing,
        karras=config.karras or (config.scheduler in KARRAS_SAMPLERS and schedule.use_karras_sigmas),
        strength=_STRENGTH if config.init_image is not None and config.strength is None else config.strength,
        precision=dtype,
    )


def settings_of(config: SampleConfig) -> SamplingSettings:
    """The part of resolved options that says what a picture looks like."""
    assert config.height is not None
    assert config.width is not None
    return SamplingSettings(
        height=config.height,
        width=config.width,
        negative_prompt=config.negative_prompt,
        scheduler=config.scheduler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        guidance_interval=config.guidance_interval,
        karras=config.karras,
        timestep_spacing=config.timestep_spacing,
        eta=config.eta,
        clip_skip=config.clip_skip,
        strength=1.0 if config.strength is None or config.init_image is None else config.strength,
    )
