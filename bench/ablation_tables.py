"""What bench/ablations.py has made, as the tables of docs/ablations.md and the pictures of docs/troubleshooting.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_variants import BASE, NO_LORA
from PIL import Image

from minisd.images import image_grid

# What is changed -> what a line says -> the variant.
AXES: dict[str, dict[str, str]] = {
    "seed": {"without a LoRA": NO_LORA, "0": BASE, "1": "seed 1", "2": "seed 2"},
    "learning rate": {
        "1e-4, 50 steps": "learning rate 1e-4, 50 steps",
        "1e-4": "learning rate 1e-4",
        "3e-4": "learning rate 3e-4",
        "1e-3": "learning rate 1e-3",
        "5e-3": BASE,
        "1e-2": "learning rate 1e-2",
        "2e-2": "learning rate 2e-2",
        "2e-2, drawn at strength 0.5": "learning rate 2e-2, strength 0.5",
    },
    "steps": {"50": "50 steps", "150": "150 steps", "300": BASE, "800": "800 steps"},
    "rank": {"1": "rank 1", "1, seed 1": "rank 1, seed 1", "4": "rank 4", "16": BASE, "64": "rank 64"},
    "alpha / rank": {"1/16": "alpha / rank 1/16", "1": BASE, "4": "alpha / rank 4"},
    "pictures": {
        "4": "4 pictures",
        "4, seed 1": "4 pictures, seed 1",
        "4, 60 steps": "4 pictures, 60 steps",
        "4, drawn at strength 0.5": "4 pictures, strength 0.5",
        "4, rank 1": "4 pictures, rank 1",
        "4, LoRA dropout 0.3": "4 pictures, lora dropout 0.3",
        "4, caption dropout 0.5": "4 pictures, caption dropout 0.5",
        "10": "10 pictures",
        "30": "30 pictures",
        "100": BASE,
    },
    "what the pictures show": {
        "everything": BASE,
        "castles only": "castles only",
        "red subjects only": "red only",
        "everything, in pale colours": "pale pictures",
        "that, drawn at strength 0.5": "pale pictures, strength 0.5",
    },
    "captions": {
        "true ones": BASE,
        "those of other pictures": "captions of other pictures",
        "that, drawn at strength 0.5": "captions of other pictures, strength 0.5",
        "the same for all": "captions all alike",
    },
    "caption dropout": {"0": "caption dropout 0", "0.1": BASE, "0.5": "caption dropout 0.5"},
    "loss weighting": {"none": BASE, "min-SNR 5": "min-SNR 5"},
    "targets": {
        "attn": BASE,
        "attn+ff": "targets attn+ff",
        "all": "targets all",
        "all, seed 1": "targets all, seed 1",
    },
    "noise offset, LoRA dropout": {
        "none": BASE,
        "noise offset 0.3": "noise offset 0.3",
        "LoRA dropout 0.3": "lora dropout 0.3",
    },
    "strength": {
        "0": NO_LORA,
        "0.4": "strength 0.4",
        "0.7": "strength 0.7",
        "1": BASE,
        "1.5": "strength 1.5",
        "2": "strength 2",
        "3": "strength 3",
    },
    "guidance": {"1": "guidance 1", "3": "guidance 3", "7.5": BASE, "20": "guidance 20"},
    "sampler steps": {"6": "6 sampler steps", "25": BASE},
}
STYLED = (2, 5, 7, 9, 13)
RECALLED = range(4)
# Pictures of docs/troubleshooting/: the rows (variant, file in its folder), and which columns of the files are shown.
STRIPS: dict[str, tuple[tuple[tuple[str, str], ...], Sequence[int]]] = {
    "no-effect": ((("learning rate 1e-4, 50 steps", "styled"), (BASE, "styled")), STYLED),
    "distorted": ((("learning rate 2e-2", "styled"), (BASE, "styled")), STYLED),
    "over-fit": ((("4 pictures", "training"), ("4 pictures", "recalled"), (BASE, "recalled")), RECALLED),
    "too-strong": ((("strength 2", "styled"), (BASE, "styled")), STYLED),
    "washed-out": ((("pale pictures", "styled"), (BASE, "styled")), STYLED),
    "off-prompt": ((("captions of other pictures", "styled"), (BASE, "styled")), STYLED),
}
HEAD = (
    "as asked: all (colour, time, subject)",
    "blockiness",
    "of plain captions",
    "saturation",
    "loss, trained",
    "loss, held out",
    "copies",
)


def folder_of(name: str) -> str:
    """Where in the output folder a variant is."""
    return name.replace(" / ", "-per-").replace("/", "-").replace(",", "").replace(" ", "-")


def tables(output: Path) -> str:
    """A table for each axis in Markdown; lines whose variant has not been made are left out."""
    parts = []
    for axis, variants in AXES.items():
        lines = [f"| {axis} | {' | '.join(HEAD)} |", "|---" * (1 + len(HEAD)) + "|"]
        for label, name in variants.items():
            path = output / folder_of(name) / "figures.json"
            if path.exists():
                shown = f"**{label}**" if name == BASE else label
                lines.append(f"| {shown} | {' | '.join(_cells(json.loads(path.read_text())))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def strip_of(output: Path, name: str, enlarged: int = 3) -> Image.Image:
    """A picture of docs/troubleshooting/, enlarged without smoothing."""
    rows, columns = STRIPS[name]
    pictures = []
    for variant, file in rows:
        grid = Image.open(output / folder_of(variant) / f"{file}.png")
        for index in columns:
            top, left = (64 * place for place in divmod(index, grid.width // 64))
            pictures.append(grid.crop((left, top, left + 64, top + 64)))
    large = [p.resize((enlarged * p.width, enlarged * p.height), Image.Resampling.NEAREST) for p in pictures]
    return image_grid(large, columns=len(columns))


def _cells(report: dict[str, Any]) -> list[str]:
    if "failed" in report:
        return [f"no picture: {report['failed']}", *[""] * (len(HEAD) - 1)]
    figures = report["figures"]
    shares = [f"{figures[name]:.0%}" for name in ("all_three", "colour", "time", "subject")]
    losses = ["", ""]
    if "train_bands" in figures:
        losses = [f"{sum(figures[name]) / len(figures[name]):.2f}" for name in ("train_bands", "held_out_bands")]
    return [
        f"{shares[0]} ({', '.join(shares[1:])})",
        f"{figures['blockiness']:.2f}",
        f"{figures['plain_blockiness']:.2f}",
        f"{figures['saturation']:.2f}",
        *losses,
        f"{figures['copies']} of 8",
    ]
