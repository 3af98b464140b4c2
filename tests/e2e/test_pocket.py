"""The pocket model, as committed: it draws what captions say, learns a style, and is an ordinary diffusers model."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import sample
import train
from minisd.config import TrainConfig
from minisd.distributed import Distributed
from minisd.hub import resolve_model
from minisd.lora_reader import add_lora_to, load_lora
from minisd.pocket import demo, scenes
from minisd.pocket.measure import draw_scenes, figures_of, held_out_scenes, scenes_to_ask
from minisd.sample_config import SampleConfig
from minisd.weights import load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA as `make demo` trains it, in fewer steps."""
    folder = tmp_path_factory.mktemp("eight-bit")
    demo.write_dataset(folder / "dataset")
    options = demo.training_options(steps=400)
    config = TrainConfig(data=folder / "dataset", output=folder / "lora", **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    train.train(config, Distributed(0, 1, torch.device("cpu")))
    torch.set_num_threads(threads)
    return folder / "lora" / "lora.safetensors"


def test_the_model_is_small_and_whole():
    files = [path for path in resolve_model("pocket").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}


def test_diffusers_opens_it_and_draws_the_same_picture(tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(resolve_model("pocket"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = SampleConfig(
        prompt=(demo.PROMPT,), model="pocket", lora=("none",), scheduler="ddim", num_inference_steps=10, num_images=1,
        seed=1, output=tmp_path / "ddim",
    )  # fmt: skip
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(
        demo.PROMPT, num_inference_steps=10, height=64, width=64, generator=torch.Generator().manual_seed(1)
    ).images[0]
    ours = Image.open(sample.sample(config)[0])
    assert abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_it_draws_what_the_caption_says():
    """docs/pocket.md has the figures on all hundred prompts."""
    shown = scenes_to_ask(24)
    figures = figures_of(draw_scenes(load_model("pocket"), shown), shown)
    assert figures.colour >= 0.9
    assert figures.time >= 0.9


def test_the_lora_changes_the_style_and_keeps_the_content(trained):
    """Unseen captions become blocky; colour and time of day stay. docs/pocket.md has the figures at full size."""
    shown = held_out_scenes(10)
    model = load_model("pocket")
    before = figures_of(draw_scenes(model, shown, "8bit "), shown)
    networks = {"unet": model.unet}
    lora = load_lora(trained, networks)
    add_lora_to(networks, lora, name="style")
    model.unet.eval()
    after = figures_of(draw_scenes(model, shown, "8bit "), shown)
    real = figures_of([scenes.draw(scene, "8bit") for scene in shown], shown)
    assert before.blockiness < 0.6 * real.blockiness
    assert after.blockiness >= 0.9 * real.blockiness
    assert min(after.colour, after.time) >= 0.8
    assert lora.info.base_model == "pocket"


def test_diffusers_draws_the_same_picture_with_the_trained_lora(trained, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(resolve_model("pocket"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(trained))
    theirs = pipe(demo.PROMPT, num_inference_steps=25, height=64, width=64, generator=torch.Generator().manual_seed(0))
    # no --model: the base is the one the LoRA's header names
    config = SampleConfig(prompt=(demo.PROMPT,), lora=(str(trained),), num_images=1, output=tmp_path / "out")
    ours = Image.open(sample.sample(config)[0])
    assert abs(np.asarray(ours).astype(int) - np.asarray(theirs.images[0]).astype(int)).max() <= 1
    assert scenes.blockiness(ours.convert("RGB")) > 0.75  # no colour named: the hardest prompt there is


def test_held_out_captions_are_not_among_the_trained_ones():
    trained = {scenes.caption(scenes.scene_at(index, demo.SEED)) for index in range(demo.PICTURES)}
    shown = [scenes.caption(scene) for scene in held_out_scenes(30)]
    assert len(set(shown)) == 30
    assert not trained & set(shown)
