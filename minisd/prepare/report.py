"""The report: one HTML file that shows a dataset as training will see it, and what was left out of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minisd.atomic import write_atomically
from minisd.errors import DataError, one_line
from minisd.html_page import data_uri
from minisd.picture_files import MAX_ASPECT, PictureError, open_regular
from minisd.prepare.examine import examine, preview
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Report, Rules
from minisd.prepare.report_page import View, relative_address, render
from minisd.prepare.table import DROPPED, Picture, dropped_path, picture_path, read_pictures, read_rejected, table_path

log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{16,64}")
_MAX_PREVIEW_BYTES = 256 * 1024
_JPEG = b"\xff\xd8\xff"
_ANY = Rules(min_side=1, max_aspect=MAX_ASPECT)
_THUMBNAIL, _SMALL_THUMBNAIL, _MANY = 384, 256, 300


def report(options: Report) -> Path:
    """Write DATA/report.html: style, script and small pictures are inside, and nothing is fetched from anywhere.

    A picture that cannot be read is shown as such; the others are not held up by it.

    Returns:
        The file.

    Raises:
        DataError: there is no table, or it is damaged.
        DiskError: the file cannot be written.
    """
    data = options.data
    pictures, rejected = read_pictures(data), read_rejected(data)
    folder = table_path(data).parent.relative_to(data)
    with GuardedPool() as pool:
        pictures = with_sizes(data, pictures, pool)
        thumbnails = _thumbnails(data, [*pictures, *(row for row in rejected if row.status == DROPPED)], pool)

    def left_out(picture: Picture) -> str:
        if picture.status == DROPPED:
            return thumbnails.get(picture.file_name, "")
        jpeg = saved_preview(data, picture)
        return data_uri(jpeg, "jpeg") if jpeg else ""

    view = View(
        title=title_of(data, pictures),
        resolution=options.resolution,
        trigger=options.trigger,
        thumbnail=lambda picture: thumbnails.get(picture.file_name, ""),
        left_out=left_out,
        link=lambda picture: relative_address((folder / picture.file_name).as_posix()),
    )
    path = data / "report.html"
    write_atomically(path, render(pictures, rejected, view).encode())
    log.info("to look at: %s", one_line(str(path)))
    return path


def _thumbnails(data: Path, pictures: Sequence[Picture], pool: GuardedPool) -> dict[str, str]:
    """A small version of each picture that can be read, as an address that holds it, by file name."""
    # A page of many pictures is to stay one that a browser opens at once.
    longest = _THUMBNAIL if len(pictures) <= _MANY else _SMALL_THUMBNAIL
    paths = {picture.file_name: path for picture in pictures if (path := find_picture(data, picture))}
    jpegs = pool.map(partial(preview, longest=longest), paths.values())
    thumbnails = {}
    for name, jpeg in zip(
        paths, tqdm(jpegs, desc="report", unit="picture", total=len(paths), disable=None), strict=True
    ):
        if isinstance(jpeg, PictureError):
            log.warning("%r is shown without its picture: %s", name, jpeg.reason)
        else:
            thumbnails[name] = data_uri(jpeg, "jpeg")
    return thumbnails


def title_of(data: Path, pictures: Sequence[Picture]) -> str:
    """What a dataset is called: what was searched for, or its folder's name."""
    queries = {picture.query for picture in pictures}
    return queries.pop() if len(queries) == 1 and "" not in queries else data.resolve().name


def find_picture(data: Path, picture: Picture) -> Path | None:
    """The file of a picture, also of one that was dropped; None, and a warning, if there is none to be had."""
    try:
        return (dropped_path if picture.status == DROPPED else picture_path)(data, picture.file_name)
    except DataError as error:
        log.warning("shown without its picture: %s", one_line(str(error)))
        return None


def with_sizes(data: Path, pictures: Sequence[Picture], pool: GuardedPool) -> list[Picture]:
    """The same rows, with the sizes filled in that a table does not say; 0 stays for what cannot be read."""
    unknown = [index for index, picture in enumerate(pictures) if not picture.width or not picture.height]
    paths = {index: path for index in unknown if (path := find_picture(data, pictures[index]))}
    rows = list(pictures)
    for index, found in zip(paths, pool.map(partial(examine, rules=_ANY), paths.values()), strict=True):
        if not isinstance(found, PictureError):
            rows[index] = replace(rows[index], width=found.width, height=found.height)
    return rows


def saved_preview(data: Path, picture: Picture) -> bytes:
    """The small JPEG that `clean` made of a picture it left out; empty if there is none."""
    if not _HASH.fullmatch(picture.original_sha256):
        return b""
    try:
        with open_regular(data / "left_out" / f"{picture.original_sha256[:16]}.jpg") as file:
            jpeg = file.read(_MAX_PREVIEW_BYTES + 1)
    except DataError:
        return b""
    return jpeg if jpeg.startswith(_JPEG) and len(jpeg) <= _MAX_PREVIEW_BYTES else b""
