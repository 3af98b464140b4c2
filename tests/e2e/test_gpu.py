"""On a CUDA device: `pytest -m gpu`. Elsewhere these are skipped, and the CPU tests say all there is to say."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sample
import train
from minisd.distributed import Distributed
from minisd.sample_config import SampleConfig
from tests.e2e.running import config_for, metrics_of
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", ["no", "bf16", "fp16"])
def test_training_in_each_precision(tiny_folder, dataset, tmp_path, mode):
    config = config_for(tiny_folder, dataset, tmp_path, mixed_precision=mode, max_train_steps=4)
    train.train(config, Distributed(0, 1, torch.device("cuda", 0)))
    lines = metrics_of(tmp_path)
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    tensors = safetensors.torch.load_file(tmp_path / "checkpoints" / "step-000004" / "optim.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_draws_and_losses_are_those_of_the_cpu(tiny_folder, dataset, tmp_path):
    for device in ("cpu", "cuda"):
        config = config_for(tiny_folder, dataset, tmp_path / device, max_train_steps=3)
        train.train(config, Distributed(0, 1, torch.device(device)))
    for a, b in zip(metrics_of(tmp_path / "cpu"), metrics_of(tmp_path / "cuda"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_pictures_are_those_of_the_cpu(tiny_folder, tmp_path, monkeypatch):
    options = {"prompt": ("the cat",), "model": str(tiny_folder), "lora": ("none",), "precision": "float32"}
    options |= {"num_images": 1, "num_inference_steps": 5}
    gpu = sample.sample(SampleConfig(output=tmp_path / "gpu", **options))[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = sample.sample(SampleConfig(output=tmp_path / "cpu", **options))[0]
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (gpu, cpu))
    assert abs(a - b).mean() < 1


def test_nothing_waits_for_the_device_inside_an_accumulation(tiny_folder, dataset, tmp_path, monkeypatch):
    """torch raises at every synchronizing call between the first forward pass of a step and its all-reduce."""
    original_loss, original_sum = train.loss_of, train.sum_gradients

    def loss_of(*args):
        torch.cuda.set_sync_debug_mode("error")
        return original_loss(*args)

    def sum_gradients(*args):
        torch.cuda.set_sync_debug_mode("default")
        return original_sum(*args)

    monkeypatch.setattr(train, "loss_of", loss_of)
    monkeypatch.setattr(train, "sum_gradients", sum_gradients)
    config = config_for(
        tiny_folder, dataset, tmp_path, mixed_precision="bf16", gradient_accumulation_steps=4, max_train_steps=3,
        snr_gamma=5.0,
    )  # fmt: skip
    try:
        train.train(config, Distributed(0, 1, torch.device("cuda", 0)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(metrics_of(tmp_path)) == 3


def test_cached_and_encoded_latents_are_the_same_bits(tiny_folder, dataset, tmp_path):
    for cached in (True, False):
        config = config_for(tiny_folder, dataset, tmp_path / str(cached), cache_latents=cached, max_train_steps=2)
        train.train(config, Distributed(0, 1, torch.device("cuda", 0)))
    assert metrics_of(tmp_path / "True")[0]["loss"] == metrics_of(tmp_path / "False")[0]["loss"]


def test_vae_and_text_encoder_leave_the_device(tiny_folder, dataset, tmp_path, monkeypatch):
    seen = []
    original = train.loss_of

    def loss_of(config, run, batch):
        seen.append((run.model.vae.quant_conv.weight.device.type, run.model.text_encoder.device.type))
        return original(config, run, batch)

    monkeypatch.setattr(train, "loss_of", loss_of)
    config = config_for(tiny_folder, dataset, tmp_path, max_train_steps=1, validation_prompts=("cat",))
    train.train(config, Distributed(0, 1, torch.device("cuda", 0)))
    assert set(seen) == {("cpu", "cpu")}


def test_a_compiled_run_computes_the_same(tiny_folder, dataset, tmp_path):
    for compiled in (True, False):
        config = config_for(tiny_folder, dataset, tmp_path / str(compiled), compile=compiled, max_train_steps=3)
        train.train(config, Distributed(0, 1, torch.device("cuda", 0)))
    for a, b in zip(metrics_of(tmp_path / "True"), metrics_of(tmp_path / "False"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_an_xl_run_is_that_of_the_cpu_and_its_vae_in_float32(dataset, tmp_path):
    folder = write_tiny_model(tmp_path / "sdxl", family="sdxl").folder
    for device in ("cpu", "cuda"):
        train.train(
            config_for(folder, dataset, tmp_path / device, max_train_steps=3),
            Distributed(0, 1, torch.device(device)),
        )
    for a, b in zip(metrics_of(tmp_path / "cpu"), metrics_of(tmp_path / "cuda"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    half = config_for(
        folder, dataset, tmp_path / "half", mixed_precision="fp16", validation_prompts=("cat",), max_train_steps=3
    )
    train.train(half, Distributed(0, 1, torch.device("cuda", 0)))
    assert all(math.isfinite(line["loss"]) for line in metrics_of(half.output))
    assert len(list((half.output / "samples").rglob("*.png"))) == 2
