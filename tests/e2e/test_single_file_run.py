"""A run on a single file is the run on the same model as a folder: the same LoRA, the same pictures."""

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import sample
import train
from minisd.sample_config import SampleConfig
from tests.e2e.running import ALONE, config_for
from tests.parity.test_single_file import as_published, tiny  # noqa: F401 (fixtures)


def test_training_and_drawing_are_those_from_the_folder(tiny, as_published, dataset, tmp_path):  # noqa: F811
    model, path, _ = tiny
    found = {}
    for name, source in (("file", path), ("folder", model.folder)):
        config = config_for(source, dataset, tmp_path / name, max_train_steps=2, upscale=True)
        train.train(config, ALONE)
        lora = config.output / "lora.safetensors"
        pictures = sample.sample(
            SampleConfig(
                prompt=("the cat",), model=str(source), lora=(str(lora),), output=tmp_path / f"{name}-drawn",
                num_images=1, num_inference_steps=2,
            )
        )  # fmt: skip
        found[name] = safetensors.torch.load_file(lora), np.asarray(Image.open(pictures[0]))
    (ours, drawn), (expected, picture) = found["file"], found["folder"]
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert (drawn == picture).all()
    assert drawn.std() > 0
