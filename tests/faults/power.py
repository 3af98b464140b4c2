"""A disk that forgets: the operations of a save are recorded, and a power cut drops what no fsync has made certain.

A file keeps what was written before its last fsync, and perhaps more. A folder keeps its names as of its own last
fsync, and perhaps some of the changes after it, in their order. Nothing is certain between two files or folders.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.harness import each_operation


@dataclass(eq=False)
class File:
    """What is in it, and how many bytes of it are certain."""

    data: bytes = b""
    certain: int = 0

    def sync(self) -> None:
        """Make all of it certain."""
        self.certain = len(self.data)


@dataclass(eq=False)
class Folder:
    """Its names, those that are certain, and the changes in between: name -> what it stands for, None for nothing."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    certain: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def change(self, change: dict[str, File | Folder | None]) -> None:
        """Give or take names, at once."""
        self.names = _changed(self.names, change)
        self.changes.append(change)

    def sync(self) -> None:
        """Make the names certain."""
        self.certain, self.changes = self.names, []


def _changed(names: dict[str, File | Folder], change: dict[str, File | Folder | None]) -> dict[str, File | Folder]:
    return {name: item for name, item in {**names, **change}.items() if item is not None}


Operation = tuple[str, Path, object]  # its name, on what, and with what: the data, the flags or the new name


def record(root: Path, work: Callable[[], None], log: list[Operation]) -> None:
    """Do `work` and put the operations that it makes below `root` into `log`, as they come."""

    def before(name: str, _: object, arguments: tuple[object, ...]) -> None:
        first, *rest = arguments
        path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(os.fspath(first))
        # Names in a folder that is being deleted are relative. It has lost its own name by then: nothing loads it.
        if path.is_relative_to(root):
            log.append((name, path.relative_to(root), bytes(rest[0]) if name == "write" else rest[0] if rest else None))

    with each_operation(before):
        work()


def after_power_cut(log: Sequence[Operation], target: Path, generator: random.Random) -> None:
    """Write into `target`, which is made, what may be left if the power goes after the operations of `log`."""
    top = Folder()

    def find(path: Path) -> File | Folder:
        item: File | Folder = top
        for name in path.parts:
            item = item.names[name]
        return item

    for name, path, extra in log:
        if name == "write":
            find(path).data += extra
        elif name == "fsync":
            find(path).sync()
        elif name == "mkdir":
            find(path.parent).change({path.name: Folder()})
        elif name == "open" and extra & os.O_CREAT:
            find(path.parent).change({path.name: File()})
        elif name == "rename":
            find(path.parent).change({path.name: None, Path(extra).name: find(path)})
        elif name in ("unlink", "rmdir"):
            find(path.parent).change({path.name: None})

    def write(item: File | Folder, path: Path) -> None:
        if isinstance(item, File):
            path.write_bytes(item.data[: generator.randint(item.certain, len(item.data))])
            return
        path.mkdir()
        names = item.certain
        for change in item.changes[: generator.randint(0, len(item.changes))]:
            names = _changed(names, change)
        for name, inner in names.items():
            write(inner, path / name)

    write(top, target)
