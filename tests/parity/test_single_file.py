"""Single-file checkpoints of the published models: what minisd makes of them is what diffusers makes of them."""

from __future__ import annotations

import os
import random
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minisd import ldm_keys, single_file, strict_load
from minisd.clip import load_tokenizer
from minisd.ddpm import NoiseScheduleConfig
from minisd.errors import MinisdError, UsageError, WeightsError
from minisd.families import Family, ModelConfigs, network_on_meta, pad_token
from minisd.model_files import read_json, read_tensors
from minisd.single_file import TOKENIZER, identify, load_networks, tokenizers
from minisd.weights import load_model, weights_id
from tests import hub_configs
from tests.ldm_layout import open_clip_to_ldm, to_ldm, unet_to_ldm, vae_to_ldm, write_hollow
from tests.tiny import TinyModel, write_json, write_tiny_model

FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")
# Name of the published model -> its family, what it predicts, its configurations on the Hub.
PUBLISHED = {
    "sd14": ("sd1", "epsilon", hub_configs.SD14),
    "sd15": ("sd1", "epsilon", hub_configs.SD15),
    "sd21-base": ("sd2", "epsilon", hub_configs.SD21_BASE),
    "sd21": ("sd2", "v_prediction", hub_configs.SD21),
    "sdxl": ("sdxl", "epsilon", hub_configs.SDXL),
}


class ReachedError(Exception):
    """Keys and shapes have all been found to fit; the next thing would be to read the weights."""


def refusal(kind: type[MinisdError], call: Callable[[], object]) -> str:
    with pytest.raises(MinisdError) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def published_states(model: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a published model as diffusers and transformers build it, on the meta device."""
    _, _, configs = PUBLISHED[model]
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
        if "text_encoder_2" in configs:
            networks["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
    return {part: network.state_dict() for part, network in networks.items()}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A published model and its single file, of full size and without content."""
    family, _, configs = PUBLISHED[request.param]
    levels = len(configs["unet"]["block_out_channels"])
    tensors = to_ldm(family, published_states(request.param), levels=levels)
    path = write_hollow(tmp_path_factory.mktemp("hollow") / "anything.safetensors", tensors)
    assert path.stat().st_size > 4_000_000_000
    yield request.param, path
    path.unlink()


def test_published_file_is_recognised_and_fits_at_full_size(
    published: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = published
    family, prediction, hub = PUBLISHED[model]
    found, configs = identify(path, prediction)
    assert found == family
    states = published_states(model)
    assert list(configs.networks) == list(states)
    for part, raw in configs.networks.items():
        expected = {key: tuple(tensor.shape) for key, tensor in states[part].items()}
        network = network_on_meta(part, raw)
        assert {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == expected
        # What no key records is as on the Hub.
        ours, on_the_hub = (network_on_meta(part, config).config for config in (raw, hub[part]))
        assert ours == on_the_hub if part in ("unet", "vae") else ours.to_dict() == on_the_hub.to_dict()
    ours, on_the_hub = (
        NoiseScheduleConfig.from_json(raw, xl=family == "sdxl") for raw in (configs.scheduler, hub["scheduler"])
    )
    assert ours == on_the_hub
    assert configs.zeros_when_absent == (family == "sdxl")

    def reached(*_: object) -> None:
        raise ReachedError

    monkeypatch.setattr(strict_load, "read_tensors", reached)
    with pytest.raises(ReachedError):
        load_networks(path, configs, float32(configs), "cpu")
    monkeypatch.setattr(single_file, "network_of", lambda _: "")  # one at a time: the others are no strangers
    for part in configs.networks:
        alone = ModelConfigs({part: configs.networks[part]}, configs.scheduler, False)
        with pytest.raises(ReachedError):
            load_networks(path, alone, float32(alone), "cpu")


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_every_tensor_goes_where_diffusers_puts_it(model: str) -> None:
    """Not only keys and shapes: of tensors of the same shape, each is told from the others."""
    family, _, configs = PUBLISHED[model]
    states = published_states(model)
    levels = len(configs["unet"]["block_out_channels"])
    stored = unet_to_ldm(states["unet"], levels)
    converted = theirs.convert_ldm_unet_checkpoint(dict(stored), dict(configs["unet"]) | {"class_embed_type": None})
    for name, tensor in stored.items():
        key = single_file.unet_key(name.removeprefix("model.diffusion_model."))
        assert converted[key] is tensor is states["unet"][key]
    stored = vae_to_ldm(states["vae"])
    converted = theirs.convert_ldm_vae_checkpoint(dict(stored), dict(configs["vae"]))
    keys = {single_file.vae_key(name.removeprefix("first_stage_model.")) for name in stored}
    assert keys == converted.keys() == states["vae"].keys()
    same = [name for name in stored if ".attn_1." not in name]  # those are reshaped, so they are not the same objects
    assert all(converted[single_file.vae_key(name.removeprefix("first_stage_model."))] is stored[name] for name in same)
    if family == "sd1":
        return
    part, prefix = (
        ("text_encoder", "cond_stage_model.") if family == "sd2" else ("text_encoder_2", "conditioner.embedders.1.")
    )
    layers = configs[part]["num_hidden_layers"]
    stored = open_clip_to_ldm(states[part], prefix, penultimate=family == "sd2")
    network = CLIPTextModel(CLIPTextConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    converted = theirs.convert_open_clip_checkpoint(network, dict(stored), f"{prefix}model.")
    split = 0
    for name, tensor in stored.items():
        place = single_file.open_clip_key(name.removeprefix(prefix), layers=layers, projection=family == "sdxl")
        if place is None:  # SD 2.x reads the last layer but one: diffusers leaves out what minisd does
            assert not name.endswith("bias") or name in theirs.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
        elif len(place.keys) == 1 and not place.transposed:
            assert converted[place.keys[0]] is tensor
        else:
            split += len(place.keys)
            assert all(key in converted for key in place.keys)
    assert split == 6 * layers + (family == "sdxl")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, Path, Family]:
    """A tiny model as a folder, and the same as a single file."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tiny_model(folder / "model", family=request.param, vae_levels=4)
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if request.param == "sdxl" else [])]
    states = {part: getattr(model, part).state_dict() for part in parts}
    tensors = to_ldm(request.param, states, levels=3 if request.param == "sdxl" else 2)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "tiny.safetensors")
    return model, folder / "tiny.safetensors", request.param


def tiny_configs(model: TinyModel) -> ModelConfigs:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    networks = {part: read_json(path) for part in parts if (path := model.folder / part / "config.json").is_file()}
    return ModelConfigs(networks, read_json(model.folder / "scheduler" / "scheduler_config.json"), len(networks) == 4)


def float32(configs: ModelConfigs) -> dict[str, torch.dtype]:
    return dict.fromkeys(configs.networks, torch.float32)


def test_values_are_those_of_the_folder(tiny: tuple[TinyModel, Path, Family]) -> None:
    model, path, _ = tiny
    configs = tiny_configs(model)
    networks = load_networks(path, configs, float32(configs), "cpu")
    assert networks.keys() == configs.networks.keys()
    for part, network in networks.items():
        expected = getattr(model, part).state_dict()
        assert network.state_dict().keys() == expected.keys()
        for key, value in network.state_dict().items():
            assert torch.equal(value, expected[key]), key
            assert value.untyped_storage().nbytes() == value.numel() * 4  # nothing is a part of something larger


@pytest.fixture
def as_published(tiny: tuple[TinyModel, Path, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model be one of the published: recognised, with its own tokenizer as CLIP's."""
    model, _, family = tiny
    configs = tiny_configs(model)
    monkeypatch.setattr(single_file, "identify", lambda path, asked: (family, configs))
    monkeypatch.setattr(single_file, "TOKENIZER", model.folder / "tokenizer")


def test_whole_model_computes_what_the_folder_does_without_a_socket(
    tiny: tuple[TinyModel, Path, Family], as_published: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    model, path, family = tiny
    file, folder = load_model(str(path)), load_model(str(model.folder))
    assert (file.source, file.commit, file.is_xl) == (path, None, family == "sdxl")
    assert file.schedule.config == folder.schedule.config
    assert file.networks().keys() == folder.networks().keys()
    captions = ["the cat!", None]
    ours, expected = file.text_encoder(captions), folder.text_encoder(captions)
    assert torch.equal(ours.hidden_states, expected.hidden_states)
    assert (ours.pooled is None) == (family != "sdxl")
    assert ours.pooled is None or torch.equal(ours.pooled, expected.pooled)
    half = load_model(str(path), dtype=torch.float16)
    assert next(half.unet.parameters()).dtype == torch.float16
    assert next(half.vae.parameters()).dtype == (torch.float32 if family == "sdxl" else torch.float16)
    ids = {part: weights_id(path, part) for part in ("unet", "vae", "text_encoder")}
    assert len(set(ids.values())) == 3
    assert all(value.startswith("sha256:") and len(value) == 71 for value in ids.values())


def test_a_vae_under_the_short_prefix(tiny: tuple[TinyModel, Path, Family], tmp_path: Path) -> None:
    model, path, _ = tiny
    configs = tiny_configs(model)
    stored = dict(read_tensors(path, names_in(path)))
    short = {key.replace("first_stage_model.", "vae."): value for key, value in stored.items()}
    save_file({key: value for key, value in short.items() if "loss" not in key}, tmp_path / "short.safetensors")
    networks = load_networks(tmp_path / "short.safetensors", configs, float32(configs), "cpu")
    assert all(torch.equal(v, model.vae.state_dict()[k]) for k, v in networks["vae"].state_dict().items())


def names_in(path: Path) -> list[str]:
    return list(single_file.read_header(path).tensors)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s | {"surprise.\x1b[31m": torch.ones(1)}, ["1 tensors that are of no network", "surprise."]),
        (lambda s: s | {"conditioner.embedders.7.x": torch.ones(1)}, ["1 tensors that are of no network"]),
        (
            lambda s: {k: v for k, v in s.items() if "middle_block" not in k},
            ["unet is not that of the published model", "missing: mid_block."],
        ),
        (
            lambda s: s | {"first_stage_model.encoder.mid.extra.weight": torch.ones(1)},
            ["vae is not that of the published model: 1 unexpected: encoder.mid.extra.weight"],
        ),
        (
            lambda s: s | {"model.diffusion_model.time_embed.0.weight": torch.ones(7, 7)},
            ["1 of another shape: time_embedding.linear_1.weight"],
        ),
        (
            lambda s: s | {"model.diffusion_model.out.2.bias": torch.tensor([1, 2, 3, torch.nan])},
            ["'model.diffusion_model.out.2.bias' has values that are NaN"],
        ),
    ],
)
def test_a_file_that_does_not_fit(
    tiny: tuple[TinyModel, Path, Family],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    fragments: list[str],
) -> None:
    model, path, _ = tiny
    configs = tiny_configs(model)
    save_file(change(dict(read_tensors(path, names_in(path)))), tmp_path / "changed.safetensors")
    message = refusal(
        WeightsError, lambda: load_networks(tmp_path / "changed.safetensors", configs, float32(configs), "cpu")
    )
    for fragment in (str(tmp_path / "changed.safetensors"), *fragments):
        assert fragment in message


def test_a_projection_that_cannot_be_split_in_three_is_refused(tmp_path: Path) -> None:
    """A square one of a width that 3 does not divide has the shape of one part: it must not pass for it."""
    model = write_tiny_model(tmp_path / "model", family="sdxl", vae_levels=4)
    configs = tiny_configs(model)
    states = {part: getattr(model, part).state_dict() for part in configs.networks}
    tensors = {key: tensor.clone().contiguous() for key, tensor in to_ldm("sdxl", states, levels=3).items()}
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert tensors[name].shape == (120, 40)
    save_file(tensors | {name: torch.ones(40, 40)}, tmp_path / "square.safetensors")
    message = refusal(
        WeightsError, lambda: load_networks(tmp_path / "square.safetensors", configs, float32(configs), "cpu")
    )
    assert "3 of another shape: text_model.encoder.layers.0.self_attn.q_proj.weight" in message


def test_file_truncated_while_it_is_loaded(
    tiny: tuple[TinyModel, Path, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file would end the process with SIGBUS."""
    model, path, _ = tiny
    configs = tiny_configs(model)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())

    def truncating(file: Path, names: Any) -> Iterator[tuple[str, Tensor]]:
        for index, item in enumerate(read_tensors(file, names)):
            yield item
            if index == 3:
                os.truncate(copy, 10_000)

    monkeypatch.setattr(strict_load, "read_tensors", truncating)
    message = refusal(WeightsError, lambda: load_networks(copy, configs, float32(configs), "cpu"))
    assert f"{copy}: " in message
    assert "Download it again" in message


def test_no_two_copies_while_loading(tiny: tuple[TinyModel, Path, Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, those before it are gone but for the last: what remains is the cast."""
    model, path, _ = tiny
    configs = tiny_configs(model)
    alive: list[int] = []

    def counting(file: Path, names: Any) -> Iterator[tuple[str, Tensor]]:
        read: list[weakref.ref[Tensor]] = []
        for name, tensor in read_tensors(file, names):
            alive.append(sum(reference() is not None for reference in read))
            read.append(weakref.ref(tensor))
            yield name, tensor

    monkeypatch.setattr(strict_load, "read_tensors", counting)
    load_networks(path, configs, dict.fromkeys(configs.networks, torch.float16), "cpu")
    assert len(alive) > 100
    assert max(alive) <= 1


def hollow(tmp_path: Path, change: dict[str, tuple[int, ...] | None], metadata: dict[str, str] | None = None) -> Path:
    """A file with the few keys by which SD 2.x is recognised, and changes to them."""
    shapes: dict[str, tuple[int, ...] | None] = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "cond_stage_model.model.ln_final.bias": (1024,),
        **change,
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if shape is not None}
    return write_hollow(tmp_path / "model.safetensors", tensors, metadata)


def only(*names: str) -> dict[str, tuple[int, ...] | None]:
    usual = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")
    usual += ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",)
    usual += ("cond_stage_model.model.ln_final.bias",)
    return {**dict.fromkeys(usual), **dict.fromkeys(names, (4, 4))}


ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model (9 input channels)"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "InstructPix2Pix) (8 input channels)"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}, "depth-to-image model (5 input channels)"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 6, 3, 3)}, "of another kind (6 input channels)"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1280, 2560)}, "the SDXL refiner is not supported"),
        ({"noise_augmentor.data_mean": (1, 768)}, "Stable unCLIP is not supported"),
        ({"edm_vpred.sigma_max": ()}, "an EDM model (CosXL, Playground 2.5) is not supported"),
        ({"edm_mean": (4,)}, "an EDM model"),
        ({ATTENTION: (320, 999)}, "a UNet that reads none of the known text encoders"),
        ({ATTENTION: None}, "a UNet that reads none of the known text encoders"),
        ({"first_stage_model.encoder.conv_in.weight": None}, "Stable Diffusion 2.x without vae. Give a file"),
        ({"cond_stage_model.model.ln_final.bias": None}, "Stable Diffusion 2.x without text_encoder. Give"),
        ({ATTENTION: (320, 2048)}, "SDXL without text_encoder_2. Give"),
        (only("model.diffusion_model.joint_blocks.0.x.weight"), "Stable Diffusion 3 is not supported"),
        (only("model.diffusion_model.double_blocks.0.x.weight"), "FLUX is not supported"),
        (only("model.diffusion_model.blocks.0.x.weight"), "a model of another architecture is not supported"),
        (only("double_blocks.0.img_attn.qkv.weight"), "FLUX is not supported"),
        (only("lora_unet_x.lora_down.weight"), "a LoRA, not a model: pass it with --lora"),
        (only("unet.x.hada_w1_a"), "a LoRA, not a model"),
        (only("unet:12:up", "unet:12:down"), "a LoRA, not a model: pass it with --lora"),
        (only("control_model.input_blocks.0.0.weight"), "a ControlNet is not supported"),
        (only("emb_params"), "an embedding (textual inversion), not a model"),
        (only("input_blocks.0.0.weight"), "a UNet alone, without VAE and text encoder"),
        (only("down_blocks.0.resnets.0.conv1.weight"), "a UNet, a part of a model"),
        (only("encoder.down_blocks.0.resnets.0.conv1.weight"), "a VAE, a part of a model"),
        (only("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder, a part of a model"),
        (only("x"), "checkpoint: no key begins with model.diffusion_model. minisd reads"),
    ],
)
def test_other_files_are_refused_by_name(
    change: dict[str, tuple[int, ...] | None], fragment: str, tmp_path: Path
) -> None:
    path = hollow(tmp_path, change)
    message = refusal(WeightsError, lambda: identify(path, "epsilon"))
    assert str(path) in message
    assert fragment in message


def test_sd2_that_does_not_say_what_it_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hollow(tmp_path, {})
    message = refusal(UsageError, lambda: identify(path))
    assert "--prediction-type epsilon for a model of 512 pixels" in message
    assert "--prediction-type v_prediction for one of 768" in message
    for asked, size in (("epsilon", 64), ("v_prediction", 96)):
        _, configs = identify(path, asked)
        assert (configs.scheduler["prediction_type"], configs.networks["unet"]["sample_size"]) == (asked, size)
    # The published files are known by their content.
    digest = single_file.sha256_of(path)
    for prediction in ("epsilon", "v_prediction"):
        monkeypatch.setattr(single_file, "_PUBLISHED", {digest: prediction})
        assert identify(path)[1].scheduler["prediction_type"] == prediction
    assert identify(path, "epsilon")[1].scheduler["prediction_type"] == "epsilon"  # the user knows better


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_sd2_that_says_what_it_predicts(metadata: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert identify(hollow(tmp_path, {}, metadata))[1].scheduler["prediction_type"] == expected


def test_an_unknown_prediction_is_refused(tmp_path: Path) -> None:
    path = hollow(tmp_path, {}, {"modelspec.prediction_type": "rectified flow"})
    assert "predicts 'rectified flow', which is not supported" in refusal(WeightsError, lambda: identify(path))
    identify(path, "epsilon")


def test_marks_of_fine_tuned_sdxl(tmp_path: Path) -> None:
    change = {ATTENTION: (320, 2048), "conditioner.embedders.1.model.ln_final.bias": (1280,)}
    family, configs = identify(hollow(tmp_path, change))
    assert (family, configs.scheduler["prediction_type"]) == ("sdxl", "epsilon")
    _, configs = identify(hollow(tmp_path, {**change, "v_pred": ()}))
    assert configs.scheduler["prediction_type"] == "v_prediction"
    assert "rescale_betas_zero_snr" not in configs.scheduler
    _, configs = identify(hollow(tmp_path, {**change, "v_pred": (), "ztsnr": ()}))
    assert configs.scheduler["rescale_betas_zero_snr"] is True
    assert configs.scheduler["timestep_spacing"] == "trailing"
    _, configs = identify(hollow(tmp_path, {**change, "v_pred": (), "ztsnr": ()}), "epsilon")
    assert configs.scheduler["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in configs.scheduler


def test_no_key_is_too_strange_to_be_refused() -> None:
    words = (
        "model diffusion_model input_blocks output_blocks middle_block time_embed label_emb out in_layers conv op 0 1 2"
    )
    words += (
        " 3 11 99999 first_stage_model vae encoder decoder up down mid block attn_1 block_1 norm_out q k downsample"
    )
    words += (
        " cond_stage_model conditioner embedders transformer resblocks attn in_proj_weight ln_final text_projection"
    )
    words += " token_embedding positional_embedding text_model position_ids \u0664 -1 weight bias"
    draw = random.Random(0)
    for _ in range(20_000):
        key = ".".join(draw.choices([*words.split(), "9" * 5000, "", "\x1b["], k=draw.randrange(7)))
        assert ldm_keys.network_of(key) in ("", None, *ldm_keys.PREFIXES)
        assert isinstance(ldm_keys.unet_key(key), str)
        assert isinstance(ldm_keys.vae_key(key), str)
        assert ldm_keys.clip_l_key(key) in (None, key, key.removeprefix("transformer."))
        for projection in (False, True):
            place = ldm_keys.open_clip_key(key, layers=3, projection=projection)
            assert place is None or len(place.keys) in (1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_that_of_a_folder_on_the_hub(family: Family, tmp_path: Path) -> None:
    prompts = ["a photo of a cat", "A  CAT!! wow!", "! !", "", "caf\u00e9 \u732b 123 it's", "cat " * 100]
    ours = tokenizers(family)
    assert len(ours) == (2 if family == "sdxl" else 1)
    for tokenizer, name in zip(ours, ("tokenizer", "tokenizer_2"), strict=False):
        for file in TOKENIZER.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        pad = pad_token(family, name)
        marks = read_json(TOKENIZER / "special_tokens_map.json") | {"pad_token": pad}
        write_json(tmp_path / "special_tokens_map.json", marks)
        for expected in (CLIPTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
            assert len(tokenizer) == len(expected) == 49408
            assert tokenizer.pad_token_id == expected.pad_token_id == (0 if pad == "!" else 49407)
            assert tokenizer.model_max_length == expected.model_max_length == 77
            options: dict[str, Any] = {"padding": "max_length", "max_length": 77, "truncation": True}
            assert tokenizer(prompts, **options).input_ids == expected(prompts, **options).input_ids
            assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_vocabulary_is_clips() -> None:
    vocabulary = read_json(TOKENIZER / "vocab.json")
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0].startswith("#version")
    assert len(merges) == 1 + 48_894
    assert sorted(vocabulary.values()) == list(range(49_408))
    assert (vocabulary["!"], vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (0, 49406, 49407)
    assert [vocabulary["".join(merge.split())] for merge in merges[1:]] == list(range(512, 49_406))
