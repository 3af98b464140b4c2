"""Which model a folder holds: XL with its parts, and every other model refused by its name."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd.errors import MinisdError, UsageError, WeightsError
from minisd.hub import resolve_model
from minisd.weights import load_model, weights_id
from tests.tiny import TinyModel, change_json, write_json, write_tiny_model

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("xl"), family="sdxl")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("sd1"))


@pytest.fixture
def folder(xl: TinyModel, tmp_path: Path) -> Path:
    """A copy of an XL model to change."""
    shutil.copytree(xl.folder, tmp_path / "model")
    return tmp_path / "model"


def refusal(kind: type[MinisdError], call: Callable[[], object]) -> str:
    with pytest.raises(MinisdError) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def test_xl_reads_what_stands_for_an_absent_prompt(folder: Path) -> None:
    assert load_model(str(folder)).text_encoder.zeros_when_absent
    change_json(folder, "model_index.json", {"force_zeros_for_empty_prompt": False})
    assert not load_model(str(folder)).text_encoder.zeros_when_absent
    change_json(folder, "model_index.json", {"force_zeros_for_empty_prompt": "yes"})
    message = refusal(WeightsError, lambda: load_model(str(folder)))
    assert "model_index.json: force_zeros_for_empty_prompt='yes' is neither true nor false" in message
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]  # it is on by default in diffusers' pipeline
    write_json(folder / "model_index.json", index)
    assert load_model(str(folder)).text_encoder.zeros_when_absent
    (folder / "model_index.json").write_text("[")
    assert "model_index.json: not valid JSON" in refusal(WeightsError, lambda: load_model(str(folder)))
    (folder / "model_index.json").unlink()
    assert load_model(str(folder)).text_encoder.zeros_when_absent


def test_xl_takes_its_own_offset_of_the_schedule(folder: Path) -> None:
    config = load_model(str(folder)).schedule.config
    assert (config.class_name, config.timestep_spacing, config.steps_offset) == ("EulerDiscreteScheduler", "leading", 1)
    change_json(folder, "scheduler/scheduler_config.json", {"steps_offset": 0})
    assert load_model(str(folder)).schedule.config.steps_offset == 0


@pytest.mark.parametrize(
    "name", ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/special_tokens_map.json"]
)
def test_identity_of_the_text_encoder_is_that_of_both(folder: Path, name: str) -> None:
    before = {part: weights_id(folder, part) for part in ("unet", "vae", "text_encoder")}
    if name.endswith(".safetensors"):
        state = load_file(folder / name)
        save_file({key: value + 1 for key, value in state.items()}, folder / name)
    else:
        change_json(folder, name, {"_note": "changed"})
    after = {part: weights_id(folder, part) for part in before}
    assert {part for part in before if before[part] != after[part]} == {"text_encoder"}


@pytest.mark.parametrize(
    ("make", "remove", "fragment"),
    [
        (
            [],
            ["text_encoder"],
            "the SDXL refiner is not supported. minisd reads Stable Diffusion 1.x, 2.x and SDXL base",
        ),
        (["transformer/config.json"], ["unet"], "a diffusion transformer, such as Stable Diffusion 3 or FLUX is not"),
        (["movq/config.json"], ["vae", "text_encoder"], "Kandinsky is not supported"),
        (["prior/config.json"], ["unet"], "a model of two stages, such as Kandinsky or Stable Cascade is not"),
        (["image_encoder/config.json"], ["text_encoder", "text_encoder_2"], "a model that reads pictures"),
        ([], ["text_encoder_2/model.safetensors"], "text_encoder_2/model.safetensors missing"),
        ([], ["tokenizer_2"], "tokenizer_2/vocab.json missing"),
    ],
)
def test_other_folders_are_refused_by_name(folder: Path, make: list[str], remove: list[str], fragment: str) -> None:
    for name in remove:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    for name in make:
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    message = refusal(WeightsError, lambda: resolve_model(str(folder)))
    assert message.startswith(f"{folder}: ")
    assert fragment in message


def test_parts_of_an_xl_and_of_another_model(folder: Path, sd1: TinyModel, tmp_path: Path) -> None:
    change_json(folder, "unet/config.json", {"projection_class_embeddings_input_dim": 80})
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"add_embedding.linear_1.weight": torch.ones(128, 80)}, weights)
    message = refusal(WeightsError, lambda: load_model(str(folder)))
    assert "the UNet reads a pooled prompt 32 wide, the text encoder writes 24" in message
    shutil.rmtree(folder / "unet")
    shutil.copytree(sd1.folder / "unet", folder / "unet")
    message = refusal(WeightsError, lambda: load_model(str(folder)))
    assert "the UNet is of Stable Diffusion 1.x or 2.x, with the two text encoders of SDXL" in message
    shutil.rmtree(folder / "text_encoder_2")
    shutil.rmtree(folder / "unet")
    shutil.copytree(write_tiny_model(tmp_path / "other", family="sdxl").folder / "unet", folder / "unet")
    message = refusal(WeightsError, lambda: load_model(str(folder)))
    assert "not a model that can be read: text_encoder_2/config.json" in message


def test_the_refiners_unet_is_not_taken_for_the_bases(folder: Path) -> None:
    """It reads five sizes, not six, and 1280 wide prompts."""
    change_json(folder, "unet/config.json", {"projection_class_embeddings_input_dim": 24 + 5 * 8})
    assert str(folder) in refusal(WeightsError, lambda: load_model(str(folder)))


def test_v_prediction_of_an_sd1_is_to_be_confirmed(sd1: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(sd1.folder, tmp_path / "model")
    change_json(tmp_path / "model", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    load_model(str(tmp_path / "model"))  # the tiny model is 32 wide: it is no SD 1.x
    change_json(tmp_path / "model", "unet/config.json", {"cross_attention_dim": 768})
    message = refusal(WeightsError, lambda: load_model(str(tmp_path / "model")))
    assert "it says v_prediction, which no Stable Diffusion 1.x was published with" in message
    assert "add --prediction-type v_prediction" in message
    # Confirmed, it comes as far as the weights, which are not 768 wide here.
    message = refusal(WeightsError, lambda: load_model(str(tmp_path / "model"), prediction_type="v_prediction"))
    assert "of another shape" in message


def test_a_prediction_that_the_folder_contradicts(sd1: TinyModel) -> None:
    load_model(str(sd1.folder), prediction_type="epsilon")
    message = refusal(UsageError, lambda: load_model(str(sd1.folder), prediction_type="v_prediction"))
    assert "--prediction-type v_prediction: " in message
    assert "scheduler_config.json says epsilon. Leave it out, or correct that file" in message


def test_options_of_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert resolve_model(str(path)) == path
    assert "a single file has no variants" in refusal(UsageError, lambda: resolve_model(str(path), variant="fp16"))
    assert "only a Hub repository has revisions" in refusal(UsageError, lambda: resolve_model(str(path), revision="x"))
    assert f"{path}: the file is empty" in refusal(WeightsError, lambda: load_model(str(path)))


class Bomb:
    """Unpickling it creates a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("exploded", "w")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (pickle.dumps(Bomb(), protocol=2), "a Python pickle. Pickled weights can run code when opened"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\xff" * 100, "not a safetensors file"),
        ((10**15).to_bytes(8, "little") + b"{}", "truncated inside its header"),
        ((2).to_bytes(8, "little") + b"{}", "not a Stable Diffusion checkpoint: no key begins with"),
    ],
)
def test_a_single_file_that_is_something_else(
    content: bytes, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(content)
    assert fragment in refusal(WeightsError, lambda: load_model("model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


PEAK = r"""
import re, sys
from pathlib import Path
import torch
from torch import nn
from minisd.strict_load import fill
with torch.device("meta"):
    network = nn.ModuleList([nn.Linear(1000, 1000, bias=False) for _ in range(60)])
def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
small = nn.ModuleList([nn.Linear(1000, 1000, bias=False, device="meta")])
fill(small, [Path(sys.argv[1]) / "one.safetensors"], lambda key: key, torch.float16, "cpu", complaint="")
before = peak()
fill(network, [Path(sys.argv[1]) / "all.safetensors"], lambda key: key, torch.float16, "cpu", complaint="")
print(peak() - before)
"""


def test_peak_of_memory_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    """240 MB in float32 become 120 MB in float16: the whole file in memory besides would show."""
    save_file({f"{index}.weight": torch.zeros(1000, 1000) for index in range(60)}, tmp_path / "all.safetensors")
    save_file({"0.weight": torch.zeros(1000, 1000)}, tmp_path / "one.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 100 < float(result.stdout) < 190
