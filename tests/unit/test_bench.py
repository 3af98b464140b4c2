"""The benchmarks run; what they measure is not a test's affair."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_train_step_compares_the_same_computation_and_writes_its_figures(tmp_path):
    output = tmp_path / "train_step.json"
    words = ["--size", "tiny", "--steps", "1", "--batch-sizes", "1", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "bench/train_step.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert max(report["agreement"].values()) < 1e-3
    assert report["flops_of_image"] > 0
    assert report["left_out"] == []
    (comparison,) = report["comparisons"]
    assert list(comparison["seconds"]) == ["minisd", "diffusers", "diffusers, cached"]
    assert all(len(seconds) == 1 for seconds in comparison["seconds"].values())
    assert "| 1 | minisd, eager | shipped |" in done.stdout
