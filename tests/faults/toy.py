"""A trainer small enough to be killed ten times a second, with the checkpoints and the randomness of the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from minisd import draws
from minisd.atomic import write_atomically
from minisd.optimizer import load_optimizer, optimizer_tensors
from tests.faults.harness import CAREFUL, Store

SIDE, SEED = 24, 3


def train(
    output: Path,
    *,
    steps: int,
    every: int,
    keep: int = 2,
    store: Store = CAREFUL,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Train, going on from the newest checkpoint; the result is OUTPUT/lora.safetensors. `begin` is called first."""
    weight = torch.nn.Parameter(draws.noise(SEED, -1, (SIDE, SIDE)))
    named = [("weight", weight)]
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    step = 0
    folder = output / "checkpoints"
    if (newest := store.newest(folder)) is not None:
        step = json.loads((newest / "state.json").read_bytes())["step"]
        with torch.no_grad():
            weight.copy_(safetensors.torch.load((newest / "lora.safetensors").read_bytes())["weight"])
        load_optimizer(optimizer, named, safetensors.torch.load((newest / "optim.safetensors").read_bytes()))
    begin()
    while step < steps:
        x = draws.noise(SEED, step, (4, SIDE))
        loss = (x @ weight - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % every == 0 or step == steps:
            store.save(folder, step, files(step, weight, optimizer))
            store.prune(folder, keep)
    write_atomically(output / "lora.safetensors", safetensors.torch.save({"weight": weight.detach()}))


def files(step: int, weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return {
        "lora.safetensors": safetensors.torch.save({"weight": weight.detach()}),
        "optim.safetensors": safetensors.torch.save(optimizer_tensors(optimizer, [("weight", weight)])),
        "state.json": json.dumps({"step": step}).encode(),
    }
