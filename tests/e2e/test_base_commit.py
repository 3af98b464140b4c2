"""A repository may change between training and drawing: the LoRA says which commit it was trained on."""

import logging
import shutil
from dataclasses import replace

import pytest

import sample
from minisd import sample_setup
from minisd.lora import inject_lora, lora_weights
from minisd.lora_reader import read_lora_info
from minisd.lora_writer import save_lora
from minisd.run_setup import lora_info
from minisd.sample_config import SampleConfig
from minisd.weights import load_model
from tests.e2e.running import config_for

THEN, NOW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """A repository of which two commits are in the cache."""
    for commit in (THEN, NOW):
        shutil.copytree(tiny_folder, tmp_path / "snapshots" / commit)
    at = {"commit": THEN}

    def load(name, **options):
        return replace(load_model(str(tmp_path / "snapshots" / at["commit"]), **options), name=name)

    def load_for_sample(name, *, revision, variant, prediction_type, dtype, device):
        assert name == "owner/name"
        return load(name, dtype=dtype, device=device)

    monkeypatch.setattr(sample_setup, "load_model", load_for_sample)
    return load, at


@pytest.mark.parametrize("moved", [True, False])
def test_a_base_that_has_moved_since_training_is_said(hub, dataset, tmp_path, caplog, moved):
    load, at = hub
    caplog.set_level(logging.INFO)
    model = load("owner/name")
    config = config_for("owner/name", dataset, tmp_path)
    info = lora_info(config, model, model.schedule, 64, 1)
    inject_lora(model.unet, ("to_q",), rank=2, alpha=2)
    save_lora(tmp_path / "style.safetensors", {"unet": lora_weights(model.unet)}, info)
    assert read_lora_info(tmp_path / "style.safetensors").base_commit == THEN
    at["commit"] = NOW if moved else THEN
    sample.sample(
        SampleConfig(
            prompt=("cat",), lora=(str(tmp_path / "style.safetensors"),), output=tmp_path / "out", num_images=1,
            num_inference_steps=1,
        )
    )  # fmt: skip
    said = f"a LoRA was trained on commit {THEN[:10]} of owner/name, and this is {NOW[:10]}"
    assert (said in caplog.text) is moved
