"""A folder of captioned pictures: which there are, what their captions say, and what is known of each beforehand."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minisd.caption_table import read_captions, read_table, resolve_inside
from minisd.errors import DataError
from minisd.picture_files import load_image, open_regular

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TABLES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Example:
    """A picture (a regular file in the dataset, links resolved) and its captions, of which one is drawn each time.

    sha256: what the table says the file has, in hex; empty if it says nothing.
    """

    path: Path
    captions: tuple[str, ...]
    sha256: str = ""


@dataclass(frozen=True)
class Survey:
    """What is known of a picture: the SHA-256 of its file, and its (height, width) in pixels, upright."""

    sha256: str
    size: tuple[int, int]


def read_dataset(folder: Path) -> list[Example]:
    """List a dataset: metadata.csv or metadata.jsonl in the folder or its train/, else a .txt beside each picture.

    Pictures that the table does not name are counted in a warning. No picture is opened; see `survey`.

    Returns:
        In the order of the table, or sorted by name; at least one.

    Raises:
        DataError: no such folder, no or two tables, a bad row, a name that leads outside, a picture without a caption.
    """
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r}: expected a folder of pictures and captions, got none. Correct --data.")
    root = folder.resolve()
    table = find_table(root)
    return _from_sidecars(root) if table is None else _from_table(root, table)


def find_table(folder: Path) -> Path | None:
    """The metadata.csv or metadata.jsonl in a folder or its train/, if there is one.

    Raises:
        DataError: there is more than one.
    """
    tables = [place / name for place in (folder, folder / "train") for name in _TABLES if os.path.lexists(place / name)]
    if len(tables) > 1:
        names = " and ".join(str(table.relative_to(folder)) for table in tables)
        raise DataError(f"{str(folder)!r}: expected one table of captions, got {names}. Delete all but one.")
    return tables[0] if tables else None


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
        examples.append(Example(path, row.captions, row.sha256))
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

    def captions(name: Path) -> tuple[str, ...]:
        return read_captions(inside(name.with_suffix(".txt"))) or ("",)

    return [Example(inside(name), captions(name)) for name in names]


def _pictures(folder: Path) -> list[Path]:
    """Names below a folder that have a picture's suffix, sorted; hidden ones left out, linked folders not entered."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(name for name in names if not any(part.startswith(".") for part in name.parts))


def _some(names: Sequence[Path]) -> str:
    """The first few names, quoted."""
    return ", ".join(repr(str(name)) for name in names[:3]) + (" and more" if len(names) > 3 else "")


def with_trigger(caption: str, trigger: str | None) -> str:
    """A caption that has the trigger word: in the place of "[trigger]", else in front unless it is there already."""
    if trigger is None:
        return caption
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger)
    if trigger.casefold() in caption.casefold():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def sha256_of_picture(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises DataError if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def survey(examples: Sequence[Example], *, quiet: bool) -> list[Survey]:
    """Hash every picture and decode it once, so that a damaged one ends the run before it begins, not at step 900.

    Raises:
        DataError: a picture cannot be used, or is not the one that the table was made for; names it.
    """
    found = []
    for example in tqdm(examples, desc="check", unit="picture", disable=quiet or len(examples) <= 200):
        sha256 = sha256_of_picture(example.path)
        if example.sha256 and example.sha256.lower() != sha256:
            raise DataError(
                f"{str(example.path)!r}: changed since the table was made: expected SHA-256 {example.sha256[:16]}, got "
                f"{sha256[:16]}. If that is meant, empty its cell sha256; if not, delete the file and run "
                "prepare_data.py clean again."
            )
        width, height = load_image(example.path).size
        found.append(Survey(sha256, (height, width)))
    return found
