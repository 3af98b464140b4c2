"""Starting train.py, in-process and under torchrun, and reading what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from minisd.config import TrainConfig
from minisd.distributed import Distributed

ROOT = Path(__file__).parents[2]
ALONE = Distributed(0, 1, torch.device("cpu"))


def config_for(tiny_folder, dataset, output, **options):
    defaults = {
        "model": str(tiny_folder),
        "data": dataset,
        "output": output,
        "max_train_steps": 6,
        "gradient_accumulation_steps": 2,
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 1e-3,
        "random_flip": True,
        "caption_dropout": 0.2,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 100,
        "report_to": "none",
    }
    if "global_batch_size" in options:
        del defaults["gradient_accumulation_steps"]
    return TrainConfig(**(defaults | options))


def options_of(config):
    """The command line of a config."""
    words = []
    for name, value in vars(config).items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            for item in value:
                words += [f"--{name}", str(item)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun_command(*words, processes):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*command, *words]


def torchrun(script, *words, processes):
    return subprocess.run(
        torchrun_command(script, *words, processes=processes),
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip


def metrics_of(output):
    """The lines of metrics.jsonl, without what depends on the machine's speed and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "images_per_second", "memory_gb"):
            del line[name]
    return lines


def state_of(output, step):
    """Every byte of a checkpoint that a run's future depends on, and the LoRA file."""
    folder = output / "checkpoints" / f"step-{step:06d}"
    names = ("lora.safetensors", "optim.safetensors", "state.json")
    return [(folder / name).read_bytes() for name in names] + [(output / "lora.safetensors").read_bytes()]
