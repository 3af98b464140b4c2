"""What a run tells the world: metrics.jsonl line by line, TensorBoard read back, a stand-in for wandb."""

import importlib.machinery
import json
import logging
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minisd.errors import DiskError, UsageError
from minisd.run_state import rewind_metrics
from minisd.trackers import LossAverage, MetricsLog

LOSSES = np.random.default_rng(0).uniform(0.01, 1, 12).tolist()


def log_steps(metrics, first, last):
    for step in range(first, last + 1):
        metrics.log(step, {"loss": LOSSES[step - 1], "lr": 1e-4 / step, "images_seen": 4 * step})


def lines_of(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0.01 < line.pop("memory_gb") < 1000
    return lines


def scalars_of(output, name):
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(f"train/{name}")]


def test_a_line_a_step_and_the_average_of_the_loss(tmp_path):
    metrics = MetricsLog(tmp_path, "none", {})
    log_steps(metrics, 1, 12)
    metrics.close()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == LOSSES
    assert list(lines[0]) == ["step", "loss", "lr", "images_seen", "loss_average"]
    for count, line in enumerate(lines, 1):
        weights = 0.98 ** np.arange(count - 1, -1, -1)
        assert line["loss_average"] == pytest.approx(np.average(LOSSES[:count], weights=weights), rel=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_average_of_a_constant_is_that_constant():
    average = LossAverage()
    assert [average.add(0.25) for _ in range(500)] == pytest.approx([0.25] * 500, rel=1e-12)


def test_tensorboard_has_the_values_and_the_pictures(tmp_path):
    metrics = MetricsLog(tmp_path, "tensorboard", {})
    picture = Image.new("RGBA", (6, 4), (10, 200, 30, 255))
    picture.save(tmp_path / "picture.png")
    metrics.picture(0, "0-a cat", picture)
    log_steps(metrics, 1, 3)
    metrics.picture(3, "0-a cat", tmp_path / "picture.png")
    metrics.close()
    assert scalars_of(tmp_path, "loss") == [(step, pytest.approx(LOSSES[step - 1])) for step in (1, 2, 3)]
    assert [step for step, _ in scalars_of(tmp_path, "loss_average")] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(
        f"train/{name}" for name in ("loss", "lr", "images_seen", "loss_average", "memory_gb")
    )
    images = events.Images("samples/0-a cat")
    assert [(image.step, image.width, image.height) for image in images] == [(0, 6, 4), (3, 6, 4)]


RATIOS = {
    "train": {"ratio": 0.9, "bands": [0.99, 0.95, 0.9, 0.76]},
    "held_out": {"ratio": 1.0, "bands": [1.01, 1.0, 1.0, 0.99]},
}


def test_the_validation_loss_has_a_file_and_curves_of_its_own(tmp_path):
    metrics = MetricsLog(tmp_path, "tensorboard", {})
    for step in (0, 2):
        metrics.validation(step, RATIOS)
        log_steps(metrics, step + 1, step + 2)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **RATIOS} for step in (0, 2)]
    assert len(lines_of(tmp_path)) == 4
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    wanted = {f"{name}_ratio": RATIOS[name]["ratio"] for name in RATIOS}
    wanted |= {f"{name}_band_{i}": RATIOS[name]["bands"][i] for name in RATIOS for i in range(4)}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("v")} == {f"validation/{name}" for name in wanted}
    for name, value in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(f"validation/{name}")]
        assert found == [(0, pytest.approx(value)), (2, pytest.approx(value))]
    (tmp_path / "validation.jsonl").unlink()
    (tmp_path / "validation.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"validation\.jsonl: cannot be written: No space left"):
        MetricsLog(tmp_path, "none", {}).validation(4, RATIOS)


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path, monkeypatch):
    """Killed at step 9, resumed at 6, killed at 8, resumed at 7: every step once, with the same average."""
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    for output in (whole, halted):
        output.mkdir()
    metrics = MetricsLog(whole, "tensorboard", {})
    log_steps(metrics, 1, 12)
    metrics.close()
    now = time.time
    for start, (step, last) in enumerate([(0, 9), (6, 8), (7, 12)]):
        # TensorBoard reads its files in the order of their names, which have the second they were made in.
        monkeypatch.setattr(time, "time", lambda start=start: now() + 10 * start)
        rewind_metrics(halted / "metrics.jsonl", step)
        metrics = MetricsLog(halted, "tensorboard", {})
        log_steps(metrics, step + 1, last)
        metrics._tracker._writer.flush()  # and no close(): it was killed
    assert lines_of(halted) == lines_of(whole)
    for name in ("loss", "loss_average", "lr"):
        assert scalars_of(halted, name) == scalars_of(whole, name)
    assert [step for step, _ in scalars_of(halted, "loss")] == list(range(1, 13))


def hide(monkeypatch, package):
    """Make a package look as if it were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_refused_with_the_remedy(tmp_path, monkeypatch, package):
    hide(monkeypatch, package)
    with pytest.raises(UsageError, match=f"--report-to {package}: .* pip install {package}"):
        MetricsLog(tmp_path, package, {})


def test_auto_takes_tensorboard_if_it_is_there_and_is_silent_otherwise(tmp_path, monkeypatch, caplog):
    MetricsLog(tmp_path, "auto", {}).close()
    assert (tmp_path / "tensorboard").is_dir()
    hide(monkeypatch, "tensorboard")
    (tmp_path / "other").mkdir()
    metrics = MetricsLog(tmp_path / "other", "auto", {})
    log_steps(metrics, 1, 1)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["metrics.jsonl"]
    assert not caplog.records


def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, monkeypatch, caplog):
    metrics = MetricsLog(tmp_path, "tensorboard", {})
    log_steps(metrics, 1, 2)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics._tracker._writer, "add_scalar", fail)
    log_steps(metrics, 3, 5)
    metrics.picture(5, "a", Image.new("RGB", (4, 4)))
    metrics.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text
    assert len(lines_of(tmp_path)) == 5


def test_a_tracker_that_cannot_start_is_given_up_too(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    metrics = MetricsLog(tmp_path, "auto", {})
    log_steps(metrics, 1, 2)
    metrics.close()
    assert len(caplog.records) == 1
    assert len(lines_of(tmp_path)) == 2


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    metrics = MetricsLog(tmp_path, "none", {})
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: No space left"):
        log_steps(metrics, 1, 1)


class FakeRun:
    """A wandb.Run: `step` is the last one logged, and 1 more than it after a resume."""

    def __init__(self, step):
        self.step, self.rows = step, []

    def log(self, values, step):
        assert step >= self.step
        self.step = step
        self.rows.append((step, sorted(values)))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    module.runs = []

    def init(**options):
        resumed = [run for run, before in module.runs if before["id"] == options["id"]]
        module.runs.append((FakeRun(resumed[-1].step + 1 if resumed else 0), options))
        return module.runs[-1][0]

    module.init, module.Image = init, lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_in_the_same_run(tmp_path, wandb):
    config = {"data": Path("x"), "validation_prompts": ("a",), "rank": 4}
    metrics = MetricsLog(tmp_path, "wandb", config)
    metrics.picture(0, "0-a", Image.new("RGB", (4, 4)))
    log_steps(metrics, 1, 5)
    rewind_metrics(tmp_path / "metrics.jsonl", 3)  # killed, and resumed from step 3

    metrics = MetricsLog(tmp_path, "wandb", config)
    log_steps(metrics, 4, 6)
    metrics.picture(6, "0-a", tmp_path / "picture.png")
    metrics.close(failed=True)
    (first, options), (second, resumed) = wandb.runs
    assert options == resumed
    assert options["id"] == (tmp_path / "wandb_run_id").read_text()
    assert (options["project"], options["resume"], options["dir"]) == ("minisd", "allow", str(tmp_path))
    assert options["config"] == {"data": "x", "validation_prompts": ["a"], "rank": 4}
    assert "mode" not in options  # WANDB_MODE=offline is the user's to set
    assert [step for step, _ in first.rows] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in second.rows] == [6, 6]  # 4 and 5 are there already
    assert second.rows[0][1] == sorted(f"train/{n}" for n in ("loss", "lr", "images_seen", "loss_average", "memory_gb"))
    assert second.exit_code == 1
    with MetricsLog(tmp_path, "wandb", config):
        pass
    assert wandb.runs[-1][0].exit_code == 0
    (tmp_path / "metrics.jsonl").unlink()  # set aside: the next run starts anew
    MetricsLog(tmp_path, "wandb", config).close()
    assert wandb.runs[-1][1]["id"] != options["id"]


def test_wandb_that_cannot_be_reached_does_not_end_the_run(tmp_path, wandb, caplog):
    def init(**_):
        raise ConnectionError("no network\nat all")

    wandb.init = init
    metrics = MetricsLog(tmp_path, "wandb", {})
    log_steps(metrics, 1, 2)
    metrics.close()
    assert len(caplog.records) == 1
    assert "no network" in caplog.text
    assert len(lines_of(tmp_path)) == 2
