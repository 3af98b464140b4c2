"""docs/elsewhere.md: its example for diffusers draws what sample.py draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

import sample
from minisd.hub import resolve_model
from minisd.lora_info import LoRAInfo
from minisd.lora_writer import save_lora
from minisd.sample_config import SampleConfig
from minisd.weights import load_unet
from tests.lora_files import random_lora

PAGE = Path(__file__).parents[2] / "docs" / "elsewhere.md"


def test_the_example_for_diffusers_draws_the_picture_of_sample_py(tmp_path: Path, monkeypatch: Any) -> None:
    pocket = resolve_model("pocket")
    file = tmp_path / "lora.safetensors"
    weights = random_lora(load_unet(pocket), alpha=2.0)
    save_lora(file, {"unet": weights}, LoRAInfo(base_model="pocket", base_model_version="pocket", rank=4, alpha=2.0))
    monkeypatch.setattr(DiffusionPipeline, "progress_bar", lambda _, total: _Quiet())

    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for said, here in {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(pocket),
        "output/lora.safetensors": str(file),
        "num_inference_steps=25": "num_inference_steps=6",
    }.items():
        assert said in code
        code = code.replace(said, here)
    names: dict[str, Any] = {}
    exec(code, names)

    def draw(lora: str) -> Any:
        config = SampleConfig(
            prompt=("8bit illustration of a castle",),
            model="pocket",
            lora=(lora,),
            seed=0,
            num_images=1,
            num_inference_steps=6,
            overwrite=True,
            output=tmp_path / "drawn",
        )
        return np.asarray(Image.open(sample.sample(config)[0])).astype(int)

    theirs = np.asarray(names["image"]).astype(int)
    assert abs(draw(f"{file}:0.8") - theirs).max() <= 1
    assert abs(draw(f"{file}:1") - theirs).max() > 10


class _Quiet:
    """In the place of a progress bar."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass
