"""The whole path on a machine with no GPU and no model: `make demo`.

Draws a hundred eight-bit pictures with captions, trains a LoRA on them with the ordinary train.py, draws with the
ordinary sample.py, without the LoRA and with it, and lays the pictures side by side. Every command is printed.
"""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from tqdm import tqdm

from minisd.pocket import scenes

PROMPT = "8bit illustration of city view"
PICTURES = 100
SEED = 8  # of the series of scenes that the dataset is drawn from


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """From a hundred pictures to pictures in their style, with the pocket model."""

    output: Path = Path("demo")
    """Folder of everything the demo writes; what an earlier demo wrote there is replaced."""
    steps: int = 600
    """Training steps."""


def write_dataset(folder: Path) -> None:
    """Draw a hundred eight-bit pictures with captions into `folder`, in the layout of a Hugging Face imagefolder."""
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for index in tqdm(range(PICTURES), desc="draw", unit="picture"):
            scene = scenes.scene_at(index, SEED)
            scenes.draw(scene, "8bit").save(folder / "train" / f"{index:03d}.png")
            writer.writerow([f"{index:03d}.png", f"8bit {scenes.caption(scene)}"])


def training_options(steps: int) -> dict[str, Any]:
    """The demo's options of train.py, but for the folders."""
    return {
        "model": "pocket",
        "max_train_steps": steps,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "lr_warmup_steps": 20,
        "center_crop": True,
    }


def run(*words: str) -> None:
    """Run a Python script as the user would, after printing the command."""
    print("+ python", shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True)


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


def main() -> None:
    """Run the demo."""
    config = tyro.cli(DemoConfig)
    for part in ("dataset", "lora", "before", "after"):
        shutil.rmtree(config.output / part, ignore_errors=True)
    data, lora, before, after = (str(config.output / part) for part in ("dataset", "lora", "before", "after"))

    write_dataset(Path(data))
    options = [word for name, value in training_options(config.steps).items() for word in _words(name, value)]
    run("train.py", "--data", data, "--output", lora, *options)
    # The prompt names no colour, and strong guidance would mix several into one picture.
    draw = ("sample.py", "--model", "pocket", "--prompt", PROMPT, "--num-images", "3", "--guidance-scale", "3")
    run(*draw, "--lora", "none", "--output", before)
    run(*draw, "--lora", f"{lora}/lora.safetensors", "--output", after)

    rows = [Image.open(Path(folder) / "grid.png") for folder in (before, after)]
    grid = Image.new("RGB", (rows[0].width, 2 * rows[0].height))
    for index, row in enumerate(rows):
        grid.paste(row, (0, index * row.height))
    # Enlarged without smoothing: at 64 pixels a screen shows little.
    grid.resize((4 * grid.width, 4 * grid.height), Image.Resampling.NEAREST).save(config.output / "grid.png")
    print(f"wrote {config.output / 'grid.png'}: above without the LoRA, below with it, same seeds")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the script has said why
