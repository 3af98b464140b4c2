"""A folder of pictures as somebody has it: which files are looked at, and what is known of each beforehand."""

from __future__ import annotations

import csv
import logging
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minisd.caption_table import check_inside, read_captions, read_table
from minisd.data import find_table
from minisd.errors import DataError, UsageError, one_line
from minisd.picture_files import PictureError, open_regular
from minisd.prepare.examine import suffix_of
from minisd.prepare.journal import KEPT, Found
from minisd.prepare.table import Picture

log = logging.getLogger(__name__)

# Who has a file of such a name takes it for a picture, and wants to hear if it is none.
_SUFFIXES = (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
             ".jxl", ".png", ".psd", ".svg", ".tif", ".tiff", ".webp")  # fmt: skip
# Of other files those are looked at that begin like these; BMP and TIFF begin like much that is no picture.
_KNOWN_BY_CONTENT = (".png", ".jpg", ".gif", ".webp", ".avif")
_TEXTS = (".txt", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class Listing:
    """The files to look at, by their names in the folder, each with the path to open; and what cannot be opened."""

    paths: dict[str, Path]
    refused: list[Picture]


def check_folders(output: Path, source: Path | None) -> None:
    """Refuse an --output in which pictures that are not ours could come to harm, and a --from that is not there.

    Raises:
        UsageError, DataError: see above.
    """
    folder = output.resolve()
    if Path.home().resolve().is_relative_to(folder):
        raise UsageError(f"--output {str(output)!r}: expected a folder for one dataset. Choose a folder of its own.")
    if source is None:
        return
    if not source.is_dir():
        raise DataError(f"--from {str(source)!r}: expected a folder of pictures, got none. Correct --from.")
    ours = (folder / name for name in ("train", "left_out", "dropped"))
    if source.resolve() == folder or any(source.resolve().is_relative_to(place) for place in ours):
        raise UsageError(
            f"--output {str(output)!r}: expected another folder than that with the pictures, {str(source)!r}. "
            "Choose a new one."
        )


def list_files(source: Path, output: Path, *, follow_symlinks: bool) -> Listing:
    """List the files that are or claim to be pictures, by suffix or by content; hidden ones and OUTPUT are left out.

    Args:
        source: the folder; its folders are entered, too.
        output: the dataset, which may lie in it.
        follow_symlinks: also take what links lead to outside of `source`.

    Returns:
        Sorted by name: with forward slashes, and as Python writes what is not UTF-8 (with halves of surrogate pairs).
    """
    root = source.resolve()
    paths: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for path in _walk(root, output, follow_symlinks, refused):
        name = path.relative_to(root).as_posix()
        claims = path.suffix.lower() in _SUFFIXES
        try:
            real = _resolve(root, path, follow_symlinks)
        except PictureError as error:
            if claims:
                refused[name] = error.reason
        else:
            if claims or _is_picture(real):
                paths[name] = real
    rows = [Picture(original=name, status="unreadable", reason=reason) for name, reason in sorted(refused.items())]
    return Listing(dict(sorted(paths.items())), rows)


def _resolve(root: Path, path: Path, follow_symlinks: bool) -> Path:
    """Follow links as far as they may lead."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise PictureError("unreadable", "is a link that leads to nothing", path) from error
    if not follow_symlinks and not real.is_relative_to(root):
        reason = "is a link that leads out of the folder; with --follow-symlinks it is taken"
        raise PictureError("unreadable", reason, path)
    return real


def _walk(root: Path, output: Path, follow_symlinks: bool, refused: dict[str, str]) -> Iterator[Path]:
    """All that is no folder, hidden ones left out. Folders that are not entered are noted with the reason."""

    def name_of(path: str | Path) -> str:
        return Path(path).relative_to(root).as_posix()

    def cannot_enter(error: OSError) -> None:
        refused[name_of(error.filename)] = f"is a folder that cannot be read: {error.strerror}"

    ours = output.resolve()
    seen = {root}
    for place, folders, names in os.walk(root, followlinks=follow_symlinks, onerror=cannot_enter):
        entered = []
        for name in sorted(folders):
            path = Path(place, name)
            real = path.resolve()
            if name.startswith(".") or real == ours or real in seen:
                continue
            if path.suffix.lower() in _SUFFIXES:
                refused[name_of(path)] = "is a folder, expected a file"
            if path.is_symlink() and not follow_symlinks:
                if not real.is_relative_to(root):
                    refused[name_of(path)] = "is a link to a folder elsewhere; with --follow-symlinks it is entered"
                continue
            seen.add(real)
            entered.append(name)
        folders[:] = entered
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_picture(path: Path) -> bool:
    """Whether a file with some other suffix begins like a picture."""
    if path.suffix.lower() in _TEXTS:
        return False
    try:
        with open_regular(path) as file:
            return suffix_of(file.read(32)) in _KNOWN_BY_CONTENT
    except PictureError:
        return False


def describe(source: Path, listing: Listing, journal: Sequence[Found], *, follow_symlinks: bool) -> dict[str, Picture]:
    """What is known of each file before it is looked at: its caption, from a table or a .txt beside it, and origin.

    Returns:
        name -> a row with text, caption_source, original and what `collect` noted.

    Raises:
        DataError: a caption or a table cannot be read; names the file and the line.
    """
    root = source.resolve()
    rows = {name: Picture(original=name) for name in listing.paths}
    several = 0
    written = _from_table(root, listing.paths)
    for name, row in rows.items():
        captions, origin = written.get(name, ()), "table"
        if not captions:
            captions, origin = _from_sidecar(root, name, follow_symlinks), "sidecar"
        if captions:
            if len(captions[0]) > csv.field_size_limit():
                longest, got = csv.field_size_limit(), len(captions[0])
                raise DataError(f"{name!r}: expected a caption of at most {longest} characters, got {got}. Shorten it.")
            rows[name] = replace(row, text=captions[0], caption_source=origin)
            several += len(captions) > 1
    if several:
        log.warning("%d pictures have several captions; the first of each is taken", several)
    for found in journal:
        if found.file_name in rows:
            row = rows[found.file_name]
            url, query, at = found.url, found.query, found.fetched_at
            rows[found.file_name] = replace(row, source_url=url, query=query, fetched_at=at)
    return rows


def left_out_before(journal: Sequence[Found]) -> list[Picture]:
    """What `collect` found and did not save."""
    return [
        Picture(
            width=found.width,
            height=found.height,
            dhash=found.dhash,
            source_url=found.url,
            query=found.query,
            status=found.status,
            reason=found.reason,
            original_sha256=found.sha256,
            fetched_at=found.fetched_at,
        )
        for found in journal
        if found.status != KEPT and not found.file_name
    ]


def _from_table(root: Path, names: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    """The captions in the folder's table, by the names of the files they belong to; empty ones are none."""
    table = find_table(root)
    if table is None:
        return {}
    lines: dict[str, int] = {}
    captions = {}
    for row in read_table(table):
        where = f"{str(table)!r}, line {row.line}"
        check_inside(table.parent, row.file_name, where)
        name = posixpath.normpath((table.parent.relative_to(root) / row.file_name).as_posix())
        if name in lines:
            raise DataError(f"{where}: {row.file_name!r} has a row already, in line {lines[name]}. Delete one of them.")
        lines[name] = row.line
        captions[name] = tuple(caption for caption in row.captions if caption.strip())
    missing = [name for name in lines if name not in names]
    if missing:
        some = one_line(", ".join(map(repr, missing[:3]))) + (" and more" if len(missing) > 3 else "")
        log.warning("%d rows of %s are for no picture in the folder: %s", len(missing), table, some)
    return captions


def _from_sidecar(root: Path, name: str, follow_symlinks: bool) -> tuple[str, ...]:
    """The captions in the .txt beside a picture, one a line, as train.py reads them."""
    path = (root / name).with_suffix(".txt")
    if not os.path.lexists(path):
        return ()
    return read_captions(_resolve(root, path, follow_symlinks))
