"""What can happen to a process or a disk in the middle of a save, made to happen, at each point or at random.

The parent has imported torch; every trial is a forked child, which costs milliseconds. A store under test is given by
its three functions, so that a careless one can be put through the same: a harness that lets it pass is broken.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from minisd.checkpoint import newest_checkpoint, prune_checkpoints, save_checkpoint
from minisd.errors import MinisdError

_POWER = {
    "": {"kills": 500, "naive_kills": 1000, "keep": (2, 3), "changes": 500, "power_cuts": 1000, "mutants": 200_000},
    "nightly": {
        "kills": 20_000,
        "naive_kills": 1000,
        "keep": (2, 3, 4),
        "changes": 50_000,
        "power_cuts": 20_000,
        "mutants": 20_000_000,
    },
    "release": {
        "kills": 100_000,
        "naive_kills": 1000,
        "keep": (2, 3, 4),
        "changes": 50_000,
        "power_cuts": 100_000,
        "mutants": 20_000_000,
    },
}
SOAK = os.environ.get("MINISD_SOAK", "")
POWER = _POWER[SOAK]  # how much is tried: with each change, or at night

KILLED = 137
UNEXPECTED = 99


class Store(NamedTuple):
    """How a trainer keeps its checkpoints: save(folder, step, files), newest(folder), prune(folder, keep)."""

    save: Callable[[Path, int, dict[str, bytes]], object]
    newest: Callable[[Path], Path | None]
    prune: Callable[[Path, int], None]


CAREFUL = Store(save_checkpoint, newest_checkpoint, prune_checkpoints)


def _write_in_place(folder: Path, step: int, files: dict[str, bytes]) -> None:
    final = folder / f"step-{step:06d}"
    final.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        descriptor = os.open(final / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for start in range(0, len(data), 128):
            os.write(descriptor, data[start : start + 128])
        os.close(descriptor)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _prune_by_name(folder: Path, keep: int) -> None:
    for path in _steps(folder)[:-keep]:
        shutil.rmtree(path)


NAIVE = Store(_write_in_place, lambda folder: _steps(folder)[-1] if _steps(folder) else None, _prune_by_name)


def fork(work: Callable[[], None]) -> int:
    """Start `work` in a child; returns its process id. It ends with 0, a MinisdError's exit code or UNEXPECTED."""
    pid = os.fork()
    if pid:
        return pid
    code = UNEXPECTED
    try:
        # Threads that the parent has started are not forked with it, and work given to them is never done.
        torch.set_num_threads(1)
        work()
        code = 0
    except MinisdError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(work: Callable[[Callable[[], None]], None], delay: float, *, begun: bool) -> int:
    """Run `work` in a child and kill it after `delay` seconds, unless it has ended; returns its exit code.

    Args:
        work: is given a function to call when it begins with what is to be interrupted.
        delay: in seconds.
        begun: count them from that call, and not from the fork, which takes long where the parent is large.
    """
    receive, send = os.pipe()
    pid = fork(lambda: work(lambda: os.write(send, b".") and None))
    os.close(send)
    if begun:
        os.read(receive, 1)  # nothing, if it ends before
    os.close(receive)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)  # a zombie takes it, too
    return wait(pid)


# --- each operation in turn ---
MAKING = ("mkdir", "open", "write", "fsync", "rename", "replace")
OPERATIONS = (*MAKING, "unlink", "rmdir")


@contextmanager
def each_operation(before: Callable[[str, Callable[..., object], tuple[object, ...]], None]) -> Iterator[None]:
    """Call before(name, the real function, its arguments) before each file operation."""
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def wrap(name: str) -> Callable[..., object]:
        def operation(*arguments: object, **options: object) -> object:
            before(name, originals[name], arguments)
            return originals[name](*arguments, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def count_operations(work: Callable[[], None]) -> int:
    """How many file operations `work` makes. Here, not in a child."""
    count = 0

    def before(*_: object) -> None:
        nonlocal count
        count += 1

    with each_operation(before):
        work()
    return count


def with_fault(work: Callable[[], None], at: int, fault: str) -> int:
    """Run `work` in a child in which the operation number `at`, from 1, goes wrong; returns its exit code.

    "kill" ends the process; a write is half done by then. "EIO" fails once: who tries again succeeds, and must not
    believe it. "ENOSPC" fails from there on with all that needs room.
    """
    count = 0

    def before(name: str, original: Callable[..., object], arguments: tuple[object, ...]) -> None:
        nonlocal count
        count += 1
        if count < at or (count > at and (fault != "ENOSPC" or name not in MAKING)):
            return
        if name == "open" and not int(arguments[1]) & os.O_CREAT and fault == "ENOSPC":
            return  # reading needs no room
        if name == "write" and count == at:
            original(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if fault == "kill":
            os._exit(KILLED)
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number))

    def faulty() -> None:
        with each_operation(before):
            work()

    return wait(fork(faulty))


# --- a checkpoint whose content is known from its step ---
def content(step: int) -> dict[str, bytes]:
    """Three files, a few KB."""
    generator = random.Random(step)
    return {
        "lora.safetensors": generator.randbytes(3000),
        "optim.safetensors": generator.randbytes(6000),
        "state.json": f'{{"step": {step}}}'.encode(),
    }


def loaded_step(store: Store, folder: Path) -> int | str:
    """The step of the newest checkpoint if what it holds is what was saved; what is wrong otherwise."""
    try:
        path = store.newest(folder)
        if path is None:
            return "no checkpoint"
        step = int(path.name.removeprefix("step-"))
        return step if all((path / n).read_bytes() == data for n, data in content(step).items()) else "torn"
    except (MinisdError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def violations(store: Store, folder: Path, keep: int, faults: tuple[str, ...] = ("kill", "ENOSPC", "EIO")) -> list[str]:
    """Save and prune with each fault at each operation; returns what was lost or taken for whole, one line each.

    There are `keep` checkpoints before, and the wreckage of a process that was killed.
    """
    last = keep + 1

    before = folder.with_name(f"{folder.name}-before")
    before.mkdir(parents=True)
    for step in range(1, last):
        store.save(before, step, content(step))
    wait(dead := fork(lambda: None))
    for name in (f".tmp-step-{last:06d}-{dead}", f".tmp-step-000001-old-{dead}"):
        (before / name).mkdir()
        (before / name / "lora.safetensors").write_bytes(b"half")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    def work() -> None:
        store.save(folder, last, content(last))
        store.prune(folder, keep)

    prepare()
    count = count_operations(work)
    assert count > 10, "the operations are not seen"
    found = []
    for fault in faults:
        for at in range(1, count + 1):
            prepare()
            code = with_fault(work, at, fault)
            step = loaded_step(store, folder)
            fine = step == last or (step == last - 1 and code != 0)
            fine &= code == KILLED if fault == "kill" else code in (0, 6)
            left = {path.name for path in folder.glob(".tmp-*")} - {path.name for path in before.iterdir()}
            fine &= code != 6 or not left
            try:  # and the run goes on from there
                store.save(folder, last + 1, content(last + 1))
                store.prune(folder, keep)
                fine &= loaded_step(store, folder) == last + 1
                fine &= len(list(folder.iterdir())) == keep
            except (MinisdError, OSError) as error:
                fine, step = False, f"{step}, then {error}"
            if not fine:
                found.append(f"{fault} at {at} of {count}: exit code {code}, loads {step}")
    return found
