"""The validation loss: what it says it is, the same however it is measured, and nothing to the run.

That two processes measure what one does is in test_validation.py, which has them at work.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

import train
from minisd import run, validation_loss
from minisd.buckets import bucket_geometry
from minisd.errors import NonFiniteError, UsageError
from minisd.images import to_pixel_values
from minisd.interruptions import StopRequest
from minisd.lora import add_lora
from minisd.lora_reader import load_lora
from minisd.picture_files import load_image
from minisd.pocket import scenes
from minisd.preflight import preflight
from minisd.run_setup import base_model
from minisd.run_status import RunReport
from tests.e2e.running import ALONE, config_for, metrics_of, state_of

STEPS = [0, 2, 4, 5]


def draw_pictures(folder, numbers):
    """Captioned pictures of three shapes, every third with two captions."""
    for i in numbers:
        size = [(64, 64), (90, 46), (46, 90)][i % 3]
        scenes.draw(scenes.scene_at(i, 0), "8bit").resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"the cat {i}" + ("\nanother city" if i % 3 == 1 else ""))
    return folder


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run of five steps with everything that the validation loss must leave out: dropout, flips, offsets, weights."""
    data, held_out = (tmp_path_factory.mktemp(name) for name in ("data", "held-out"))
    config = config_for(
        tiny_folder, draw_pictures(data, range(5)), tmp_path_factory.mktemp("run"), max_train_steps=5, seed=3,
        validation_data=draw_pictures(held_out, range(20, 31)), validation_steps=2, learning_rate=1e-2,
        lora_dropout=0.2, noise_offset=0.1, snr_gamma=5.0, checkpointing_steps=2, checkpoints_total_limit=9,
        max_caption_tokens=75,
    )  # fmt: skip
    train.train(config, ALONE)
    return config


def lines_of(config):
    return [json.loads(line) for line in (config.output / "validation.jsonl").read_text().splitlines()]


def probe_json(config):
    return json.loads((config.output / "probe.json").read_text())


def in_another_folder(config, output, **options):
    return replace(config, output=output, cache_dir=config.cache_folder, **options)


# --- what it is ---


def generator(config, purpose, position):
    digest = hashlib.sha256(f"minisd/1/{purpose}/{config.seed}/{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)


@torch.no_grad()
def losses_by_diffusers(config, folder, pipeline):
    """Mean loss by band, as the docstrings of probe_sets.py and draws.py say, computed by diffusers."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pictures = sorted(folder.glob("*.png"))
    order = torch.randperm(len(pictures), generator=generator(config, "epoch", -1)).tolist()
    sums = [0.0] * 4
    for place in range(8):
        path = pictures[order[place % len(order)]]
        image = load_image(path)
        geometry = bucket_geometry((image.height, image.width), 64, 8, upscale=False)
        pixels = to_pixel_values(image, geometry, crop=None, flip=False).unsqueeze(0)
        posterior = pipeline.vae.encode(pixels).latent_dist
        captions = path.with_suffix(".txt").read_text().splitlines()
        for band in range(4):
            at = -1 - (4 * place + band)
            noise, posterior_noise = (
                torch.randn(posterior.mean.shape[1:], generator=generator(config, purpose, at)).unsqueeze(0)
                for purpose in ("noise", "posterior")
            )
            latents = (posterior.mean + posterior.std * posterior_noise) * pipeline.vae.config.scaling_factor
            time = 250 * band + torch.randint(250, (), generator=generator(config, "timestep", at))
            choice = torch.randint(len(captions), (), generator=generator(config, "choice", at))
            hidden, _ = pipeline.encode_prompt(captions[choice], "cpu", 1, do_classifier_free_guidance=False)
            noisy = scheduler.add_noise(latents, noise, time.view(1))
            sums[band] += F.mse_loss(pipeline.unet(noisy, time, hidden).sample, noise).item() / 8
    return sums


def test_it_is_the_loss_that_diffusers_computes_from_the_documented_draws(whole):
    """The base's losses, and a checkpoint's ratios, on training and on held-out pictures."""
    folders = {"train": whole.data, "held_out": whole.validation_data}
    pipeline = StableDiffusionPipeline.from_pretrained(whole.model, safety_checker=None)
    base = {name: losses_by_diffusers(whole, folder, pipeline) for name, folder in folders.items()}
    pipeline.load_lora_weights(str(whole.output / "checkpoints" / "step-000004" / "lora.safetensors"))
    assert probe_json(whole)["bands"] == [[0, 249], [250, 499], [500, 749], [750, 999]]
    for name, folder in folders.items():
        assert probe_json(whole)[name]["base"] == pytest.approx(base[name], rel=1e-5)
        ratios = [a / b for a, b in zip(losses_by_diffusers(whole, folder, pipeline), base[name], strict=True)]
        written = lines_of(whole)[2]
        assert written["step"] == 4
        assert written[name]["bands"] == pytest.approx(ratios, rel=1e-5)
        assert written[name]["ratio"] == pytest.approx(sum(ratios) / 4, rel=1e-5)
        assert max(abs(ratio - 1) for ratio in ratios) > 1e-3  # there is something to see


def test_it_is_measured_before_along_and_at_the_end_and_starts_at_exactly_1(whole):
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == STEPS
    assert lines[0] == {"step": 0} | {s: {"ratio": 1.0, "bands": [1.0] * 4} for s in ("train", "held_out")}
    assert len({json.dumps(line["held_out"]) for line in lines}) == len(STEPS)


def test_the_probe_names_its_pictures(whole):
    stored = probe_json(whole)
    assert stored["held_out_pictures"] == [f"{i}.png" for i in range(20, 31)]
    assert len(set(stored["held_out"]["pictures"])) == 8  # of eleven, no one twice
    shown = stored["train"]["pictures"]
    assert shown[:3] == shown[5:]  # five pictures in eight places
    assert set(shown) == {f"{i:02d}.png" for i in range(5)}


# --- the same, however it is measured ---


def test_who_evaluates_a_checkpoint_afterwards_gets_the_figure_of_the_run(whole):
    """With the base's losses from probe.json, and the same again measured anew, adapters in the UNet or not."""
    path = whole.output / "checkpoints" / "step-000004" / "lora.safetensors"
    model = base_model(whole, ALONE.device)
    plain = run.probe_of(whole, ALONE, model)
    add_lora(model.unet, load_lora(path, {"unet": model.unet}).parts["unet"], name="style")
    again = run.probe_of(replace(whole, output=whole.output / "elsewhere", cache_dir=whole.cache_folder), ALONE, model)
    assert plain.base == again.base == {s: probe_json(whole)[s]["base"] for s in ("train", "held_out")}
    for probe in (plain, again):
        assert {"step": 4} | validation_loss.measure(probe, model, ALONE, StopRequest()) == lines_of(whole)[2]
    assert model.unet.training is False
    assert run.probe_of(replace(whole, validation_data=None), ALONE, model) is None


def test_how_a_run_reads_its_pictures_does_not_matter(whole, tmp_path):
    """Encoded each time, cropped anywhere, many captions left out, never mirrored: the same probe."""
    config = in_another_folder(
        whole, tmp_path, max_train_steps=1, cache_latents=False, center_crop=False, random_flip=False,
        caption_dropout=0.9, noise_offset=0.0,
    )  # fmt: skip
    train.train(replace(config, cache_dir=tmp_path / "cache"), ALONE)
    assert probe_json(config) == probe_json(whole)


# --- nothing to the run ---


def test_measuring_changes_no_bit_of_the_run(whole, tmp_path):
    silent = in_another_folder(whole, tmp_path, validation_data=None)
    train.train(silent, ALONE)
    assert state_of(tmp_path, 5) == state_of(whole.output, 5)
    assert metrics_of(tmp_path) == metrics_of(whole.output)
    assert not (tmp_path / "validation.jsonl").exists()
    assert not (tmp_path / "probe.json").exists()


class Asked(StopRequest):
    """A stop request that comes when somebody has looked for it so many times."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0

    def check(self):
        pass


def test_stopped_anywhere_the_curves_are_those_of_an_uninterrupted_run(whole, tmp_path, monkeypatch):
    """In the middle of a measurement, the base's among them, and killed after it had gone on and torn a line."""
    config = in_another_folder(whole, tmp_path)
    # How often the loop looks, 16 times in a measurement and once a step, until it is asked to stop.
    base, step_0, saved_2, step_2, saved_3 = 5, 20, 16 + 16 + 2 + 7, 1, 16
    for looks, saved in ((base, None), (step_0, None), (saved_2, 2), (step_2, None), (saved_3, 3)):
        report = RunReport(tmp_path, 0)
        with pytest.raises(train.Stopped) as caught:
            train.train(config, ALONE, Asked(looks), report)
        assert caught.value.checkpoint == (saved and tmp_path / "checkpoints" / f"step-{saved:06d}")
        if saved:
            assert (report.step, report.checkpoint) == (saved, caught.value.checkpoint)
        assert (tmp_path / "probe.json").exists() == (looks != base)
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"step": 4, "train": {}}\n{"step": 5, "tra')
    train.train(config, ALONE)
    assert lines_of(config) == lines_of(whole)
    assert state_of(tmp_path, 5) == state_of(whole.output, 5)
    assert (tmp_path / "probe.json").read_text() == (whole.output / "probe.json").read_text()

    def measured(*_):
        raise AssertionError

    monkeypatch.setattr(validation_loss, "_mean_losses", measured)  # a run that is complete measures nothing again
    train.train(config, ALONE)
    assert lines_of(config) == lines_of(whole)


def test_other_held_out_pictures_have_another_base_and_a_warning(whole, tmp_path, caplog):
    shutil.copytree(whole.output, tmp_path / "run")
    (tmp_path / "others").mkdir()
    draw_pictures(tmp_path / "others", range(40, 43))
    config = in_another_folder(whole, tmp_path / "run", validation_data=tmp_path / "others")
    shutil.rmtree(config.output / "checkpoints" / "step-000005")
    train.train(config, ALONE)
    assert "The base is measured again" in caplog.text
    assert probe_json(config)["train"] == probe_json(whole)["train"]
    assert set(probe_json(config)["held_out"]["pictures"]) == {"40.png", "41.png", "42.png"}
    assert [line["step"] for line in lines_of(config)] == STEPS
    assert lines_of(config)[-1]["train"] == lines_of(whole)[-1]["train"]
    assert lines_of(config)[-1]["held_out"] != lines_of(whole)[-1]["held_out"]


def test_a_split_holds_back_pictures_that_a_preflight_does_not_see(tiny_folder, tmp_path, caplog):
    """And who goes on with another split is refused by that name."""
    (tmp_path / "data").mkdir()
    draw_pictures(tmp_path / "data", range(12))
    config = config_for(tiny_folder, tmp_path / "data", tmp_path / "run", validation_split=0.4)
    trials = []

    def train_and_keep(trial, dist):
        path = train.train(trial, dist)
        trials.append(in_another_folder(trial, shutil.copytree(trial.output, tmp_path / "kept")))
        return path

    with caplog.at_level(logging.INFO):
        preflight(config, ALONE, train_and_keep)
    (trial,) = trials
    held_out = set(probe_json(trial)["held_out_pictures"])
    seen = {row.split(",")[0] for row in (trial.output / "pictures.csv").read_text().splitlines()[1:]}
    assert held_out | seen == {f"{i:02d}.png" for i in range(12)}
    assert not held_out & seen
    assert f"{len(held_out)} of 12 pictures are held out" in caplog.text
    first, last = lines_of(trial)
    assert (first["step"], last["step"]) == (0, 3)
    train_ratio, held_out_ratio = (f"{last[name]['ratio']:.2f} of the base's loss" for name in ("train", "held_out"))
    assert f"validation at step 3: {train_ratio} on training pictures, {held_out_ratio[:4]} on held-out" in caplog.text
    with pytest.raises(UsageError, match=r"validation_split was 0\.4, now None"):
        train.train(replace(trial, validation_split=0.0, resume_from_checkpoint="latest"), ALONE)


def test_a_loss_that_is_no_number_names_the_picture(whole):
    model = base_model(whole, ALONE.device)
    probe = run.probe_of(whole, ALONE, model)
    with torch.no_grad():
        model.unet.conv_out.bias += torch.nan
    with pytest.raises(NonFiniteError, match=r"'0\d\.png': its validation loss is not finite: \[nan"):
        validation_loss.measure(probe, model, ALONE, StopRequest())


def test_a_run_that_learns_two_pictures_by_heart_shows_a_gap(whole, tmp_path):
    """The pocket model: the loss on the two falls fast, that on others hardly or not at all."""
    config = replace(
        whole, model="pocket", output=tmp_path, data=draw_pictures(tmp_path, range(2)), max_train_steps=8,
        train_batch_size=4, gradient_accumulation_steps=1, learning_rate=5e-3, validation_steps=99, rank=16, alpha=None,
        lora_targets="all", caption_dropout=0.0, random_flip=False, snr_gamma=None, lora_dropout=0.0,
    )  # fmt: skip
    train.train(config, ALONE)
    first, last = lines_of(config)
    assert first["train"]["ratio"] == first["held_out"]["ratio"] == 1.0
    assert last["train"]["ratio"] < 0.9
    assert last["held_out"]["ratio"] > last["train"]["ratio"] + 0.2
