"""How a run is looked at along the way: pictures of the validation prompts, and the validation loss.

The pictures come from the function that sample.py draws with: same prompt, seed, precision: same pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from minisd.a1111_text import parameters_text
from minisd.config import TrainConfig
from minisd.data import with_trigger
from minisd.distributed import Distributed, gather, wait_for_all
from minisd.images import save_png, to_pil
from minisd.interruptions import StopRequest
from minisd.run import Run
from minisd.sampling import SamplingSettings, decode, denoise, native_size
from minisd.trackers import MetricsLog
from minisd.validation_loss import is_measured, measure
from minisd.weights import StableDiffusion

log = logging.getLogger(__name__)


def is_due(config: TrainConfig, step: int, max_train_steps: int) -> bool:
    """Whether a run is looked at after `step` updates: at 0, every --validation-steps, and at the end."""
    return step % config.validation_steps == 0 or step == max_train_steps


def validate(
    config: TrainConfig, dist: Distributed, run: Run, metrics: MetricsLog | None, stop: StopRequest, *, resumed: bool
) -> bool:
    """Draw the validation prompts and measure the validation loss, each if the run has it.

    Args:
        config: the options.
        dist: this process among the others.
        run: between two steps.
        metrics: told of both; on the main rank only.
        stop: both break off when it is requested.
        resumed: the run has just come back to this step: what is there already is kept.

    Returns:
        Whether all is well. False: measuring broke off, on every rank.
    """
    step = run.state.progress.step
    for path in draw_validation(config, dist, run.model, step, stop, keep=resumed):
        if metrics is not None:
            metrics.picture(step, path.stem, path)
    if run.probe is None or (resumed and gather(dist, is_measured(config.output, step))[0]):
        return True
    ratios = measure(run.probe, run.model, dist, stop)
    if ratios is None:
        return False
    if metrics is not None:
        metrics.validation(step, ratios)
    train, held_out = ratios["train"]["ratio"], ratios["held_out"]["ratio"]
    text = "validation at step %d: %.2f of the base's loss on training pictures, %.2f on held-out ones"
    log.info(text, step, train, held_out)
    return True


def validation_settings(config: TrainConfig, model: StableDiffusion) -> SamplingSettings:
    """How a validation picture is drawn: a square of the training resolution."""
    size = native_size(model) if config.resolution is None else config.resolution
    return SamplingSettings(
        height=size,
        width=size,
        num_inference_steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
    )


def draw_validation(
    config: TrainConfig, dist: Distributed, model: StableDiffusion, step: int, stop: StopRequest, *, keep: bool
) -> list[Path]:
    """Draw the validation prompts, spread over the processes: OUTPUT/samples/step-000250/PROMPT-IMAGE.png.

    Args:
        config: prompts, seeds and settings.
        dist: this process among the others.
        model: in training; its UNet is put back into training mode.
        step: updates made.
        stop: drawing breaks off when it is requested; what is missing is drawn when the run goes on.
        keep: leave pictures alone that are there already.

    Returns:
        The paths of all pictures that are there, in order; none without prompts.

    Raises:
        NonFiniteError: a picture is not finite.
        DiskError: it cannot be written.
    """
    if not config.validation_prompts:
        return []
    folder = config.output / "samples" / f"step-{step:06d}"
    prompts = [with_trigger(prompt, config.trigger) for prompt in config.validation_prompts]
    pictures = [
        (folder / f"{number:02d}-{image}.png", prompt, config.seed + image)
        for number, prompt in enumerate(prompts)
        for image in range(config.validation_num_images)
    ]
    settings = validation_settings(config, model)
    mine = [entry for entry in pictures[dist.rank :: dist.world_size] if not (keep and entry[0].exists())]
    folder.mkdir(parents=True, exist_ok=True)
    with _ready_to_draw(model, dist.device):
        for path, prompt, seed in mine:
            for latents in denoise(model, prompt, [seed], settings):  # noqa: B007 (the last ones are decoded below)
                if stop.requested:
                    break
            if stop.requested:
                break
            text = parameters_text(settings, prompt, seed, model.name, [f"Training step: {step}"])
            save_png(to_pil(decode(model, latents))[0], path, parameters=text, overwrite=True)
    wait_for_all(dist)
    return [path for path, _, _ in pictures if path.exists()]


@contextmanager
def _ready_to_draw(model: StableDiffusion, device: torch.device) -> Iterator[None]:
    """Bring VAE and text encoder to the device and switch dropout off; then everything back as it was."""
    vae_device, text_device = model.vae.quant_conv.weight.device, model.text_encoder.device
    model.vae.to(device)
    model.text_encoder.to(device=device)
    model.unet.eval()
    try:
        yield
    finally:
        model.unet.train()
        model.vae.to(vae_device)
        model.text_encoder.to(device=text_device)
