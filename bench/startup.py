"""Time from a command to its first sign of life: --help, and the first training step of the pocket model.

    python bench/startup.py

Prints a markdown table and the same figures as JSON: medians in seconds of fresh processes, after one that warms the
disk cache up. The training command is the demo's, with one step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minisd is run from its folder, not installed

from minisd.pocket.demo import training_options, write_dataset  # noqa: E402

# What train.py does before its first step that can be done without it, one after the other in one process.
PARTS = """
import json, time
marks = [time.perf_counter()]
def mark():
    marks.append(time.perf_counter())
import torch
mark()
import train
mark()
from minisd.weights import load_model
load_model("pocket")
mark()
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""


@dataclass(frozen=True, kw_only=True)
class StartupConfig:
    """Time from a command to its first sign of life."""

    repeats: int = 5
    """Processes of each kind; the median counts."""


def main() -> None:
    """Measure, and print the table and the JSON."""
    repeats = tyro.cli(StartupConfig).repeats
    figures = {
        "train.py --help": median(lambda: seconds_of("train.py", "--help"), repeats),
        "sample.py --help": median(lambda: seconds_of("sample.py", "--help"), repeats),
        **training_figures(repeats),
    }
    machine = {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],  # of the last five minutes; about 1 if nothing else ran
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    print("| what | seconds |\n|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {seconds:.2f} |")
    print(json.dumps({"seconds": {name: round(value, 3) for name, value in figures.items()}, "machine": machine}))


def training_figures(repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "dataset"
        write_dataset(data)
        runs = [first_step(data, Path(folder) / f"run{index}") for index in range(repeats + 1)]
    total, step = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    parts = [json.loads(output_of("-c", PARTS)) for _ in range(repeats)]
    torch, others, load = (statistics.median(column) for column in zip(*parts, strict=True))
    return {
        "train.py, command to first step": total,
        "- importing torch": torch,
        "- importing the rest": others,
        "- loading the pocket model": load,
        "- the step": step,
        "- what is left: Python, reading 100 pictures, encoding them": total - torch - others - load - step,
    }


def median(measure: Callable[[], float], repeats: int) -> float:
    measure()
    return statistics.median(measure() for _ in range(repeats))


def output_of(*words: str) -> str:
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def seconds_of(*words: str) -> float:
    started = time.perf_counter()
    output_of(*words)
    return time.perf_counter() - started


def first_step(data: Path, output: Path) -> tuple[float, float]:
    """Seconds from the start of the training command to the line of its first step, and of the step alone."""
    options = [word for name, value in training_options(1).items() for word in option_words(name, value)]
    metrics = output / "metrics.jsonl"
    words = [sys.executable, "train.py", "--data", str(data), "--output", str(output), *options]
    started = time.perf_counter()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            if process.poll() is not None:
                sys.exit(process.stderr.read() if process.stderr else "train.py failed")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        process.communicate()  # it goes on to write its checkpoint and its LoRA file
    return seconds, json.loads(metrics.read_text().splitlines()[0])["seconds"]


def option_words(name: str, value: object) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


if __name__ == "__main__":
    main()
