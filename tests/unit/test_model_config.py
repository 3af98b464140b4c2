"""What a config.json may say: each field is read, inert, or refused by name. None is ignored.

The oracle is diffusers: its full dump says which fields exist, and what it builds says which changes matter.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from torch import nn

from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from tests import hub_configs
from tests.hub_configs import Config

UNET: Config = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
VAE: Config = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}

# Another value for every field of diffusers' dump, one that diffusers itself knows or that a real model has.
UNET_CHANGES: Config = {
    "act_fn": "gelu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 32,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [2, 4],
    "attention_type": "gated",
    "block_out_channels": [16, 64],
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "class_embeddings_concat": True,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 0,
    "dropout": 0.1,
    "dual_cross_attention": True,
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 9,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 1.4142135623730951,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
    "num_attention_heads": 8,
    "num_class_embeds": 1000,
    "only_cross_attention": True,
    "out_channels": 8,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.4142135623730951,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [1, 2],
    "sample_size": 32,
    "time_cond_proj_dim": 256,
    "time_embedding_act_fn": "silu",
    "time_embedding_dim": 128,
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
    "transformer_layers_per_block": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": True,
    "use_linear_projection": True,
}
VAE_CHANGES: Config = {
    "act_fn": "gelu",
    "block_out_channels": [16, 64],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "force_upcast": False,
    "in_channels": 4,
    "latent_channels": 16,
    "latents_mean": [0.0, 0.1, 0.2, 0.3],
    "latents_std": [1.0, 1.1, 1.2, 1.3],
    "layers_per_block": 2,
    "mid_block_add_attention": False,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.13025,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
# Change nothing in what is computed: the attention of torch ignores the first, the pipelines act on the others.
INERT = {("unet", "upcast_attention"), ("vae", "sample_size"), ("vae", "force_upcast")}
# In the config, not in the network: the pipeline's default picture size, the factor around the VAE.
SHAPELESS = {("unet", "sample_size"), ("vae", "scaling_factor")}
CASES = [("unet", name) for name in UNET_CHANGES] + [("vae", name) for name in VAE_CHANGES]

READERS: dict[str, Any] = {"unet": UNetConfig.from_json, "vae": AutoencoderKLConfig.from_json}
BUILDERS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
REFERENCES: dict[str, Any] = {"unet": ReferenceUNet, "vae": ReferenceVAE}
CHANGES = {"unet": UNET_CHANGES, "vae": VAE_CHANGES}


def _dump(part: str) -> Config:
    """The config as diffusers writes it: every field it knows."""
    with torch.device("meta"):
        reference = ReferenceUNet(**UNET) if part == "unet" else ReferenceVAE(**VAE)
    return json.loads(reference.to_json_string())


DUMPS = {part: _dump(part) for part in ("unet", "vae")}


def _read(part: str, raw: Config) -> Any:
    """The config, or the text of the refusal. Anything but a ValueError is a failure."""
    try:
        return READERS[part](raw)
    except ValueError as error:
        return str(error)


def _built(network: nn.Module) -> dict[str, Any]:
    """What a config decides and a state dict does not hold all of: shapes, epsilons, groups, heads."""
    built: dict[str, Any] = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            built[f"{name}.norm"] = (module.eps, getattr(module, "num_groups", None))
        if hasattr(module, "to_q") and hasattr(module, "heads"):
            built[f"{name}.heads"] = module.heads
    return built


def _ours(part: str, raw: Config) -> dict[str, Any]:
    with torch.device("meta"):
        return _built(BUILDERS[part](READERS[part](raw)))


def _theirs(part: str, raw: Config) -> dict[str, Any]:
    with torch.device("meta"):
        built = _built(REFERENCES[part].from_config(raw))
    # Our VAE's attention has one head by construction and does not carry the number.
    return {key: value for key, value in built.items() if part == "unet" or not key.endswith(".heads")}


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_the_changes_cover_every_field_of_diffusers(part: str) -> None:
    fields = {name for name in DUMPS[part] if not name.startswith("_")}
    assert fields == CHANGES[part].keys()
    assert all(DUMPS[part][name] != value for name, value in CHANGES[part].items())
    assert _ours(part, DUMPS[part]) == _theirs(part, DUMPS[part])


@pytest.mark.parametrize(("part", "name"), CASES)
def test_a_changed_field_is_built_or_inert_or_refused_by_name(part: str, name: str) -> None:
    raw = DUMPS[part] | {name: CHANGES[part][name]}
    config = _read(part, raw)
    if isinstance(config, str):
        assert config.startswith(f"{name}=") or config.startswith(f"{name}: ")
        return
    if (part, name) in INERT:
        assert config == READERS[part](DUMPS[part])
        return
    value = getattr(config, name)
    assert (list(value) if isinstance(value, tuple) else value) == raw[name]
    assert _ours(part, raw) == _theirs(part, raw)
    if (part, name) not in SHAPELESS:
        assert _ours(part, raw) != _ours(part, DUMPS[part])


@pytest.mark.parametrize(("part", "name"), CASES)
def test_null_is_read_as_diffusers_reads_it_or_refused_by_name(part: str, name: str) -> None:
    absent = {key: value for key, value in DUMPS[part].items() if key != name}
    config = _read(part, absent | {name: None})
    assert config == _read(part, absent) or config.startswith(f"{name}=None is not supported")
    if DUMPS[part][name] is None:
        assert _ours(part, absent | {name: None}) == _theirs(part, absent | {name: None})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "mid_block_type"),  # null: no middle
        ("unet", "flip_sin_to_cos"),  # null: false
        ("vae", "use_quant_conv"),
        ("vae", "use_post_quant_conv"),
        ("vae", "mid_block_add_attention"),
    ],
)
def test_null_that_diffusers_reads_as_false_is_refused(part: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=None is not supported"):
        READERS[part](DUMPS[part] | {name: None})


@pytest.mark.parametrize(
    "raw",
    [
        hub_configs.UNET_SD15,
        hub_configs.UNET_SD15_RESAVED,
        hub_configs.UNET_SD21_BASE,
        hub_configs.UNET_SD21,
        hub_configs.UNET_SDXL,
    ],
)
def test_every_field_that_is_null_on_the_hub_may_be_absent(raw: Config) -> None:
    without = {name: value for name, value in raw.items() if value is not None}
    assert UNetConfig.from_json(raw) == UNetConfig.from_json(without)


def test_resaving_changes_nothing() -> None:
    assert UNetConfig.from_json(hub_configs.UNET_SD15_RESAVED) == UNetConfig.from_json(hub_configs.UNET_SD15)


def test_published_numbers() -> None:
    sd15, sd21 = UNetConfig.from_json(hub_configs.UNET_SD15), UNetConfig.from_json(hub_configs.UNET_SD21)
    assert (sd15.heads, sd15.sample_size, sd15.use_linear_projection) == ((8, 8, 8, 8), 64, False)
    assert (sd21.heads, sd21.sample_size, sd21.use_linear_projection) == ((5, 10, 20, 20), 96, True)
    assert (sd15.cross_attention_dim, sd21.cross_attention_dim) == (768, 1024)
    sdxl = UNetConfig.from_json(hub_configs.UNET_SDXL)
    assert (sdxl.depths, sdxl.heads, sdxl.size_width, sdxl.pooled_width) == ((1, 2, 10), (5, 10, 20), 256, 1280)
    assert (sd15.is_xl, sd21.is_xl, sdxl.is_xl) == (False, False, True)
    assert AutoencoderKLConfig.from_json(hub_configs.VAE_SD15).scaling_factor == 0.18215
    assert AutoencoderKLConfig.from_json(hub_configs.VAE_SDXL).scaling_factor == 0.13025


def test_the_addition_embedding_comes_whole_or_not_at_all() -> None:
    sdxl = hub_configs.UNET_SDXL
    for name, value, message in (
        ("addition_embed_type", None, "addition_time_embed_dim=256 is not supported without"),
        ("addition_time_embed_dim", None, "addition_embed_type='text_time' is not supported without addition_time"),
        (
            "projection_class_embeddings_input_dim",
            None,
            "addition_embed_type='text_time' is not supported without proj",
        ),
        ("projection_class_embeddings_input_dim", 6 * 256, "projection_class_embeddings_input_dim=1536 is not more"),
        ("addition_embed_type", "image", "addition_embed_type='image' is not supported"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            UNetConfig.from_json(sdxl | {name: value})


def test_a_network_that_could_never_be_built_is_refused() -> None:
    for part in ("unet", "vae"):
        with pytest.raises(ValueError, match=r"^layers_per_block=100000 is not supported"):
            READERS[part](DUMPS[part] | {"layers_per_block": 100_000})
        with pytest.raises(ValueError, match=r"^norm_num_groups=10000000000 is not supported"):
            READERS[part](DUMPS[part] | {"norm_num_groups": 10**10})
    with pytest.raises(ValueError, match=r"^transformer_layers_per_block=1000 is not supported"):
        UNetConfig.from_json(DUMPS["unet"] | {"transformer_layers_per_block": [1, 1000]})


def test_a_depth_of_one_at_every_level_is_supported() -> None:
    raw = DUMPS["unet"] | {"transformer_layers_per_block": [1, 1]}
    assert UNetConfig.from_json(raw).depths == UNetConfig.from_json(DUMPS["unet"]).depths
    assert _ours("unet", raw) == _theirs("unet", raw) == _theirs("unet", DUMPS["unet"])


def test_cross_attention_dim_is_required() -> None:
    # diffusers' default, 1280, is no published model's.
    with pytest.raises(ValueError, match=r"^cross_attention_dim is missing"):
        UNetConfig.from_json({name: value for name, value in UNET.items() if name != "cross_attention_dim"})


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_field_of_the_future_is_refused_unless_it_is_off(part: str) -> None:
    plain = READERS[part](DUMPS[part])
    for off in (None, False):
        assert READERS[part](DUMPS[part] | {"spectral_gates": off}) == plain
    # Zero is not off: `num_class_embeds: 0` makes diffusers build an embedding, if an empty one.
    for value in (True, 0, 1, 0.0, "", "on", [], [False], {}):
        with pytest.raises(ValueError, match=r"^spectral_gates="):
            READERS[part](DUMPS[part] | {"spectral_gates": value})
    assert READERS[part](DUMPS[part] | {"_spectral_gates": True}) == plain


WRONG_KINDS: dict[str, tuple[Any, ...]] = {
    "list": ("16, 32", 16, True, {}, {"0": 16}, [], ["16", "32"], [16, True], [16, 32.0], [16, None], [[16], [32]]),
    "names": ("DownBlock2D", 2, True, {}, [], [1, 2], [None, None], [["DownBlock2D"], ["DownBlock2D"]]),
    "int": ("2", 2.0, 2.5, True, False, 0, -2, [2], [2, 2], {}),
    "heads": ("4", 4.0, True, 0, -4, {}, [], ["2", "4"], [2, True], [2, 0], [2.0, 4.0]),
    "float": ("1e-5", True, 0, 0.0, -1e-5, float("nan"), float("inf"), [1e-5], {}),
    "bool": ("true", 0, 1, 1.0, [True], {}),
}
KINDS = {
    "unet": {
        "addition_time_embed_dim": "int",
        "attention_head_dim": "heads",
        "block_out_channels": "list",
        "cross_attention_dim": "int",
        "down_block_types": "names",
        "in_channels": "int",
        "layers_per_block": "int",
        "norm_eps": "float",
        "norm_num_groups": "int",
        "out_channels": "int",
        "projection_class_embeddings_input_dim": "int",
        "sample_size": "int",
        "transformer_layers_per_block": "heads",
        "up_block_types": "names",
        "use_linear_projection": "bool",
    },
    "vae": {
        "block_out_channels": "list",
        "latent_channels": "int",
        "layers_per_block": "int",
        "norm_num_groups": "int",
        "scaling_factor": "float",
    },
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, kinds in KINDS.items() for name in kinds])
def test_a_value_of_the_wrong_kind_is_refused_by_name(part: str, name: str) -> None:
    for value in WRONG_KINDS[KINDS[part][name]]:
        with pytest.raises(ValueError, match=f"^{name}[=: ]"):
            READERS[part](DUMPS[part] | {name: value})


@pytest.mark.parametrize(("part", "name"), [case for case in CASES if case[1] not in KINDS[case[0]]])
def test_no_value_of_a_field_that_is_not_read_raises_anything_but_a_refusal(part: str, name: str) -> None:
    for value in ("x", 7, -1, 1.5, True, False, [], [1], ["x"], [None], {}, {"x": 1}, [[1]]):
        config = _read(part, DUMPS[part] | {name: value})
        if isinstance(config, str):
            assert config.startswith(f"{name}=")
        else:
            assert config == READERS[part](DUMPS[part])
            harmless = value is False or value == DUMPS[part][name] or (part, name) in INERT
            assert harmless, f"{name}={value!r} is ignored"


def test_booleans_are_not_numbers() -> None:
    for name, value in {
        "downsample_padding": True,
        "conv_in_kernel": True,
        "freq_shift": False,
        "dropout": False,
        "flip_sin_to_cos": 1,
        "center_input_sample": 0,
    }.items():
        with pytest.raises(ValueError, match=f"^{name}="):
            UNetConfig.from_json(DUMPS["unet"] | {name: value})
    with pytest.raises(ValueError, match=r"^use_quant_conv=1"):
        AutoencoderKLConfig.from_json(DUMPS["vae"] | {"use_quant_conv": 1})


@pytest.mark.parametrize("length", [1, 3])
def test_lists_of_the_wrong_length_are_refused_by_name(length: int) -> None:
    for name, item in {
        "attention_head_dim": 4,
        "down_block_types": "DownBlock2D",
        "up_block_types": "UpBlock2D",
        "transformer_layers_per_block": 1,
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            UNetConfig.from_json(DUMPS["unet"] | {name: [item] * length})
    for name, item in {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            AutoencoderKLConfig.from_json(DUMPS["vae"] | {name: [item] * length})
    # The levels of one field, the defaults of the others.
    with pytest.raises(ValueError, match=r"^down_block_types has 4 entries, block_out_channels has"):
        UNetConfig.from_json({"block_out_channels": [32] * length, "cross_attention_dim": 32})


def test_unknown_blocks_are_refused_by_name() -> None:
    for name in ("down_block_types", "up_block_types"):
        raw = DUMPS["unet"] | {name: ["SimpleCrossAttnDownBlock2D", DUMPS["unet"][name][1]]}
        with pytest.raises(ValueError, match=f"^{name}: 'SimpleCrossAttnDownBlock2D' is not supported"):
            UNetConfig.from_json(raw)
        swapped = "up_block_types" if name == "down_block_types" else "down_block_types"
        with pytest.raises(ValueError, match=f"^{name}: "):
            UNetConfig.from_json(DUMPS["unet"] | {name: DUMPS["unet"][swapped]})


def test_heads_must_divide_the_channels_where_there_is_attention() -> None:
    # diffusers rounds the width of a head down, so its projections are narrower than the level: another network.
    for heads in (3, [3, 4], [4, 3]):
        with pytest.raises(ValueError, match=r"^attention_head_dim: 3 heads do not divide"):
            UNetConfig.from_json(DUMPS["unet"] | {"attention_head_dim": heads})
    # A level without attention may say anything: 16 channels under 8 x 3 heads, never built.
    blocks = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    raw = DUMPS["unet"] | blocks | {"attention_head_dim": [24, 4]}
    assert _ours("unet", raw) == _theirs("unet", raw)
    # Attention on one way only counts all the same.
    raw["up_block_types"] = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    with pytest.raises(ValueError, match=r"^attention_head_dim: 24 heads do not divide 16 channels"):
        UNetConfig.from_json(raw)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_groups_must_divide_the_channels(part: str) -> None:
    with pytest.raises(ValueError, match=r"^norm_num_groups=12 does not divide 16 channels"):
        READERS[part](DUMPS[part] | {"norm_num_groups": 12})
