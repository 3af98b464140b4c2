"""What bench/ablations.py tries: the demo's recipe for the pocket model, and one thing at a time that is changed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from minisd.pocket import scenes
from minisd.pocket.demo import SEED
from minisd.pocket.measure import held_out_scenes

STEPS = 300
ASKED = 16
"""Pictures that are drawn with each LoRA, of captions that no dataset here has."""


@dataclass(frozen=True)
class Pictures:
    """A dataset of eight-bit pictures.

    Args:
        count: how many.
        subject, colour: what all of them show; None for every one there is.
        captions: true ones, each picture with another's, or the same few words for all.
        haze: how far towards light grey the pictures are, in [0, 1].
    """

    count: int = 100
    subject: str | None = None
    colour: str | None = None
    captions: Literal["true", "of others", "all alike"] = "true"
    haze: float = 0.0

    def rows(self) -> list[tuple[scenes.Scene, str]]:
        """What each picture shows, and its caption."""
        shown = list(islice(self._scenes(), self.count))
        texts = [f"8bit {scenes.caption(scene)}" for scene in shown]
        if self.captions == "of others":
            texts = texts[self.count // 2 :] + texts[: self.count // 2]
        elif self.captions == "all alike":
            texts = ["8bit illustration"] * self.count
        return list(zip(shown, texts, strict=True))

    def _scenes(self) -> Iterator[scenes.Scene]:
        asked = {scenes.caption(scene) for scene in held_out_scenes(ASKED)}
        fixed = {"subject": self.subject, "colour": self.colour}
        for index in count():  # without restrictions the first hundred are the demo's
            scene = replace(scenes.scene_at(index, SEED), **{name: value for name, value in fixed.items() if value})
            if scenes.caption(scene) not in asked:
                yield scene

    def draw(self, scene: scenes.Scene) -> Image.Image:
        """One of them."""
        picture = scenes.draw(scene, "8bit")
        return Image.blend(picture, Image.new("RGB", picture.size, (200, 200, 200)), self.haze)

    def write(self, folder: Path) -> None:
        """Draw them all, in the layout of a Hugging Face imagefolder."""
        (folder / "train").mkdir(parents=True, exist_ok=True)
        with (folder / "train" / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "text"])
            for index, (scene, text) in enumerate(self.rows()):
                self.draw(scene).save(folder / "train" / f"{index:03d}.png")
                writer.writerow([f"{index:03d}.png", text])


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Args:
        options: of train.py, other than the base recipe's.
        pictures: trained on.
        drawn_with: the name of the variant whose LoRA is drawn with, instead of training one.
        strength: of the LoRA when drawing.
        guidance_scale, num_inference_steps: of sample.py.
    """

    options: dict[str, Any] = field(default_factory=dict)
    pictures: Pictures = Pictures()
    drawn_with: str | None = None
    strength: float = 1.0
    guidance_scale: float = 7.5
    num_inference_steps: int = 25


BASE = "base"
NO_LORA = "without a LoRA"
# Those that docs/troubleshooting.md needs come first.
VARIANTS: dict[str, Variant] = {
    BASE: Variant(),
    NO_LORA: Variant(drawn_with=BASE, strength=0.0),
    "seed 1": Variant({"seed": 1}),
    "learning rate 3e-4": Variant({"learning_rate": 3e-4}),
    "learning rate 1e-4, 50 steps": Variant({"learning_rate": 1e-4, "max_train_steps": 50}),
    "4 pictures": Variant(pictures=Pictures(4)),
    "learning rate 1e-4": Variant({"learning_rate": 1e-4}),
    "learning rate 2e-2": Variant({"learning_rate": 2e-2}),
    "learning rate 1e-2": Variant({"learning_rate": 1e-2}),
    "guidance 1": Variant(drawn_with=BASE, guidance_scale=1.0),
    "strength 3": Variant(drawn_with=BASE, strength=3.0),
    "pale pictures": Variant(pictures=Pictures(haze=0.5)),
    "pale pictures, strength 0.5": Variant(drawn_with="pale pictures", strength=0.5),
    "captions of other pictures": Variant(pictures=Pictures(captions="of others")),
    "noise offset 0.3": Variant({"noise_offset": 0.3}),
    "red only": Variant(pictures=Pictures(colour="red")),
    "learning rate 2e-2, strength 0.5": Variant(drawn_with="learning rate 2e-2", strength=0.5),
    "4 pictures, strength 0.5": Variant(drawn_with="4 pictures", strength=0.5),
    "strength 0.7": Variant(drawn_with=BASE, strength=0.7),
    "4 pictures, rank 1": Variant({"rank": 1}, Pictures(4)),
    "4 pictures, caption dropout 0.5": Variant({"caption_dropout": 0.5}, Pictures(4)),
    "4 pictures, lora dropout 0.3": Variant({"lora_dropout": 0.3}, Pictures(4)),
    "4 pictures, seed 1": Variant({"seed": 1}, Pictures(4)),
    "4 pictures, 60 steps": Variant({"max_train_steps": 60}, Pictures(4)),
    "alpha / rank 4": Variant({"alpha": 64.0}),
    "10 pictures": Variant(pictures=Pictures(10)),
    "50 steps": Variant({"max_train_steps": 50}),
    "castles only": Variant(pictures=Pictures(subject="castle")),
    "captions of other pictures, strength 0.5": Variant(drawn_with="captions of other pictures", strength=0.5),
    "captions all alike": Variant(pictures=Pictures(captions="all alike")),
    "learning rate 1e-3": Variant({"learning_rate": 1e-3}),
    "guidance 3": Variant(drawn_with=BASE, guidance_scale=3.0),
    "guidance 20": Variant(drawn_with=BASE, guidance_scale=20.0),
    "caption dropout 0.5": Variant({"caption_dropout": 0.5}),
    "rank 1": Variant({"rank": 1}),
    "rank 64": Variant({"rank": 64}),
    "targets all": Variant({"lora_targets": "all"}),
    "min-SNR 5": Variant({"snr_gamma": 5.0}),
    "caption dropout 0": Variant({"caption_dropout": 0.0}),
    "alpha / rank 1/16": Variant({"alpha": 1.0}),
    "strength 0.4": Variant(drawn_with=BASE, strength=0.4),
    "strength 1.5": Variant(drawn_with=BASE, strength=1.5),
    "strength 2": Variant(drawn_with=BASE, strength=2.0),
    "6 sampler steps": Variant(drawn_with=BASE, num_inference_steps=6),
    "30 pictures": Variant(pictures=Pictures(30)),
    "150 steps": Variant({"max_train_steps": 150}),
    "rank 4": Variant({"rank": 4}),
    "targets attn+ff": Variant({"lora_targets": "attn+ff"}),
    "800 steps": Variant({"max_train_steps": 800}),
    "seed 2": Variant({"seed": 2}),
    "rank 1, seed 1": Variant({"rank": 1, "seed": 1}),
    "targets all, seed 1": Variant({"lora_targets": "all", "seed": 1}),
    "lora dropout 0.3": Variant({"lora_dropout": 0.3}),
}
