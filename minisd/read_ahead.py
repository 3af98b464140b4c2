"""Worker processes that read ahead of the training loop, and behave: quiet at signals, plain in their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from minisd.errors import MinisdError
from minisd.interruptions import ignore_signals, signals_held


def read_ahead(
    dataset: Dataset[Any],
    *,
    batches: Iterable[list[int]] | None,
    collate: Callable[[list[Any]], Any] | None,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Go through a dataset in order, with worker processes if there are any.

    Args:
        dataset: index -> item.
        batches: the indices of each batch; None for single items, from 0 on.
        collate: makes a batch of a list of items; None for single items.
        num_workers: 0 reads in this process, when an item is asked for.
        pin_memory: put batches into memory that a GPU copies from without waiting (they have a method for it).

    Raises:
        MinisdError: as the dataset raises it, in one line, also from a worker.
    """
    loader = DataLoader(
        dataset,
        batch_size=1 if batches is not None else None,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # or it would draw from the global generator
    )
    with signals_held():
        batches_read = iter(loader)
    try:
        yield from batches_read
    except MinisdError as error:
        # A worker's exception arrives with its traceback in front; the message itself is one line.
        kind = type(error)
        raise kind(str(error).splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from error
