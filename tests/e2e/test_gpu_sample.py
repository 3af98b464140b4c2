"""Drawing on a CUDA device: `pytest -m gpu`."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from minisd.command_line import parse_args
from minisd.sample_config import SampleConfig
from tests.tiny import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(folder, output, *words):
    given = [
        "--model",
        str(folder),
        "--lora",
        "none",
        "--num-images",
        "2",
        "--num-inference-steps",
        "5",
        "--prompt",
        "cat",
    ]
    paths = sample.sample(parse_args(SampleConfig, [*given, "--output", str(output), *words]))
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def test_compiled_networks_draw_the_same(tiny_folder, tmp_path):
    plain, fused = (
        draw(tiny_folder, tmp_path / name, "--precision", "float32", *words)
        for name, words in (("a", []), ("b", ["--compile"]))
    )
    assert all(abs(a - b).mean() < 1 for a, b in zip(plain, fused, strict=True))


def test_half_precision_draws_nearly_the_same_and_can_be_repeated_to_the_bit(tmp_path):
    write_tiny_model(tmp_path / "xl", family="sdxl")
    exact = draw(tmp_path / "xl", tmp_path / "a", "--precision", "float32")
    half = draw(tmp_path / "xl", tmp_path / "b", "--batch-size", "2")  # float16, the VAE in float32
    assert all(0 < abs(a - b).mean() < 8 for a, b in zip(exact, half, strict=True))
    words = [
        "--from-png",
        str(tmp_path / "b" / "001.png"),
        "--model",
        str(tmp_path / "xl"),
        "--output",
        str(tmp_path / "c"),
    ]
    (again,) = sample.sample(parse_args(SampleConfig, words))
    assert (np.asarray(Image.open(again)) == half[1]).all()
