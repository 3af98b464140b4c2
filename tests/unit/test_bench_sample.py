"""The benchmark of drawing runs; what it measures is not a test's affair."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_sample_compares_the_same_computation_and_writes_its_figures(tmp_path):
    output = tmp_path / "sample.json"
    words = ["--size", "tiny", "--steps", "2", "--modes", "eager", "--batch-sizes", "2", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "bench/sample.py", *words, "--output", str(output)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["agreement"] < 1e-3
    assert report["left_out"] == []
    (comparison,) = report["comparisons"]
    assert {name: len(seconds) for name, seconds in comparison["seconds"].items()} == {"minisd": 1, "diffusers": 1}
    assert "| 2 | diffusers, eager |" in done.stdout
    assert done.stdout.startswith("CPU, threads: 1; tiny, 128 pixels, 2 steps, torch.float32")
