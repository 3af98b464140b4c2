"""Try a run before it is started: a few steps, a picture, a save and a reload, and what the whole will need."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minisd.config import TrainConfig
from minisd.data import read_dataset, with_trigger
from minisd.distributed import Distributed, wait_for_all
from minisd.errors import CheckpointError
from minisd.images import to_pil
from minisd.lora_reader import add_lora_to, load_lora
from minisd.run import steps_of_run
from minisd.run_setup import base_model
from minisd.sampling import decode, denoise
from minisd.validation import validation_settings

log = logging.getLogger(__name__)

_STEPS = 3


def preflight(config: TrainConfig, dist: Distributed, train: Callable[[TrainConfig, Distributed], Path]) -> None:
    """Train three steps in OUTPUT/preflight with the run's own options, check what came out, and report.

    Latents and captions go into the run's own cache, so nothing of the work is lost.

    Args:
        config: of the run.
        dist: this process among the others.
        train: the function of train.py.

    Raises:
        MinisdError: whatever the run would end with, early.
        CheckpointError: what was saved is not what was trained.
    """
    prompts = config.validation_prompts or (next(iter(read_dataset(config.data))).captions[0],)
    folder = config.output / "preflight"
    trial = replace(
        config,
        output=folder,
        cache_dir=config.cache_folder,
        max_train_steps=_STEPS,
        num_train_epochs=None,
        validation_prompts=prompts[:1],
        validation_steps=_STEPS,
        validation_num_images=1,
        validation_inference_steps=2,
        resume_from_checkpoint="never",
        report_to="none",
        report=False,
        push_to_hub=False,
        hub_model_id=None,
        hub_private_repo=False,
        hub_license=None,
    )
    if dist.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all(dist)
    path = train(trial, dist)
    if dist.is_main:
        _compare_reloaded(trial, dist, path)
        for line in _report(config, folder):
            log.info("%s", line)
        shutil.rmtree(folder)
    wait_for_all(dist)


def _compare_reloaded(trial: TrainConfig, dist: Distributed, path: Path) -> None:
    """Draw the last validation picture again, with the model and the LoRA read from their files."""
    model = base_model(trial, dist.device)
    networks = {"unet": model.unet}
    add_lora_to(networks, load_lora(path, networks), name="default")
    model.unet.eval()
    settings = validation_settings(trial, model)
    prompt = with_trigger(trial.validation_prompts[0], trial.trigger)
    for latents in denoise(model, prompt, [trial.seed], settings):  # noqa: B007 (the last ones are decoded below)
        pass
    drawn = np.asarray(to_pil(decode(model, latents))[0], dtype=int)
    with Image.open(trial.output / "samples" / f"step-{_STEPS:06d}" / "00-0.png") as picture:
        before = np.asarray(picture.convert("RGB"), dtype=int)
    # One level in 255: a GPU may choose another kernel for the reloaded weights' place in memory.
    if np.abs(drawn - before).max() > 1:
        raise CheckpointError(
            f"{path}: the reloaded LoRA draws another picture than the trained one. Please report it."
        )


def _report(config: TrainConfig, folder: Path) -> list[str]:
    """What the run will need, from what three steps needed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = statistics.median(line["seconds"] for line in lines[1:])  # the first one warms up
    checkpoint = sum(path.stat().st_size for path in (folder / "checkpoints" / f"step-{_STEPS:06d}").iterdir())
    cache = sum(path.stat().st_size for path in config.cache_folder.glob("*.safetensors"))
    state = json.loads((folder / "checkpoints" / f"step-{_STEPS:06d}" / "state.json").read_bytes())
    steps = steps_of_run(config, state["circumstances"]["steps_per_epoch"])
    disk = checkpoint * (config.checkpoints_total_limit + 1) + checkpoint // 3 + cache
    place = "GPU" if torch.cuda.is_available() else "process"
    return [
        "preflight: data, captions, model, step, picture, save and reload are fine",
        f"memory: {max(line['memory_gb'] for line in lines):.2f} GB at most ({place})",
        f"time: {seconds:.3f} s a step, {_span(seconds * steps)} for {steps} steps, validation pictures not counted",
        f"disk: {disk / 1e6:.0f} MB ({checkpoint / 1e6:.1f} MB a checkpoint, {cache / 1e6:.1f} MB of cache), "
        f"{shutil.disk_usage(config.output).free / 1e6:.0f} MB free",
    ]


def _span(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
