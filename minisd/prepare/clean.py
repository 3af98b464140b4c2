"""From pictures as they are to OUTPUT/train/*.png: decoded, upright, RGB, large enough, each once.

Nothing is changed in the folder they are from. Stopped at any moment and run again, it ends as if it had not been
stopped: numbers are given in the order of names, and what the table has is kept as it is, whatever the rules say now.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minisd.atomic import remove_leftovers, write_atomically
from minisd.data import find_table, sha256_of_picture
from minisd.errors import DataError, UsageError, one_line
from minisd.picture_files import PictureError
from minisd.prepare.dropping import finish_moves
from minisd.prepare.duplicates import near_duplicates
from minisd.prepare.examine import MAX_BYTES, Examined, Written, examine, preview, write_png
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.journal import read_journal
from minisd.prepare.names import OUR_NAME, delete_strays, named, numbered, recognised
from minisd.prepare.options import Clean, Rules
from minisd.prepare.source_folder import check_folders, describe, left_out_before, list_files
from minisd.prepare.summary import counts, summary
from minisd.prepare.table import (
    DROPPED,
    Picture,
    make_folder,
    read_pictures,
    read_rejected,
    write_pictures,
    write_rejected,
)

log = logging.getLogger(__name__)

_DHASH = re.compile(r"[0-9a-f]{16}-[0-9a-f]{54}")
_SAVE_SECONDS = 3.0
_PREVIEW_SIDE = 256
_SHOWN = ("too small", "too narrow", "near-duplicate")  # of these there is something to see


def clean(options: Clean) -> None:
    """Write the pictures of a folder that follow the rules to OUTPUT/train, with their table; others to rejected.csv.

    Raises:
        UsageError, DataError: a folder cannot be used, a caption cannot be read, or no picture is left.
        DiskError: something cannot be written.
    """
    data = options.output
    check_folders(data, options.source)
    source = options.source or data / "raw"
    if not source.is_dir():
        raise DataError(
            f"{str(source)!r}: no such folder. Collect pictures first, or give a folder with --from FOLDER."
        )
    kept, before = _begin(data)
    dropped = [row for row in before if row.status == DROPPED]
    # What is collected and what is one's own are decided in runs of their own.
    others = [row for row in before if row.status != DROPPED and bool(row.source_url) != (options.source is None)]

    listing = list_files(source, data, follow_symlinks=options.follow_symlinks)
    journal = read_journal(source) if options.source is None else []
    rows = describe(source, listing, journal, follow_symlinks=options.follow_symlinks)
    firsts, rejected = _hash(listing.paths, rows)
    kept = [recognised(row, firsts) for row in kept]
    settled = {row.original_sha256 for row in (*kept, *dropped)}
    new = {name: listing.paths[name] for sha256, name in firsts.items() if sha256 not in settled}
    with GuardedPool() as pool:
        _remake(pool, data, kept, {sha256: listing.paths[name] for sha256, name in firsts.items()}, options.rules)
        examined, refused = _examine(pool, new, rows, options.rules)
        rejected += refused
        while True:
            alike = _alike((*kept, *dropped), examined, options.rules.duplicate_distance)
            chosen = [name for name in examined if name not in alike]
            if not chosen:
                break
            chosen_rows = numbered([rows[name] for name in chosen], (*kept, *dropped))
            rejected += _write(pool, data, kept, chosen_rows, new, options.rules)
            # Once more: what looks like one that could not be written after all may be the best there is.
            examined = {name: examined[name] for name in alike}
        rejected += [
            replace(rows[name], status="near-duplicate", duplicate_of=sha256) for name, sha256 in alike.items()
        ]
        _write_previews(pool, data / "left_out", rejected, new)
    rejected += listing.refused
    kept = _with_captions(kept, rows, alike)

    rejected = sorted(named(rejected, kept, dropped), key=lambda row: row.original)
    judged = {row.original for row in rejected}
    others = [row for row in others if not row.original or row.original not in judged]
    everything = [*dropped, *others, *rejected, *left_out_before(journal)]
    write_rejected(data, everything)
    if not kept:
        said = f"left out: {counts(everything)}; see {data / 'rejected.csv'}" if everything else "the folder has none"
        raise DataError(
            f"{str(source)!r}: expected pictures to keep, got none; {said}. Change the rules or the folder."
        )
    write_pictures(data, kept)
    delete_strays(data / "train", {row.file_name for row in kept}, {sha256[:8] for sha256 in firsts})
    log.info("%s", summary(len(kept), everything, None))


def _begin(data: Path) -> tuple[list[Picture], list[Picture]]:
    """What an earlier run kept, and left out; its half-written files are removed. Makes the folders."""
    for folder in (data, data / "train", data / "left_out"):
        make_folder(folder)
        remove_leftovers(folder)
    table = find_table(data)
    if table is None:
        return [], read_rejected(data)
    if table != data / "train" / "metadata.csv":
        raise UsageError(f"--output {str(data)!r}: has a table of its own, {table.name}. Choose a new folder.")
    finish_moves(data)
    return read_pictures(data), read_rejected(data)


def _hash(paths: Mapping[str, Path], rows: dict[str, Picture]) -> tuple[dict[str, str], list[Picture]]:
    """Note the SHA-256 of each file in its row.

    Returns:
        Hash -> the first name of each file; and the rows of those that are equal to one before, or cannot be read. The
        `duplicate_of` of a row is the hash of the original, until the names in the dataset are known.
    """
    firsts: dict[str, str] = {}
    rejected = []
    for name, path in tqdm(paths.items(), desc="hash", unit="picture", disable=None):
        try:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise PictureError("too large", f"{size} bytes, expected at most {MAX_BYTES}", path)
            sha256 = sha256_of_picture(path)
        except PictureError as error:
            rejected.append(replace(rows[name], status=error.status, reason=error.reason))
            continue
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            rejected.append(replace(rows[name], status="unreadable", reason=reason))
            continue
        row = rows[name] = replace(rows[name], original_sha256=sha256)
        first = firsts.setdefault(sha256, name)
        if first != name:
            reason = f"is the same file as {first!r}"
            rejected.append(replace(row, status="duplicate", reason=reason, duplicate_of=sha256))
    return firsts, rejected


def _examine(
    pool: GuardedPool, paths: Mapping[str, Path], rows: dict[str, Picture], rules: Rules
) -> tuple[dict[str, Examined], list[Picture]]:
    """Decode each picture; its row gets size and hash. Returns those that follow the rules, and rows of the others."""
    found: dict[str, Examined] = {}
    rejected = []
    animated = 0
    results = pool.map(partial(examine, rules=rules), paths.values())
    for name, result in zip(paths, tqdm(results, "look", len(paths), unit="picture", disable=None), strict=True):
        if isinstance(result, PictureError):
            rejected.append(replace(rows[name], status=result.status, reason=result.reason))
        elif result.sha256 != rows[name].original_sha256:
            rejected.append(replace(rows[name], status="unreadable", reason="was changed while it was read"))
        else:
            found[name] = result
            animated += result.animated
            rows[name] = replace(rows[name], width=result.width, height=result.height, dhash=result.dhash)
    if animated:
        log.info("%d animations: the first frame of each is taken", animated)
    return found, rejected


def _alike(settled: Sequence[Picture], examined: Mapping[str, Examined], distance: int) -> dict[str, str]:
    """Name of a picture that looks like a better one, or like one that is settled -> hash of the other's original."""
    known = [
        Examined(row.original_sha256, row.width, row.height, row.dhash, "", 0)
        for row in settled
        if _DHASH.fullmatch(row.dhash)
    ]
    pictures = [*known, *examined.values()]
    found = near_duplicates(pictures, distance, first=len(known))
    names = [*examined]
    return {names[i - len(known)]: pictures[better].sha256 for i, better in found.items()}


def _write(
    pool: GuardedPool,
    data: Path,
    kept: list[Picture],
    rows: Sequence[Picture],
    paths: Mapping[str, Path],
    rules: Rules,
) -> list[Picture]:
    """Write the PNG of each row, which then joins `kept`, and every few seconds the table. Returns what failed."""
    jobs = [(paths[row.original], data / "train" / row.file_name) for row in rows]
    results = pool.map(partial(_write_png, rules=rules), jobs)
    rejected = []
    saved = time.monotonic()
    try:
        for row, result in zip(rows, tqdm(results, "write", len(rows), unit="picture", disable=None), strict=True):
            if isinstance(result, PictureError):
                rejected.append(replace(row, file_name="", status=result.status, reason=result.reason))
                continue
            written = replace(row, width=result.width, height=result.height, sha256=result.sha256, status="ok")
            kept.append(written)
            if time.monotonic() - saved > _SAVE_SECONDS:
                write_pictures(data, kept)
                saved = time.monotonic()
    finally:  # also when interrupted
        if kept:
            write_pictures(data, kept)
    return rejected


def _write_png(job: tuple[Path, Path], rules: Rules) -> Written:
    return write_png(*job, rules)


def _remake(pool: GuardedPool, data: Path, kept: list[Picture], originals: Mapping[str, Path], rules: Rules) -> None:
    """Write files anew that are missing in the dataset, from their originals (hash -> path) if these are there."""
    targets = {index: data / "train" / row.file_name for index, row in enumerate(kept)}
    missing = {index: target for index, target in targets.items() if not target.is_file()}
    jobs = {
        index: (originals[kept[index].original_sha256], target)
        for index, target in missing.items()
        if kept[index].original_sha256 in originals and OUR_NAME.fullmatch(kept[index].file_name)
    }
    for index, result in zip(jobs, pool.map(partial(_write_png, rules=rules), jobs.values()), strict=True):
        if not isinstance(result, PictureError):
            kept[index] = replace(kept[index], width=result.width, height=result.height, sha256=result.sha256)
            del missing[index]
    if missing:
        first = one_line(str(next(iter(missing.values()))))
        log.warning(
            "%d rows of the table have no file, as %s; take them out, or put the files back", len(missing), first
        )


def _with_captions(kept: Sequence[Picture], rows: Mapping[str, Picture], alike: Mapping[str, str]) -> list[Picture]:
    """Give pictures that have no caption, and never had one, what the folder has for them by now, or for a copy."""
    said: dict[str, Picture] = {}
    for row in rows.values():
        if row.text:
            said.setdefault(row.original_sha256, row)
    for name, sha256 in alike.items():
        if rows[name].text:
            said.setdefault(sha256, rows[name])

    def with_caption(row: Picture) -> Picture:
        if row.text or row.caption_source or row.original_sha256 not in said:
            return row
        found = said[row.original_sha256]
        return replace(row, text=found.text, caption_source=found.caption_source)

    return [with_caption(row) for row in kept]


def _write_previews(pool: GuardedPool, folder: Path, rejected: Sequence[Picture], paths: Mapping[str, Path]) -> None:
    """Write a small version of each picture that was left out and can be seen, LEFT_OUT/SHA16.jpg."""
    shown = {folder / f"{row.original_sha256[:16]}.jpg": row.original for row in rejected if row.status in _SHOWN}
    missing = {target: paths[name] for target, name in shown.items() if not target.exists()}
    for target, data in zip(missing, pool.map(partial(preview, longest=_PREVIEW_SIDE), missing.values()), strict=True):
        if not isinstance(data, PictureError):
            write_atomically(target, data)
