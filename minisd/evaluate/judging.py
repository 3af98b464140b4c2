"""What is measured on the pictures of a checkpoint, and who measures it.

A judge is CLIP (clip_judge.py), or for the pocket model its own measures of pixels (minisd/pocket/judge.py). Shape
letters: B pictures, N training pictures, F features of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor

# Two training pictures that are as alike as this are one picture twice, and say nothing about copies.
SAME_PICTURE = 0.995

Figures = Mapping[str, float | None]  # name -> figure, None where there is nothing to measure it on


class Judge(Protocol):
    """Who compares pictures with prompts, with a style, and with each other.

    Attributes:
        name: as in evaluation.json.
        agreement_title: what `agreement` measures, in words.
        agreement_format: how its numbers are written, as for format().
        tolerance: how much less agreement than the base's is no loss yet.
        style_title: what `nearness` measures, in words.
        copy_floor: a likeness below this is no copy, however unlike the training pictures are among themselves.
        training_features: of the training pictures, as from `features` [N, F] float32.
    """

    name: str
    agreement_title: str
    agreement_format: str
    tolerance: float
    style_title: str
    copy_floor: float
    training_features: Tensor

    def agreement(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """How far each picture shows what its prompt says; None where the prompt says nothing that is measured."""

    def nearness(self, images: Sequence[Image.Image]) -> list[float]:
        """How near each picture is to the training pictures' style; at most 1."""

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """What a picture looks like, as rows of length 1 [B, F] float32: the product of two is their likeness."""


@dataclass(frozen=True)
class Prompt:
    """What to draw, whether it is in the style's domain, and from which seed."""

    text: str
    inside: bool
    seed: int


@dataclass(frozen=True)
class Nearest:
    """The training picture that is most like a picture: its file's name, how like (at most 1), and if it is a copy."""

    training: str
    likeness: float
    copy: bool


@dataclass(frozen=True)
class FigureKind:
    """A column of the table: its name, what it is in words, which end is better (None: neither), and its format."""

    name: str
    title: str
    better: str | None
    format: str


def figure_kinds(judge: Judge) -> list[FigureKind]:
    """The columns of the table, from left to right."""
    agreement, number = judge.agreement_title, judge.agreement_format
    return [
        FigureKind("held_out_ratio", "loss on held-out pictures, of the base's", "low", ".3f"),
        FigureKind("train_ratio", "loss on training pictures, of the base's", None, ".3f"),
        FigureKind("agreement", f"{agreement}, in the domain", "high", number),
        FigureKind("outside_agreement", f"{agreement}, outside it", "high", number),
        FigureKind("style", f"{judge.style_title}, in the domain", "high", ".3f"),
        FigureKind("outside_style", f"{judge.style_title}, outside it", None, ".3f"),
        FigureKind("likeness", "highest likeness of a picture to a training picture", "low", ".3f"),
        FigureKind("copies", "pictures that are copies of a training picture", "low", ".0%"),
    ]


class TrainingPictures:
    """The training pictures by what they look like, and from where on a likeness is a copy.

    A picture is called a copy if it is more like a training picture than any two different training pictures are like
    each other, and at least as like as the judge's floor.

    Args:
        names: of the files, N of them.
        features: as of Judge.features [N, F].
        copy_floor: as of a Judge.
    """

    def __init__(self, names: Sequence[str], features: Tensor, copy_floor: float) -> None:
        assert len(names) == len(features)
        self.names, self.features = names, features
        likeness = features @ features.T  # [N, N]
        different = likeness.masked_fill(likeness >= SAME_PICTURE, -1.0)  # nor each with itself
        self.copy_above = max(copy_floor, different.max().item())

    def nearest(self, features: Tensor) -> list[Nearest]:
        """The most like of them to each of some pictures [B, F]."""
        found = (features @ self.features.T).max(dim=1)  # [B, N] -> [B]
        pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        return [Nearest(self.names[index], round(value, 4), value > self.copy_above) for value, index in pairs]


def measure(
    judge: Judge, training: TrainingPictures, images: Sequence[Image.Image], prompts: Sequence[Prompt]
) -> tuple[dict[str, float | None], list[Nearest]]:
    """The figures of pictures, one a prompt, but for the ratios of the loss; and what each picture is most like."""
    agreement = judge.agreement(images, [prompt.text for prompt in prompts])
    style = judge.nearness(images)
    nearest = training.nearest(judge.features(images))

    def mean(values: Sequence[float | None], *, inside: bool) -> float | None:
        chosen = [v for v, prompt in zip(values, prompts, strict=True) if v is not None and prompt.inside == inside]
        return round(sum(chosen) / len(chosen), 4) if chosen else None

    figures = {
        "agreement": mean(agreement, inside=True),
        "outside_agreement": mean(agreement, inside=False),
        "style": mean(style, inside=True),
        "outside_style": mean(style, inside=False),
        "likeness": max(found.likeness for found in nearest),
        "copies": round(sum(found.copy for found in nearest) / len(nearest), 4),
    }
    return figures, nearest
