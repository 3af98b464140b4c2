"""Options of train.py that change how a step is computed or what learns: each as a law on a short run."""

import json
import logging
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import train
from minisd import run_state
from minisd.errors import DataError, DiskError, NonFiniteError, UsageError, run_script
from minisd.lora import add_lora
from minisd.lora_reader import load_lora
from minisd.weights import load_unet
from tests.e2e.gradient_probe import probe
from tests.e2e.running import ALONE, config_for, metrics_of, state_of


def gradients_of(config):
    return probe(config, ALONE)[0]


def test_gradient_checkpointing_changes_no_bit(tiny_folder, dataset, tmp_path):
    options = {"max_train_steps": 2, "lora_dropout": 0.2}
    plain = gradients_of(config_for(tiny_folder, dataset, tmp_path / "a", **options))
    twice = gradients_of(config_for(tiny_folder, dataset, tmp_path / "b", **options, gradient_checkpointing=True))
    assert all(torch.equal(plain[key], twice[key]) for key in plain)


def test_a_compiled_run_computes_the_same(tiny_folder, dataset, tmp_path, monkeypatch):
    """The whole network in one graph. Generating its kernels, minutes on a CPU, is for tests/e2e/test_gpu.py."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return aot_eager(module, inputs)

    original, aot_eager = torch.compile, torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda unet: original(unet, backend=backend, fullgraph=True))
    options = {"max_train_steps": 2, "gradient_accumulation_steps": 1, "validation_prompts": ("cat",)}
    options["validation_inference_steps"] = 1
    plain = gradients_of(config_for(tiny_folder, dataset, tmp_path / "a", **options))
    fused = gradients_of(config_for(tiny_folder, dataset, tmp_path / "b", **options, compile=True))
    assert len(graphs) == 1  # for both steps
    largest = max(gradient.abs().max() for gradient in plain.values())
    assert plain.keys() == fused.keys()
    assert all((plain[key] - fused[key]).abs().max() <= 1e-5 * largest for key in plain)
    a, b = (next((tmp_path / name / "samples" / "step-000000").iterdir()).read_bytes() for name in "ab")
    assert a == b  # pictures are drawn by the plain network in both


def test_all_targets_learn_and_diffusers_opens_the_file(tiny_folder, dataset, tmp_path):
    config = config_for(tiny_folder, dataset, tmp_path, lora_targets="all", learning_rate=1e-2, max_train_steps=4)
    train.train(config, ALONE)
    path = tmp_path / "lora.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert any(tensor.dim() == 4 and tensor.shape[-1] == 3 for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_up" in key)

    ours = load_unet(tiny_folder, dtype=torch.float64)
    add_lora(ours, load_lora(path, {"unet": ours}).parts["unet"], name="style")
    theirs = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").double()
    _load_kohya(theirs, path)
    inputs = torch.randn(2, 4, 16, 16, dtype=torch.float64), torch.tensor([7, 900]), torch.randn(2, 77, 32).double()
    with torch.no_grad():
        plain = load_unet(tiny_folder, dtype=torch.float64)(*inputs)
        difference = (ours.double()(*inputs) - theirs(*inputs).sample).abs().max()
        assert difference < 1e-10
        assert (ours(*inputs) - plain).abs().max() > 1e-4


def _load_kohya(unet, path):
    """As StableDiffusionPipeline.load_lora_weights does it for the UNet."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state_dict, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state_dict, network_alphas=alphas, unet=unet)
    unet.double()


def test_min_snr_weights_the_losses_that_are_logged(tiny_folder, dataset, tmp_path):
    options = {"max_train_steps": 1, "gradient_accumulation_steps": 8}
    plain = config_for(tiny_folder, dataset, tmp_path / "plain", **options)
    weighted = config_for(tiny_folder, dataset, tmp_path / "weighted", **options, snr_gamma=5.0)
    huge = config_for(tiny_folder, dataset, tmp_path / "huge", **options, snr_gamma=1e5)
    for config in (plain, weighted, huge):
        train.train(config, ALONE)
    losses = [metrics_of(config.output)[0]["loss"] for config in (plain, weighted, huge)]
    assert losses[1] < losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)  # no SNR is that high: every weight is 1


def test_noise_offset_shifts_whole_channels(tiny_folder, dataset, tmp_path):
    drawn = {}
    for offset in (0.0, 0.3):
        config = config_for(tiny_folder, dataset, tmp_path / str(offset), max_train_steps=1, noise_offset=offset)
        batches = []
        original = train.loss_of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "loss_of", lambda c, r, b, o=original, kept=batches: (kept.append(b), o(c, r, b))[1])
            train.train(config, ALONE)
        drawn[offset] = torch.cat([batch.noise for batch in batches])
    shift = drawn[0.3] - drawn[0.0]
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert shift.abs().min() > 0


def test_latents_that_are_not_finite_name_the_picture(tiny_folder, dataset, tmp_path):
    """kohya's scripts put zeros in their place and train on them."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    path = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    tensors["quant_conv.weight"][0] = 3e38  # finite, and overflows in the sum
    safetensors.torch.save_file(tensors, path)
    config = config_for(tmp_path / "model", dataset, tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"\d\.png.*latents are not finite"):
        train.train(config, ALONE)


def test_a_picture_too_small_for_a_bucket_is_named(tiny_folder, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    Image.new("RGB", (30, 5)).save(tmp_path / "data" / "train" / "2.png")
    with pytest.raises(DataError, match=r"2\.png.*30 x 5 pixels, expected at least 8 x 8.*--upscale"):
        train.train(config_for(tiny_folder, tmp_path / "data", tmp_path / "run"), ALONE)
    config = config_for(tiny_folder, tmp_path / "data", tmp_path / "run", upscale=True, max_train_steps=1)
    train.train(config, ALONE)


def test_the_plan_is_printed_before_training(tiny_folder, dataset, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train.train(config_for(tiny_folder, dataset, tmp_path, max_train_steps=8), ALONE)
    said = caplog.text
    for words in ("7 images, 2 a step, 4 steps an epoch, 8 steps in all (2.0 epochs)", "64 x 64 (7)",
                  "cropped away: 0.0%", "fill each bucket's last batch: 1", "alpha / rank 2",
                  "starting at step 0"):  # fmt: skip
        assert words in said, words


def test_what_is_cut_away_is_said_of_each_picture(tiny_folder, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    Image.new("RGB", (128, 64)).save(tmp_path / "data" / "train" / "2.png")
    config = config_for(tiny_folder, tmp_path / "data", tmp_path / "run", max_train_steps=1, buckets=False)
    train.train(config, ALONE)
    lines = (tmp_path / "run" / "pictures.csv").read_text().splitlines()
    assert lines[0] == "file_name,width,height,bucket_width,bucket_height,cropped_share"
    assert lines[1] == "0.png,64,64,64,64,0.0000"
    assert lines[3] == "2.png,128,64,64,64,0.5000"


def test_random_crops_are_drawn_and_refused_with_a_cache(tiny_folder, dataset, tmp_path):
    with pytest.raises(UsageError, match="random crops cannot be cached"):
        config_for(tiny_folder, dataset, tmp_path, center_crop=False)
    config = config_for(
        tiny_folder, dataset, tmp_path, center_crop=False, cache_latents=False, buckets=False, resolution=32,
        max_train_steps=2,
    )  # fmt: skip
    train.train(config, ALONE)
    assert len(metrics_of(tmp_path)) == 2


def test_runs_share_a_cache_and_another_vae_does_not(tiny_folder, dataset, tmp_path, monkeypatch):
    first = config_for(tiny_folder, dataset, tmp_path / "a", cache_dir=tmp_path / "cache", max_train_steps=2)
    train.train(first, ALONE)
    shards = set((tmp_path / "cache").iterdir())
    second = config_for(tiny_folder, dataset, tmp_path / "b", cache_dir=tmp_path / "cache", max_train_steps=2)
    train.train(second, ALONE)
    assert set((tmp_path / "cache").iterdir()) == shards
    assert state_of(first.output, 2)[:2] == state_of(second.output, 2)[:2]

    shutil.copytree(tiny_folder, tmp_path / "model")
    path = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.conv_in.weight"] *= 1.1
    safetensors.torch.save_file(tensors, path)
    third = config_for(tmp_path / "model", dataset, tmp_path / "c", cache_dir=tmp_path / "cache", max_train_steps=2)
    train.train(third, ALONE)
    assert len(set((tmp_path / "cache").iterdir())) == len(shards) + 1  # latents anew, captions not
    assert metrics_of(third.output)[0]["loss"] != metrics_of(first.output)[0]["loss"]


def test_a_loss_that_is_no_number_writes_down_the_batch(tiny_folder, dataset, tmp_path, monkeypatch):
    original = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *args: original(*args) * float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.*rank 0: \d\.png"):
        train.train(config_for(tiny_folder, dataset, tmp_path), ALONE)
    facts = json.loads((tmp_path / "bad_batch.json").read_text())
    assert facts["step"] == 1
    assert len(facts["ranks"][0]["pictures"]) == 2
    assert not (tmp_path / "checkpoints").exists()


def make_gradients_infinite(monkeypatch):
    original = train.sum_gradients

    def overflow(dist, parameters):
        original(dist, parameters)
        parameters[0].grad[0, 0] = torch.inf

    monkeypatch.setattr(train, "sum_gradients", overflow)


def test_float16_that_overflows_at_every_scale_ends_the_run(tiny_folder, dataset, tmp_path, monkeypatch):
    make_gradients_infinite(monkeypatch)
    config = config_for(tiny_folder, dataset, tmp_path, mixed_precision="fp16", max_train_steps=30)
    with pytest.raises(NonFiniteError, match=r"overflowed (1\d|20) times in a row"):
        train.train(config, ALONE)


def test_weights_beyond_reason_are_not_saved(tiny_folder, dataset, tmp_path):
    config = config_for(tiny_folder, dataset, tmp_path, max_train_steps=2)

    def enlarge(optimizer):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0] += 1e5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", enlarge)
        with pytest.raises(NonFiniteError, match="beyond 10000; not saved"):
            train.train(config, ALONE)
    assert not (tmp_path / "checkpoints").exists()


def test_memory_that_is_not_there_is_exit_code_8_with_the_sizes(tiny_folder, dataset, tmp_path, monkeypatch, capsys):
    def exhausted(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 99 bytes")

    monkeypatch.setattr(train, "loss_of", exhausted)
    config = config_for(tiny_folder, dataset, tmp_path, train_batch_size=3, resolution=64)
    assert run_script(partial(train.main, config), debug=False) == 8
    said = capsys.readouterr().err
    assert "--train-batch-size 3, --resolution 64, --rank 4" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run_status.json").read_text())["code"] == 8


def test_an_output_folder_that_vanishes_is_exit_code_6(tiny_folder, dataset, tmp_path, monkeypatch, capsys):
    config = config_for(tiny_folder, dataset, tmp_path / "run", cache_dir=tmp_path / "cache")
    original, calls = train.loss_of, []

    def loss_of(*args):
        calls.append(None)
        if len(calls) == 5:
            shutil.rmtree(config.output)
        return original(*args)

    monkeypatch.setattr(train, "loss_of", loss_of)
    assert run_script(partial(train.main, config), debug=False) == 6
    assert "metrics.jsonl: cannot be written" in capsys.readouterr().err


def test_a_disk_too_small_is_known_at_the_start(tiny_folder, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(DiskError, match=r"\d+ bytes are needed, 10000 are free"):
        train.train(config_for(tiny_folder, dataset, tmp_path), ALONE)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_processes_that_do_not_share_the_output_folder_are_refused(tiny_folder, dataset, tmp_path, monkeypatch):
    """Another rank sees no run.lock there."""
    (tmp_path / "run.lock").touch()
    monkeypatch.setattr(run_state, "gather", lambda dist, value: [value, [value[0], False]])
    with pytest.raises(DiskError, match="Put --output on a disk that they share"):
        train.train(config_for(tiny_folder, dataset, tmp_path), ALONE)


def test_a_gradient_that_is_no_number_ends_the_run_though_the_loss_is_one(tiny_folder, dataset, tmp_path, monkeypatch):
    make_gradients_infinite(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"step 1: loss \d.*gradient norm inf"):
        train.train(config_for(tiny_folder, dataset, tmp_path), ALONE)
    assert not (tmp_path / "checkpoints").exists()


def test_the_names_in_the_lora_file_are_those_asked_for(tiny_folder, dataset, tmp_path):
    found = {}
    for name, start in (("kohya", "lora_unet_down_blocks_0_"), ("peft", "unet.down_blocks.0.")):
        config = config_for(tiny_folder, dataset, tmp_path / name, lora_format=name, max_train_steps=1)
        train.train(config, ALONE)
        path = config.output / "lora.safetensors"
        assert any(key.startswith(start) for key in safetensors.torch.load_file(path))
        found[name] = load_lora(path, {"unet": load_unet(tiny_folder)}).parts["unet"]
    assert found["kohya"].keys() == found["peft"].keys()
    for path, ours in found["kohya"].items():
        assert torch.equal(ours.down, found["peft"][path].down)
        assert (ours.alpha, found["peft"][path].alpha) == (8.0, 8.0)
