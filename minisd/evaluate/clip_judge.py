"""CLIP as a judge: what a picture and a prompt, or two pictures, have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from minisd.evaluate.clip_model import Clip


class ClipJudge:
    """Judges pictures by the cosines of CLIP's embeddings: see judging.py, Judge.

    A cosine says little by itself: those of all pictures and texts lie in a narrow range. Compare the rows of a table
    with the base's.

    Args:
        clip: the model.
        name: of the model, as the user gave it.
        training: the training pictures, RGB, any size; at least one.
    """

    agreement_title = "cosine of picture and prompt"
    agreement_format = ".3f"
    tolerance = 0.02
    copy_floor = 0.95

    def __init__(self, clip: Clip, name: str, training: Iterable[Image.Image]) -> None:
        self.name = f"CLIP {name}"
        self._clip = clip
        self.training_features = torch.cat([self.features([image]) for image in training])  # not all in memory
        mean = normalize(self.training_features.mean(dim=0), dim=0)  # [F]
        self._style = mean
        own = float((self.training_features @ mean).mean())
        self.style_title = f"cosine to the data's mean (its own: {own:.3f})"

    def agreement(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """The cosine of each picture and its prompt, in [-1, 1]."""
        return list((self.features(images) * self._clip.embed_texts(prompts)).sum(dim=1).tolist())

    def nearness(self, images: Sequence[Image.Image]) -> list[float]:
        """The cosine of each picture and the mean of the training pictures, in [-1, 1]."""
        return list((self.features(images) @ self._style).tolist())

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP's embeddings [B, P] float32."""
        return self._clip.embed_pictures(images)
