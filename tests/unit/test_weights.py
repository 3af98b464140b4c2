"""A folder written by diffusers' save_pretrained loads strictly and computes what diffusers computes, or is refused."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisd import model_files
from minisd.errors import WeightsError
from minisd.ldm_keys import rename_old_vae_attention
from minisd.model_folder import weight_files
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from minisd.weights import load_model, load_noise_schedule, load_text_encoder, load_unet, load_vae, weights_id
from tests.tiny import TinyModel, change_json, write_json, write_tiny_model

WEIGHTS = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")} | {
    part: f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")
}
SD1_PARTS = ("unet", "vae", "text_encoder")
LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    prediction_type = "v_prediction" if request.param == "sd2" else "epsilon"
    folder = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(folder, family=request.param, prediction_type=prediction_type)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(sd1: TinyModel, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(sd1.folder, tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / WEIGHTS[part]
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as error:
        load()
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def test_computes_what_diffusers_computes(model: TinyModel) -> None:
    ours = load_model(str(model.folder), dtype=torch.float64)
    xl = model.text_encoder_2 is not None
    if xl:
        theirs = StableDiffusionXLPipeline.from_pretrained(model.folder, dtype=torch.float64)
    else:
        theirs = StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None, dtype=torch.float64)
    assert (ours.name, ours.source, ours.commit, ours.is_xl) == (str(model.folder), model.folder, None, xl)
    assert list(ours.networks()) == ["unet", "text_encoder", *(["text_encoder_2"] if xl else [])]
    assert ours.networks()["unet"] is ours.unet
    generator = torch.Generator().manual_seed(0)
    latents, pictures, prompts = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 4, 16, 16), (2, 3, 64, 64), (2, 77, ours.text_encoder.width))
    )
    if not xl:  # what an XL's UNet takes besides is in tests/parity
        timesteps = torch.tensor([3, 981])
        expected = theirs.unet(latents, timesteps, prompts).sample
        torch.testing.assert_close(ours.unet(latents, timesteps, prompts), expected, rtol=0, atol=1e-10)
    expected = theirs.vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(ours.vae.encode(pictures).mean, expected, rtol=0, atol=1e-10)
    expected = theirs.vae.decode(latents).sample
    torch.testing.assert_close(ours.vae.decode(latents), expected, rtol=0, atol=1e-10)
    abar = ours.schedule.alphas_cumprod.to(torch.float32)
    torch.testing.assert_close(abar, theirs.scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert ours.schedule.config.prediction_type == theirs.scheduler.config.prediction_type


def test_keys_are_the_files_and_values_equal(model: TinyModel) -> None:
    loaded = load_model(str(model.folder))
    for part, network in (loaded.networks() | {"vae": loaded.vae}).items():
        state, stored = network.state_dict(), load_file(model.folder / WEIGHTS[part])
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)


def test_frozen_whole_and_of_the_dtype_asked_for_but_the_vae_of_xl(model: TinyModel) -> None:
    loaded = load_model(str(model.folder), dtype=torch.bfloat16)
    for part, network in (loaded.networks() | {"vae": loaded.vae}).items():
        assert not any(module.training for module in network.modules())
        for tensor in network.parameters():
            assert tensor.dtype == (torch.float32 if part == "vae" and loaded.is_xl else torch.bfloat16)
            assert not tensor.requires_grad
        assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_no_request_for_a_folder(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 9))
    load_model(str(model.folder))


def test_mixed_dtypes_are_cast(folder: Path) -> None:
    expected = load_unet(folder).state_dict()
    change_weights(
        folder, "unet", lambda state: {k: v.double() if "norm" in k else v.bfloat16() for k, v in state.items()}
    )
    for key, value in load_unet(folder).state_dict().items():
        stored = expected[key] if "norm" in key else expected[key].bfloat16().float()
        assert torch.equal(value, stored)


def test_variant(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, dtype=torch.float16, variant="fp16")
    loaded = load_model(str(tmp_path), variant="fp16")
    for key, value in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], value.float())
    message = refusal(lambda: load_model(str(tmp_path)))
    assert "unet/diffusion_pytorch_model.safetensors missing" in message
    assert "unet/diffusion_pytorch_model.fp16.safetensors is there: choose it with --variant" in message


def test_no_such_variant(folder: Path) -> None:
    message = refusal(lambda: load_model(str(folder), variant="fp16"))
    assert "unet/diffusion_pytorch_model.fp16.safetensors missing: there is no variant 'fp16'" in message
    assert "no variant 'fp16'" in refusal(lambda: load_vae(folder, variant="fp16"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path: Path, sd1: TinyModel, variant: str | None) -> None:
    write_tiny_model(tmp_path, variant=variant, max_shard_size="60KB")
    for part in SD1_PARTS:
        assert len(weight_files(tmp_path, part, variant)) > 2
    ours, whole = load_model(str(tmp_path), variant=variant), load_model(str(sd1.folder))
    for key, value in whole.unet.state_dict().items():
        assert torch.equal(ours.unet.state_dict()[key], value)
    captions = ["the cat"]
    assert torch.equal(ours.text_encoder(captions).hidden_states, whole.text_encoder(captions).hidden_states)


def test_damaged_shards(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, max_shard_size="60KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shards = weight_files(tmp_path, "unet")
    assert "both" in refusal(lambda: shutil.copy(shards[0], tmp_path / WEIGHTS["unet"]) and load_unet(tmp_path))
    (tmp_path / WEIGHTS["unet"]).unlink()
    shutil.copy(shards[0], shards[1])
    assert "is there a second time" in refusal(lambda: load_unet(tmp_path))
    shards[1].unlink()
    message = refusal(lambda: load_model(str(tmp_path)))
    assert f"{shards[1]}: missing, but listed in {index.name}" in message
    for weight_map in ({"a": "../vae/x.safetensors"}, {"a": "config.json"}, {"a": 1}, {}, None):
        write_json(index, {"weight_map": weight_map})
        assert str(index) in refusal(lambda: load_unet(tmp_path))


def test_old_vae_names(folder: Path) -> None:
    """SD 1.x's file on the Hub: other names, and in some the projections are 1 x 1 convolutions."""
    expected = load_vae(folder).state_dict()

    def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for key, value in state.items():
            for new, name in OLD_ATTENTION.items():
                if f".attentions.0.{new}." in key:
                    key = key.replace(f".{new}.", f".{name}.")
                    value = value[:, :, None, None] if value.dim() == 2 else value
            result[key] = value
        assert sum(".proj_attn." in key for key in result) == 4
        return result

    change_weights(folder, "vae", old)
    state = load_vae(folder).state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_old_vae_names_at_full_size() -> None:
    with torch.device("meta"):
        keys = AutoencoderKL(AutoencoderKLConfig()).state_dict().keys()
    assert len(keys) == 248
    old = set()
    for key in keys:
        for new, name in OLD_ATTENTION.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old.add(key)
    assert len(old - keys) == 16
    assert {rename_old_vae_attention(key) for key in old} == set(keys)
    assert {rename_old_vae_attention(key) for key in keys} == set(keys)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.mid_block.attentions.1.query.weight",
        "decoder.up_blocks.0.attentions.0.query.weight",
        "mid_block.attentions.0.query.weight",
        "quant.mid_block.attentions.0.query.weight",
        "encoder.mid_block.attentions.0.query.lora.weight",
        "encoder.mid_block.attentions.0.query_norm.weight",
        "query",
    ],
)
def test_other_keys_are_not_renamed(key: str) -> None:
    assert rename_old_vae_attention(key) == key


def test_linear_and_conv_projections(model: TinyModel, tmp_path: Path) -> None:
    """The file may have proj_in and proj_out the other way than the config says: the numbers are the same."""
    expected = load_unet(model.folder).state_dict()
    shutil.copytree(model.folder, tmp_path / "model")

    def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
        projections = [key for key in state if key.endswith(("proj_in.weight", "proj_out.weight"))]
        assert projections
        for key in projections:
            value = state[key]
            state[key] = value[:, :, 0, 0] if value.dim() == 4 else value[:, :, None, None]
        return state

    change_weights(tmp_path / "model", "unet", other)
    state = load_unet(tmp_path / "model").state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_no_other_reshape(folder: Path) -> None:
    def flatten(state: dict[str, Tensor]) -> dict[str, Tensor]:
        shortcut = next(key for key in state if key.endswith("conv_shortcut.weight"))
        embedding = state["time_embedding.linear_1.weight"]
        return state | {shortcut: state[shortcut][:, :, 0, 0], "time_embedding.linear_1.weight": embedding.T}

    change_weights(folder, "unet", flatten)
    message = refusal(lambda: load_unet(folder))
    assert "2 of another shape: " in message
    assert "time_embedding.linear_1.weight (expected [128, 32], got [32, 128])" in message
    assert "conv_shortcut.weight (expected [64, 32, 1, 1], got [64, 32])" in message


def without_last_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("conv_out") and "mid_block" not in key}


@pytest.mark.parametrize(
    ("part", "change", "fragments"),
    [
        ("unet", without_last_layers, ["48 missing: mid_block.", ", ...", "The file is incomplete"]),
        ("unet", lambda s: s | {"extra.\x1b[31m": torch.ones(1)}, ["1 unexpected: extra.", "of different models"]),
        ("unet", lambda s: s | {"conv_in.weight": torch.ones(32, 9, 3, 3)}, ["an inpainting UNet (9 input channels)"]),
        ("unet", lambda s: {"lora_unet_mid.lora_down.weight": torch.ones(2, 2)}, ["This is a LoRA", "--lora"]),
        ("unet", lambda s: {"unet.mid.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, ["This is a LoRA"]),
        ("unet", lambda s: {f"model.diffusion_model.{k}": v for k, v in s.items()}, ["a single-file checkpoint"]),
        (
            "unet",
            lambda s: {k: torch.ones(*v.shape[:1], 1024) if "attn2.to_k" in k else v for k, v in s.items()},
            ["SD 2.x"],
        ),
        ("unet", lambda s: s | {"conv_in.bias": torch.ones(32).int()}, ["'conv_in.bias' is stored as I32"]),
        (
            "unet",
            lambda s: s | {"conv_in.bias": torch.full((32,), torch.nan)},
            ["'conv_in.bias' has values that are NaN"],
        ),
        ("vae", lambda s: s | {"position_ids": torch.ones(1)}, ["1 unexpected: position_ids"]),
        ("vae", lambda s: s | {"encoder.mid_block.attentions.0.key.bias": torch.ones(32)}, ["is there a second time"]),
        ("text_encoder", lambda s: s | {"text_projection.weight": torch.ones(1)}, ["1 unexpected: text_projection"]),
        ("text_encoder", lambda s: {}, ["52 missing", "The file is incomplete"]),
    ],
)
def test_weights_that_do_not_fit(
    folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], fragments: list[str]
) -> None:
    change_weights(folder, part, change)
    message = refusal(lambda: LOADERS[part](folder))
    assert str(folder / part) in message
    for fragment in fragments:
        assert fragment in message


def test_too_large_for_float16(folder: Path) -> None:
    change_weights(folder, "unet", lambda state: state | {"conv_in.bias": torch.full((32,), 1e5)})
    load_unet(folder, dtype=torch.bfloat16)
    assert "too large for torch.float16" in refusal(lambda: load_unet(folder, dtype=torch.float16))
    # A sum that overflows is no infinite value.
    change_weights(folder, "unet", lambda state: state | {"conv_in.bias": torch.full((32,), 6e4)})
    load_unet(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model (9 input channels)"),
        ("unet/config.json", {"in_channels": 8}, "an image editing model (InstructPix2Pix) (8 input channels)"),
        ("unet/config.json", {"block_out_channels": 32}, "unet/config.json"),
        ("unet/config.json", {"norm_num_groups": 7}, "unet/config.json"),
        ("vae/config.json", {"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"beta_start": "0"}, "scheduler_config.json"),
    ],
)
def test_config_refused(folder: Path, name: str, change: dict[str, object], fragment: str) -> None:
    change_json(folder, name, change)
    message = refusal(lambda: load_model(str(folder)))
    assert str(folder / name) in message
    assert fragment in message
    (folder / name).write_text("{")
    assert "not valid JSON" in refusal(lambda: load_model(str(folder)))


def test_parts_of_different_models(folder: Path, tmp_path: Path) -> None:
    change_json(folder, "unet/config.json", {"cross_attention_dim": 48})

    def widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.ones(len(v), 48) if "attn2.to_k" in k or "attn2.to_v" in k else v for k, v in state.items()}

    change_weights(folder, "unet", widen)
    load_unet(folder)
    assert "reads prompts 48 wide, the text encoder writes 32" in refusal(lambda: load_model(str(folder)))


def test_noise_schedule(model: TinyModel) -> None:
    assert load_noise_schedule(model.folder).config.num_train_timesteps == 1000


def test_weights_id(sd1: TinyModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {part: weights_id(folder, part) for part in SD1_PARTS}
    assert len(set(ids.values())) == 3
    assert ids == {part: weights_id(sd1.folder, part) for part in SD1_PARTS}  # the content counts, not the place
    assert all(value.startswith("sha256:") and len(value) == 71 for value in ids.values())

    change_json(folder, "vae/config.json", {"scaling_factor": 0.5})
    assert weights_id(folder, "vae") != ids["vae"]
    change_weights(folder, "unet", lambda state: state | {"conv_in.bias": state["conv_in.bias"] + 1})
    assert weights_id(folder, "unet") != ids["unet"]
    assert weights_id(folder, "text_encoder") == ids["text_encoder"]

    model_files._sha256.cache_clear()
    again = weights_id(folder, "unet")
    monkeypatch.setattr("hashlib.file_digest", None)  # a second time, nothing is read
    assert weights_id(folder, "unet") == again
