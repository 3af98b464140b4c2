"""The options of sample.py: a frozen dataclass and its checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from minisd.config import check
from minisd.errors import UsageError

Scheduler = Literal[
    "ddpm", "ddim", "pndm", "euler", "euler-a", "heun", "dpm++2m", "dpm++2m-sde", "unipc", "lcm"
]  # fmt: skip

# Those that can space their noise levels as Karras et al. do; in samplers.py too, but that needs torch.
KARRAS_SCHEDULERS = ("euler", "heun", "dpm++2m", "dpm++2m-sde", "unipc")
# Longer ones are refused before they are cut into tokens; what the text encoder takes is far below.
MAX_PROMPT = 100_000
# What A1111 takes out of a prompt: a file to load.
_EXTRA_NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw pictures from prompts, with Stable Diffusion and LoRAs."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw; may be given several times. (word:1.2) weighs a part of it."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, and behind it, where they differ from the options here: --n negative prompt,
    --w width, --h height, --d seed, --l guidance scale, --s steps. Lines that start with # are comments."""
    negative_prompt: str | None = None
    """What to keep away from."""
    model: str | None = None
    """Base model: a repo id, a folder, a .safetensors file or "pocket"; if not given, the one named in the LoRA's
    header, or Stable Diffusion 1.5."""
    revision: str | None = None
    """Branch, tag or commit of the repo on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model predicts, where its file does not say so (a single file of SD 2.x)."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LoRA file or PEFT folder, PATH or PATH:SCALE; may be given several times. If not given, output/lora.safetensors
    is used if it is there and was trained on the model; "none" draws without."""
    allow_partial: bool = False
    """Use a LoRA of which some modules have no place in this model, instead of refusing it."""
    strength_sweep: bool = False
    """Draw each picture at 0, 0.4, 0.7, 1 and 1.3 times the LoRAs' scales: grid.png has them side by side."""

    num_images: int = 3
    """Pictures for each prompt. Picture i is drawn from seed + i."""
    num_inference_steps: int = 25
    """Steps of the sampler."""
    guidance_scale: float = 7.5
    """How strongly the prompt steers; 1 switches classifier-free guidance off."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that is brought back to the contrast of the unguided one, from 0 to 1."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide from START to STOP only, shares of the way from pure noise (0) to the picture (1). Outside it a network
    call does half the work."""
    scheduler: Scheduler = "dpm++2m"
    """The sampler."""
    karras: bool = False
    """Space the noise levels as in Karras et al., where the sampler has them."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """How the sampler's steps are spread over the diffusion times; what diffusers ends up with if not given."""
    eta: float = 0.0
    """Noise that ddim adds at each step, from 0 (none) to 1 (as ddpm)."""
    clip_skip: int = 0
    """Last layers of the text encoder to leave out, counted as in diffusers; A1111's "Clip skip" is one more."""
    seed: int = 0
    """Seed of the first picture."""
    height: int | None = None
    """Height in pixels; the model's own size if not given."""
    width: int | None = None
    """Width in pixels; the model's own size if not given."""
    init_image: Path | None = None
    """Start from this picture, resized to cover height x width and cut to its middle, instead of from noise alone."""
    strength: float | None = None
    """How far to go back towards noise with --init-image, from just above 0 to 1 (all the way); 0.8 if not given."""

    batch_size: int = 1
    """Pictures drawn at a time. Changes speed, memory and the last bits of a picture."""
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """dtype of the weights; auto is float16 on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes once, then faster."""
    vae_tiling: bool = False
    """Decode pictures larger than the model's own size in tiles, which saves memory."""
    output: Path = Path("samples")
    """Folder for 000.png, 001.png, ... and grid.png."""
    overwrite: bool = False
    """Replace pictures that are there already."""
    from_png: Path | None = None
    """Draw a picture of sample.py again: its options are the defaults, those given here win. Its LoRAs are looked for
    by name here and in output/, or among the files given with --lora."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "batch_size"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "a whole number of at least 1")
        check("guidance_scale", self.guidance_scale, 0 <= self.guidance_scale < 1000, "a number from 0 to 1000")
        check("guidance_rescale", self.guidance_rescale, 0 <= self.guidance_rescale <= 1, "a number from 0 to 1")
        start, stop = self.guidance_interval
        check("guidance_interval", f"{start:g} {stop:g}", 0 <= start < stop <= 1,
              "two shares, START below STOP, from 0 to 1")  # fmt: skip
        check("eta", self.eta, 0 <= self.eta <= 1, "a number from 0 to 1")
        if self.karras and self.scheduler not in KARRAS_SCHEDULERS:
            known = ", ".join(KARRAS_SCHEDULERS)
            raise UsageError(f"--karras means nothing to {self.scheduler}; samplers that take it: {known}.")
        if self.eta and self.scheduler != "ddim":
            raise UsageError(f"--eta {self.eta:g} means nothing to {self.scheduler}; the sampler that takes it: ddim.")
        if "none" in self.lora and len(self.lora) > 1:
            raise UsageError('--lora: "none" goes with no other --lora.')
        check("clip_skip", self.clip_skip, 0 <= self.clip_skip <= 100, "a number of layers, from 0")
        check("seed", self.seed, 0 <= self.seed < 2**63 - self.num_images, "from 0 to 2^63")
        for name in ("height", "width"):
            value = getattr(self, name)
            check(name, value, value is None or 8 <= value <= 8192, "from 8 to 8192 pixels")
        check("strength", self.strength, self.strength is None or 0 < self.strength <= 1, "a number above 0, up to 1")
        if self.strength is not None and self.init_image is None and self.from_png is None:
            raise UsageError("--strength says how far to go from a picture. Give --init-image, or leave it out.")
        if not self.prompt and self.prompts_file is None:
            raise UsageError('no prompt. Give --prompt "8bit illustration of city view" or --prompts-file FILE.')
        for text in (*self.prompt, self.negative_prompt or ""):
            _check_text(text)


def _check_text(text: str) -> None:
    """Refuse what is no prompt. Raises UsageError."""
    if len(text) > MAX_PROMPT:
        raise UsageError(f"a prompt of {len(text)} characters: expected at most {MAX_PROMPT}. Make it shorter.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"the prompt {text[:50]!r} is not text in UTF-8. Write it in UTF-8.")
    if found := _EXTRA_NETWORK.search(text):
        raise UsageError(f"{found[0]!r} in a prompt would be read as words. Give the file with --lora PATH:SCALE.")
