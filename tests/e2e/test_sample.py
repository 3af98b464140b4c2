"""sample.py as a whole: the same pictures as diffusers' pipeline, and what it does with its options."""

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import sample
from minisd import sample_setup
from minisd.errors import UsageError, WeightsError
from minisd.lora import TARGETS, inject_lora, lora_weights
from minisd.lora_info import LoRAInfo
from minisd.lora_writer import save_lora
from minisd.sample_config import SampleConfig
from minisd.weights import load_text_encoder, load_unet
from tests.tiny import write_tiny_model

PROMPT = "8bit illustration of the city, and a cat"


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-sd2-v")
    write_tiny_model(folder, family="sd2", prediction_type="v_prediction", vae_levels=4)
    return folder


def write_lora(path, folder, seed=0, base_model="tiny"):
    """A LoRA with alpha != rank whose effect on the picture is plain to see."""
    unet = load_unet(folder)
    inject_lora(unet, TARGETS["attn"], rank=4, alpha=8.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weights in lora_weights(unet).values():
        weights.up.copy_(0.1 * torch.randn(weights.up.shape, generator=generator))
    info = LoRAInfo(base_model=base_model, rank=4, alpha=8.0, targets=TARGETS["attn"])
    save_lora(path, {"unet": lora_weights(unet)}, info)
    return path


def draw(folder, output, **options):
    defaults = {
        "prompt": (PROMPT,),
        "model": str(folder),
        "lora": ("none",),
        "num_inference_steps": 5,
        "num_images": 1,
        "seed": 3,
    }
    config = SampleConfig(output=output, **(defaults | options))
    return [np.asarray(Image.open(path)).astype(int) for path in sample.sample(config)]


def draw_with_diffusers(folder, scheduler, size, lora=None, negative_prompt="", guidance_scale=7.5, eta=0.0, **changes):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes)
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    picture = pipe(
        PROMPT, height=size, width=size, num_inference_steps=5, guidance_scale=guidance_scale, eta=eta,
        negative_prompt=negative_prompt, generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    return [np.asarray(picture).astype(int)]


SCHEDULERS = {
    "ddpm": (DDPMScheduler, {}, {}),
    "ddim": (DDIMScheduler, {}, {}),
    "ddim eta": (DDIMScheduler, {"eta": 0.7}, {}),
    "pndm": (PNDMScheduler, {}, {}),
    "euler": (EulerDiscreteScheduler, {}, {}),
    "euler leading": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {"timestep_spacing": "leading"}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}, {}),
    "heun": (HeunDiscreteScheduler, {}, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, {}),
    "dpm++2m karras": (DPMSolverMultistepScheduler, {"karras": True}, {"use_karras_sigmas": True}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {}, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}, {}),
    "lcm": (LCMScheduler, {}, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_equal_diffusers_to_one_level_in_255(tiny_folder, tmp_path, name):
    scheduler, options, changes = SCHEDULERS[name]
    lora = write_lora(tmp_path / "style.safetensors", tiny_folder)
    ours = draw(tiny_folder, tmp_path / "out", scheduler=name.split()[0], lora=(str(lora),), **options)
    theirs = draw_with_diffusers(tiny_folder, scheduler, 64, lora, eta=options.get("eta", 0.0), **changes)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (64, 64, 3)
        assert abs(a - b).max() <= 1
        assert a.std() > 5  # a picture, not a plain colour that anything would equal


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_pictures_of_a_v_prediction_model_equal_diffusers(v_folder, tmp_path, name):
    scheduler, options, changes = SCHEDULERS[name]
    ours = draw(v_folder, tmp_path, scheduler=name, negative_prompt="the bit!", guidance_scale=4.0, **options)
    theirs = draw_with_diffusers(v_folder, scheduler, 128, None, "the bit!", 4.0, **changes)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (128, 128, 3)
        assert abs(a - b).max() <= 1


def test_without_guidance_equals_diffusers(tiny_folder, tmp_path):
    ours = draw(tiny_folder, tmp_path, scheduler="ddim", guidance_scale=1.0)
    theirs = draw_with_diffusers(tiny_folder, DDIMScheduler, 64, guidance_scale=1.0)
    assert all(abs(a - b).max() <= 1 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["dpm++2m", "euler-a"])
def test_a_picture_depends_on_its_seed_alone(tiny_folder, tmp_path, name):
    single = draw(tiny_folder, tmp_path / "a", num_images=3, scheduler=name)
    batched = draw(tiny_folder, tmp_path / "b", num_images=3, batch_size=3, scheduler=name)
    moved = draw(tiny_folder, tmp_path / "c", num_images=1, seed=5, scheduler=name)
    assert all(abs(a - b).max() <= 1 for a, b in zip(single, batched, strict=True))
    assert abs(moved[0] - single[2]).max() == 0
    assert abs(single[0] - single[1]).max() > 5


def test_strength_zero_is_the_base_and_two_loras_add_up(tiny_folder, tmp_path):
    a = write_lora(tmp_path / "a.safetensors", tiny_folder, seed=1)
    b = write_lora(tmp_path / "b.safetensors", tiny_folder, seed=2)
    base = draw(tiny_folder, tmp_path / "0")
    off = draw(tiny_folder, tmp_path / "1", lora=(f"{a}:0",))
    one = draw(tiny_folder, tmp_path / "2", lora=(f"{a}:0.7",))
    two = draw(tiny_folder, tmp_path / "3", lora=(f"{a}:0.7", f"{b}:-0.5"))
    other_order = draw(tiny_folder, tmp_path / "4", lora=(f"{b}:-0.5", f"{a}:0.7"))
    assert all((x == y).all() for x, y in zip(base, off, strict=True))
    assert abs(base[0] - one[0]).max() > 5
    assert abs(one[0] - two[0]).max() > 5
    assert all(abs(x - y).max() <= 1 for x, y in zip(two, other_order, strict=True))


def test_pictures_carry_their_recipe_and_no_paths(tiny_folder, tmp_path):
    lora = write_lora(tmp_path / "style.safetensors", tiny_folder)
    draw(tiny_folder, tmp_path / "out", lora=(f"{lora}:0.5",), negative_prompt="blurred", num_images=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000.png", "001.png", "grid.png"]
    texts = Image.open(tmp_path / "out" / "001.png").text
    assert texts["parameters"].splitlines()[:2] == [f"{PROMPT} <lora:style:0.5>", "Negative prompt: blurred"]
    for part in ("Steps: 5, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: 4, Size: 64x64, ",
                 f"Model: {tiny_folder.name}, Lora hashes: \"style: "):  # fmt: skip
        assert part in texts["parameters"]
    private = [str(tmp_path), str(tiny_folder.parent), str(Path.home()), f"{socket.gethostname():?>8}"]
    assert not [word for word in private for text in texts.values() if word in text]
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.size == (128, 64)
    assert grid.crop((64, 0, 128, 64)).tobytes() == Image.open(tmp_path / "out" / "001.png").convert("RGB").tobytes()


def test_the_trained_lora_and_its_base_are_picked_up(tiny_folder, tmp_path, monkeypatch, caplog):
    """With no --lora and no --model. The base is looked for by the name in the header."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    write_lora(tmp_path / "output" / "lora.safetensors", tiny_folder, base_model="someone/tiny")
    asked = []
    original = sample_setup.load_model
    monkeypatch.setattr(
        sample_setup,
        "load_model",
        lambda name, **options: (asked.append(name), original(str(tiny_folder), **options))[1],
    )
    with caplog.at_level("INFO"):
        picked = draw(tiny_folder, tmp_path / "picked", model=None, lora=())
    assert asked == ["someone/tiny"]
    assert "output/lora.safetensors" in caplog.text
    assert "someone/tiny" in caplog.text
    named = draw(tiny_folder, tmp_path / "named", lora=("output/lora.safetensors",))
    assert all((a == b).all() for a, b in zip(picked, named, strict=True))


def test_prompts_from_a_file(tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n# no\n  the city --n red --w 96 --h 32 --d 8 --l 2 --s 2\n")
    pictures = draw(tiny_folder, tmp_path / "a", prompt=(), prompts_file=tmp_path / "prompts.txt")
    assert [picture.shape for picture in pictures] == [(64, 64, 3), (32, 96, 3)]
    options = {"negative_prompt": "red", "width": 96, "height": 32, "seed": 8, "guidance_scale": 2.0}
    (alone,) = draw(tiny_folder, tmp_path / "b", prompt=("the city",), num_inference_steps=2, **options)
    assert (pictures[1] == alone).all()
    assert Image.open(tmp_path / "a" / "grid.png").size == (96, 128)  # each in a cell as large as the largest


def test_nothing_is_overwritten_unasked(tiny_folder, tmp_path):
    draw(tiny_folder, tmp_path, num_images=1)
    before = (tmp_path / "000.png").read_bytes()
    with pytest.raises(UsageError, match=r"000\.png is there already"):
        draw(tiny_folder, tmp_path, num_images=1, seed=9)
    assert (tmp_path / "000.png").read_bytes() == before
    draw(tiny_folder, tmp_path, num_images=1, seed=9, overwrite=True)
    assert (tmp_path / "000.png").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"height": 66}, UsageError, "expected multiples of 4"),
        ({"lora": ("nowhere.safetensors",)}, WeightsError, "no such file"),
        ({"lora": ("a.safetensors:strong",)}, UsageError, "PATH:SCALE"),
        ({"scheduler": "ddim", "karras": True}, UsageError, "karras"),
        ({"num_inference_steps": 1001}, UsageError, "1001"),
        ({"eta": 0.5}, UsageError, "eta"),
    ],
)
def test_refusals(tiny_folder, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        draw(tiny_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_compiled_networks_draw_the_same(tiny_folder, tmp_path, monkeypatch):
    """Each network in one graph. Generating its kernels, minutes on a CPU, is for tests/e2e/test_gpu.py."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    original, aot_eager = torch.compile, torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: original(call, backend=backend, fullgraph=True, **options)
    )
    lora = write_lora(tmp_path / "style.safetensors", tiny_folder)
    options = {"lora": (f"{lora}:0.5",), "num_inference_steps": 3, "num_images": 2}
    plain = draw(tiny_folder, tmp_path / "a", **options)
    assert graphs == []
    fused = draw(tiny_folder, tmp_path / "b", **options, compile=True)
    assert len(graphs) == 2  # the UNet and the decoder, for all steps and pictures
    assert all(abs(a - b).max() <= 1 for a, b in zip(plain, fused, strict=True))


def test_a_lora_of_the_text_encoder_and_its_words_are_used(tiny_folder, tmp_path, monkeypatch):
    network = load_text_encoder(tiny_folder).networks()["text_encoder"]
    inject_lora(network, ("q_proj", "v_proj"), rank=2, alpha=2.0, seed=1)
    for weights in lora_weights(network).values():
        weights.up.copy_(torch.randn(weights.up.shape, generator=torch.Generator().manual_seed(1)))
    info = LoRAInfo(base_model="tiny", rank=2, alpha=2.0)
    save_lora(tmp_path / "text.safetensors", {"text_encoder": lora_weights(network)}, info)
    base = draw(tiny_folder, tmp_path / "0")
    off = draw(tiny_folder, tmp_path / "1", lora=(f"{tmp_path / 'text.safetensors'}:0",))
    used = draw(tiny_folder, tmp_path / "2", lora=(str(tmp_path / "text.safetensors"),))
    assert (base[0] == off[0]).all()
    assert abs(base[0] - used[0]).max() > 2

    original = sample_setup.load_lora

    def with_word(*arguments, **options):
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
        return replace(original(*arguments, **options), embeddings={"<s1>": vectors})

    plain = draw(tiny_folder, tmp_path / "3", prompt=("cat <s1>",))
    monkeypatch.setattr(sample_setup, "load_lora", with_word)
    taught = draw(tiny_folder, tmp_path / "4", prompt=("cat <s1>",), lora=(f"{tmp_path / 'text.safetensors'}:0",))
    assert abs(plain[0] - taught[0]).max() > 2


def test_options_of_the_way_reach_the_picture(tiny_folder, tmp_path):
    """Those that no other test compares with diffusers."""
    size = {"height": 96, "width": 64, "num_inference_steps": 3}
    plain = draw(tiny_folder, tmp_path / "plain", **size)[0]
    for name, value in {
        "guidance_interval": (0.0, 0.5),
        "vae_tiling": True,
        "prompt": (PROMPT.replace("cat", "(cat:1.5)"),),
    }.items():
        assert (draw(tiny_folder, tmp_path / name, **(size | {name: value}))[0] != plain).any()
