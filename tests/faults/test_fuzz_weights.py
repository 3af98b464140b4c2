"""200,000 damaged weights files and LoRA files: each loads as a valid one or is refused in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.harness import POWER

ROOT = Path(__file__).parents[2]


def _start(folder: Path, reader: str, first: int, count: int) -> subprocess.Popen[str]:
    folder.mkdir()
    words = ["-m", "tests.faults.fuzz_weights", str(folder), reader, str(first), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate()
    assert process.returncode == 0, error[-2000:]  # below 0: a signal
    result: dict[str, Any] = json.loads(out)
    return result


def test_every_mutant_loads_as_valid_or_is_refused(disk: Path) -> None:
    half = POWER["mutants"] // 2
    processes = [_start(disk / str(first), "careful", first, half) for first in (0, half)]
    for result in map(_result, processes):
        assert result["wrong"] == []
        assert result["loaded"] + result["refused"] == half
        # A mutator that only makes rubbish, or changes nothing, would prove little.
        assert 0.02 * half < result["loaded"] < 0.5 * half
        assert result["peak MiB"] < 1024


def test_a_reader_that_trusts_the_file_fails_on_the_same_mutants(disk: Path) -> None:
    result = _result(_start(disk / "naive", "naive", 0, 500))
    assert result["number of wrong"] > 100
