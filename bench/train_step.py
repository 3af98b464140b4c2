"""minisd against diffusers + peft + accelerate: seconds a training step, memory, and share of the device's peak.

    python bench/train_step.py                                       a small model on the CPU, some minutes
    python bench/train_step.py --device cuda --everything            SD 1.5 at 512 pixels, below ten minutes

Three programs (contestants.py) make the same LoRA step on the same random weights, in turns, in one process: a machine
that slows down slows all of them. Before anything is timed, they must agree on the loss and on the gradients.

Where only torch and transformers are installed, carry the peers along as wheels:

    pip download --no-deps -d wheels diffusers peft accelerate tyro docstring-parser typeguard psutil importlib-metadata
    pip install --no-index --no-deps wheels/*.whl
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import accelerate
import diffusers
import peft
import torch
import tyro
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from contestants import Contestant, Minisd, Peer, flops_of_image, make_accelerator  # noqa: E402
from models import SIZES, Layout, Setting, Size, Weights, random_weights  # noqa: E402

from minisd.lora import lora_parameters  # noqa: E402

TABLE = """\
| batch | | layout | seconds a step | images/s | share of peak | peak memory, GiB | times minisd's (quartiles) |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """minisd against diffusers + peft, training step by training step."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    size: Literal["tiny", "small", "sd15"] | None = None
    """Widths of the model; by default sd15 on a GPU and small on a CPU."""
    dtype: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision as train.py names it; by default bf16 on a GPU and no on a CPU."""
    batch_sizes: tuple[int, ...] | None = None
    """Images a step; by default 1 4 8 16 on a GPU and 1 4 on a CPU."""
    steps: int = 10
    """Timed steps of each contestant in each comparison."""
    compile: bool = False
    """All through torch.compile."""
    layout: Layout = "shipped"
    """Memory layout of the UNet: as each program has it of its own accord, or one for all."""
    everything: bool = False
    """Eager and compiled, as shipped and channels-last."""
    threads: int = 1
    """On a CPU. With one, processor time is counted: other programs on the machine then hardly disturb."""
    minutes: float = 9.0
    """No comparison is begun that would end later than this."""
    output: Path = Path("train_step.json")
    """Where the figures go, rewritten after each comparison."""


def main() -> None:
    """Compare, write the JSON, and print the table."""
    config = tyro.cli(BenchConfig)
    warnings.filterwarnings("ignore", message=".*no gradient clipping will occur.*")  # see contestants.Peer
    deadline = time.monotonic() + 60 * config.minutes
    device, gpu = torch.device(config.device), config.device == "cuda"
    if not gpu:
        torch.set_num_threads(config.threads)
    size = SIZES[config.size or ("sd15" if gpu else "small")]
    precision = config.dtype or ("bf16" if gpu else "no")
    weights = random_weights(size, device)
    flops = flops_of_image(size)
    peak = matmul_peak(device, Setting(size, device, precision, 1).dtype)
    report: dict[str, Any] = {
        **machine(device),
        "size": config.size or ("sd15" if gpu else "small"),
        "precision": precision,
        "flops_of_image": flops,
        "matmul_peak": peak,
        "agreement": agreement(size, device, weights),
        "comparisons": [],
        "left_out": [],
    }
    print(f"{flops / 1e9:.0f} GFLOP an image; matrix products reach {peak / 1e12:.2f} TFLOP/s; {report['agreement']}")
    print(TABLE)

    modes = [(config.compile, config.layout)]
    if config.everything:
        modes = [(False, "shipped"), (False, "channels-last"), (True, "shipped"), (True, "channels-last")]
    batch_sizes = config.batch_sizes or ((1, 4, 8, 16) if gpu else (1, 4))
    took: dict[bool, float] = {}  # what a comparison last cost, eager or compiled
    for (compiled, layout), batch_size in product(modes, batch_sizes):
        setting = Setting(size, device, precision, batch_size, compile=compiled, layout=layout)
        started = time.monotonic()
        if started + took.get(compiled, 200 if compiled else 0) > deadline:
            report["left_out"].append([batch_size, compiled, layout])
            continue
        figures = comparison(setting, weights, config.steps, deadline)
        took[compiled] = 1.3 * (time.monotonic() - started)  # the next batch is larger
        report["comparisons"].append(figures)
        config.output.write_text(json.dumps(report, indent=1))
        print(rows(figures, flops, peak), flush=True)
    config.output.write_text(json.dumps(report, indent=1))
    if report["left_out"]:
        print(f"\nleft out for want of time (batch, compiled, layout): {report['left_out']}")


def comparison(setting: Setting, weights: Weights, steps: int, deadline: float) -> dict[str, Any]:
    """Build the contestants one by one, warm them up, and let them step in turns."""
    gc.collect()  # the last contestants: accelerate's wrappers refer to themselves
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # or a new batch size would be compiled as an unknown one, which is slower
    accelerator = make_accelerator(setting)
    gpu = setting.device.type == "cuda"
    contestants: list[Contestant] = []
    own: list[int] = []  # bytes each one holds between steps
    for build in (
        lambda: Minisd(setting, weights),
        lambda: Peer(setting, weights, accelerator, cached=False),
        lambda: Peer(setting, weights, accelerator, cached=True),
    ):
        before = torch.cuda.memory_allocated() if gpu else 0
        contestants.append(build())
        for _ in range(3 if gpu else 1):
            contestants[-1].step()
        own.append(torch.cuda.memory_allocated() - before if gpu else 0)

    seconds: list[list[float]] = [[] for _ in contestants]
    memory = [0 for _ in contestants]
    for turn in range(steps):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for index in ((turn + place) % len(contestants) for place in range(len(contestants))):
            duration, used = timed(contestants[index], setting.device)
            seconds[index].append(duration)
            memory[index] = max(memory[index], used + own[index])
    return {
        "batch_size": setting.batch_size,
        "compile": setting.compile,
        "layout": setting.layout,
        "seconds": {c.name: s for c, s in zip(contestants, seconds, strict=True)},
        "memory": {c.name: m for c, m in zip(contestants, memory, strict=True)} if gpu else None,
    }


def timed(contestant: Contestant, device: torch.device) -> tuple[float, int]:
    """Seconds of a step, and the bytes it needs at its height beyond what is held between steps."""
    clock, gpu = clock_of(device), device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if gpu else 0
    started = clock()
    contestant.step()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started, torch.cuda.max_memory_allocated() - held if gpu else 0


def rows(figures: dict[str, Any], flops: float, peak: float) -> str:
    """Lines of the table: the ratios are those of steps made in the same turn, with their quartiles."""
    lines = []
    ours = figures["seconds"]["minisd"]
    mode = "compiled" if figures["compile"] else "eager"
    for name, seconds in figures["seconds"].items():
        median = statistics.median(seconds)
        rate = figures["batch_size"] / median
        memory = f"{figures['memory'][name] / 2**30:.2f}" if figures["memory"] else "not measured"
        ratio = ""
        if name != "minisd":
            low, middle, high = quartiles([theirs / own for theirs, own in zip(seconds, ours, strict=True)])
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        cells = [figures["batch_size"], f"{name}, {mode}", figures["layout"], f"{median:.3f}", f"{rate:.2f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{rate * flops / peak:.0%}', memory, ratio]))} |")
    return "\n".join(lines)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, method="inclusive")
    return low, middle, high


def agreement(size: Size, device: torch.device, weights: Weights) -> dict[str, float]:
    """Relative differences of loss and gradients, minisd to diffusers, in float32 with the same adapters.

    Raises:
        RuntimeError: they are not computing the same.
    """
    setting = Setting(size, device, "no", 2)
    torch.manual_seed(0)  # of the adapters below: the same difference in every run
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        ours, theirs = Minisd(setting, weights), Peer(setting, weights, make_accelerator(setting), cached=True)
        their_parameters = adapters(theirs.unet)
        own_parameters = dict(lora_parameters(ours.unet))
        with torch.no_grad():
            for name, parameter in own_parameters.items():
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
                their_parameters[name].copy_(parameter)
        batch = ours.batch.to(device)
        assert batch.moments is not None
        mean, logvar = batch.moments.unbind(dim=1)
        latents = (mean + torch.exp(0.5 * logvar) * batch.posterior_noise) * ours.vae.config.scaling_factor
        loss = ours.loss(batch)
        loss.backward()
        their_loss = theirs.loss(latents, batch.noise, batch.timesteps, batch.encoder_hidden_states)
        their_loss.backward()
        own, other = (gradient(parameters, own_parameters) for parameters in (own_parameters, their_parameters))
    differences = {
        "loss": abs(loss.item() - their_loss.item()) / their_loss.item(),
        "gradients": ((own - other).norm() / other.norm()).item(),
    }
    if not max(differences.values()) < 1e-3:  # rounding in float32; another computation differs by tenths
        raise RuntimeError(f"minisd and diffusers do not compute the same: {differences}")
    return differences


def adapters(unet: nn.Module) -> dict[str, Tensor]:
    """The adapter weights of peft under minisd's names."""
    names = {"lora_A.default.weight": "adapters.default.lora_down", "lora_B.default.weight": "adapters.default.lora_up"}
    found = {}
    for name, parameter in unet.named_parameters():
        for theirs, ours in names.items():
            if name.endswith(theirs):
                found[name.replace(theirs, ours)] = parameter
    return found


def gradient(parameters: dict[str, Any], names: Any) -> Tensor:
    return torch.cat([parameters[name].grad.flatten() for name in names])


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time where all the work is one thread of this process."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two large square matrices, the best of several."""
    sides, repeats = ((4096, 8192), 20) if device.type == "cuda" else ((1024, 2048), 5)
    best, clock = 0.0, clock_of(device)
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * side**3 / (clock() - started))
    return best


def machine(device: torch.device) -> dict[str, Any]:
    libraries = {module.__name__: module.__version__ for module in (torch, diffusers, peft, accelerate)}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **libraries,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


if __name__ == "__main__":
    main()
