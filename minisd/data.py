"""From a folder of captioned pictures to the micro-batches of a run.

Order of the run: the samples have positions 0, 1, 2 ...; every len(examples) positions are an epoch, in which each
picture comes once, in an order of its own. An epoch does not end with a step: the next one starts in the middle of it,
so nothing is dropped or padded. Which position a process trains in which micro-step is `positions_of`; everything
random about a position is in draws.py.

Shapes: B pictures in a micro-batch, R the training resolution.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minisd import draws
from minisd.caption_table import read_table, read_text, resolve_inside
from minisd.config import TrainConfig
from minisd.distributed import Distributed
from minisd.errors import DataError
from minisd.images import load_image, to_pixel_values

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TABLES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Example:
    """A picture (a regular file inside the dataset, links resolved) and its caption, exactly as written."""

    path: Path
    caption: str


def read_dataset(folder: Path) -> list[Example]:
    """List a dataset: metadata.csv or metadata.jsonl in the folder or its train/, else a .txt beside each picture.

    Pictures that the table does not name are counted in a warning. No picture is opened; see `check_pictures`.

    Returns:
        In the order of the table, or sorted by name; at least one.

    Raises:
        DataError: no such folder, no or two tables, a bad row, a name that leads outside, a picture without a caption.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r}: expected a folder of pictures and captions, got none. Correct --data.")
    root = folder.resolve()
    tables = [place / name for place in (root, root / "train") for name in _TABLES if os.path.lexists(place / name)]
    if len(tables) > 1:
        names = " and ".join(str(table.relative_to(root)) for table in tables)
        raise DataError(f"{str(folder)!r}: expected one table of captions, got {names}. Delete all but one.")
    return _from_table(root, tables[0]) if tables else _from_sidecars(root)


def _from_table(root: Path, table: Path) -> list[Example]:
    """Examples in the rows of a table, whose names are relative to the table's folder."""
    lines: dict[Path, int] = {}
    examples = []
    for row in read_table(table):
        where = f"{str(table)!r}, line {row.line}"
        path = resolve_inside(root, table.parent, row.file_name, where)
        if path in lines:
            raise DataError(f"{where}: {row.file_name!r} has a row already, in line {lines[path]}. Delete one of them.")
        lines[path] = row.line
        examples.append(Example(path, row.caption))
    unlisted = [name for name in _pictures(table.parent) if (table.parent / name).resolve() not in lines]
    if unlisted:
        log.warning("%d pictures have no row in %s and are not used: %s", len(unlisted), table, _some(unlisted))
    return examples


def _from_sidecars(root: Path) -> list[Example]:
    """Examples from the pictures below a folder that have a .txt beside them, which all must have."""
    names = _pictures(root)
    if not names:
        raise DataError(
            f"{str(root)!r}: expected train/metadata.csv (columns file_name,text) or pictures ({' '.join(SUFFIXES)}) "
            "with captions, got neither. Correct --data."
        )
    bare = [name for name in names if not (root / name).with_suffix(".txt").exists()]
    if bare:
        raise DataError(
            f"{str(root)!r}: {len(bare)} of {len(names)} pictures have no caption: {_some(bare)}. Write NAME.txt "
            "beside each, or a metadata.csv with columns file_name,text."
        )

    def inside(name: Path) -> Path:
        return resolve_inside(root, root, name.as_posix(), repr(str(root)))

    return [Example(inside(name), read_text(inside(name.with_suffix(".txt"))).strip()) for name in names]


def _pictures(folder: Path) -> list[Path]:
    """Names below a folder that have a picture's suffix, sorted; hidden ones left out, linked folders not entered."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(name for name in names if not any(part.startswith(".") for part in name.parts))


def _some(names: Sequence[Path]) -> str:
    """The first few names, quoted."""
    return ", ".join(repr(str(name)) for name in names[:3]) + (" and more" if len(names) > 3 else "")


def check_pictures(examples: Sequence[Example]) -> None:
    """Decode every picture once, so that a damaged one ends the run before it begins and not at step 900.

    Raises:
        DataError: a picture cannot be used; names it.
    """
    for example in tqdm(examples, desc="check", unit="picture", disable=None if len(examples) > 200 else True):
        load_image(example.path)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return draws.permutation(seed, epoch, count)


def image_index(position: int, count: int, seed: int) -> int:
    """Which of `count` pictures a position of the run shows. Pure: any epoch's order is drawn from (seed, epoch)."""
    epoch, place = divmod(position, count)
    return _epoch_order(seed, epoch, count)[place]


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
class MicroBatchSampler:
    """The micro-batches of one process from one step up to another, as lists of positions (torch's batch sampler)."""

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


@dataclass(frozen=True)
class Sample:
    """One position of the run: index into the examples, caption, pixel_values [3, R, R] float32 in [-1, 1]."""

    position: int
    index: int
    caption: str
    pixel_values: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of a micro-batch: positions, indices and captions of length B, pixel_values [B, 3, R, R]."""

    positions: list[int]
    indices: list[int]
    captions: list[str]
    pixel_values: Tensor


@dataclass(frozen=True)
class CaptionedImages(Dataset[Sample]):
    """Position of the run -> sample. A picture is decoded each time it comes up, which worker processes hide."""

    examples: Sequence[Example]
    resolution: int
    _: KW_ONLY
    center_crop: bool
    random_flip: bool
    seed: int

    def path_of(self, position: int) -> Path:
        """The picture that a position of the run shows."""
        return self.examples[image_index(position, len(self.examples), self.seed)].path

    def __getitem__(self, position: int) -> Sample:
        index = image_index(position, len(self.examples), self.seed)
        crop = None if self.center_crop else draws.crop(self.seed, position)
        flip = self.random_flip and draws.flip(self.seed, position)
        image = load_image(self.examples[index].path)
        pixel_values = to_pixel_values(image, self.resolution, crop=crop, flip=flip)
        return Sample(position, index, self.examples[index].caption, pixel_values)


def collate(samples: Sequence[Sample], *, seed: int, caption_dropout: float) -> Batch:
    """Put samples together; a share `caption_dropout` of the captions, drawn by position, becomes ""."""
    captions = ["" if draws.caption_dropout(seed, s.position) < caption_dropout else s.caption for s in samples]
    pixel_values = torch.stack([s.pixel_values for s in samples])
    return Batch([s.position for s in samples], [s.index for s in samples], captions, pixel_values)


def training_batches(
    dataset: CaptionedImages, config: TrainConfig, dist: Distributed, start_step: int, max_steps: int
) -> Iterator[Batch]:
    """The micro-batches of this process, in order: gradient_accumulation_steps of them for each step.

    Raises:
        DataError: a picture has changed or gone since it was checked.
    """
    sampler = MicroBatchSampler(
        start_step, max_steps, dist.rank, dist.world_size, config.train_batch_size, config.gradient_accumulation_steps
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.dataloader_num_workers,
        collate_fn=partial(collate, seed=config.seed, caption_dropout=config.caption_dropout),
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),  # or it would draw from the global generator
    )
    try:
        yield from loader
    except DataError as error:
        # A worker's exception arrives with its traceback in front; the message itself is one line.
        raise DataError(str(error).splitlines()[-1].removeprefix("minisd.errors.DataError: ")) from error


def _leave_process_group(worker: int) -> None:
    """Torchrun and Ctrl-C signal the whole group; a reader that died of it would take the last save with it."""
    os.setpgrp()  # and not SIG_IGN: the reader must still obey its parent
