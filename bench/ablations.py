"""What each option does to the LoRA: the demo's recipe for the pocket model, with one thing changed at a time.

    python bench/ablations.py                   every variant, an hour and a half on one core; goes on where it stopped
    python bench/ablations.py --only base "rank 4"
    python bench/ablations.py --table           the tables of docs/ablations.md from the figures that are there
    python bench/ablations.py --pictures docs/troubleshooting    and its pictures

Each variant trains with train.py's own loop, and draws: captions that no dataset has (styled.png), some of them without
the style's word (plain.png), captions of training pictures (recalled.png, training.png has the pictures themselves).
The figures are in figures.json, beside the LoRA and its metrics.jsonl, in a folder for each variant.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from ablation_figures import (  # noqa: E402
    LORA,
    PLAIN,
    RECALLED,
    copies,
    drawn,
    loss_ratios,
    mean_blockiness,
    picture_figures,
)
from ablation_tables import STRIPS, folder_of, strip_of, tables  # noqa: E402
from ablation_variants import ASKED, STEPS, VARIANTS, Variant  # noqa: E402

from minisd.atomic import write_atomically  # noqa: E402
from minisd.config import TrainConfig  # noqa: E402
from minisd.distributed import Distributed  # noqa: E402
from minisd.errors import NonFiniteError  # noqa: E402
from minisd.images import image_grid  # noqa: E402
from minisd.lora import set_lora_scale  # noqa: E402
from minisd.lora_reader import add_lora_to, load_lora  # noqa: E402
from minisd.pocket import scenes  # noqa: E402
from minisd.pocket.demo import training_options  # noqa: E402
from minisd.pocket.measure import held_out_scenes  # noqa: E402
from minisd.weights import load_model  # noqa: E402
from train import train  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class AblationsConfig:
    """Train and draw with one thing changed at a time."""

    output: Path = ROOT / ".cache" / "ablations"
    """Folder of the figures and pictures; variants that are there already are not made again."""
    only: tuple[str, ...] = ()
    """Variants to make, by name; all if not given."""
    threads: int = 1
    """Of torch."""
    table: bool = False
    """Make nothing: print the tables."""
    pictures: Path | None = None
    """Make nothing: write the pictures of docs/troubleshooting.md into this folder."""


def main() -> None:
    """Make the variants that are missing, or print the tables."""
    config = tyro.cli(AblationsConfig)
    if config.table:
        print(tables(config.output))
    if config.pictures is not None:
        for name in STRIPS:
            strip_of(config.output, name).save(config.pictures / f"{name}.png", optimize=True)
    if config.table or config.pictures is not None:
        return
    unknown = [name for name in config.only if name not in VARIANTS]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    torch.set_num_threads(config.threads)
    for name in config.only or VARIANTS:
        for needed in (VARIANTS[name].drawn_with, name):
            if needed is not None:
                make(needed, config.output)


def make(name: str, output: Path) -> None:
    """Make a variant, unless its figures are there already."""
    done = output / folder_of(name) / "figures.json"
    if not done.exists() or json.loads(done.read_text())["variant"] != as_json(VARIANTS[name]):
        print(f"--- {name}", flush=True)
        write_atomically(done, json.dumps(made(name, output), indent=1).encode())


def as_json(variant: Variant) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(variant)))


def made(name: str, output: Path) -> dict[str, Any]:
    """Train, draw, count: what goes into figures.json."""
    variant, folder, started = VARIANTS[name], output / folder_of(name), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "variant": as_json(variant),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} used",
    }
    try:
        lora = trained(variant, folder) if variant.drawn_with is None else lora_of(variant.drawn_with, output)
        figures = measured(variant, lora, folder)
    except NonFiniteError as error:
        return report | {"failed": str(error), "seconds": round(time.monotonic() - started, 1)}
    return report | {"figures": figures, "seconds": round(time.monotonic() - started, 1)}


def lora_of(name: str, output: Path) -> Path:
    return output / folder_of(name) / "lora.safetensors"


def trained(variant: Variant, folder: Path) -> Path:
    """Train as train.py does, unless that is done; only the LoRA and the curves are kept."""
    run, data, mark = folder / "run", folder / "dataset", folder / "trained.json"
    settings = {"options": variant.options, "pictures": asdict(variant.pictures)}
    if not mark.exists() or json.loads(mark.read_text()) != settings:
        variant.pictures.write(data)
        options = training_options(STEPS) | {"data": data, "output": run, "report_to": "none"} | variant.options
        lora = train(TrainConfig(**options), Distributed(0, 1, torch.device("cpu")))
        for kept in (lora, run / "metrics.jsonl"):
            shutil.copy2(kept, folder / kept.name)
        shutil.rmtree(run)
        write_atomically(mark, json.dumps(settings).encode())
    return folder / "lora.safetensors"


def measured(variant: Variant, lora: Path, folder: Path) -> dict[str, Any]:
    """Draw with a LoRA, and count."""
    model = load_model("pocket")
    networks = {"unet": model.unet}
    add_lora_to(networks, load_lora(lora, networks), name=LORA)
    model.unet.eval()
    source = variant if variant.drawn_with is None else VARIANTS[variant.drawn_with]
    training, asked = source.pictures.rows(), held_out_scenes(ASKED)
    ratios = loss_ratios(model, source.pictures) if variant.drawn_with is None else {}
    set_lora_scale(model.unet, LORA, variant.strength)
    captions = [scenes.caption(scene) for scene in asked]
    recalled = [training[index % len(training)] for index in range(RECALLED)]
    pictures = {
        "styled": drawn(model, variant, [f"8bit {caption}" for caption in captions]),
        "plain": drawn(model, variant, captions[:PLAIN]),
        "recalled": drawn(model, variant, [caption for _, caption in recalled], first_seed=100),
        "training": [source.pictures.draw(scene) for scene, _ in recalled],
    }
    for name, images in pictures.items():
        image_grid(images, columns=8).save(folder / f"{name}.png")
    others = {
        "plain_blockiness": mean_blockiness(pictures["plain"]),
        "copies": copies(pictures["recalled"], [scene for scene, _ in recalled], source.pictures),
    }
    return picture_figures(pictures["styled"], asked) | others | ratios


if __name__ == "__main__":
    main()
