"""What sample.py makes ready before it draws, and what it says and saves while it draws."""

from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import sample
from minisd import sample_setup
from minisd.lora_info import LoRAInfo
from minisd.lora_layers import LoRALayer
from minisd.lora_writer import save_lora
from minisd.sample_config import SampleConfig
from minisd.weights import load_unet
from tests.lora_files import random_lora


class AskedError(Exception):
    """The model was asked for."""


def draw(folder, output, **options):
    given = {"prompt": ("cat",), "lora": ("none",), "num_inference_steps": 5, "num_images": 3, "batch_size": 2}
    paths = sample.sample(SampleConfig(model=str(folder), output=output, **(given | options)))
    return [np.asarray(Image.open(path)) for path in paths]


@pytest.mark.parametrize(
    ("cuda", "precision", "expected"),
    [
        (True, "auto", (torch.float16, "cuda")),
        (False, "auto", (torch.float32, "cpu")),
        (True, "bfloat16", (torch.bfloat16, "cuda")),
        (False, "float16", (torch.float16, "cpu")),
    ],
)
def test_the_dtype_is_that_of_the_device_unless_it_is_given(tmp_path, monkeypatch, cuda, precision, expected):
    asked = []

    def load_model(name, *, dtype, device, **options):
        asked.append((dtype, device))
        raise AskedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(sample_setup, "load_model", load_model)
    with suppress(AskedError):
        draw("somewhere", tmp_path, precision=precision)
    assert asked == [expected]


def test_the_progress_bar_ends_with_the_network_s_last_call(tiny_folder, tmp_path, monkeypatch):
    """Two prompts, for each a batch of two and one of one, nine calls of Heun's method a batch."""
    bars = []
    monkeypatch.setattr(sample, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    draw(tiny_folder, tmp_path, prompt=("cat", "city"), scheduler="heun")
    assert [(bar.n, bar.total) for bar in bars] == [(36, 36)]


def test_a_dora_is_computed_once_a_batch_to_the_same_bits(tiny_folder, tmp_path, monkeypatch):
    loras = random_lora(load_unet(tiny_folder))
    doras = {path: replace(lora, magnitude=lora.up.abs().mean(1).add(1)) for path, lora in loras.items()}
    path = tmp_path / "dora.safetensors"
    save_lora(path, {"unet": doras}, LoRAInfo(base_model="tiny", rank=4, alpha=6.0))
    computed, original = [], LoRALayer.changed_weight
    monkeypatch.setattr(LoRALayer, "changed_weight", lambda layer: (computed.append(layer), original(layer))[1])
    options = {"lora": (f"{path}:0.5",), "strength_sweep": True, "num_images": 1}
    merged = draw(tiny_folder, tmp_path / "a", **options)
    assert len(computed) == 4 * len(doras)  # at each strength but 0
    computed.clear()
    monkeypatch.setattr(sample, "merged_doras", lambda model: nullcontext())
    anew = draw(tiny_folder, tmp_path / "b", **options)
    assert len(computed) == 4 * 5 * len(doras)
    assert all((a == b).all() for a, b in zip(merged, anew, strict=True))
    assert len({picture.tobytes() for picture in merged}) == 5
