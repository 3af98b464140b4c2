"""Which pictures are trained on, and which are held out: those on which the loss says what was learnt, not what was
remembered.

To reimplement --validation-split: the number of a picture is the first 8 bytes (big-endian) of
SHA-256("minisd/1/split/{seed}/{sha256}"), divided by 2^64, where sha256 is that of its file, in hex; it is held out if
its number is below the share, or is the smallest of all. So a picture that is added, renamed or described anew moves no
other across (unless none is below the share), and files of equal content are on the same side.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minisd.config import TrainConfig
from minisd.data import Example, Survey, read_dataset, survey, with_trigger
from minisd.distributed import Distributed, gather_shares
from minisd.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """Pictures with their captions, trigger word included, and what is known of each, in the same order."""

    examples: Sequence[Example]
    surveys: Sequence[Survey]

    @property
    def names(self) -> list[str]:
        """Names of the files, without folders."""
        return [example.path.name for example in self.examples]

    @property
    def captions(self) -> list[str]:
        """Every caption of every picture."""
        return [caption for example in self.examples for caption in example.captions]

    def those(self, chosen: Sequence[bool]) -> Pictures:
        """The pictures whose flag is set."""
        return Pictures(
            [example for example, flag in zip(self.examples, chosen, strict=True) if flag],
            [found for found, flag in zip(self.surveys, chosen, strict=True) if flag],
        )


def read_pictures(config: TrainConfig, dist: Distributed) -> tuple[Pictures, Pictures | None]:
    """The pictures to train on, and those held out; None without --validation-split and --validation-data.

    Every process looks at a share of the files; all get the same answer.

    Raises:
        DataError: a dataset cannot be used, the split leaves a side empty, or a picture is on both sides.
    """
    if config.validation_data is not None and config.validation_data.resolve() == config.data.resolve():
        raise DataError(
            f"--validation-data {config.validation_data}: this is --data itself, expected pictures that are not "
            "trained on. Give another folder, or --validation-split 0.1."
        )
    pictures = _read(config.data, config.trigger, dist)
    if config.validation_split:
        return _split(pictures, config.validation_split, config.seed)
    if config.validation_data is None:
        return pictures, None
    held_out = _read(config.validation_data, config.trigger, dist)
    trained = {found.sha256 for found in pictures.surveys}
    both = [name for name, found in zip(held_out.names, held_out.surveys, strict=True) if found.sha256 in trained]
    if both:  # refused, not skipped: whoever held pictures out by hand wants to know that it went wrong
        raise DataError(
            f"{str(config.validation_data)!r}: {len(both)} of its {len(held_out.names)} pictures are in --data as well "
            f"({both[0]!r} is one), and what is trained on is not held out. Delete them in one of the two folders."
        )
    return pictures, held_out


def split_number(sha256: str, seed: int) -> float:
    """Where a picture stands in [0, 1]: it is held out below the share. See the head of this file.

    Args:
        sha256: of its file, in hex.
        seed: of the run.
    """
    digest = hashlib.sha256(f"minisd/1/split/{seed}/{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read(folder: Path, trigger: str | None, dist: Distributed) -> Pictures:
    examples = [
        replace(example, captions=tuple(with_trigger(caption, trigger) for caption in example.captions))
        for example in read_dataset(folder)
    ]
    found = survey(examples[dist.rank :: dist.world_size], quiet=not dist.is_main)
    gathered = gather_shares(dist, [[entry.sha256, *entry.size] for entry in found])
    return Pictures(examples, [Survey(sha256, (height, width)) for sha256, height, width in gathered])


def _split(pictures: Pictures, share: float, seed: int) -> tuple[Pictures, Pictures]:
    """Divide by content. Raises DataError if a side is empty."""
    numbers = [split_number(found.sha256, seed) for found in pictures.surveys]
    held_out = [number < share or number == min(numbers) for number in numbers]
    if all(held_out):
        raise DataError(
            f"--validation-split {share}: with --seed {seed} it holds all of {len(numbers)} pictures out, expected "
            "some to train on. Add pictures, or try another --seed, or use --validation-data."
        )
    log.info("%d of %d pictures are held out", sum(held_out), len(held_out))
    return pictures.those([not flag for flag in held_out]), pictures.those(held_out)
