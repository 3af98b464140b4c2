"""The benchmark of prepare_data.py runs; what it measures is not a test's affair."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_prepare_cleans_real_pictures_and_writes_its_figures():
    words = [sys.executable, "bench/prepare.py", "--numbers", "10"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(done.stdout.splitlines()[-1])["clean"]
    assert (figures["pictures"], figures["kept"]) == (10, 9)  # one is a copy
    assert figures["parent"] > 10
    assert figures["worker"] > 10
    assert f"| 10 | 9 | {figures['seconds']:.1f} |" in done.stdout
