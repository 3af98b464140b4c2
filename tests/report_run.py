"""A run's folder as train.py and evaluate would have left it, made up: for tests of the report."""

import json
import math
from pathlib import Path

from PIL import Image, PngImagePlugin

from minisd.command_line import as_json
from minisd.config import TrainConfig
from minisd.pocket import scenes

STEPS = (0, 10, 20)
PROMPTS = ("8bit castle at night", "a cat, (red:1.2) & 'blue' \"$HOME\" `id` \\ <b>")


def drawing(index: int, path: Path, text: str | None = None, size: int = 64) -> None:
    """A picture of the pocket's world, with a text as sample.py's have."""
    chunks = PngImagePlugin.PngInfo()
    if text is not None:
        chunks.add_text("parameters", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = scenes.draw(scenes.scene_at(index, 0), "8bit")
    image.resize((size, size), Image.Resampling.NEAREST).save(path, pnginfo=chunks)


def text_of(prompt: str, step: int, seed: int) -> str:
    """What save_png writes into a picture along a run."""
    return (
        f"{prompt}\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: {seed}, "
        f"Size: 64x64, Model: pocket, Training step: {step}, Version: minisd"
    )


def write_dataset(folder: Path, captions: list[str], names: list[str] | None = None) -> None:
    """Pictures and metadata.jsonl."""
    names = [f"{index:03d}.png" for index in range(len(captions))] if names is None else names
    for index, name in enumerate(names):
        drawing(index, folder / name)
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def write_run(folder: Path, data: Path, **options: object) -> None:
    """A run of 20 steps: metrics, validation, pictures along it, checkpoints of steps 10 and 20, state "done"."""
    defaults: dict[str, object] = {"output": Path("out"), "model": "pocket", "max_train_steps": 20,
                                   "validation_prompts": PROMPTS, "validation_steps": 10}  # fmt: skip
    config = TrainConfig(data=data, **(defaults | options))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(as_json(config))
    names = [path.name for path in sorted(data.glob("*.png"))]
    table = ["file_name,width,height,bucket_width,bucket_height,cropped_share"]
    (folder / "pictures.csv").write_text("\n".join([*table, *(f"{n},64,64,64,64,0.0" for n in names)]) + "\n")
    lines = [
        {"step": step, "loss": 0.3 / step + 0.05, "loss_average": 0.4 / step + 0.05, "lr": 1e-3 * (1 - step / 20),
         "grad_norm": 1 / step, "images_seen": 4 * step, "skipped": 0, "seconds": 0.5, "images_per_second": 8.0,
         "memory_gb": 1.5} for step in range(1, 21)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ratios = [
        {"step": step, "train": {"ratio": 1 - step / 100, "bands": [1.0, 0.9, 0.8, 0.7]},
         "held_out": {"ratio": 1 - step / 200, "bands": [1.0, 0.95, 0.9, 0.85]}} for step in STEPS
    ]  # fmt: skip
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ratios))
    (folder / "probe.json").write_text(
        json.dumps({"bands": [[0, 249], [250, 499], [500, 749], [750, 999]], "held_out_pictures": names[:1]})
    )
    for step in STEPS:
        for index, prompt in enumerate(config.validation_prompts):
            path = folder / "samples" / f"step-{step:06d}" / f"{index:02d}-0.png"
            drawing(index + step, path, text_of(prompt, step, 0))
    for step in STEPS[1:]:
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "lora.safetensors").write_bytes(b"")
        state = {"run": {"max_train_steps": 20}, "circumstances": {"device": "cpu", "world_size": 2, "torch": "2.9"}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "lora.safetensors").write_bytes(b"")
    write_status(folder, state="done", code=0)


def write_status(folder: Path, **values: object) -> None:
    """run_status.json."""
    status = {"state": "running", "step": 20, "checkpoint": None, "code": None, "error": None, "pid": 1,
              "host": "secret-host", "updated": "2026-01-01T00:00:00+00:00"} | values  # fmt: skip
    (folder / "run_status.json").write_text(json.dumps(status))


def write_evaluation(folder: Path, prompts: tuple[str, ...] = PROMPTS, **changes: object) -> None:
    """evaluation/: the base and two checkpoints, a sweep, a copy."""
    place = folder / "evaluation"
    rows = []
    for step in STEPS:
        names = [f"step-{step:06d}/{index:02d}.png" for index in range(len(prompts))]
        for index, name in enumerate(names):
            drawing(index + step, place / name)
        nearest = [{"training": "001.png", "likeness": 0.5, "copy": step == 20 and index == 0} for index in (0, 1)]
        lora = None if step == 0 else f"checkpoints/step-{step:06d}/lora.safetensors"
        figures = {"held_out_ratio": 1 - step / 100, "agreement": math.nan if step == 0 else 0.5}
        rows.append({"step": step, "lora": lora, "figures": figures, "pictures": names, "nearest": nearest})
    sweep = []
    for scale in (0.4, 1.0):
        drawing(7, place / f"sweep/{scale}-01.png")
        sweep.append({"scale": scale, "figures": {"agreement": scale}, "pictures": [f"sweep/{scale}-01.png"]})
    content = {
        "judge": "pocket", "data_pictures": 3,
        "prompts": [{"text": text, "inside": index == 0, "seed": index} for index, text in enumerate(prompts)],
        "figures": [{"name": "held_out_ratio", "title": "held-out loss", "better": "low", "format": ".3f"},
                    {"name": "agreement", "title": "agreement", "better": "high", "format": ".0%"}],
        "rows": rows, "pick": {"step": 10, "why": "step 10: it has 0.900."},
        "settings": {"num_inference_steps": 4, "guidance_scale": 3.25, "scheduler": "euler", "height": 64, "width": 64},
        "sweep": {"step": 10, "prompts": [1], "scales": [0.4, 1.0], "rows": sweep, "suggested": 0.4, "why": "enough."},
    }  # fmt: skip
    (place / "evaluation.json").write_text(json.dumps(content | changes))
