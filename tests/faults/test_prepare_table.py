"""A dataset while pictures are taken out and put back, with something going wrong at each operation in turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minisd.errors import MinisdError
from minisd.prepare.dropping import drop, restore
from minisd.prepare.table import (
    DROPPED,
    Picture,
    dropped_path,
    picture_path,
    read_pictures,
    read_rejected,
    write_pictures,
    write_rejected,
)
from tests.faults.harness import KILLED, count_operations, with_fault

IN, OUT = "000001-bbbbbbbb.png", "000002-cccccccc.png"
Move = Callable[[Path, str], None]


def _captions() -> dict[str, str]:
    return {f"{i:06d}-{letter * 8}.png": f"caption\n{letter}, ={i}" for i, letter in enumerate("abcd")}


def _make(data: Path) -> None:
    """Four pictures, one of them taken out; the content of each file is its name."""
    write_pictures(data, [Picture(file_name=name, text=text, status="ok") for name, text in _captions().items()])
    for name in _captions():
        (data / "train" / name).write_text(name)
    write_rejected(data, [Picture(original="small.png", status="too small")])
    drop(data, OUT)


def _wrong(data: Path) -> list[str]:
    """What is lost, or in two places, as a reader sees it."""
    kept = {row.file_name: row for row in read_pictures(data)}
    dropped = {row.file_name: row for row in read_rejected(data) if row.status == DROPPED}
    found = [f"{name} is both" for name in kept.keys() & dropped.keys()]
    for name, text in _captions().items():
        row = kept.get(name) or dropped.get(name)
        if row is None or row.text != text:
            found.append(f"{name}: row lost" if row is None else f"{name}: {row.text!r}")
            continue
        try:
            path = picture_path(data, name) if name in kept else dropped_path(data, name)
            found += [] if path.read_text() == name else [f"{name}: another file"]
        except (MinisdError, OSError) as error:
            found.append(f"{name} cannot be read: {error}")
    files = [path.name for path in data.rglob("*.png")]
    found += [f"{name} is there {files.count(name)} times" for name in _captions() if files.count(name) != 1]
    if [row.original for row in read_rejected(data) if row.status != DROPPED] != ["small.png"]:
        found.append("the other row is lost")
    return found


def _violations(folder: Path, move: Move, name: str) -> list[str]:
    """Do `move` with each fault at each of its operations; returns what was lost, and whether it could go on."""
    before, data = folder / "before", folder / "data"
    _make(before)
    shutil.copytree(before, data)
    count = count_operations(lambda: move(data, name))
    assert count > 10, "the operations are not seen"
    after = _files(data)
    found = []
    for fault in ("kill", "EIO", "ENOSPC"):
        for at in range(1, count + 1):
            shutil.rmtree(data)
            shutil.copytree(before, data)
            code = with_fault(lambda: move(data, name), at, fault)
            wrong = _wrong(data)
            done = (name in {row.file_name for row in read_pictures(data)}) == (move is restore)
            # 3: a table could not be opened. 0: what failed was reading, for which there is always room.
            expected = (KILLED,) if fault == "kill" else (3, 6) if fault == "EIO" or not done else (0, 6)
            wrong += [] if code in expected else [f"exit code {code}"]
            wrong += ["something half-written is left"] if fault != "kill" and [*data.rglob(".tmp*")] else []
            try:
                if done:  # there and back again, which begins with what is left to do
                    (drop if move is restore else restore)(data, name)
                move(data, name)
                wrong += _wrong(data)
                wrong += [] if _files(data) == after else ["does not end as without the fault"]
            except (MinisdError, OSError) as error:
                wrong.append(f"cannot go on: {error}")
            found += [f"{fault} at {at} of {count}: {line}" for line in wrong]
    return found


def _files(data: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in data.rglob("*.*") if path.is_file() and path.name[0] != "."}


def test_no_picture_and_no_caption_is_lost_whatever_stops_a_drop(disk: Path) -> None:
    assert _violations(disk, drop, IN) == []


def test_no_picture_and_no_caption_is_lost_whatever_stops_a_restore(disk: Path) -> None:
    assert _violations(disk, restore, OUT) == []


def _careless_drop(data: Path, name: str) -> None:
    """The file first, and one table after the other."""
    pictures = read_pictures(data)
    (data / DROPPED / name).parent.mkdir(exist_ok=True)
    (data / "train" / name).rename(data / DROPPED / name)
    write_pictures(data, [row for row in pictures if row.file_name != name])
    dropped = [replace(row, status=DROPPED, reason="taken out by hand") for row in pictures if row.file_name == name]
    write_rejected(data, [*read_rejected(data), *dropped])


def test_a_careless_order_is_caught(disk: Path) -> None:
    found = "\n".join(_violations(disk, _careless_drop, IN))
    assert "row lost" in found
    assert "cannot be read" in found
