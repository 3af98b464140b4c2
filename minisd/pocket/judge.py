"""The pocket model's judge: what an evaluation measures, read off pixels instead of asking CLIP.

The measures are those of docs/pocket.md: colour, time of day, blockiness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minisd.pocket import scenes
from minisd.pocket.measure import held_out_scenes

INSIDE, OUTSIDE = 8, 4  # prompts
STYLE_WORD = "8bit "


class PocketJudge:
    """Judges pictures by their pixels: see evaluate/judging.py, Judge.

    Args:
        training: the training pictures, RGB, any size; at least one.
    """

    name = "pocket"
    agreement_title = "colour and time of day as the prompt says"
    agreement_format = ".0%"
    style_title = "nearness to the training pictures' blockiness"
    tolerance = 0.13  # one property in eight: what four pictures show outside the domain, and one of them is chance
    copy_floor = 0.85

    def __init__(self, training: Iterable[Image.Image]) -> None:
        pictures = [_fitted(image) for image in training]
        self.training_features = self.features(pictures)
        self._blockiness = float(np.mean([scenes.blockiness(image) for image in pictures]))

    def agreement(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """The share of what each prompt names, colour and time of day, that its picture shows; None: it names none."""
        return [_agreement(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def nearness(self, images: Sequence[Image.Image]) -> list[float]:
        """1 less the distance of each picture's blockiness from the training pictures': in [0, 1]."""
        return [1 - abs(scenes.blockiness(image) - self._blockiness) for image in images]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """The pixels without their mean, to length 1 [B, 12288] float32: likeness is the correlation of the pixels."""
        pixels = np.stack([np.asarray(_fitted(image), np.float32).ravel() for image in images])
        centred = torch.from_numpy(pixels - pixels.mean(axis=1, keepdims=True))
        return torch.nn.functional.normalize(centred, dim=1)


def prompts_of_demo() -> tuple[list[str], list[str]]:
    """Prompts for a LoRA that was trained on the demo's pictures, which has seen none of them: with the style's word,
    and without it.
    """
    captions = [scenes.caption(scene) for scene in held_out_scenes(INSIDE + OUTSIDE)]
    return [STYLE_WORD + caption for caption in captions[:INSIDE]], captions[INSIDE:]


def _agreement(image: Image.Image, prompt: str) -> float | None:
    colour, time = scenes.named_in(prompt)
    shown = []
    if colour is not None:
        shown.append(scenes.subject_colour(image) == colour)
    if time is not None:
        shown.append(scenes.time_of_day(image) == time)
    return sum(shown) / len(shown) if shown else None


def _fitted(image: Image.Image) -> Image.Image:
    """A picture in the size of the pocket model's, its middle where the shape differs."""
    size = (scenes.SIZE, scenes.SIZE)
    return image if image.size == size else ImageOps.fit(image, size)
