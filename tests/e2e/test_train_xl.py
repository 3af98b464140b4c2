"""Training Stable Diffusion XL: two text encoders, sizes and crops of each picture, a VAE in float32. Long captions."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import train
from minisd import draws
from minisd.interruptions import StopRequest
from minisd.lora_reader import read_lora_info
from minisd.picture_files import load_image
from minisd.pocket import scenes
from minisd.preflight import preflight
from minisd.run import prepare
from tests.e2e.gradient_probe import probe
from tests.e2e.running import ALONE, config_for, metrics_of, state_of
from tests.e2e.test_resume import run_until
from tests.e2e.test_validation import SETTINGS, drawn_by_sample, pixels
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny XL model."""
    return write_tiny_model(tmp_path_factory.mktemp("sdxl"), family="sdxl").folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Six captioned pictures of two shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    for index, size in enumerate([(140, 128)] * 2 + [(90, 47)] * 4):
        scene = scenes.scene_at(index, 0)
        scenes.draw(scene, "8bit").resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"the cat {index}")
    return folder


def xl_config(sdxl, shapes, output, **options):
    return config_for(sdxl, shapes, output, **{"max_train_steps": 3, "gradient_accumulation_steps": 4, **options})


@torch.no_grad()
def losses_by_diffusers(config, sdxl):
    """The loss of each sample of the first step, computed by diffusers from the draws."""
    run = prepare(config, ALONE, StopRequest())
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    losses = []
    for position in range(4):
        sample = run.samples[position]
        index = run.samples.plan.index(position)
        geometry, picture = run.samples.geometries[index], load_image(run.samples.examples[index].path)
        flip = config.random_flip and draws.flip(config.seed, position)
        caption = run.samples.caption_of(position)
        hidden, _, pooled, _ = pipeline.encode_prompt(caption or "", do_classifier_free_guidance=False)
        if caption is None:
            hidden, pooled = torch.zeros_like(hidden), torch.zeros_like(pooled)
        # The picture is mirrored first, then cropped at the corner that the network is told.
        assert sample.time_ids is not None
        height, width, top, left, *size = map(int, sample.time_ids[0].tolist())
        assert (height, width) == (picture.height, picture.width)
        assert tuple(size) == geometry.size
        resized = picture.resize(geometry.resized[::-1], Image.Resampling.LANCZOS)
        if flip:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cut = resized.crop((left, top, left + size[1], top + size[0]))
        pixels = pipeline.image_processor.preprocess(cut)
        posterior = pipeline.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * sample.posterior_noise) * pipeline.vae.config.scaling_factor
        noisy = pipeline.scheduler.__class__.from_config(pipeline.scheduler.config)
        alphas = noisy.alphas_cumprod[sample.timesteps].view(-1, 1, 1, 1)
        noisy_latents = alphas.sqrt() * latents + (1 - alphas).sqrt() * sample.noise
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[height, width, top, left, *size]]).float()}
        output = pipeline.unet(noisy_latents, sample.timesteps, hidden, added_cond_kwargs=added).sample
        losses.append(torch.nn.functional.mse_loss(output, sample.noise).item())
    return losses


@pytest.mark.parametrize("center_crop", [True, False])
def test_the_loss_is_that_of_diffusers_on_the_same_samples(sdxl, shapes, tmp_path, center_crop):
    config = xl_config(sdxl, shapes, tmp_path, center_crop=center_crop, cache_latents=False)
    train.train(config, ALONE)
    losses = losses_by_diffusers(replace(config, output=tmp_path / "again"), sdxl)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_splits_and_caches_are_the_same_run(sdxl, shapes, tmp_path):
    """One process x four micro-steps and a batch of four; latents cached or not."""
    runs = {}
    for number, (split, cached) in enumerate([((4, 1), True), ((1, 4), True), ((4, 1), False)]):
        accumulation, batch = split
        config = xl_config(
            sdxl, shapes, tmp_path / str(number), cache_latents=cached, gradient_accumulation_steps=accumulation,
            train_batch_size=batch,
        )  # fmt: skip
        runs[number] = probe(config, ALONE)
    (reference, drawn), (batched, drawn_batched), (encoded, drawn_encoded) = runs.values()
    assert drawn == drawn_batched == drawn_encoded
    assert all(torch.equal(reference[key], encoded[key]) for key in reference)
    for step in range(3):
        keys = [key for key in reference if key.startswith(f"{step}/")]
        largest = max(reference[key].abs().max().item() for key in keys)
        assert largest > 0
        furthest = max((batched[key] - reference[key]).abs().max().item() for key in keys)
        assert furthest <= 3e-6 * largest  # deeper transformers than the others, and as much more rounding


def test_a_resumed_run_ends_with_the_same_bits(sdxl, shapes, tmp_path, monkeypatch):
    whole = xl_config(sdxl, shapes, tmp_path / "whole")
    train.train(whole, ALONE)

    parts = xl_config(sdxl, shapes, tmp_path / "parts", checkpointing_steps=1)
    run_until(parts, 1, monkeypatch)
    train.train(parts, ALONE)
    assert state_of(parts.output, 3) == state_of(whole.output, 3)
    info = read_lora_info(whole.output / "lora.safetensors")
    assert info.base_model == sdxl.name


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_the_vae_stays_in_float32(sdxl, shapes, tmp_path, mode):
    config = xl_config(sdxl, shapes, tmp_path, mixed_precision=mode)
    run = prepare(config, ALONE, StopRequest())
    assert run.model.vae.quant_conv.weight.dtype == torch.float32
    assert run.model.unet.conv_in.weight.dtype == run.precision.dtype
    sample = run.samples[0]
    assert sample.moments is not None
    assert sample.moments.dtype == torch.float32
    assert sample.time_ids is not None
    assert sample.time_ids.dtype == torch.float32  # 1023 is no bfloat16
    train.train(config, ALONE)
    assert all(line["loss"] < 10 for line in metrics_of(tmp_path))


def test_long_captions_are_read_in_chunks_and_all_are_as_long(tiny_folder, shapes, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "data"
    data.mkdir()
    for index, words in enumerate((3, 100, 400)):
        (data / f"{index}.png").write_bytes((shapes / f"{index}.png").read_bytes())
        (data / f"{index}.txt").write_text("the " * words)
    config = config_for(tiny_folder, data, tmp_path / "out", max_train_steps=1, caption_dropout=0.5)
    run = prepare(config, ALONE, StopRequest())
    text_encoder = run.model.text_encoder
    for position in range(9):
        caption = run.samples.caption_of(position)
        expected = text_encoder([caption], chunks=3).hidden_states
        assert expected.shape == (1, 3 * 77, 32)
        assert torch.equal(run.samples[position].encoder_hidden_states, expected)
    assert "captions are read in 3 chunks of 75 tokens" in caplog.text
    assert "1 of 3 captions are cut at 225 tokens" in caplog.text
    train.train(config, ALONE)
    state = json.loads((tmp_path / "out" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert "max_caption_tokens" in json.dumps(state)
    # Where no caption needs them the limit is no matter: the same cache serves.
    identities = set()
    for limit in (75, 225):
        short = config_for(tiny_folder, shapes, tmp_path / str(limit), max_caption_tokens=limit)
        identities.add(prepare(short, ALONE, StopRequest()).samples.text_weights)
    assert len(identities) == 1


def test_its_pictures_are_those_of_sample_py_and_a_preflight_passes(sdxl, shapes, tmp_path):
    config = xl_config(sdxl, shapes, tmp_path / "run", **(SETTINGS | {"validation_prompts": ("the cat",)}))
    train.train(config, ALONE)
    paths = drawn_by_sample(config, str(config.output / "lora.safetensors"), tmp_path / "drawn")
    ours = sorted((config.output / "samples" / "step-000003").iterdir())
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(ours, paths, strict=True))
    preflight(replace(config, output=tmp_path / "tried"), ALONE, train.train)
