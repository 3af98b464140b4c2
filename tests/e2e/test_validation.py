"""Pictures along a run are what sample.py draws, and change nothing about the run; a preflight is a run in small."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minisd import validation
from minisd.errors import CheckpointError
from minisd.interruptions import StopRequest
from minisd.lora_reader import add_lora_to, load_lora
from minisd.pocket import scenes
from minisd.preflight import preflight
from minisd.run import probe_of
from minisd.run_setup import base_model
from minisd.sample_config import SampleConfig
from minisd.validation_loss import measure
from tests.e2e.running import ALONE, config_for, metrics_of, options_of, state_of, torchrun
from tests.tiny import write_tiny_model

SETTINGS = {"validation_prompts": ("the cat", "a city"), "validation_steps": 2, "validation_num_images": 2,
            "validation_inference_steps": 3, "validation_guidance_scale": 4.0, "max_train_steps": 3}  # fmt: skip


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def drawn_by_sample(config, lora, output):
    """The validation pictures, as a user would draw them afterwards."""
    return sample.sample(
        SampleConfig(
            prompt=config.validation_prompts, model=config.model, lora=(lora,), seed=config.seed, precision="float32",
            num_images=config.validation_num_images, num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale, output=output,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_folder, dataset, tmp_path_factory):
    config = config_for(tiny_folder, dataset, tmp_path_factory.mktemp("run"), **SETTINGS, lora_dropout=0.1, seed=3)
    train.train(config, ALONE)
    return config


def test_pictures_are_drawn_before_along_and_at_the_end(run):
    folders = sorted(path.name for path in (run.output / "samples").iterdir())
    assert folders == ["step-000000", "step-000002", "step-000003"]
    for folder in folders:
        names = sorted(path.name for path in (run.output / "samples" / folder).iterdir())
        assert names == ["00-0.png", "00-1.png", "01-0.png", "01-1.png"]


def test_the_last_ones_are_the_pixels_that_sample_py_draws(run, tmp_path):
    paths = drawn_by_sample(run, str(run.output / "lora.safetensors"), tmp_path / "with")
    ours = sorted((run.output / "samples" / "step-000003").iterdir())
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(ours, paths, strict=True))


def test_the_first_ones_are_the_base_model_s(run, tmp_path):
    paths = drawn_by_sample(run, "none", tmp_path / "without")
    ours = sorted((run.output / "samples" / "step-000000").iterdir())
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(ours, paths, strict=True))
    last = sorted((run.output / "samples" / "step-000003").iterdir())
    assert any((pixels(a) != pixels(b)).any() for a, b in zip(last, paths, strict=True))


def test_drawing_does_not_touch_the_run(run, tmp_path):
    silent = replace(run, output=tmp_path, validation_prompts=(), cache_dir=run.cache_folder)
    train.train(silent, ALONE)
    assert state_of(tmp_path, 3) == state_of(run.output, 3)


def test_two_processes_share_the_drawing_and_the_measuring_and_come_to_the_same(run, tmp_path):
    """Pictures, and the validation loss: what two have measured of a LoRA, one measures of it, to the bit."""
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for i in range(20, 25):
        scenes.draw(scenes.scene_at(i, 0), "8bit").save(held_out / f"{i}.png")
        (held_out / f"{i}.txt").write_text(f"the cat {i}")
    config = replace(
        run, output=tmp_path, gradient_accumulation_steps=1, cache_dir=run.cache_folder, validation_data=held_out
    )
    done = torchrun("train.py", *options_of(config), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    model = base_model(config, ALONE.device)
    probe = probe_of(replace(config, output=tmp_path / "alone"), ALONE, model)  # no probe.json there
    assert probe.as_json() == (tmp_path / "probe.json").read_text()
    add_lora_to({"unet": model.unet}, load_lora(tmp_path / "lora.safetensors", {"unet": model.unet}), name="style")
    *_, last = (json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines())
    assert last == {"step": 3} | measure(probe, model, ALONE, StopRequest())
    assert last["train"]["ratio"] != 1
    for step in ("step-000000", "step-000003"):
        for path in (run.output / "samples" / step).iterdir():
            # Other sums over the ranks, other last bits in the weights.
            difference = np.abs(pixels(path) - pixels(tmp_path / "samples" / step / path.name)).max()
            assert difference <= (0 if step == "step-000000" else 1)


def test_a_stop_breaks_the_drawing_off_and_what_is_missing_is_drawn_when_the_run_goes_on(run, tmp_path, monkeypatch):
    config = replace(run, output=tmp_path, cache_dir=run.cache_folder)

    class Asked(StopRequest):
        requested = False

    stop, drawn = Asked(), []

    def save_png(*args, **options):
        original(*args, **options)
        drawn.append(args[1])
        stop.requested = len(drawn) == 6  # the second picture of step 2

    original = validation.save_png
    with monkeypatch.context() as patch:
        patch.setattr(validation, "save_png", save_png)
        with pytest.raises(train.Stopped):
            train.train(config, ALONE, stop)
    assert len(list((tmp_path / "samples" / "step-000002").iterdir())) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    # The step after it was made and saved; whoever wants the missing pictures goes on from a checkpoint before them.
    train.train(replace(config, checkpointing_steps=2, resume_from_checkpoint="never"), ALONE)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000003")
    for path in list((tmp_path / "samples" / "step-000002").iterdir())[:3]:
        path.unlink()
    train.train(config, ALONE)
    for path in (run.output / "samples").rglob("*.png"):
        assert (pixels(path) == pixels(tmp_path / path.relative_to(run.output))).all()


def test_the_trigger_is_in_captions_prompts_and_header(tiny_folder, dataset, tmp_path):
    config = config_for(
        tiny_folder, dataset, tmp_path, max_train_steps=1, validation_prompts=("a [trigger] cat", "a city"),
        validation_inference_steps=1, trigger="zkx style",
    )  # fmt: skip
    train.train(config, ALONE)
    texts = []
    for path in sorted((tmp_path / "samples" / "step-000001").iterdir()):
        with Image.open(path) as picture:
            texts.append(picture.text["parameters"].splitlines()[0])
    assert texts == ["a zkx style cat", "zkx style, a city"]
    other = config_for(tiny_folder, dataset, tmp_path / "other", max_train_steps=1)
    train.train(other, ALONE)
    assert metrics_of(tmp_path)[0]["loss"] != metrics_of(tmp_path / "other")[0]["loss"]
    with (tmp_path / "lora.safetensors").open("rb") as file:
        assert b"zkx style" in file.read(40_000)


def test_zero_terminal_snr_trains_and_sample_py_knows(dataset, tmp_path, caplog):
    write_tiny_model(tmp_path / "model", family="sd2", prediction_type="v_prediction")
    config = config_for(
        tmp_path / "model", dataset, tmp_path / "run", **SETTINGS, zero_terminal_snr=True, snr_gamma=5.0
    )
    with caplog.at_level("INFO"):
        train.train(config, ALONE)
        paths = drawn_by_sample(config, str(config.output / "lora.safetensors"), tmp_path / "drawn")
    assert "zero terminal SNR, as the LoRA was trained" in caplog.text
    ours = sorted((config.output / "samples" / "step-000003").iterdir())
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(ours, paths, strict=True))


def test_a_preflight_says_what_the_run_needs_and_leaves_only_the_cache(tiny_folder, dataset, tmp_path, caplog):
    config = config_for(tiny_folder, dataset, tmp_path, max_train_steps=None, num_train_epochs=10, preflight=True)
    with caplog.at_level("INFO"):
        preflight(config, ALONE, train.train)
    text = caplog.text
    for words in ("are fine", "GB at most", "s a step", "for 40 steps", "MB a checkpoint", "MB free"):
        assert words in text, words
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_preflight_notices_a_lora_that_does_not_come_back(tiny_folder, dataset, tmp_path, monkeypatch):
    config = config_for(tiny_folder, dataset, tmp_path, learning_rate=0.05, lr_warmup_steps=0)

    def train_and_lose_it(trial, dist):
        path = train.train(trial, dist)
        shutil.copy(untrained, path)
        return path

    other = replace(config, output=tmp_path / "other", max_train_steps=1, learning_rate=1e-9)
    untrained = train.train(other, ALONE)
    with pytest.raises(CheckpointError, match="draws another picture"):
        preflight(config, ALONE, train_and_lose_it)
    preflight(config, ALONE, train.train)


def test_the_pictures_reach_tensorboard(tiny_folder, dataset, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_for(tiny_folder, dataset, tmp_path, **SETTINGS, report_to="tensorboard")
    train.train(config, ALONE)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in found.Images("samples/00-0")] == [0, 2, 3]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert found.Scalars("train/loss_average")[-1].value == pytest.approx(line["loss_average"])
