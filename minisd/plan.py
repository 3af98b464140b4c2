"""Which pictures each step of a run shows: the plan, a pure function of the dataset, the batch size and the seed.

An epoch is a permutation of the pictures, cut into global batches of one bucket each; a bucket's last batch is topped
up from its own bucket, and the batches are shuffled. So every picture is in every epoch, nothing is dropped, a set
smaller than a batch included, and one step needs one shape, however it is split over processes and micro-steps.

To reimplement: order = permutation(seed, epoch, pictures) (draws.py); the pictures of each bucket, buckets by ascending
size, in that order, followed by as many of them again from the first as fill the last batch; cut into batches; batch b
of the epoch is the one at batch_order(seed, epoch, batches)[b]. Step s is batch s mod (batches an epoch) of epoch
s div (batches an epoch); its samples have the positions s * G to (s + 1) * G - 1, G pictures a step.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from minisd import draws
from minisd.buckets import Geometry, Size


class TrainingPlan:
    """The batches of a run.

    Args:
        geometries: of each picture; its bucket is its size.
        images_per_step: G.
        seed: of the run.

    Attributes:
        images: number of pictures.
        sizes: the bucket of each picture.
        buckets: size -> the pictures in it, buckets by ascending size.
        steps_per_epoch: global batches in an epoch.
    """

    def __init__(self, geometries: Sequence[Geometry], images_per_step: int, seed: int) -> None:
        assert geometries
        self.images, self.images_per_step, self.seed = len(geometries), images_per_step, seed
        self.sizes = [geometry.size for geometry in geometries]
        self.buckets: dict[Size, list[int]] = {size: [] for size in sorted(set(self.sizes))}
        for index, size in enumerate(self.sizes):
            self.buckets[size].append(index)
        self.steps_per_epoch = sum(-(-len(bucket) // images_per_step) for bucket in self.buckets.values())
        self._epoch = (-1, [[0]])

    @property
    def repeats_per_epoch(self) -> int:
        """Samples of an epoch that top a batch up, beyond one of each picture."""
        return self.steps_per_epoch * self.images_per_step - self.images

    def batch(self, step: int) -> list[int]:
        """The pictures of a step, counted from 0: G indices, one bucket."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches_of(epoch))
        return self._epoch[1][place]

    def index(self, position: int) -> int:
        """The picture at a position of the run."""
        return self.batch(position // self.images_per_step)[position % self.images_per_step]

    def _batches_of(self, epoch: int) -> list[list[int]]:
        members: dict[Size, list[int]] = {size: [] for size in self.buckets}
        for index in draws.permutation(self.seed, epoch, self.images):
            members[self.sizes[index]].append(index)
        batches = []
        for bucket in members.values():
            full = -(-len(bucket) // self.images_per_step) * self.images_per_step
            filled = list(islice(cycle(bucket), full))
            batches += [filled[i : i + self.images_per_step] for i in range(0, full, self.images_per_step)]
        return [batches[place] for place in draws.batch_order(self.seed, epoch, len(batches))]


def positions_of(
    step: int, rank: int, world_size: int, train_batch_size: int, accumulation_steps: int, micro_step: int
) -> range:
    """The positions of the run in one micro-batch of one process.

    Step s of G = world_size x accumulation_steps x train_batch_size samples holds the positions [s G, (s + 1) G),
    however G is split: cut into blocks of train_batch_size, of which the first world_size blocks are micro-step 0 of
    rank 0, 1 ..., the next ones micro-step 1, and so on.
    """
    block = (step * accumulation_steps + micro_step) * world_size + rank
    return range(block * train_batch_size, (block + 1) * train_batch_size)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one process, as lists of positions (torch's batch sampler).

    From `start_step` up to `max_steps`, the first step not made; the others are the arguments of `positions_of`.
    """

    start_step: int
    max_steps: int
    rank: int
    world_size: int
    train_batch_size: int
    accumulation_steps: int

    def __iter__(self) -> Iterator[list[int]]:
        split = (self.rank, self.world_size, self.train_batch_size, self.accumulation_steps)
        for step in range(self.start_step, self.max_steps):
            for micro_step in range(self.accumulation_steps):
                yield list(positions_of(step, *split, micro_step))

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step) * self.accumulation_steps


def picture_table(names: Sequence[str], pictures: Sequence[Size], geometries: Sequence[Geometry]) -> str:
    """What becomes of each picture, as CSV: its size, its bucket, and the share of it that is cut away.

    Args:
        names: of the files.
        pictures: their (height, width).
        geometries: what is cut out of them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "width", "height", "bucket_width", "bucket_height", "cropped_share"])
    for name, (height, width), geometry in zip(names, pictures, geometries, strict=True):
        row = [name, width, height, geometry.size[1], geometry.size[0], f"{geometry.cropped_share:.4f}"]
        writer.writerow(row)
    return text.getvalue()


def describe(plan: TrainingPlan, geometries: Sequence[Geometry], max_train_steps: int) -> str:
    """The plan in words, for the user to check before anything runs: pictures, buckets, steps, epochs, cropping."""
    epochs = max_train_steps / plan.steps_per_epoch
    shares = [geometry.cropped_share for geometry in geometries]
    lines = [
        f"{plan.images} images, {plan.images_per_step} a step, {plan.steps_per_epoch} steps an epoch, "
        f"{max_train_steps} steps in all ({epochs:.1f} epochs)",
        f"cropped away: {sum(shares) / len(shares):.1%} of a picture on average, {max(shares):.1%} at most",
    ]
    shown = sorted(plan.buckets.items(), key=lambda item: (-len(item[1]), item[0]))
    names = [f"{width} x {height} ({len(members)})" for (height, width), members in shown]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    lines.insert(1, f"buckets, width x height (images): {', '.join(names[:12])}{more}")
    if plan.repeats_per_epoch:
        lines.append(f"samples an epoch that come again, to fill each bucket's last batch: {plan.repeats_per_epoch}")
    return "\n".join(lines)
