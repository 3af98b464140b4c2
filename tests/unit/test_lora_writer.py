"""What a LoRA file of ours has in it: names, header, exact values; and what is not written."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load, load_file

from minisd.atomic import write_atomically
from minisd.errors import DiskError, NonFiniteError
from minisd.lora import (
    TARGETS,
    LoRAWeights,
    adaptable_layers,
    inject_lora,
    lora_weights,
)
from minisd.lora_dialects import target_names
from minisd.lora_info import LoRAInfo, base_model_version, public_name
from minisd.lora_reader import read_lora_info
from minisd.lora_writer import lora_bytes, save_lora
from minisd.model_files import read_header
from minisd.unet import UNet2DConditionModel
from minisd.weights import load_unet
from tests.lora_files import INFO, kohya, random_lora, read_unet


@pytest.mark.parametrize("alpha", [6.0, 1.0, 0.1, 1e-3, 64.0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("targets", ["attn", "all"])
def test_round_trip_keeps_weights_alphas_and_information(
    tiny_unet: UNet2DConditionModel, tmp_path: Path, alpha: float, dtype: torch.dtype | None, targets: str
) -> None:
    file = tmp_path / "ours.safetensors"
    trained = random_lora(tiny_unet, rank=3, alpha=alpha, targets=targets)
    info = LoRAInfo(rank=3, alpha=alpha, base_model="pocket", base_model_version="pocket", targets=TARGETS[targets])
    save_lora(file, {"unet": trained}, info, dtype=dtype)
    weights, read = read_unet(file, tiny_unet)
    assert list(weights) != []
    assert weights.keys() == trained.keys()
    for path, given in trained.items():
        assert weights[path].alpha == alpha
        assert weights[path].down.dtype == (dtype or torch.float32)
        assert torch.equal(weights[path].down, given.down.to(dtype or torch.float32))
        assert torch.equal(weights[path].up, given.up.to(dtype or torch.float32))
    assert read == info
    assert read_lora_info(file) == info
    again = tmp_path / "again.safetensors"
    save_lora(again, {"unet": weights}, read)
    assert again.read_bytes() == file.read_bytes()


def test_our_names_of_all_are_kohyas(sd_folder: Path) -> None:
    """LoRANetwork of its scripts: each linear layer and convolution that is a child of a module of these classes."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    expected = {}
    for name, module in unet.named_modules():
        if type(module).__name__ in ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"):
            for child, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    expected[f"lora_unet.{name}.{child}".replace(".", "_")] = layer.weight
    ours = load_unet(sd_folder)
    inject_lora(ours, TARGETS["all"], rank=3, alpha=6)
    written = load(lora_bytes({"unet": lora_weights(ours)}, INFO))
    assert {key.partition(".")[0] for key in written} == expected.keys()
    assert len(written) == 3 * len(expected)
    for name, weight in expected.items():
        ones = (1,) * (weight.dim() - 2)
        assert written[f"{name}.lora_down.weight"].shape == (3, *weight.shape[1:])
        assert written[f"{name}.lora_up.weight"].shape == (len(weight), 3, *ones)
        assert written[f"{name}.alpha"] == 6


def test_ranks_and_alphas_may_differ_between_modules(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    paths = list(random_lora(tiny_unet))
    mixed = random_lora(tiny_unet) | {
        path: w for path, w in random_lora(tiny_unet, rank=2, alpha=0.5).items() if path in paths[:3]
    }
    save_lora(file, {"unet": mixed}, INFO)
    weights, info = read_unet(file, tiny_unet)
    assert {path: (w.rank, w.alpha) for path, w in weights.items()} == {
        path: (2, 0.5) if path in paths[:3] else (4, 6.0) for path in paths
    }
    assert (info.rank, info.alpha) == (4, 6.0)


def test_the_header_says_what_other_programs_ask_for(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    save_lora(file, {"unet": random_lora(tiny_unet)}, INFO)
    header = read_header(file)
    assert header.metadata == {
        "format": "pt",
        "minisd.base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "minisd.format_version": "1",
        "minisd.recipe": '{"learning_rate": 0.0001, "rank": 4}',
        "minisd.targets": '["to_q", "to_k", "to_v", "to_out.0"]',
        "minisd.trigger": "8bit",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "my style",
        "modelspec.trigger_phrase": "8bit",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "6.0",
        "ss_network_args": "{}",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": "my style",
        "ss_resolution": "(512, 512)",
        "ss_sd_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "ss_seed": "0",
        "ss_steps": "1000",
        "ss_v2": "False",
    }
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {key.removeprefix(name) for key in header.tensors if key.startswith(name)} == {
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    }
    assert header.tensors[f"{name}.alpha"].shape == ()


def test_the_header_of_convolutions_is_kohyas(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    info = LoRAInfo(rank=4, alpha=6.0, targets=TARGETS["all"])
    save_lora(tmp_path / "a.safetensors", {"unet": random_lora(tiny_unet, targets="all")}, info)
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "6.0"}
    assert json.loads(metadata["minisd.targets"]) == list(TARGETS["all"])


@pytest.mark.parametrize("flat", [False, True])
def test_the_targets_of_others_are_guessed_from_the_ends_of_their_names(
    tiny_unet: UNet2DConditionModel, flat: bool
) -> None:
    paths = [path for path in adaptable_layers(tiny_unet) if path.endswith(TARGETS["all"])]
    names = target_names([path.replace(".", "_") if flat else path for path in paths])
    assert set(names) == {target.replace(".", "_") if flat else target for target in TARGETS["all"]}
    assert target_names(["middle_block_0_in_layers_2", "input_blocks_4_1_proj_in"]) == ("in_layers_2", "proj_in")
    assert target_names(["conv_in", "time_embedding.linear_1"]) == ("conv_in", "time_embedding.linear_1")


def test_equal_runs_write_equal_bytes() -> None:
    weights = {name: LoRAWeights(torch.ones(2, 3), torch.ones(4, 2), 0.1) for name in ("b.c", "a")}
    data = lora_bytes({"unet": weights}, LoRAInfo(rank=2, alpha=0.1, trigger="t", recipe={"b": 1, "a": (2, "\u00e9")}))
    # Exact to the byte: the library alone would write the text fields in another order in each process.
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 8 == 0
    fields = {
        "format": "pt",
        "minisd.format_version": "1",
        "minisd.targets": "[]",
        "minisd.trigger": "t",
        "minisd.recipe": '{"a": [2, "\\u00e9"], "b": 1}',
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "unknown/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": "t",
        "ss_base_model_version": "unknown",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "0.1",
        "ss_network_args": "{}",
        "ss_v2": "False",
    }
    metadata = json.dumps(fields, separators=(",", ":"))
    assert data[8:end].decode().rstrip().endswith(f',"__metadata__":{metadata}}}')
    assert all(
        lora_bytes(
            {"unet": dict(reversed(weights.items()))},
            LoRAInfo(rank=2, alpha=0.1, trigger="t", recipe={"a": [2, "\u00e9"], "b": 1}),
        )
        == data
        for _ in range(8)
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/name", "owner/name"),
        ("pocket", "pocket"),
        ("/home/alice/models/sd15", "sd15"),
        ("~/models/sd15/", "sd15"),
        ("./sd15", "sd15"),
        ("../alice/sd15", "sd15"),
        ("alice/models/sd15", "sd15"),
        (r"C:\Users\alice\sd15", "sd15"),
        ("C:/Users/alice/sd15", "sd15"),
        ("~alice", ""),
        ("", ""),
    ],
)
def test_a_local_path_never_gets_into_a_file(model: str, name: str) -> None:
    assert public_name(model) == name
    info = LoRAInfo(rank=2, alpha=1, base_model=model, recipe={"model": model, "path": Path(model), "all": [model]})
    data = lora_bytes({"unet": {"a": LoRAWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0)}}, info)
    assert b"alice" not in data or model == "alice/models/sd15"  # in a recipe that one could be any text
    assert b"Users" not in data


def test_a_folder_that_looks_like_a_repository_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "sd15").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/sd15") == "sd15"


def test_other_slashes_in_a_recipe_stay(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    recipe = {"prompt": "a city, 8bit/16bit", "betas": [0.9, 0.999], "none": None, "escaped": r"a \(cat\)"}
    save_lora(tmp_path / "a.safetensors", {"unet": random_lora(tiny_unet)}, LoRAInfo(rank=4, alpha=6, recipe=recipe))
    assert read_lora_info(tmp_path / "a.safetensors").recipe == recipe


@pytest.mark.parametrize(
    ("width", "prediction", "version"),
    [
        (768, "epsilon", "sd_v1"),
        (1024, "epsilon", "sd_v2"),
        (1024, "v_prediction", "sd_v2_v"),
        (2048, "epsilon", "sdxl_base_v1-0"),
        (64, "v_prediction", "pocket"),
        (32, "epsilon", "unknown"),
    ],
)
def test_names_of_bases(width: int, prediction: str, version: str) -> None:
    assert base_model_version(width, prediction) == version


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_what_is_not_finite_is_not_written(tiny_unet: UNet2DConditionModel, tmp_path: Path, value: float) -> None:
    file = tmp_path / "ours.safetensors"
    file.write_bytes(b"older")
    trained = random_lora(tiny_unet)
    next(iter(trained.values())).up[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"attn1_to_q\.lora_up\.weight has values that are NaN or too large"):
        save_lora(file, {"unet": trained}, INFO, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"older"


def test_other_refusals_of_the_writer(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA weights"):
        save_lora(tmp_path / "a.safetensors", {"unet": {}}, INFO)
    with pytest.raises(ValueError, match="float64"):
        save_lora(tmp_path / "a.safetensors", {"unet": random_lora(tiny_unet)}, INFO, dtype=torch.float64)
    for recipe in ({"loss": math.nan}, {"what": object()}):
        with pytest.raises(ValueError, match="JSON"):
            save_lora(
                tmp_path / "a.safetensors", {"unet": random_lora(tiny_unet)}, LoRAInfo(rank=4, alpha=6, recipe=recipe)
            )
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.bin"
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"a\.bin: cannot be written \(5 bytes\): No space left on device"):
        write_atomically(file, b"three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "plain"]
    assert file.read_bytes() == b"two"
    monkeypatch.undo()
    for path in (tmp_path / "missing" / "a", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(DiskError):
            write_atomically(path, b"three")


def test_our_tensors_are_kohyas(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    file = tmp_path / "ours.safetensors"
    save_lora(file, {"unet": random_lora(tiny_unet)}, INFO)
    state = load_file(file)
    expected = kohya(random_lora(tiny_unet))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
