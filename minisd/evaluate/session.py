"""What an evaluation works with, loaded once: the run's model and pictures, the prompts, and the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from minisd.config import TrainConfig
from minisd.distributed import Distributed
from minisd.errors import DataError
from minisd.evaluate.adapters import Checkpoints
from minisd.evaluate.clip_judge import ClipJudge
from minisd.evaluate.clip_model import load_clip
from minisd.evaluate.drawing import draw
from minisd.evaluate.judging import Judge, Prompt, TrainingPictures
from minisd.evaluate.options import DEFAULT_CLIP, EvaluateConfig
from minisd.evaluate.prompts import prompts_to_draw
from minisd.evaluate.run_folder import Candidate
from minisd.held_out import Pictures, read_pictures
from minisd.interruptions import StopRequest
from minisd.picture_files import load_image
from minisd.pocket.judge import PocketJudge, prompts_of_demo
from minisd.run import probe_of
from minisd.run_setup import base_model, resolution_of
from minisd.sampling import SamplingSettings
from minisd.validation_loss import Probe, measure
from minisd.vision_files import CLIP, resolve_vision_model
from minisd.weights import StableDiffusion


@dataclass(frozen=True)
class Session:
    """Everything that stays the same from checkpoint to checkpoint.

    Attributes:
        folder: OUTPUT/evaluation.
        dist: this process, alone.
        model: of the run, on the device.
        checkpoints: put the adapters of one into the model.
        judge: of the pictures.
        training: what a copy would be a copy of.
        probe: what the validation loss is measured on; None if the run holds no pictures out.
        prompts: to draw.
        settings: how.
    """

    folder: Path
    dist: Distributed
    model: StableDiffusion
    checkpoints: Checkpoints
    judge: Judge
    training: TrainingPictures
    probe: Probe | None
    prompts: Sequence[Prompt]
    settings: SamplingSettings

    def draw(
        self,
        prompts: Sequence[Prompt],
        names: Sequence[str],
        candidate: Candidate,
        details: Sequence[str],
        on_picture: Callable[[], object],
    ) -> list[Image.Image]:
        """Draw prompts into files of these names, with the adapters that are in the model: those of `candidate`.

        Raises:
            NonFiniteError: a picture is not finite.
            DiskError: it cannot be written.
        """
        lora = [] if candidate.lora is None else [f"LoRA: {candidate.sha256[:12]}"]
        details = [f"Training step: {candidate.step}", *lora, *details]
        paths = [self.folder / name for name in names]
        return draw(self.model, prompts, paths, self.settings, details, on_picture)

    def ratios(self) -> dict[str, float | None]:
        """The validation loss of the model as it is, of the base's. Raises NonFiniteError."""
        found = None if self.probe is None else measure(self.probe, self.model, self.dist, StopRequest())
        return {
            "held_out_ratio": None if found is None else round(found["held_out"]["ratio"], 6),
            "train_ratio": None if found is None else round(found["train"]["ratio"], 6),
        }


def open_session(config: EvaluateConfig, run: TrainConfig) -> Session:
    """Read the run's pictures, load its model and the judge.

    Raises:
        MinisdError: one of them is not there, or cannot be used.
    """
    clip_name = DEFAULT_CLIP if config.clip is None and run.model != "pocket" else config.clip
    # Before anything slow: a name that is wrong shows at once.
    clip_folder = None if clip_name is None else resolve_vision_model(CLIP, clip_name)
    for option, folder in {"data": run.data, "validation-data": run.validation_data}.items():
        if folder is not None and not folder.is_dir():
            where = "Start this in the folder that train.py was started in"
            raise DataError(f"{str(folder)!r}: the run's --{option} is not here. {where}, or put it back.")
    dist = Distributed(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pictures, held_out = read_pictures(run, dist)
    judge = _judge(clip_name, clip_folder, pictures, dist.device)
    prompts = prompts_to_draw(
        config,
        (pictures if held_out is None else held_out).examples,
        run.trigger,
        prompts_of_demo() if clip_name is None else None,
    )
    model = base_model(run, dist.device)
    size = resolution_of(run, model)
    settings = SamplingSettings(
        height=size,
        width=size,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    checkpoints, probe = Checkpoints(model, run), probe_of(run, dist, model)
    training = TrainingPictures(pictures.names, judge.training_features, judge.copy_floor)
    return Session(run.output / "evaluation", dist, model, checkpoints, judge, training, probe, prompts, settings)


def _judge(name: str | None, folder: Path | None, pictures: Pictures, device: torch.device) -> Judge:
    """CLIP, or without its name and folder the pocket model's own judge. Raises WeightsError, DataError."""
    images = (load_image(example.path) for example in pictures.examples)
    if name is None or folder is None:
        return PocketJudge(images)
    return ClipJudge(load_clip(folder, device), name, images)
