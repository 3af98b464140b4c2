"""Time and memory to clean a folder of pictures: `prepare_data.py clean`, with 250 and with 1,000 of them.

    python bench/prepare.py

Writes photo-like pictures of 1024 x 768 pixels, three JPEGs to a PNG, a tenth of them smaller copies of others. Prints
a markdown table and the same figures as JSON: seconds of a fresh process, and the most memory that it and the largest
of its workers took. Memory is to stay the same, however many pictures there are.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1024, 768


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Time and memory to clean a folder of pictures."""

    numbers: tuple[int, ...] = (250, 1000)
    """Of pictures, in a run each."""


def main() -> None:
    """Measure, and print the table and the JSON."""
    numbers = tyro.cli(PrepareConfig).numbers
    with tempfile.TemporaryDirectory() as folder:
        figures = [figures_of(number, Path(folder)) for number in numbers]
    machine = {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],  # of the last five minutes; about 2 if nothing else ran
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    print("| pictures | kept | seconds | pictures/s | MiB, program | MiB, largest worker |\n|---|---|---|---|---|---|")
    for row in figures:
        print("| {pictures} | {kept} | {seconds:.1f} | {rate:.1f} | {parent:.0f} | {worker:.0f} |".format(**row))
    print(json.dumps({"clean": figures, "machine": machine}))


def figures_of(number: int, folder: Path) -> dict[str, Any]:
    source, output = folder / f"source-{number}", folder / f"output-{number}"
    source.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_picture, source), range(number)))
    words = [sys.executable, "prepare_data.py", "clean", "--from", str(source), "--output", str(output)]
    started = time.perf_counter()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), peak_kib(pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        said = process.stderr.read() if process.stderr else ""
    if process.returncode:
        sys.exit(said)
    parent = peaks.pop(process.pid)
    return {
        "pictures": number,
        "kept": len(list((output / "train").glob("*.png"))),
        "seconds": round(seconds, 2),
        "rate": round(number / seconds, 2),
        "parent": round(parent / 1024, 1),
        "worker": round(max(peaks.values()) / 1024, 1),
    }


def write_picture(folder: Path, index: int) -> None:
    """Noise whose amplitude falls with its frequency, as that of photographs does."""
    copy = index % 10 == 9
    rng = np.random.default_rng(index - copy)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    channels = []
    for _ in range(3):
        wave = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        values = np.fft.irfft2(wave / frequency**1.5, (HEIGHT, WIDTH))
        channels.append(values / values.std() * 50 + 128)
    image = Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))
    if copy:
        image = image.resize((WIDTH * 3 // 4, HEIGHT * 3 // 4), Image.Resampling.LANCZOS)
    if index % 4 == 3:
        image.save(folder / f"{index:05d}.png", compress_level=1)
    else:
        image.save(folder / f"{index:05d}.jpg", quality=90)


def family(pid: int) -> list[int]:
    """A process and all that it started, and those in turn."""
    found = [pid]
    for parent in found:
        try:
            text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:  # it ended
            continue
        found += [int(child) for child in text.split()]
    return found


def peak_kib(pid: int) -> int:
    """The most memory that a process held so far (VmHWM); 0 if it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


if __name__ == "__main__":
    main()
