"""What ends a run rather than spoil it: a loss that is no number, a loss scale that found no ground."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minisd.atomic import write_atomically
from minisd.config import TrainConfig
from minisd.distributed import Distributed, gather
from minisd.errors import NonFiniteError, OutOfMemoryError, translate

# float16 finds its scale within a few steps of the start, and now and then halves it later.
_MOST_SKIPS = 20


def refuse_non_finite(
    output: Path,
    dist: Distributed,
    step: int,
    *,
    mean_loss: float,
    own_loss: float,
    grad_norm: float,
    lr: float,
    loss_scale: float,
    pictures: Sequence[str],
) -> NonFiniteError:
    """The refusal to go on after a loss or gradient that is no number. All processes come here together.

    Args:
        output: gets bad_batch.json with what is known of the step.
        dist: this process among the others.
        step: updates made; this one is not.
        mean_loss: over all processes.
        own_loss: this process's share of it.
        grad_norm: of all.
        lr: learning rate of the step.
        loss_scale: float16's; 1 otherwise.
        pictures: names of this process's files in the step.
    """
    own = {"rank": dist.rank, "loss": str(own_loss), "finite": math.isfinite(own_loss), "pictures": list(pictures)}
    ranks = gather(dist, own)
    blamed = [entry for entry in ranks if not entry["finite"]] or ranks
    facts = {"step": step + 1, "loss": str(mean_loss), "grad_norm": str(grad_norm), "lr": lr, "loss_scale": loss_scale}
    if dist.is_main:
        write_atomically(output / "bad_batch.json", json.dumps({**facts, "ranks": ranks}, indent=2).encode())
    where = "; ".join(f"rank {entry['rank']}: {', '.join(entry['pictures'])}" for entry in blamed)
    return NonFiniteError(
        f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}, learning rate {lr:g}, loss scale "
        f"{loss_scale:g} ({where}). Nothing was updated or saved; see bad_batch.json. Lower --learning-rate, or use "
        "--mixed-precision bf16 or no."
    )


def check_loss_scale(step: int, skipped_in_a_row: int, loss_scale: float) -> None:
    """Stop when float16 overflows at every scale. Raises NonFiniteError."""
    if skipped_in_a_row >= _MOST_SKIPS or loss_scale < 1:
        raise NonFiniteError(
            f"step {step}: float16 gradients overflowed {skipped_in_a_row} times in a row, down to a loss scale of "
            f"{loss_scale:g}. Use --mixed-precision bf16 or no."
        )


@contextmanager
def naming_sizes(config: TrainConfig) -> Iterator[None]:
    """Say with a failure for lack of memory what the sizes were. Raises OutOfMemoryError in its place."""
    try:
        yield
    except Exception as error:
        known = translate(error)
        if not isinstance(known, OutOfMemoryError) or "--train-batch-size" in str(known):
            raise
        resolution = "the model's own" if config.resolution is None else config.resolution
        raise OutOfMemoryError(
            f"{known} (--train-batch-size {config.train_batch_size}, --resolution {resolution}, --rank {config.rank})"
        ) from error
