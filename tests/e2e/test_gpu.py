"""On a CUDA device: `pytest -m gpu`. Elsewhere these are skipped, and the CPU tests say all there is to say."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sample
import train
from minisd.config import SampleConfig
from minisd.distributed import Distributed
from tests.e2e.test_train import config_for, metrics_of

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
