"""train.py as a whole on a tiny model: what it writes, resume, topologies, learning, refusals."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from minisd import run as run_module
from minisd.checkpoint import newest_checkpoint
from minisd.config import TrainConfig
from minisd.errors import CheckpointError, NonFiniteError
from minisd.lora_reader import read_lora_info
from tests.e2e.running import ALONE, config_for, metrics_of, state_of


@pytest.fixture(scope="module")
def whole(tiny_folder, dataset, tmp_path_factory):
    """An uninterrupted run of six steps."""
    config = config_for(tiny_folder, dataset, tmp_path_factory.mktemp("whole"), lora_dropout=0.1)
    train.train(config, ALONE)
    return config


def test_a_run_writes_its_files(whole):
    assert sorted(p.name for p in whole.output.iterdir()) == [
        "cache", "checkpoints", "config.json", "lora.safetensors", "metrics.jsonl", "pictures.csv",
    ]  # fmt: skip
    lines = metrics_of(whole.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["images_seen"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[0]["lr"] == pytest.approx(5e-4)  # half of the warmup
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    info = read_lora_info(whole.output / "lora.safetensors")
    assert (info.rank, info.alpha) == (4, 8.0)
    assert json.loads((whole.output / "config.json").read_text())["rank"] == 4


def test_no_path_of_the_machine_is_in_the_file(whole):
    data = (whole.output / "lora.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    for secret in (str(whole.data), str(whole.output), str(Path(whole.model).parent), str(Path.home())):
        assert secret not in header


def test_a_finished_run_is_left_as_it_is(whole):
    before = state_of(whole.output, 6)
    train.train(whole, ALONE)
    assert state_of(whole.output, 6) == before
    assert len(metrics_of(whole.output)) == 6


def test_only_the_adapter_learns_and_it_overfits(tiny_folder, dataset, tmp_path):
    config = config_for(
        tiny_folder, dataset, tmp_path, max_train_steps=60, gradient_accumulation_steps=1, train_batch_size=7,
        learning_rate=2e-2, rank=16, caption_dropout=0.0, random_flip=False,
    )  # fmt: skip
    train.train(config, ALONE)
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_clipping_bounds_the_gradient_that_adam_sees(tiny_folder, dataset, tmp_path, monkeypatch):
    """diffusers' script hands clip_grad_norm_ a spent iterator and never clips."""
    seen = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = config_for(tiny_folder, dataset, tmp_path, max_grad_norm=1e-4, max_train_steps=2)
    train.train(config, ALONE)
    assert all(line["grad_norm"] > 1e-3 for line in metrics_of(tmp_path))
    assert seen == pytest.approx([1e-4, 1e-4], rel=1e-2)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_mixed_precision_keeps_the_adapter_and_adam_in_float32(tiny_folder, dataset, tmp_path, mode):
    config = config_for(tiny_folder, dataset, tmp_path, mixed_precision=mode, max_train_steps=4)
    train.train(config, ALONE)
    folder = tmp_path / "checkpoints" / "step-000004"
    for name in ("lora.safetensors", "optim.safetensors"):
        tensors = safetensors.torch.load_file(folder / name)
        assert {t.dtype for t in tensors.values()} == {torch.float32}
    exact = config_for(tiny_folder, dataset, tmp_path / "exact", max_train_steps=4)
    train.train(exact, ALONE)
    for half, full in zip(metrics_of(tmp_path), metrics_of(tmp_path / "exact"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)  # unscaled before it is clipped
        assert half["skipped"] == 0


def test_float16_overflow_is_counted_skipped_and_does_not_move_the_learning_rate(
    tiny_folder, dataset, tmp_path, monkeypatch
):
    """An initial scale of 2^30 overflows; the scaler halves it until it does not."""
    monkeypatch.setattr(
        run_module.Precision, "scaler", lambda self: torch.amp.GradScaler(self.device_type, init_scale=2.0**30)
    )
    config = config_for(tiny_folder, dataset, tmp_path, mixed_precision="fp16", max_train_steps=24)
    train.train(config, ALONE)
    lines = metrics_of(tmp_path)
    skipped = [line["skipped"] for line in lines]
    assert 0 < skipped[-1] < 24
    for before, after in pairwise(lines):
        if after["skipped"] > before["skipped"] == 0:
            assert after["lr"] == lines[0]["lr"]
    assert lines[skipped[-1]]["lr"] == lines[0]["lr"]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_pictures(tiny_folder, dataset, tmp_path, monkeypatch):
    config = config_for(tiny_folder, dataset, tmp_path, checkpointing_steps=1)
    original, calls = train.diffusion_loss, []

    def loss(*args, **options):
        calls.append(None)
        return original(*args, **options) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(train, "diffusion_loss", loss)
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*\d\.png"):
        train.train(config, ALONE)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-000002"
    assert len(metrics_of(tmp_path)) == 2


def test_never_sets_an_earlier_run_aside(tiny_folder, dataset, tmp_path):
    config = config_for(tiny_folder, dataset, tmp_path, max_train_steps=1)
    train.train(config, ALONE)
    first = (tmp_path / "lora.safetensors").read_bytes()
    train.train(TrainConfig(**{**vars(config), "resume_from_checkpoint": "never", "seed": 5}), ALONE)
    assert (tmp_path / "old-1" / "lora.safetensors").read_bytes() == first
    assert (tmp_path / "lora.safetensors").read_bytes() != first
    assert len(metrics_of(tmp_path)) == 1


def test_a_checkpoint_that_is_not_there_is_an_error_not_a_new_run(tiny_folder, dataset, tmp_path):
    config = config_for(tiny_folder, dataset, tmp_path, resume_from_checkpoint=str(tmp_path / "step-000009"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train.train(config, ALONE)


def test_fewer_pictures_than_a_step_holds(tiny_folder, dataset, tmp_path):
    """The plan goes round the dataset as often as it must; nothing is dropped and nothing hangs."""
    config = config_for(tiny_folder, dataset, tmp_path, train_batch_size=5, max_train_steps=2)
    train.train(config, ALONE)
    assert metrics_of(tmp_path)[-1]["images_seen"] == 20
