"""How long everything random about one sample takes, and reading what is cached for it, on one core.

python bench/draws.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # minisd is run from its folder, not installed

from minisd import draws
from minisd.tensor_cache import TensorCache


@dataclass(frozen=True, kw_only=True)
class DrawsBench:
    """Milliseconds a sample at Stable Diffusion 1.5's size: latents of 4 x 64 x 64, 77 tokens of 768."""

    repeats: int = 2000
    """How often each is timed."""


def draw(position: int) -> None:
    """Draw all there is for a sample."""
    shape = (4, 64, 64)
    draws.noise(0, position, shape)
    draws.posterior_noise(0, position, shape)
    draws.timestep(0, position, 1000)
    draws.flip(0, position)
    draws.crop(0, position)
    draws.caption_dropout(0, position)
    draws.caption_choice(0, position, 3)
    draws.noise_offset(0, position, 4)


def milliseconds(work: Callable[[int], object], repeats: int) -> str:
    """Median and 95th percentile of processor time."""
    times = []
    for position in range(repeats):
        started = time.process_time()
        work(position)
        times.append(1000 * (time.process_time() - started))
    return f"{statistics.median(times):.3f} | {statistics.quantiles(times, n=20)[-1]:.3f}"


def main(config: DrawsBench) -> None:
    """Time both and print a table."""
    torch.set_num_threads(1)
    print("| what | median, ms | 95 %, ms |\n|---|---|---|")
    print(f"| all draws | {milliseconds(draw, config.repeats)} |")
    with tempfile.TemporaryDirectory() as folder:
        cache = TensorCache(Path(folder))
        for number in range(100):
            cache.add(f"moments{number}", torch.randn(2, 4, 64, 64).bfloat16())
            cache.add(f"text{number}", torch.randn(77, 768).bfloat16())
        cache.flush()
        read = milliseconds(lambda i: (cache[f"moments{i % 100}"], cache[f"text{i % 100}"]), config.repeats)
    print(f"| reading moments and embedding from the cache, bfloat16, hashes checked | {read} |")


if __name__ == "__main__":
    main(tyro.cli(DrawsBench))
