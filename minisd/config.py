"""The options of the scripts: frozen dataclasses, their command line (tyro), and their checks.

Imports nothing slow, so that `--help` and a refusal come before torch is loaded. Option names are those of diffusers'
training scripts where the meaning is the same; dashes and underscores are both accepted.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from minisd.errors import UsageError, one_line

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_OUTPUT = Path("output")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a LoRA into the attention projections of Stable Diffusion's UNet."""

    data: Path
    """Folder of pictures with captions: DATA/train/metadata.csv with columns file_name,text (or metadata.jsonl, or a
    .txt file beside each picture)."""
    output: Path = DEFAULT_OUTPUT
    """Folder for lora.safetensors, metrics.jsonl, config.json and checkpoints/."""
    model: str = DEFAULT_MODEL
    """Base model: a repo id on the Hub, a folder in diffusers layout, or "pocket", the small model in this folder."""
    revision: str | None = None
    """Branch, tag or commit of the repo on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""

    resolution: int | None = None
    """Side of the square training pictures in pixels; the model's own size if not given."""
    center_crop: bool = False
    """Crop the middle of each picture instead of a random part."""
    random_flip: bool = False
    """Mirror every other picture at random."""
    caption_dropout: float = 0.0
    """Share of samples trained without their caption, which keeps classifier-free guidance healthy."""

    train_batch_size: int = 1
    """Pictures in one forward pass of one process (a micro-step)."""
    gradient_accumulation_steps: int = 4
    """Micro-steps in an optimizer update (a step)."""
    max_train_steps: int | None = None
    """Length of the run in steps. Give this or --num-train-epochs; 2000 steps if neither."""
    num_train_epochs: int | None = None
    """Length of the run in epochs, rounded up to whole steps."""
    dataloader_num_workers: int = 0
    """Processes that read pictures ahead, for each training process."""

    learning_rate: float = 1e-4
    """Highest learning rate."""
    lr_scheduler: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warmup: fall to zero by a half cosine, or stay."""
    lr_warmup_steps: int = 0
    """Steps of linear warmup."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """dtype of the frozen weights and of autocast. The adapter and Adam's moments are always float32."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: float | None = None
    """The adapters are scaled by alpha / rank; alpha is rank if not given."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_targets: Literal["attn", "attn+ff"] = "attn"
    """Layers that get an adapter: the attention projections, or the feed-forward layers too."""
    trigger: str | None = None
    """The word that calls the style up, written into the LoRA file for other tools to show."""

    checkpointing_steps: int = 500
    """Save the state of the run every this many steps, and at its end."""
    checkpoints_total_limit: int = 3
    """Checkpoints kept, the newest ones; at least 2."""
    resume_from_checkpoint: str = "latest"
    """"latest" goes on from the newest sound checkpoint in OUTPUT, if any; "never" sets an earlier run aside and starts
    anew; or the path of a checkpoint."""
    seed: int = 0
    """Everything random about the run follows from it."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise UsageError("--max-train-steps and --num-train-epochs exclude each other. Leave one out.")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "rank",
                     "checkpointing_steps", "resolution"):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                _check(name, value, value >= 1, "a whole number of at least 1")
        _check(
            "learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "a number between 0 and 1, such as 1e-4"
        )
        _check("alpha", self.alpha, self.alpha is None or 0 < self.alpha < 1e6, "a positive number")
        for name in ("lora_dropout", "caption_dropout"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share from 0 up to, not including, 1")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "seed"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 2**63, "0 or more")
        _check("checkpoints_total_limit", self.checkpoints_total_limit, self.checkpoints_total_limit >= 2,
               "at least 2: the newest may be the one being written")  # fmt: skip

    @property
    def scale_alpha(self) -> float:
        """Alpha, or its default."""
        return float(self.rank) if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw pictures from prompts, with Stable Diffusion and LoRAs."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw; may be given several times."""
    prompts_file: Path | None = None
    """A text file with one prompt a line."""
    negative_prompt: str = ""
    """What to keep away from."""
    model: str | None = None
    """Base model; if not given, the one named in the LoRA's header, or Stable Diffusion 1.5."""
    revision: str | None = None
    """Branch, tag or commit of the repo on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LoRA file, PATH or PATH:SCALE; may be given several times. If not given, output/lora.safetensors is used if it is
    there; "none" draws without."""
    num_images: int = 3
    """Pictures for each prompt. Picture i is drawn from seed + i."""
    num_inference_steps: int = 25
    """Steps of the sampler."""
    guidance_scale: float = 7.5
    """How strongly the prompt steers; 1 switches classifier-free guidance off."""
    scheduler: Literal["ddpm", "ddim", "euler", "euler-a", "dpm++2m"] = "dpm++2m"
    """The sampler."""
    karras: bool = False
    """Space the noise levels as in Karras et al. (euler and dpm++2m)."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """How the sampler's steps are spread over the diffusion times; what diffusers ends up with if not given."""
    eta: float = 0.0
    """Noise that ddim adds at each step, from 0 (none) to 1 (as ddpm)."""
    seed: int = 0
    """Seed of the first picture."""
    height: int | None = None
    """Height in pixels; the model's own size if not given."""
    width: int | None = None
    """Width in pixels; the model's own size if not given."""
    batch_size: int = 1
    """Pictures drawn at a time. Changes speed and memory, not the pictures."""
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """dtype of the weights; auto is float16 on a GPU and float32 on a CPU."""
    output: Path = Path("samples")
    """Folder for 000.png, 001.png, ... and grid.png."""
    overwrite: bool = False
    """Replace pictures that are there already."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number of at least 1")
        _check("guidance_scale", self.guidance_scale, 0 <= self.guidance_scale < 1000, "a number from 0 to 1000")
        _check("eta", self.eta, 0 <= self.eta <= 1, "a number from 0 to 1")
        _check("seed", self.seed, 0 <= self.seed < 2**63 - self.num_images, "from 0 to 2^63")
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(name, value, value is None or 8 <= value <= 8192, "from 8 to 8192 pixels")
        if not self.prompt and self.prompts_file is None:
            raise UsageError('no prompt. Give --prompt "8bit illustration of city view" or --prompts-file FILE.')


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} {value}: expected {wanted}.")


Config = TypeVar("Config", TrainConfig, SampleConfig)


def parse_args(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """Read the command line into a config; a mistake ends the process with one line on stderr and exit code 2.

    Args:
        config_class: TrainConfig or SampleConfig.
        arguments: the words after the script's name; those of the process if not given.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_class, args=arguments)
    except UsageError as error:
        message = str(error)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a frame around its explanation: take the words out of it.
        message = " ".join(re.sub(r"[^\x20-\x7e]|-{3,}|={3,}", " ", said.getvalue()).split())
    print(f"minisd: error {UsageError.name}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(UsageError.exit_code)


def as_json(config: TrainConfig | SampleConfig) -> str:
    """The whole resolved config as JSON, one option a line."""
    return json.dumps(asdict(config), indent=2, default=str) + "\n"
