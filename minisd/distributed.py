"""Data parallel in the open: ranks, the process group, and one flat all-reduce of the gradients.

Adapters have a few megabytes of gradients. One all-reduce of one flat buffer at the end of a step replaces the
DistributedDataParallel wrapper: no `no_sync`, no prefixes in parameter names, and the same order of additions after a
resume. (The wrapper rebuilds its buckets after its first backward, so a resumed run would reduce in another order.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from minisd.errors import UsageError


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

    Raises:
        UsageError: the environment has a part of what torchrun sets, or more processes than GPUs.
    """
    given = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    numbers = [int(value) for value in given.values() if value is not None and value.isdecimal()]
    rank, local_rank, world_size = numbers if len(numbers) == 3 else (0, 0, 1)
    complete = len(numbers) == 3 and rank < world_size and {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
    if set(given.values()) != {None} and not complete:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"the environment has {told}. Start with torchrun, or unset them for one process.")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs. Give torchrun "
                "--nproc-per-node as many, or fewer."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if given["WORLD_SIZE"] is None:
        yield Distributed(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Distributed(rank, world_size, device)
    finally:
        torch.distributed.destroy_process_group()


def set_timeout(dist: Distributed, seconds: float) -> None:
    """Change how long a collective waits for a peer: after the first step a stuck one is found within minutes."""
    if dist.world_size > 1:
        # Public since torch 2.13. (A second group would be public, too, and cost a second set of NCCL buffers.)
        change = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout
        change(timedelta(seconds=seconds))


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
    """The sum of a small tensor of any shape over all ranks, on every rank; the argument is not changed."""
    if dist.world_size == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total


def gather(dist: Distributed, value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks, on every rank. They travel as JSON: nothing is unpickled."""
    if dist.world_size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(dist.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=dist.device) for _ in range(dist.world_size)]
    torch.distributed.all_gather(sizes, torch.tensor([len(data)], device=dist.device))
    longest = int(max(size.item() for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=dist.device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in range(dist.world_size)]
    torch.distributed.all_gather(parts, padded)
    return [json.loads(bytes(p[: int(n)].cpu().numpy())) for p, n in zip(parts, sizes, strict=True)]


def gather_shares(dist: Distributed, share: Sequence[Any]) -> list[Any]:
    """Put a list together again of which each rank has worked on the items [rank::world_size]."""
    shares = gather(dist, list(share))
    total = sum(len(part) for part in shares)
    return [shares[index % dist.world_size][index // dist.world_size] for index in range(total)]


def wait_for_all(dist: Distributed) -> None:
    """Return when every rank has come here."""
    if dist.world_size > 1:
        torch.distributed.barrier()
