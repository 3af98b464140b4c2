"""The processes that read pictures: one that crashes, hangs or fills the memory costs one picture."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from minisd.errors import MinisdError
from minisd.picture_files import PictureError
from minisd.prepare.examine import examine
from minisd.prepare.guarded import GuardedPool
from minisd.prepare.options import Rules

ROOT = Path(__file__).parents[2]
RULES = Rules(min_side=16)


def test_a_worker_that_crashes_hangs_or_fills_the_memory_costs_one_item() -> None:
    started = time.monotonic()
    with GuardedPool(2, seconds=1) as pool:
        failing = [
            (pool.submit(ctypes.string_at, 0), "damaged", "the decoder crashed"),
            (pool.submit(time.sleep, 600), "damaged", "took more than 1 s to decode"),
            (pool.submit(bytes, 700 * 2**20), "too large", "needs more memory than a picture may"),
            (pool.submit(os._exit, 0), "damaged", "took more than 1 s to decode"),
        ]
        good = [pool.submit(abs, -number) for number in range(20)]
        assert [future.result(10) for future in good] == list(range(20))
        for future, status, reason in failing:
            with pytest.raises(PictureError) as caught:
                future.result(10)
            assert (caught.value.status, caught.value.reason) == (status, reason)
        with pytest.raises(ZeroDivisionError):  # a bug stays a bug
            pool.submit(divmod, 1, 0).result(10)
    assert time.monotonic() - started < 10


def test_map_keeps_the_order_and_looks_a_few_items_ahead_only() -> None:
    taken = 0

    def items() -> Iterator[float]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number % 7 / 1000

    with GuardedPool(2) as pool:
        results = pool.map(time.sleep, items())
        next(results)
        assert taken == 8
        assert len(list(results)) == 99
        names = [Path(f"/nowhere/{number}.png") for number in range(20)]
        refused = list(pool.map(partial(examine, rules=RULES), names))
    assert [error.path for error in refused if isinstance(error, PictureError)] == names


def test_workers_are_held_to_their_limits() -> None:
    with GuardedPool(1) as pool:
        assert pool.submit(resource.getrlimit, resource.RLIMIT_CORE).result() == (0, 0)
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert 2**29 < pool.submit(resource.getrlimit, resource.RLIMIT_AS).result()[0] < 2**30
    with GuardedPool(1):
        pass  # a pool that nobody used ends, too


def test_what_a_decoder_prints_does_not_reach_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tif"
    Image.effect_noise((64, 64), 50).save(path, compression="tiff_adobe_deflate")
    path.write_bytes(path.read_bytes().replace(b"\x78\x9c", b"\xff\xff", 1))
    with pytest.raises(PictureError):
        examine(path, RULES)
    assert "Decode" in capfd.readouterr().err  # libtiff's own words
    with GuardedPool(1) as pool:
        assert all(isinstance(result, PictureError) for result in pool.map(partial(examine, rules=RULES), [path]))
    assert capfd.readouterr().err == ""


def test_leaving_a_pool_by_an_exception_ends_what_is_not_done() -> None:
    caught = []

    def wait() -> None:
        try:
            future.result(30)
        except CancelledError as error:
            caught.append(error)

    started = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), GuardedPool(1) as pool:
        pool.submit(time.sleep, 600)
        future = pool.submit(abs, 1)
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        raise KeyboardInterrupt
    thread.join(10)
    assert len(caught) == 1
    assert time.monotonic() - started < 10


def test_workers_ended_by_somebody_else_end_the_run_with_one_line() -> None:
    with GuardedPool(1) as pool:
        os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(MinisdError, match="Run the same command again"):
            pool.submit(abs, 1)


def test_workers_end_with_a_parent_that_is_killed() -> None:
    program = """
import os, time
from minisd.prepare.guarded import GuardedPool
if __name__ == "__main__":
    pool = GuardedPool(2, seconds=1)
    pids = set()
    while len(pids) < 2:
        pids |= {future.result() for future in [pool.submit(os.getpid) for _ in range(20)]}
    pool.submit(time.sleep, 600)
    print(*pids, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert len(pids) == 2


def test_no_picture_of_the_bomb_set_takes_a_worker_beyond_600_mib(tmp_path: Path) -> None:
    huge = Image.new("RGB", (8192, 8192), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    huge.save(tmp_path / "tilted.jpg", exif=exif)
    huge.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    huge.convert("LA").save(tmp_path / "transparent.png", compress_level=1)
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    body = b"IDAT" + zlib.compress(bytes(3 * 12000 + 1) * 12000, 1)
    (tmp_path / "bomb.png").write_bytes(head + struct.pack(">I", len(body) - 4) + body)
    text = PngImagePlugin.PngInfo()
    for index in range(70):
        text.add_text(f"k{index}", "x" * 2**20, zip=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "texts.png", pnginfo=text)
    wanted = {"tilted.jpg": "", "progressive.jpg": "damaged", "transparent.png": "too large", "bomb.png": "too large"}
    with GuardedPool(1) as pool:
        for path in sorted(tmp_path.iterdir()):
            (result,) = pool.map(partial(examine, rules=RULES), [path])
            status = result.status if isinstance(result, PictureError) else ""
            assert status == wanted.get(path.name, "damaged"), path.name
        peak = pool.submit(Path.read_text, Path("/proc/self/status")).result().partition("VmHWM:")[2].split()[0]
    assert 256 < int(peak) / 1024 < 600
