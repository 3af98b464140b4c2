"""What the one sampler asks of a model, whatever its device and dtype."""

from contextlib import suppress

import pytest
import torch

from minisd.samplers import SAMPLERS
from minisd.sampling import SamplingSettings, denoise
from minisd.weights import load_model
from tests.tiny import write_tiny_model


class AskedError(Exception):
    """The network was called."""


def test_xl_is_told_its_size_in_float32_whatever_it_runs_in(tmp_path):
    """bfloat16 has no 1028 and no 2052."""
    model = load_model(str(write_tiny_model(tmp_path, family="sdxl").folder), dtype=torch.bfloat16)
    told = []

    def stop(_, inputs):
        told.append(inputs[4])
        raise AskedError

    model.unet.register_forward_pre_hook(stop)
    settings = SamplingSettings(height=1028, width=2052, num_inference_steps=1)
    with suppress(AskedError):
        next(denoise(model, "cat", [0, 1], settings))
    assert told[0].dtype == torch.float32
    assert told[0].tolist() == [[1028, 2052, 0, 0, 1028, 2052]] * 4  # two pictures, without and with the prompt


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_may_be_begun_with_on_another_device_than_the_schedule_was_loaded_on(tiny_folder, name):
    """On the meta device there are no numbers, but mixing it with another raises as on a GPU."""
    model = load_model(str(tiny_folder))
    model.unet.to("meta")
    model.vae.to("meta")
    settings = SamplingSettings(height=64, width=64, scheduler=name, num_inference_steps=4, strength=0.5)
    steps = denoise(model, "cat", [0], settings, init_image=torch.zeros(1, 3, 64, 64))
    latents = next(steps)
    assert latents.is_meta
    assert latents.shape == (1, 4, 16, 16)
