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
from minisd.errors import DiskError, WeightsError
from minisd.lora_choice import chosen_loras
from minisd.lora_info import LoRAInfo
from minisd.lora_layers import LoRALayer
from minisd.lora_writer import save_lora
from minisd.sample_config import KARRAS_SCHEDULERS, SampleConfig
from minisd.sample_setup import check_output
from minisd.samplers import KARRAS_SAMPLERS
from minisd.weights import load_unet
from tests.e2e.test_sample import write_lora
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


def test_the_options_know_the_same_samplers_of_karras_as_the_samplers():
    assert KARRAS_SCHEDULERS == KARRAS_SAMPLERS


def test_the_trained_lora_is_left_out_of_another_model_than_it_was_trained_on(
    tiny_folder, tmp_path, monkeypatch, caplog
):
    """Such as the one that it was merged into: it would be there twice."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "merged"):
        (tmp_path / name).symlink_to(tiny_folder)
    (tmp_path / "output").mkdir()
    write_lora(tmp_path / "output" / "lora.safetensors", tiny_folder, base_model="base")
    caplog.set_level("INFO")
    (without,) = draw("merged", tmp_path / "a", num_images=1, lora=())
    assert "LoRA: none; output/lora.safetensors is for base, give it with --lora to use it" in caplog.messages
    caplog.clear()
    (base,) = draw("merged", tmp_path / "b", num_images=1, lora=("none",))
    assert not [line for line in caplog.messages if line.startswith("LoRA:")]
    (used,) = draw("./base", tmp_path / "c", num_images=1, lora=())
    assert "LoRA: output/lora.safetensors, strength 1 (trained last; --lora none draws without)" in caplog.messages
    caplog.clear()
    (asked,) = draw("merged", tmp_path / "d", num_images=1, lora=("output/lora.safetensors",))
    assert "LoRA: output/lora.safetensors, strength 1" in caplog.messages
    assert (without == base).all()
    assert (used == asked).all()
    assert abs(used.astype(int) - base).max() > 5


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


def test_an_output_folder_that_cannot_be_written_to_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    config = SampleConfig(prompt=("a",), output=tmp_path / "not" / "there")
    check_output(config, [config.output / "000.png"])
    monkeypatch.setattr(sample_setup.os, "access", lambda path, mode: path != tmp_path)  # as root everything can be
    with pytest.raises(DiskError, match="cannot be written to"):
        check_output(config, [config.output / "000.png"])
    assert not (tmp_path / "not").exists()


def test_a_model_folder_given_as_a_lora_is_called_that(tiny_folder, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    config = SampleConfig(prompt=("a",), lora=(str(tmp_path),))
    with pytest.raises(WeightsError, match="a model folder: pass it with --model"):
        chosen_loras(config, None)
