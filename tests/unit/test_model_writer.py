"""A model written as a folder: diffusers opens it and draws the same picture, minisd reads the same weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minisd import model_writer, single_file
from minisd.errors import DiskError, MinisdError, UsageError
from minisd.families import Family, ModelConfigs
from minisd.model_files import read_json
from minisd.model_writer import write_model_folder
from minisd.weights import StableDiffusion, load_model, with_zero_terminal_snr
from tests.ldm_layout import to_ldm
from tests.tiny import TinyModel, write_tiny_model


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Family]:
    prediction_type = "v_prediction" if request.param == "sd2" else "epsilon"
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return write_tiny_model(folder, family=request.param, prediction_type=prediction_type, vae_levels=4), request.param


def picture(folder: Path, family: Family) -> np.ndarray[Any, Any]:
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    size: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 3, "output_type": "np"}
    return pipeline("the cat! and the city", negative_prompt="bit", generator=generator, **size).images


def same_weights(one: StableDiffusion, other: StableDiffusion) -> bool:
    pairs = [(network, other.networks()[part]) for part, network in one.networks().items()] + [(one.vae, other.vae)]
    states = [(first.state_dict(), second.state_dict()) for first, second in pairs]
    return all(
        first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
        for first, second in states
    )


def from_single_file(tiny: TinyModel, family: Family, path: Path, monkeypatch: pytest.MonkeyPatch) -> StableDiffusion:
    """Load the tiny model from a single file, as if it were one of the published."""
    parts = [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if (tiny.folder / part).is_dir()]
    states = {part: getattr(tiny, part).state_dict() for part in parts}
    tensors = to_ldm(family, states, levels=3 if family == "sdxl" else 2)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    networks = {part: read_json(tiny.folder / part / "config.json") for part in parts}
    scheduler = read_json(tiny.folder / "scheduler" / "scheduler_config.json")
    configs = ModelConfigs(networks, scheduler, family == "sdxl")
    monkeypatch.setattr(single_file, "identify", lambda _, asked: (family, configs))
    for module in (single_file, model_writer):
        monkeypatch.setattr(module, "TOKENIZER", tiny.folder / "tokenizer")
    return load_model(str(path))


@pytest.mark.parametrize("source", ["folder", "file"])
def test_diffusers_draws_the_same_picture(
    tiny: tuple[TinyModel, Family], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, family = tiny
    if source == "folder":
        model = load_model(str(original.folder))
    else:
        model = from_single_file(original, family, tmp_path / "tiny.safetensors", monkeypatch)
    write_model_folder(model, tmp_path / "written")
    assert np.array_equal(picture(tmp_path / "written", family), picture(original.folder, family))
    again = load_model(str(tmp_path / "written"))
    assert same_weights(model, again)
    assert again.schedule.config == model.schedule.config
    assert again.text_encoder.zeros_when_absent == (family == "sdxl")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["written"]  # nothing staged is left


def test_files_are_as_on_the_hub(tiny: tuple[TinyModel, Family], tmp_path: Path) -> None:
    original, family = tiny
    folder = tmp_path / "source"
    shutil.copytree(original.folder, folder)
    config = read_json(folder / "unet" / "config.json") | {"_name_or_path": "/home/someone/models"}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    write_model_folder(load_model(str(folder), dtype=torch.float16), tmp_path / "written")
    written = {path.relative_to(tmp_path / "written").as_posix() for path in (tmp_path / "written").rglob("*.*")}
    assert written == {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    for part in ("text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        state = load_file(tmp_path / "written" / part / "model.safetensors")
        assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in state)
        assert {value.dtype for value in state.values()} == {torch.float16}
        assert read_json(tmp_path / "written" / part / "config.json")["torch_dtype"] == "float16"
    vae = load_file(tmp_path / "written" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float32 if family == "sdxl" else torch.float16}
    assert not any("/home/someone" in path.read_text() for path in (tmp_path / "written").rglob("*.json"))
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "written").rglob("*.*")}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # as the umask says, not for the owner alone


def test_zero_terminal_snr_is_written(tiny: tuple[TinyModel, Family], tmp_path: Path) -> None:
    original, family = tiny
    if family != "sd2":
        pytest.skip("an epsilon model")
    model = with_zero_terminal_snr(load_model(str(original.folder)))
    write_model_folder(model, tmp_path / "written")
    assert load_model(str(tmp_path / "written")).schedule.config == model.schedule.config


def test_a_folder_that_is_there_is_left_alone(tiny: tuple[TinyModel, Family], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        write_model_folder(load_model(str(tiny[0].folder)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save_file", "write_synced"])
def test_a_full_disk_leaves_nothing(
    tiny: tuple[TinyModel, Family], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(model_writer, name)
    calls = []

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(name)
        original(*arguments, **options)
        if len(calls) == 2:
            text = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise SafetensorError(text) if name == "save_file" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_writer, name, full)
    with pytest.raises(DiskError, match="No space left"):
        write_model_folder(load_model(str(tiny[0].folder)), tmp_path / "written")
    assert not list(tmp_path.iterdir())


def test_learned_words_are_refused(tiny: tuple[TinyModel, Family], tmp_path: Path) -> None:
    original, family = tiny
    if family == "sdxl":
        pytest.skip("takes no words")
    model = load_model(str(original.folder))
    model.text_encoder.add_tokens({"<word>": torch.ones(2, 32)})
    with pytest.raises(MinisdError, match="words that were learned"):
        write_model_folder(model, tmp_path / "written")
    assert not list(tmp_path.iterdir())
