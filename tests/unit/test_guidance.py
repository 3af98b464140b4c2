"""Classifier-free guidance: the formula, rescaling, and where it is left out."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from minisd.guidance import Conditioning, Guidance, guided_model, rescaled
from minisd.sampling import SamplingSettings, denoise
from minisd.weights import load_model


def test_rescaling_equals_diffusers():
    guided, prompted = torch.randn(2, 3, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided = guided * torch.tensor([1.0, 2.0, 0.3]).view(3, 1, 1, 1)  # each picture has its own spread
    for phi in (0.0, 0.3, 1.0):
        assert torch.equal(rescaled(guided, prompted, phi), rescale_noise_cfg(guided, prompted, phi))
    assert torch.allclose(rescaled(guided, prompted, 1.0).std((1, 2, 3)), prompted.std((1, 2, 3)))


class Recorder:
    """A UNet whose prediction is the prompt's first number; keeps the sizes of its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, sample, timesteps, hidden_states, text_embeds, time_ids):
        assert len(sample) == len(timesteps) == len(hidden_states)
        self.batches.append(len(sample))
        return torch.ones_like(sample) * hidden_states[:, :1, :1, None]


def told(value):
    return Conditioning(torch.full((2, 77, 8), value))


@pytest.mark.parametrize(
    ("interval", "guided_at"),
    [((0.0, 1.0), {999, 750, 500, 250, 0}), ((0.2, 0.8), {750, 500, 250}), ((0.0, 0.5), {999, 750, 500}),
     ((0.5, 1.0), {250, 0}), ((0.9, 1.0), {0})],
)  # fmt: skip
def test_outside_the_interval_the_prompt_alone_is_asked(interval, guided_at):
    """From 0, pure noise, to 1, the picture; 500 of 999 is just before the middle."""
    unet, sample = Recorder(), torch.zeros(2, 4, 8, 8)
    predict = guided_model(unet, told(1.0), told(-1.0), Guidance(scale=3.0, interval=interval), 1000)
    for timestep in (999, 750, 500, 250, 0):
        prediction = predict(sample, torch.tensor(timestep))
        assert prediction.shape == sample.shape
        guided = timestep in guided_at
        assert unet.batches.pop() == (4 if guided else 2)
        assert (prediction == (-1 + 3 * 2 if guided else 1)).all()


def test_an_interval_saves_half_of_the_network_s_work_outside(tiny_folder, monkeypatch):
    model, batches = load_model(str(tiny_folder)), []
    model.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    settings = {"height": 64, "width": 64, "num_inference_steps": 10, "scheduler": "ddim"}
    for interval in ((0.0, 1.0), (0.25, 0.75), (0.99, 1.0)):
        batches.clear()
        calls = list(denoise(model, "cat", [0], SamplingSettings(guidance_interval=interval, **settings)))
        times = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
        inside = [interval[0] <= 1 - t / 999 <= interval[1] for t in times]
        assert batches == [2 if guided else 1 for guided in inside]
        assert len(calls) == SamplingSettings(**settings).network_calls == 10
    assert batches == [1] * 9 + [2]
    alone = list(denoise(model, "cat", [0], SamplingSettings(guidance_scale=1.0, **settings)))
    assert torch.equal(calls[8], alone[8])  # no trace of guidance before the interval
    assert not torch.equal(calls[9], alone[9])


def test_a_negative_prompt_without_guidance_means_nothing(tiny_folder):
    """Not even where it is longer, and would make the prompt longer, too."""
    model = load_model(str(tiny_folder))
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    drawn = [
        list(denoise(model, "cat", [0], SamplingSettings(negative_prompt=text, **settings)))[-1]
        for text in (None, "the city " * 100)
    ]
    assert torch.equal(*drawn)
