"""The names of the pictures in a dataset: 000123-<first 8 digits of the original's SHA-256>.png, each given once."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from minisd.atomic import delete
from minisd.prepare.table import Picture

OUR_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{8})\.png")


def named(rejected: Sequence[Picture], kept: Sequence[Picture], dropped: Sequence[Picture]) -> list[Picture]:
    """Rows whose `duplicate_of` is a file name in the dataset, where it was the hash of the original so far."""
    said = {row.original_sha256: (row.file_name, "which is kept") for row in kept}
    said |= {row.original_sha256: (row.file_name, "which was taken out") for row in dropped}
    rows = []
    for row in rejected:
        name, what = said.get(row.duplicate_of, ("", ""))
        reason = f"looks like {name}, {what}" if row.status == "near-duplicate" else row.reason
        rows.append(replace(row, duplicate_of=name, reason=reason))
    return rows


def delete_strays(folder: Path, names: Collection[str], originals: Collection[str]) -> None:
    """Delete pictures without a row that were made from known originals, by a run that was killed before it said so."""
    for path in folder.iterdir():
        ours = OUR_NAME.fullmatch(path.name)
        if ours and ours[2] in originals and path.name not in names:
            delete(path)


def recognised(row: Picture, originals: Collection[str]) -> Picture:
    """A row that has lost the hash of its original, in a spreadsheet say, with that which its file name begins."""
    ours = OUR_NAME.fullmatch(row.file_name)
    if ours is None or row.original_sha256 in originals:
        return row
    return replace(
        row, original_sha256=next((one for one in originals if one.startswith(ours[2])), row.original_sha256)
    )


def numbered(rows: Sequence[Picture], settled: Sequence[Picture]) -> list[Picture]:
    """Rows with file names. No number is given twice, those of pictures that were taken out included."""
    names = (OUR_NAME.fullmatch(row.file_name) for row in settled)
    first = max((int(name[1]) + 1 for name in names if name), default=0)
    return [replace(row, file_name=f"{first + i:06d}-{row.original_sha256[:8]}.png") for i, row in enumerate(rows)]
