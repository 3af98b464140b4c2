"""Data parallel in the open: ranks, the process group, and one flat all-reduce of the gradients.

Adapters have a few megabytes of gradients. One all-reduce of one flat buffer at the end of a step replaces the
DistributedDataParallel wrapper: no `no_sync`, no prefixes in parameter names, and the same order of additions after a
resume. (The wrapper rebuilds its buckets after its first backward, so a resumed run would reduce in another order.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Distributed:
    """Where this process stands: its rank among world_size processes, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


@contextmanager
def process_group(timeout: float = 1800.0) -> Iterator[Distributed]:
    """Join the process group that torchrun describes in the environment; alone without torchrun.

    NCCL on GPUs (one a process), gloo on CPU.

    Args:
        timeout: seconds after which a collective that a peer does not join raises, instead of hanging for ever.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Distributed(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Distributed(rank, world_size, device)
    finally:
        torch.distributed.destroy_process_group()


def sum_gradients(dist: Distributed, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place, with one all-reduce over one flat buffer in the given order.

    Every parameter must have a gradient: one that is missing on one rank only would shift all that follow.
    """
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    if dist.world_size == 1:
        return
    present = [gradient for gradient in gradients if gradient is not None]
    flat = torch.cat([gradient.flatten() for gradient in present])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in present])
    torch._foreach_copy_(present, [p.view_as(g) for p, g in zip(pieces, present, strict=True)])


def sum_over_ranks(dist: Distributed, value: Tensor) -> Tensor:
    """The sum of a small tensor over all ranks, on every rank; the argument is not changed."""
    if dist.world_size == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total


def wait_for_all(dist: Distributed) -> None:
    """Return when every rank has come here."""
    if dist.world_size > 1:
        torch.distributed.barrier()
