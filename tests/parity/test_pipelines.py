"""The whole path from a prompt, or a picture, to a picture: as diffusers' pipelines, to one level in 255."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import sample
from minisd.sample_config import SampleConfig
from tests.tiny import write_tiny_model

PROMPT, STEPS = "8bit illustration of the city, and a cat", 5


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-xl")
    write_tiny_model(folder, family="sdxl")
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of 64 x 64 pixels, all of them different, and not symmetric."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    y, x = np.mgrid[0:64, 0:64]
    Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)).save(path)
    return path


def ours(folder, output, **options):
    defaults = {"prompt": (PROMPT,), "lora": ("none",), "num_inference_steps": STEPS, "num_images": 2, "seed": 3}
    config = SampleConfig(**(defaults | {"model": str(folder), "output": output, "batch_size": 2} | options))
    return [np.asarray(Image.open(path)).astype(int) for path in sample.sample(config)]


def theirs(pipeline, folder, scheduler=None, **options):
    pipe = pipeline.from_pretrained(folder, **({} if "XL" in pipeline.__name__ else {"safety_checker": None}))
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return [
        np.asarray(
            pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed), **options).images[0]
        ).astype(int)
        for seed in (3, 4)
    ]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.std() > 5  # a picture, not a plain colour that anything would equal
        assert abs(a - b).max() <= 1


@pytest.mark.parametrize("negative", [None, "", "the bit!"])
def test_xl_with_its_own_sampler_and_negative_prompts(xl_folder, tmp_path, negative):
    """Not given is zeros, and "" is the encoded empty prompt: two pictures."""
    options = {"height": 64, "width": 96, "negative_prompt": negative, "guidance_scale": 5.0}
    assert_same(
        ours(xl_folder, tmp_path, scheduler="euler", **options), theirs(StableDiffusionXLPipeline, xl_folder, **options)
    )


def test_no_negative_prompt_is_not_the_empty_one_to_xl_and_is_to_sd(xl_folder, tiny_folder, tmp_path):
    for folder, same in ((xl_folder, False), (tiny_folder, True)):
        a, b = (ours(folder, tmp_path / f"{same}{text}", negative_prompt=text, num_images=1) for text in (None, ""))
        assert (abs(a[0] - b[0]).max() == 0) == same


def test_xl_without_guidance(xl_folder, tmp_path):
    options = {"guidance_scale": 1.0, "height": 64, "width": 64}
    expected = theirs(StableDiffusionXLPipeline, xl_folder, DPMSolverMultistepScheduler, **options)
    assert_same(ours(xl_folder, tmp_path, **options), expected)


@pytest.mark.parametrize(
    ("name", "scheduler", "strength"),
    [
        ("ddim", DDIMScheduler, 0.8),
        ("euler", EulerDiscreteScheduler, 0.5),
        ("dpm++2m", DPMSolverMultistepScheduler, 1.0),
    ],
)
def test_image_to_image(tiny_folder, photo, tmp_path, name, scheduler, strength):
    picture = Image.open(photo)
    options = {"strength": strength, "guidance_scale": 4.0}
    expected = theirs(StableDiffusionImg2ImgPipeline, tiny_folder, scheduler, image=picture, **options)
    assert_same(ours(tiny_folder, tmp_path, scheduler=name, init_image=photo, **options), expected)


def test_image_to_image_of_xl(xl_folder, photo, tmp_path):
    options = {"strength": 0.6, "guidance_scale": 4.0}
    expected = theirs(StableDiffusionXLImg2ImgPipeline, xl_folder, image=Image.open(photo), **options)
    assert_same(ours(xl_folder, tmp_path, scheduler="euler", init_image=photo, **options), expected)


def test_guidance_rescale(tiny_folder, tmp_path):
    options = {"guidance_rescale": 0.7, "guidance_scale": 9.0}
    expected = theirs(StableDiffusionPipeline, tiny_folder, DDIMScheduler, **options)
    assert_same(ours(tiny_folder, tmp_path, scheduler="ddim", **options), expected)
    plain = ours(tiny_folder, tmp_path, scheduler="ddim", guidance_scale=9.0, overwrite=True)
    assert abs(plain[0] - expected[0]).max() > 5


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_clip_skip(tiny_folder, xl_folder, tmp_path, family):
    """diffusers' own clip_skip fails for SD with this transformers, so the embeddings are handed to it."""
    if family == "sdxl":
        options = {"clip_skip": 1, "height": 64, "width": 64}
        expected = theirs(StableDiffusionXLPipeline, xl_folder, **options)
        drawn = ours(xl_folder, tmp_path / "a", scheduler="euler", guidance_scale=5.0, **options)
        plain = ours(xl_folder, tmp_path / "b", scheduler="euler", guidance_scale=5.0)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        tokens = pipe.tokenizer([PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        prompted, empty = pipe.text_encoder.final_layer_norm(hidden).detach().chunk(2)
        expected = [
            np.asarray(
                pipe(
                    prompt_embeds=prompted, negative_prompt_embeds=empty, num_inference_steps=STEPS,
                    generator=torch.Generator().manual_seed(seed),
                ).images[0]
            ).astype(int)
            for seed in (3, 4)
        ]  # fmt: skip
        drawn = ours(tiny_folder, tmp_path / "a", scheduler="ddim", clip_skip=1)
        plain = ours(tiny_folder, tmp_path / "b", scheduler="ddim")
    assert_same(drawn, expected)
    assert abs(plain[0] - drawn[0]).max() > 2


def test_xl_in_half_precision_keeps_its_vae_in_float32(xl_folder, photo, tmp_path):
    """Into the latents and out of them: the parts have two dtypes."""
    options = {"init_image": photo, "scheduler": "euler", "guidance_scale": 4.0, "num_images": 1}
    exact = ours(xl_folder, tmp_path / "a", **options)
    half = ours(xl_folder, tmp_path / "b", precision="bfloat16", **options)
    assert 0 < abs(exact[0] - half[0]).mean() < 8
