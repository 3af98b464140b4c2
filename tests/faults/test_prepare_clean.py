"""Killed at any moment and run again, `clean` ends with the files it would have written in one go."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minisd.pocket import scenes
from minisd.prepare import clean as stage
from minisd.prepare.options import Clean, Rules
from tests.faults.harness import KILLED, POWER, count_operations, with_fault
from tests.inline_pool import InlinePool

ROOT = Path(__file__).parents[2]
RULES = Rules(min_side=48)
PROGRAM = """
import sys
from pathlib import Path
from minisd.prepare import clean as stage
from minisd.prepare.options import Clean, Rules
if __name__ == "__main__":
    stage._SAVE_SECONDS = 0.0
    print("begun", flush=True)
    stage.clean(Clean(output=Path(sys.argv[2]), source=Path(sys.argv[1]), rules=Rules(min_side=48)))
"""


def _source(folder: Path, count: int) -> Path:
    """Pictures, larger and later copies of some, an equal file, captions and what is no picture."""
    folder.mkdir(parents=True)
    for index in range(count):
        picture = scenes.draw(scenes.scene_at(index, 0), "8bit")
        picture.resize((64, 56)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
        if index % 3 == 0:
            picture.resize((96, 84)).save(folder / f"{index}-large.jpg", quality=95)
            picture.resize((72, 63)).save(folder / f"{index}-middle.jpg", quality=95)
    shutil.copy(folder / "1.png", folder / "z.png")
    picture.resize((20, 20)).save(folder / "small.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


def _tree(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def test_killed_at_any_file_operation_it_ends_as_if_it_had_not_been(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole, data = _source(disk / "source", 4), disk / "whole", disk / "data"
    monkeypatch.setattr(stage, "GuardedPool", InlinePool)
    monkeypatch.setattr(stage, "_SAVE_SECONDS", 0.0)

    def work(output: Path) -> None:
        stage.clean(Clean(output=output, source=source, rules=RULES))

    count = count_operations(lambda: work(whole))
    assert count > 100
    expected = _tree(whole)
    assert sum(name.startswith("train/") for name in expected) == 5
    assert b"near-duplicate" in expected["rejected.csv"]
    for fault in ("kill", "ENOSPC"):
        for at in range(1, count + 1, 1 if fault == "kill" else 7):
            code = with_fault(lambda: work(data), at, fault)
            assert code == KILLED if fault == "kill" else code in (0, 6), at
            if fault == "ENOSPC":
                assert [path.name for path in data.rglob(".tmp*")] == [], at
            work(data)
            assert _tree(data) == expected, f"{fault} at {at} of {count}"
            shutil.rmtree(data)


def test_killed_at_random_with_its_workers_it_ends_as_if_it_had_not_been(disk: Path) -> None:
    source, whole, data = _source(disk / "source", 24), disk / "whole", disk / "data"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    (disk / "program.py").write_text(PROGRAM)

    def start(output: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(disk / "program.py"), str(source), str(output)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    assert start(whole).wait() == 0
    expected = _tree(whole)
    generator = random.Random(0)
    midway = 0
    for _ in range(max(2, POWER["kills"] // 250)):
        process, written = start(data), generator.randrange(20)
        while process.poll() is None and len(list(data.glob("train/*.png"))) <= written:
            time.sleep(0.001)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        midway += (data / "train").is_dir() and _tree(data) != expected
        assert start(data).wait() == 0
        assert _tree(data) == expected
        shutil.rmtree(data)
    assert midway
