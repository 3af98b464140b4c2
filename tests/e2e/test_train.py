"""train.py as a whole on a tiny model: what it writes, resume, topologies, learning, refusals."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from minisd.checkpoint import newest_checkpoint
from minisd.config import TrainConfig
from minisd.distributed import Distributed
from minisd.errors import CheckpointError, NonFiniteError, UsageError
from minisd.lora_file import read_lora_info
from tests.e2e.gradient_probe import gradients_of_run

ROOT = Path(__file__).parents[2]
ALONE = Distributed(0, 1, torch.device("cpu"))


def config_for(tiny_folder, dataset, output, **options):
    defaults = {
        "model": str(tiny_folder),
        "data": dataset,
        "output": output,
        "max_train_steps": 6,
        "gradient_accumulation_steps": 2,
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 1e-3,
        "random_flip": True,
        "caption_dropout": 0.2,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 100,
    }
    return TrainConfig(**(defaults | options))


def options_of(config):
    """The command line of a config."""
    words = []
    for name, value in vars(config).items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def torchrun(script, *words, processes):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.run(
        [*command, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def metrics_of(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def state_of(output, step):
    """Every byte of a checkpoint that a run's future depends on, and the LoRA file."""
    folder = output / "checkpoints" / f"step-{step:06d}"
    names = ("lora.safetensors", "optim.safetensors", "state.json")
    return [(folder / name).read_bytes() for name in names] + [(output / "lora.safetensors").read_bytes()]


@pytest.fixture(scope="module")
def whole(tiny_folder, dataset, tmp_path_factory):
    """An uninterrupted run of six steps."""
    config = config_for(tiny_folder, dataset, tmp_path_factory.mktemp("whole"), lora_dropout=0.1)
    train.train(config, ALONE)
    return config


def test_a_run_writes_its_files(whole):
    assert sorted(p.name for p in whole.output.iterdir()) == [
        "checkpoints", "config.json", "lora.safetensors", "metrics.jsonl",
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


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(whole, tmp_path, monkeypatch, stop):
    """Killed after a checkpoint, with a step more than it gone: twice in a row, and past the edge of an epoch."""
    config = TrainConfig(**{**vars(whole), "output": tmp_path, "checkpointing_steps": 1})
    run_until(config, stop, monkeypatch)
    run_until(config, stop + 1, monkeypatch)
    train.train(config, ALONE)
    assert state_of(tmp_path, 6) == state_of(whole.output, 6)
    assert metrics_of(tmp_path) == metrics_of(whole.output)


def run_until(config, step, monkeypatch):
    """Run until a checkpoint of `step` is written, then die as by kill -9: nothing is closed or cleaned up."""

    class KilledError(BaseException):
        pass

    original = train.save_run

    def save_then_die(config, progress, *rest):
        path = original(config, progress, *rest)
        if progress.step == step:
            with (config.output / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "loss": 99.0')  # a line cut short
            raise KilledError
        return path

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_run", save_then_die)
        with pytest.raises(KilledError):
            train.train(config, ALONE)
    assert newest_checkpoint(config.output / "checkpoints").name == f"step-{step:06d}"


def test_a_finished_run_is_left_as_it_is(whole):
    before = state_of(whole.output, 6)
    train.train(whole, ALONE)
    assert state_of(whole.output, 6) == before
    assert len(metrics_of(whole.output)) == 6


def test_two_processes_by_two_micro_steps_equal_one_by_four(tiny_folder, dataset, tmp_path):
    """Every gradient to 1e-6 relative; with a batch of four at once, too. The pictures a step are the same four."""
    runs = {}
    for name, (accumulation, batch) in {"1x4x1": (4, 1), "1x1x4": (1, 4)}.items():
        config = config_for(
            tiny_folder, dataset, tmp_path / name, max_train_steps=3,
            gradient_accumulation_steps=accumulation, train_batch_size=batch,
        )  # fmt: skip
        runs[name], _ = gradients_of_run(config)
    config = config_for(tiny_folder, dataset, tmp_path / "2x2x1", max_train_steps=3, gradient_accumulation_steps=2)
    done = torchrun("tests/e2e/gradient_probe.py", str(tmp_path / "probe"), *options_of(config), processes=2)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        runs[f"2x2x1 rank {rank}"] = safetensors.torch.load_file(tmp_path / f"probe.rank{rank}.safetensors")

    reference = runs.pop("1x4x1")
    # Step 0 is exact in its weights; later ones start from weights that Adam has moved by amplified rounding.
    first = [key for key in reference if key.startswith("0/")]
    assert any(reference[key].abs().max() > 0 for key in first)
    for name, gradients in runs.items():
        assert gradients.keys() == reference.keys()
        for key, gradient in gradients.items():
            limit = 1e-6 if key in first else 1e-4
            scale = max(reference[k].abs().max().item() for k in reference if k.split("/")[0] == key.split("/")[0])
            assert (gradient - reference[key]).abs().max().item() <= limit * scale, (name, key)
    assert all(torch.equal(runs["2x2x1 rank 0"][k], runs["2x2x1 rank 1"][k]) for k in reference)
    assert [line["images_seen"] for line in metrics_of(tmp_path / "2x2x1")] == [4, 8, 12]


def test_a_run_of_two_processes_resumes_bit_for_bit_and_on_one_process(tiny_folder, dataset, tmp_path):
    """torchrun, killed at the third step and started again; then the same run goes on with another split."""
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    through = config_for(tiny_folder, dataset, tmp_path / "through", **options)
    assert torchrun("train.py", *options_of(through), processes=2).returncode == 0

    halted = config_for(tiny_folder, dataset, tmp_path / "halted", **options)
    assert torchrun("train.py", *options_of(halted), processes=2).returncode == 0
    for leftover in ("checkpoints/step-000004/manifest.json", "lora.safetensors"):
        (halted.output / leftover).unlink()  # as if killed while the last checkpoint was written
    (halted.output / "checkpoints/step-000004").rename(halted.output / "checkpoints/.tmp-step-000004-999999999")
    assert torchrun("train.py", *options_of(halted), processes=2).returncode == 0
    assert state_of(halted.output, 4) == state_of(through.output, 4)
    assert metrics_of(halted.output) == metrics_of(through.output)

    alone = TrainConfig(**{**vars(through), "output": tmp_path / "alone", "gradient_accumulation_steps": 4})
    shutil.copytree(through.output / "checkpoints" / "step-000002", alone.output / "checkpoints" / "step-000002")
    train.train(alone, ALONE)
    for ours, theirs in zip(metrics_of(alone.output), metrics_of(through.output)[2:], strict=True):
        assert ours["images_seen"] == theirs["images_seen"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


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
        train.Precision, "scaler", lambda self: torch.amp.GradScaler(self.device_type, init_scale=2.0**30)
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

    def loss(*args):
        calls.append(None)
        return original(*args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(train, "diffusion_loss", loss)
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.*\d\.png"):
        train.train(config, ALONE)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-000002"
    assert len(metrics_of(tmp_path)) == 2


def test_another_run_s_checkpoint_is_refused_naming_the_difference(whole, tmp_path):
    for name, value in {"rank": 8, "learning_rate": 2e-3, "seed": 1}.items():
        with pytest.raises(UsageError, match=rf"{name} was .*, now {value}"):
            train.train(TrainConfig(**{**vars(whole), name: value}), ALONE)
    with pytest.raises(UsageError, match="images_per_step was 2, now 4"):
        train.train(TrainConfig(**{**vars(whole), "train_batch_size": 2}), ALONE)


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
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        train.train(config, ALONE)


def test_fewer_pictures_than_a_step_holds(tiny_folder, dataset, tmp_path):
    """The plan goes round the dataset as often as it must; nothing is dropped and nothing hangs."""
    config = config_for(tiny_folder, dataset, tmp_path, train_batch_size=5, max_train_steps=2)
    train.train(config, ALONE)
    assert metrics_of(tmp_path)[-1]["images_seen"] == 20
