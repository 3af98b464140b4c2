"""Run train.py's loop and keep every step's gradients, as they are after the all-reduce and before clipping.

Used in-process, and under torchrun as `gradient_probe.py OUT.safetensors TRAIN-OPTIONS`.
"""

import sys
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch

import train
from minisd.config import TrainConfig, parse_args
from minisd.distributed import process_group


def gradients_of_run(config):
    """{"step/parameter index": gradient} of a whole run; the same on every rank."""
    kept = {}
    steps = iter(range(1_000_000))
    original = torch.nn.utils.clip_grad_norm_

    def keep(parameters, max_norm):
        step = next(steps)
        kept.update({f"{step}/{i:03d}": p.grad.clone() for i, p in enumerate(parameters)})
        return original(parameters, max_norm)

    with process_group() as dist, mock.patch.object(torch.nn.utils, "clip_grad_norm_", keep):
        train.train(config, dist)
        return kept, dist.rank


if __name__ == "__main__":
    gradients, rank = gradients_of_run(parse_args(TrainConfig, sys.argv[2:]))
    safetensors.torch.save_file(gradients, Path(sys.argv[1]).with_suffix(f".rank{rank}.safetensors"))
