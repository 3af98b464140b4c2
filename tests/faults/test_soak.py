"""A long run of two processes that saves all the time: nothing may grow. Run by `make soak` alone, for an hour."""

import json
import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.e2e.running import config_for
from tests.e2e.test_signals import Launch
from tests.faults.harness import SOAK

MINUTES = {"": 0, "nightly": 60, "release": 480}[SOAK]
MINUTES = int(os.environ.get("MINISD_SOAK_MINUTES", MINUTES))
WARM_UP = 0.2  # share of the run after which memory is to stand still

pytestmark = pytest.mark.skipif(MINUTES == 0, reason="make soak runs it")


def measured(pid):
    """Resident bytes, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(values["VmRSS"].split()[0]) * 1024, files, int(values["Threads"])


def slope(xs, ys):
    """Least squares, and the standard error of it."""
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    value = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - value * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return value, (rest / max(1, len(xs) - 2) / spread) ** 0.5


def test_nothing_grows(tiny_folder, dataset, tmp_path):
    config = config_for(
        tiny_folder, dataset, tmp_path / "run", max_train_steps=10_000_000, checkpointing_steps=20,
        gradient_accumulation_steps=1, dataloader_num_workers=1, lr_scheduler="constant",
    )  # fmt: skip
    launch = Launch(config, processes=2)
    samples = {0: [], 1: []}  # rank -> (step, resident bytes, files, threads)
    try:
        launch.wait_for_steps(20)
        ranks = launch.ranks()
        ends = time.monotonic() + 60 * MINUTES
        while time.monotonic() < ends:
            time.sleep(max(1, MINUTES))
            assert launch.process.poll() is None, launch.said
            step = json.loads((config.output / "run_status.json").read_text())["step"]
            for rank, pid in enumerate(ranks):
                samples[rank].append((step, *measured(pid)))
        sizes = sorted(
            sum(file.stat().st_size for file in folder.iterdir())
            for folder in (config.output / "checkpoints").glob("step-*")
        )
        launch.process.send_signal(signal.SIGTERM)
        launch.wait()
    finally:
        launch.process.kill()

    for rank, entries in samples.items():
        steady = entries[int(WARM_UP * len(entries)) :]
        growth, error = slope([entry[0] for entry in steady], [entry[1] for entry in steady])
        print(f"rank {rank}: {growth * 1000 / 2**20:.3f} +- {error * 1000 / 2**20:.3f} MiB in 1,000 steps")
        assert (growth - 2 * error) * 1000 < 2**20, rank
        # Tensors come from a reader as open files: their number swings, and must not drift.
        halves = (steady[: len(steady) // 2], steady[len(steady) // 2 :])
        first, second = (statistics.median(entry[2] for entry in half) for half in halves)
        assert second <= first + 1, rank
        assert len({entry[3] for entry in steady}) == 1
    kept = config.checkpoints_total_limit
    assert kept <= len(sizes) <= kept + 1  # one may have been on its way
    assert sizes[-1] < 1.05 * sizes[0]
    seconds = [json.loads(line)["seconds"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    quarter = len(seconds) // 4
    early, late = statistics.median(seconds[quarter : 2 * quarter]), statistics.median(seconds[-quarter:])
    print(f"{len(seconds)} steps, {early:.4f} s a step early, {late:.4f} s late")
    assert late < 1.05 * early
