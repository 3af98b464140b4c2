"""20,000 damaged pictures: each is decoded, or refused in one clear line, by a program that lives to tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.harness import SOAK

ROOT = Path(__file__).parents[2]
MUTANTS = {"": 20_000, "nightly": 2_000_000, "release": 10_000_000}[SOAK]


def _start(folder: Path, reader: str, first: int, count: int) -> subprocess.Popen[str]:
    folder.mkdir()
    words = ["-m", "tests.faults.fuzz_pictures", str(folder), reader, str(first), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # libtiff complains on stderr of each damaged file.
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0  # below 0: a signal; SIGALRM is a mutant that took more than 20 s
    result: dict[str, Any] = json.loads(out)
    return result


def test_every_mutant_is_decoded_or_refused_in_one_clear_line(disk: Path) -> None:
    half = MUTANTS // 2
    processes = [_start(disk / str(first), "careful", first, half) for first in (0, half)]
    for result in map(_result, processes):
        outcomes = result["outcomes"]
        assert result["wrong"] == []
        assert sum(outcomes.values()) == half
        # A mutator that only makes rubbish, or changes nothing, would prove little.
        assert 0.1 * half < outcomes["decoded"] < 0.5 * half
        assert 0.2 * half < outcomes["damaged"]
        assert outcomes["too large"] > 0.003 * half
        assert result["peak MiB"] < 600


def test_a_careless_reader_fails_on_the_same_mutants(disk: Path) -> None:
    result = _result(_start(disk / "careless", "careless", 0, 2_000))
    assert result["number of wrong"] > 20
