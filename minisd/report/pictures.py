"""Pictures for the report: small versions inside the page, of the dataset and of what a run has drawn."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from minisd.caption_table import resolve_inside
from minisd.config import TrainConfig
from minisd.data import Example, read_dataset, with_trigger
from minisd.errors import DataError, one_line
from minisd.html_page import data_uri
from minisd.picture_files import load_image, open_regular

log = logging.getLogger(__name__)

MAX_TRAINING = 200
_QUALITY = 82
_SMALL = 128  # a picture up to this size is shown as it is, in large pixels: JPEG would smear them
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shown:
    """A picture in the page.

    Args:
        address: of its small version, which is in the page; "" if it cannot be shown.
        width: of the picture itself, in pixels.
        height: likewise.
        parameters: the text in it that says how it was drawn; "" without one.
    """

    address: str = ""
    width: int = 0
    height: int = 0
    parameters: str = ""

    @property
    def is_small(self) -> bool:
        """Whether it is to be enlarged without smoothing."""
        return 0 < max(self.width, self.height) <= _SMALL


MISSING = Shown()


@dataclass(frozen=True)
class TrainingPicture:
    """A picture of the dataset and what is said about it."""

    name: str
    captions: tuple[str, ...]
    held_out: bool
    shown: Shown


def show(path: Path, longest: int) -> Shown:
    """A small version of a picture, its longer side at most `longest` pixels; MISSING if it cannot be read."""
    try:
        image = load_image(path)
        parameters = text_of(path)
    except DataError as error:
        log.warning("shown without its picture: %s", one_line(str(error)))
        return MISSING
    width, height = image.size
    data = io.BytesIO()
    if max(width, height) <= _SMALL:
        image.save(data, "PNG", optimize=True)
        return Shown(data_uri(data.getvalue(), "png"), width, height, parameters)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    image.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return Shown(data_uri(data.getvalue(), "jpeg"), width, height, parameters)


def show_inside(folder: Path, name: str, longest: int) -> Shown:
    """The same of a picture in a folder of the run: MISSING if the name, or a link, leads out of it, or to nothing."""
    path = find_inside(folder, name)
    return MISSING if path is None else show(path, longest)


def find_inside(folder: Path, name: str) -> Path | None:
    """A file in a folder of the run, without links; None, and a warning, if the name leads out of it, or to nothing."""
    try:
        return resolve_inside(folder.resolve(), folder, name, folder.name)
    except DataError as error:
        log.warning("left out: %s", one_line(str(error)))
        return None


class Dataset:
    """The pictures that a run learns from, and those that are held out.

    A dataset that is gone, or cannot be read, is shown by what the run has noted: names, and no pictures.

    Args:
        config: of the run.
        trained: names of the pictures that are trained on, for a dataset that is gone.
        held_out: names of those of --data that are not.
    """

    def __init__(self, config: TrainConfig, trained: Collection[str], held_out: Collection[str]) -> None:
        self._trigger = config.trigger
        self.problem = ""
        entries = [self._entry(example, example.path.name in held_out) for example in self._read(config.data)]
        if not entries:  # by their names alone: no file is looked for
            entries = [_Entry(name, (), name in held_out, None) for name in [*trained, *held_out]]
        apart = [] if config.validation_data is None else self._read(config.validation_data)
        self._entries = entries + [self._entry(example, True) for example in apart]
        self._by_name = {entry.name: entry for entry in reversed(self._entries)}

    def _read(self, folder: Path) -> list[Example]:
        try:
            return read_dataset(folder)
        except (DataError, OSError) as error:
            log.warning("the report is without the data: %s", one_line(str(error)))
            self.problem = "The dataset is not where it was, or cannot be read from here."
            return []

    def _entry(self, example: Example, held_out: bool) -> _Entry:
        captions = tuple(with_trigger(caption, self._trigger) for caption in example.captions)
        return _Entry(example.path.name, captions, held_out, example.path)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_out(self) -> int:
        """How many pictures are held out."""
        return sum(entry.held_out for entry in self._entries)

    @property
    def captions(self) -> list[str]:
        """All captions, trigger word included."""
        return [caption for entry in self._entries for caption in entry.captions]

    def shown(self, longest: int) -> list[TrainingPicture]:
        """The pictures, or MAX_TRAINING of them, evenly spread."""
        return [_show(entry, longest) for entry in spread(self._entries, MAX_TRAINING)]

    def find(self, name: str, longest: int) -> TrainingPicture:
        """The picture of a name, without its picture if the dataset has none."""
        return _show(self._by_name.get(name, _Entry(name, (), False, None)), longest)


@dataclass(frozen=True)
class _Entry:
    """A picture of a dataset that has been read, or a name (path None) of one that has not."""

    name: str
    captions: tuple[str, ...]
    held_out: bool
    path: Path | None


def _show(entry: _Entry, longest: int) -> TrainingPicture:
    shown = MISSING if entry.path is None else show(entry.path, longest)
    return TrainingPicture(entry.name, entry.captions, entry.held_out, shown)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, evenly spread: the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def longest_side(count: int) -> int:
    """How large a drawn picture is shown, so that a page with `count` of them is one that a browser opens at once."""
    return 384 if count <= 100 else 256 if count <= 250 else 192


def text_of(path: Path) -> str:
    """The text that save_png puts into a picture; "" if it has none. Raises DataError if it is no regular file."""
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=("PNG",)) as image:
                text = image.info.get("parameters")
        except Exception:  # decoders raise what they like; other formats have none
            return ""
    return text if isinstance(text, str) else ""


def bucket_counts(buckets: Mapping[str, Mapping[str, str]]) -> list[tuple[int, int, int]]:
    """(width, height, pictures) of each bucket in pictures.csv, from tall to wide."""
    counts: dict[tuple[int, int], int] = {}
    for row in buckets.values():
        try:
            size = int(row["bucket_width"]), int(row["bucket_height"])
        except (KeyError, ValueError):
            continue
        if min(size) > 0:
            counts[size] = counts.get(size, 0) + 1
    return sorted(((*size, count) for size, count in counts.items()), key=lambda entry: entry[0] / entry[1])
