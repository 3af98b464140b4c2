"""The figures of bench/ablations.py: read off pictures whose every detail is known, and off the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from ablation_variants import ASKED, Pictures, Variant
from numpy.typing import NDArray
from PIL import Image

from minisd import draws
from minisd.buckets import square_geometry
from minisd.images import to_pil, to_pixel_values
from minisd.latent_cache import encode_moments
from minisd.lora import set_lora_scale
from minisd.pocket import scenes
from minisd.pocket.measure import held_out_scenes
from minisd.sampling import SamplingSettings, decode, denoise, native_size
from minisd.training import diffusion_loss, latents_of
from minisd.weights import StableDiffusion

PLAIN = 4
"""Pictures that are drawn from captions without the style's word."""
RECALLED = 8
"""Pictures that are drawn from captions of training pictures."""
PROBES = 16
BANDS = 4
LORA = "ablation"


def drawn(model: StableDiffusion, variant: Variant, prompts: Sequence[str], first_seed: int = 0) -> list[Image.Image]:
    """A picture of each prompt, picture i from seed `first_seed` + i.

    Raises:
        NonFiniteError: a picture is not finite.
    """
    size = native_size(model)
    settings = SamplingSettings(
        height=size,
        width=size,
        guidance_scale=variant.guidance_scale,
        num_inference_steps=variant.num_inference_steps,
    )
    pictures = []
    for seed, prompt in enumerate(prompts, first_seed):
        *_, latents = denoise(model, prompt, [seed], settings)
        pictures += to_pil(decode(model, latents))
    return pictures


def picture_figures(pictures: Sequence[Image.Image], asked: Sequence[scenes.Scene]) -> dict[str, float]:
    """What is counted on pictures of some scenes.

    Returns:
        `colour`, `time`, `subject` and `all_three`: shares of the pictures that show what was asked for; `blockiness`:
        see scenes.blockiness; `saturation`: mean difference of the largest and the smallest of red, green and blue, in
        [0, 1].
    """
    right = [
        (
            scenes.subject_colour(picture) == scene.colour,
            scenes.time_of_day(picture) == scene.time,
            subject_of(picture, scene) == scene.subject,
        )
        for picture, scene in zip(pictures, asked, strict=True)
    ]
    colour, time, subject = np.mean(right, axis=0).tolist()
    return {
        "colour": colour,
        "time": time,
        "subject": subject,
        "all_three": float(np.mean(np.all(right, axis=1))),
        "blockiness": mean_blockiness(pictures),
        "saturation": float(np.mean([np.ptp(_pixels(picture), axis=-1).mean() for picture in pictures]) / 255),
    }


def mean_blockiness(pictures: Sequence[Image.Image]) -> float:
    return float(np.mean([scenes.blockiness(picture) for picture in pictures]))


def copies(pictures: Sequence[Image.Image], shown: Sequence[scenes.Scene], dataset: Pictures) -> int:
    """How many pictures, drawn from the captions of training pictures that show these scenes, are those pictures again.

    A copy differs from the training picture less than half as much as another real drawing with the same caption does,
    by root mean square.
    """
    return sum(
        _distance(picture, dataset.draw(scene))
        < _distance(dataset.draw(replace(scene, seed=scene.seed + 1)), dataset.draw(scene)) / 2
        for picture, scene in zip(pictures, shown, strict=True)
    )


def _distance(picture: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(((_pixels(picture) - _pixels(other)) ** 2).mean()))


def _pixels(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB"), float)  # [64, 64, 3]


def subject_of(picture: Image.Image, scene: scenes.Scene) -> str:
    """Which subject, in the scene's colour and at its time of day, has the drawing that is nearest to the picture.

    Right for all of 50 real drawings, plain or eight-bit.
    """
    names, drawings = _drawings(scene.colour, scene.time)
    return names[int(((drawings - _middle(picture)) ** 2).sum((1, 2, 3)).argmin())]


def _middle(picture: Image.Image) -> NDArray[np.float32]:
    return _pixels(picture)[12:60, 10:54].astype(np.float32)


@lru_cache(maxsize=len(scenes.COLOURS) * len(scenes.TIMES))
def _drawings(colour: str, time: str) -> tuple[list[str], NDArray[np.float32]]:
    """24 eight-bit drawings of each subject."""
    shown = [scenes.Scene(subject, colour, time, 10**9 + i) for subject in scenes.SUBJECTS for i in range(24)]
    return [scene.subject for scene in shown], np.stack([_middle(scenes.draw(scene, "8bit")) for scene in shown])


def loss_ratios(model: StableDiffusion, dataset: Pictures) -> dict[str, list[float]]:
    """Loss with the LoRA divided by the base's on the same pictures, timesteps and noise, a number for each band.

    Args:
        model: with the adapter LORA.
        dataset: that the LoRA was trained on.

    Returns:
        `train_bands` and `held_out_bands`: of 4 equal ranges of timesteps, from little noise to most.
    """
    asked = [replace(scene, seed=scene.seed + 1) for scene in held_out_scenes(ASKED)]
    held_out = [(dataset.draw(scene), f"8bit {scenes.caption(scene)}") for scene in asked]
    trained = [(dataset.draw(scene), caption) for scene, caption in dataset.rows()]
    ratios = {}
    for name, pairs in {"train_bands": trained, "held_out_bands": held_out}.items():
        losses = []
        for strength in (1.0, 0.0):
            set_lora_scale(model.unet, LORA, strength)
            losses.append(np.sum([_losses(model, pairs, probe) for probe in range(PROBES)], axis=0))
        ratios[name] = [float(value) for value in losses[0] / losses[1]]
    return ratios


@torch.no_grad()
def _losses(model: StableDiffusion, pairs: Sequence[tuple[Image.Image, str]], probe: int) -> list[float]:
    """Loss of one picture at a time of each band. Positions are negative: no training sample has such a draw."""
    picture, caption = pairs[probe % len(pairs)]
    side = picture.height
    pixels = to_pixel_values(picture, square_geometry((side, side), side), crop=None, flip=False)[None]
    moments = encode_moments(model.vae, pixels)  # [1, 2, 4, h, w]
    hidden_states = model.text_encoder([caption]).hidden_states
    total = model.schedule.config.num_train_timesteps
    losses = []
    for band in range(BANDS):
        position = -1 - BANDS * probe - band
        shape = tuple(moments.shape[2:])
        latents = latents_of(model.vae, moments, draws.posterior_noise(0, position, shape)[None])
        low = total * band // BANDS
        timesteps = torch.tensor([low + draws.timestep(0, position, total // BANDS)])
        noise = draws.noise(0, position, shape)[None]
        loss = diffusion_loss(
            model.unet, model.schedule, latents, noise, timesteps, [hidden_states], dtype=torch.float32
        )
        losses.append(loss.item())
    return losses
