"""Pictures that a person takes out of a dataset, and puts back.

Whatever stops it in between, every row of metadata.csv has its file, and every picture is in one table at least. A row
in both tables is not dropped: table.read_rejected does not show it. The file of a row that is only in rejected.csv is
on its way to DATA/dropped/: table.dropped_path finds it. `finish_moves` puts both right.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minisd.atomic import sync_folder
from minisd.errors import DataError, DiskError
from minisd.prepare.table import (
    DROPPED,
    Picture,
    all_rejected,
    dropped_path,
    make_folder,
    picture_path,
    read_pictures,
    read_rejected,
    table_path,
    write_pictures,
    write_rejected,
)

_BY_HAND = "taken out by hand"


def drop(data: Path, file_name: str) -> None:
    """Take a picture out of the dataset: its row goes to rejected.csv, its file to DATA/dropped/.

    In this order: the row is put into rejected.csv and taken out of metadata.csv, and then the file is moved.

    Raises:
        DataError: there is no such picture, or no file of it, or one in the place it is to go to.
        DiskError: something could not be written. Nothing is lost.
    """
    finish_moves(data)
    pictures = read_pictures(data)
    picture = _find(pictures, file_name, "the dataset")
    picture_path(data, file_name)
    _check_free(data / DROPPED / file_name)
    reason = f"{_BY_HAND}; {picture.reason}" if picture.reason else _BY_HAND
    write_rejected(data, [*read_rejected(data), replace(picture, status=DROPPED, reason=reason)])
    write_pictures(data, [other for other in pictures if other is not picture])
    _move(table_path(data).parent / file_name, data / DROPPED / file_name)


def restore(data: Path, file_name: str) -> None:
    """Put a picture back that was taken out: all of `drop` backwards.

    Its row comes where it is in the order of names. Raises as `drop`.
    """
    finish_moves(data)
    rejected, pictures = read_rejected(data), read_pictures(data)
    picture = _find([other for other in rejected if other.status == DROPPED], file_name, "what was taken out")
    target = table_path(data).parent / file_name
    _check_free(target)
    dropped_path(data, file_name)
    _move(data / DROPPED / file_name, target)
    reason = picture.reason.removeprefix(_BY_HAND).removeprefix("; ")
    at = next((at for at, other in enumerate(pictures) if other.file_name > file_name), len(pictures))
    pictures.insert(at, replace(picture, status="check" if reason else "ok", reason=reason))
    write_pictures(data, pictures)
    write_rejected(data, [other for other in rejected if other is not picture])


def finish_moves(data: Path) -> None:
    """Put right what an interrupted `drop` or `restore` has left; see there. Raises as they do."""
    rejected = read_rejected(data)
    if len(rejected) < len(all_rejected(data)):
        write_rejected(data, rejected)
    for picture in rejected:
        if picture.status == DROPPED:
            source, target = table_path(data).parent / picture.file_name, data / DROPPED / picture.file_name
            if os.path.lexists(source) and not os.path.lexists(target):
                picture_path(data, picture.file_name)
                _move(source, target)


def _find(pictures: Sequence[Picture], file_name: str, where: str) -> Picture:
    for picture in pictures:
        if picture.file_name == file_name:
            return picture
    raise DataError(f"{file_name!r}: expected a picture that is in {where}, got none of that name.")


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise DataError(f"{str(path)!r}: expected nothing of that name, got a file. Move it away.")


def _move(source: Path, target: Path) -> None:
    """Rename, durably: the new name is made certain first."""
    make_folder(target.parent)
    try:
        source.rename(target)
        sync_folder(target.parent)
        sync_folder(source.parent)
    except OSError as error:
        raise DiskError(f"{source}: cannot be moved to {target}: {error.strerror}.") from error
