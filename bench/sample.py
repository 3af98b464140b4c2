"""minisd against diffusers: seconds a picture and pictures a second, 25 steps of DPM++ 2M with guidance.

    python bench/sample.py                                    a small model on the CPU, some minutes
    python bench/sample.py --modes eager --steps 5            the same without compiling, a minute
    python bench/sample.py --device cuda                      SD 1.5 at 512 pixels

Both programs draw the same picture from the same random weights, in turns, in one process: prompt through CLIP, the
guided reverse process, VAE, and the picture as PIL has it. Before anything is timed, their latents must agree.

"compiled" is what `sample.py --compile` does, for both: torch.compile of the UNet and of the VAE's decoder, with the
weights channels-last on CUDA.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import diffusers
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from models import SIZES, Size, Weights, encoders, random_weights, unet_on_meta
from train_step import clock_of, machine, quartiles

from minisd.ddpm import NoiseSchedule, NoiseScheduleConfig
from minisd.families import ModelConfigs
from minisd.images import to_pil
from minisd.sample_setup import compile_networks
from minisd.sampling import SamplingSettings, decode, denoise
from minisd.single_file import tokenizers
from minisd.text import CLIP, TextEncoder
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from minisd.weights import StableDiffusion, suits_channels_last

PROMPT, NEGATIVE = "8bit illustration of city view", "blurred, text"
GUIDANCE = 7.5
Mode = Literal["eager", "compiled"]
TABLE = """\
| batch | | seconds a picture | pictures/s | times minisd's (quartiles) |
|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """minisd against diffusers, picture by picture."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to draw."""
    size: Literal["tiny", "small", "sd15"] | None = None
    """Widths of the model; by default sd15 on a GPU and small on a CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the weights; by default float16 on a GPU and float32 on a CPU, as in sample.py."""
    steps: int = 25
    """Steps of DPM++ 2M."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Pictures drawn at a time."""
    modes: tuple[Mode, ...] = ("eager", "compiled")
    """Which of the two to compare."""
    repeats: int = 5
    """Timed draws of each program in each comparison."""
    threads: int = 1
    """On a CPU. With one, processor time is counted: other programs on the machine then hardly disturb."""
    minutes: float = 9.0
    """No comparison is begun after this."""
    output: Path = Path("sample.json")
    """Where the figures go, rewritten after each comparison."""


class Contestant(Protocol):
    """A program that draws."""

    name: str

    def latents(self, batch_size: int, steps: int) -> Tensor:
        """What the reverse process ends with: [B, 4, h, w]."""
        ...

    def draw(self, batch_size: int, steps: int) -> Sequence[Any]:
        """Pictures of PIL, one for each seed from 0."""
        ...


class Minisd:
    """What sample.py does between loading and saving."""

    name = "minisd"

    def __init__(self, size: Size, weights: Weights, parts: Any, dtype: torch.dtype, mode: Mode) -> None:
        vae, text_encoder, tokenizer = parts
        device = next(text_encoder.parameters()).device
        unet = unet_on_meta(size)
        unet.load_state_dict({key: value.to(dtype, copy=True) for key, value in weights.items()}, assign=True)
        with torch.device("meta"):
            own_vae = AutoencoderKL(AutoencoderKLConfig.from_json(dict(vae.config)))
        own_vae.load_state_dict({key: value.clone() for key, value in vae.state_dict().items()}, assign=True)
        configs = ModelConfigs({}, {}, zeros_when_absent=False)
        schedule = NoiseSchedule(NoiseScheduleConfig())
        text = TextEncoder([CLIP(text_encoder, tokenizer)])
        unet.eval().requires_grad_(False)
        if suits_channels_last(device):
            unet.to(memory_format=torch.channels_last)
        self.model = StableDiffusion("random", Path(), configs, unet, own_vae.eval(), text, schedule)
        self.side = size.latent * self.model.vae.pixels_per_latent
        if mode == "compiled":
            compile_networks(self.model)

    def latents(self, batch_size: int, steps: int) -> Tensor:
        settings = SamplingSettings(
            height=self.side, width=self.side, negative_prompt=NEGATIVE, num_inference_steps=steps,
            guidance_scale=GUIDANCE,
        )  # fmt: skip
        for latents in denoise(self.model, PROMPT, range(batch_size), settings):  # noqa: B007
            pass
        return latents

    def draw(self, batch_size: int, steps: int) -> Sequence[Any]:
        return to_pil(decode(self.model, self.latents(batch_size, steps)))


class Diffusers:
    """StableDiffusionPipeline, without its safety checker and progress bar."""

    name = "diffusers"

    def __init__(self, size: Size, weights: Weights, parts: Any, dtype: torch.dtype, mode: Mode) -> None:
        vae, text_encoder, tokenizer = parts
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**size.unet_config, sample_size=size.latent)
        unet.load_state_dict({key: value.to(dtype, copy=True) for key, value in weights.items()}, assign=True)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        self.pipe = diffusers.StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet.eval(), scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)
        self.side = size.latent * self.pipe.vae_scale_factor
        if mode == "compiled":
            if self.pipe.device.type == "cuda":
                self.pipe.unet.to(memory_format=torch.channels_last)
                self.pipe.vae.to(memory_format=torch.channels_last)
            self.pipe.unet.compile(dynamic=False)
            self.pipe.vae.decoder.compile(dynamic=False)

    def _call(self, batch_size: int, steps: int, output_type: str) -> Any:
        return self.pipe(
            [PROMPT] * batch_size, height=self.side, width=self.side, num_inference_steps=steps,
            guidance_scale=GUIDANCE, negative_prompt=[NEGATIVE] * batch_size, output_type=output_type,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch_size)],
        ).images  # fmt: skip

    def latents(self, batch_size: int, steps: int) -> Tensor:
        return self._call(batch_size, steps, "latent")

    def draw(self, batch_size: int, steps: int) -> Sequence[Any]:
        return self._call(batch_size, steps, "pil")


def main() -> None:
    """Compare, write the JSON, and print the table."""
    config = tyro.cli(BenchConfig)
    diffusers.utils.logging.set_verbosity_error()  # it warns at every cast of its VAE
    deadline = time.monotonic() + 60 * config.minutes
    device, gpu = torch.device(config.device), config.device == "cuda"
    if not gpu:
        torch.set_num_threads(config.threads)
    name = config.size or ("sd15" if gpu else "small")
    dtype = getattr(torch, config.dtype or ("float16" if gpu else "float32"))
    size = SIZES[name]
    weights = dict(random_weights(size, device))
    weights["conv_out.weight"] = 0.1 * weights["conv_out.weight"]  # or guidance would overflow float16
    report: dict[str, Any] = {
        **machine(device),
        "size": name,
        "dtype": str(dtype),
        "steps": config.steps,
        "agreement": agreement(size, weights, device),
        "comparisons": [],
        "left_out": [],
    }
    where = report["gpu"] or f"CPU, threads: {report['threads']}"
    print(f"{where}; {name}, {8 * size.latent} pixels, {config.steps} steps, {dtype}")
    print(f"latents differ by {report['agreement']:.1e} of their size in float32\n{TABLE}")
    for mode in config.modes:
        for batch_size in config.batch_sizes:
            if time.monotonic() > deadline:
                report["left_out"].append([mode, batch_size])
                continue
            figures = comparison(config, size, weights, device, dtype, mode, batch_size)
            report["comparisons"].append(figures)
            print(rows(figures), flush=True)
            config.output.write_text(json.dumps(report, indent=1))
    config.output.write_text(json.dumps(report, indent=1))
    if report["left_out"]:
        print(f"\nleft out for want of time (mode, batch): {report['left_out']}")


def parts_of(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A VAE and a text encoder with random weights, and CLIP's tokenizer."""
    torch.manual_seed(0)
    vae, text_encoder = (part.to(device, dtype).eval().requires_grad_(False) for part in encoders(size))
    return vae, text_encoder, tokenizers("sd1")[0]


def agreement(size: Size, weights: Weights, device: torch.device) -> float:
    """Largest difference of the two programs' latents after two steps in float32, over the largest latent.

    Raises:
        RuntimeError: they do not compute the same.
    """
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        parts = parts_of(size, device, torch.float32)
        ours, theirs = (
            contestant(size, weights, parts, torch.float32, "eager").latents(1, 2) for contestant in (Minisd, Diffusers)
        )
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < 1e-3:
        raise RuntimeError(f"minisd and diffusers do not compute the same: {difference}")
    return difference


def comparison(
    config: BenchConfig, size: Size, weights: Weights, device: torch.device, dtype: torch.dtype, mode: Mode, batch: int
) -> dict[str, Any]:
    """Build both, warm them up (they compile then), and let them draw in turns."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    parts = [parts_of(size, device, dtype) for _ in range(2)]  # each its own: compiling changes them
    contestants: list[Contestant] = [
        contestant(size, weights, part, dtype, mode)
        for contestant, part in zip((Minisd, Diffusers), parts, strict=True)
    ]
    for contestant in contestants:
        for _ in range(2 if device.type == "cuda" else 1):
            contestant.draw(batch, config.steps)
    seconds: list[list[float]] = [[], []]
    for turn in range(config.repeats):
        for index in (turn % 2, 1 - turn % 2):
            seconds[index].append(timed(contestants[index], batch, config.steps, device))
    return {
        "mode": mode,
        "batch_size": batch,
        "seconds": {c.name: s for c, s in zip(contestants, seconds, strict=True)},
    }


def timed(contestant: Contestant, batch: int, steps: int, device: torch.device) -> float:
    """Seconds of a batch."""
    clock = clock_of(device)
    started = clock()
    contestant.draw(batch, steps)  # ends with pictures on the CPU, so it has waited for the device
    return clock() - started


def rows(figures: dict[str, Any]) -> str:
    """Lines of the table: the ratio is that of draws made in the same turn, with its quartiles."""
    lines = []
    ours, batch = figures["seconds"]["minisd"], figures["batch_size"]
    for name, seconds in figures["seconds"].items():
        each = statistics.median(seconds) / batch
        ratio = ""
        if name != "minisd":
            low, middle, high = quartiles([theirs / own for theirs, own in zip(seconds, ours, strict=True)])
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {batch} | {name}, {figures['mode']} | {each:.3f} | {1 / each:.3f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
