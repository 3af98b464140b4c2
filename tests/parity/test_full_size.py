"""The published models at full size, on the meta device: keys and shapes as diffusers and transformers build them."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minisd.clip import clip_on_meta
from minisd.families import Family, meta_networks
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from tests import hub_configs
from tests.hub_configs import Config


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("raw", "tensors", "parameters"),
    [
        pytest.param(hub_configs.UNET_SD15, 686, 859_520_964, id="sd15"),
        pytest.param(hub_configs.UNET_SD15_RESAVED, 686, 859_520_964, id="sd15-resaved"),
        pytest.param(hub_configs.UNET_SD21_BASE, 686, 865_910_724, id="sd21-base"),
        pytest.param(hub_configs.UNET_SD21, 686, 865_910_724, id="sd21"),
        pytest.param(hub_configs.UNET_SDXL, 1680, 2_567_463_684, id="sdxl"),
    ],
)
def test_unet_has_the_keys_and_shapes_of_diffusers(raw: Config, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        ours, reference = UNet2DConditionModel(UNetConfig.from_json(raw)), ReferenceUNet.from_config(raw)
    assert _shapes(ours) == _shapes(reference)
    # Optimizers, and old LoRA files, count parameters; a buffer or a shared tensor would not show among the keys.
    assert [name for name, _ in ours.named_buffers()] == []
    assert len(ours.state_dict()) == len(list(ours.parameters())) == tensors
    assert _size(ours) == parameters
    # What no key records.
    assert ours.config.norm_eps == reference.config.norm_eps
    assert ours.config.sample_size == reference.config.sample_size
    assert _heads(ours) == {
        name: module.heads for name, module in reference.named_modules() if hasattr(module, "heads")
    }
    assert _norm_eps(ours) == _norm_eps(reference)


@pytest.mark.parametrize(
    ("raw", "scaling_factor"),
    [
        pytest.param(hub_configs.VAE_SD15, 0.18215, id="sd15"),
        pytest.param(hub_configs.VAE_SD21, 0.18215, id="sd21"),
        pytest.param(hub_configs.VAE_SDXL, 0.13025, id="sdxl"),
    ],
)
def test_vae_has_the_keys_and_shapes_of_diffusers(raw: Config, scaling_factor: float) -> None:
    with torch.device("meta"):
        ours, reference = AutoencoderKL(AutoencoderKLConfig.from_json(raw)), ReferenceVAE.from_config(raw)
    assert _shapes(ours) == _shapes(reference)
    assert [name for name, _ in ours.named_buffers()] == []
    assert len(ours.state_dict()) == len(list(ours.parameters())) == 248
    parts = (ours.encoder, ours.decoder, ours.quant_conv, ours.post_quant_conv)
    assert [_size(part) for part in parts] == [34_163_592, 49_490_179, 72, 20]
    assert _size(ours) == 83_653_863
    assert ours.config.scaling_factor == reference.config.scaling_factor == scaling_factor
    assert ours.pixels_per_latent == 8
    assert _norm_eps(ours) == _norm_eps(reference)


@pytest.mark.parametrize(
    ("raw", "projection", "tensors", "parameters"),
    [
        pytest.param(hub_configs.TEXT_SD15, False, 196, 123_060_480, id="sd15"),
        pytest.param(hub_configs.TEXT_SD21, False, 372, 340_387_840, id="sd21"),
        pytest.param(hub_configs.TEXT_SDXL_2, True, 517, 694_659_840, id="sdxl-2"),
    ],
)
def test_text_encoder_has_the_keys_and_shapes_of_transformers(
    raw: Config, projection: bool, tensors: int, parameters: int
) -> None:
    with torch.device("meta"):
        ours = clip_on_meta(raw, projection=projection)
        reference = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**raw))
    assert _shapes(ours) == _shapes(reference)
    assert len(ours.state_dict()) == tensors
    assert _size(ours) == parameters


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("sd1", {"unet": 859_520_964, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "text_encoder": 340_387_840}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_networks_of_a_family_take_no_memory(family: Family, parameters: dict[str, int]) -> None:
    networks = meta_networks(family)
    assert {part: _size(network) for part, network in networks.items()} == parameters
    assert all(parameter.is_meta for network in networks.values() for parameter in network.parameters())


def _heads(network: nn.Module) -> dict[str, int]:
    return {name: module.heads for name, module in network.named_modules() if hasattr(module, "to_q")}


def _norm_eps(network: nn.Module) -> dict[str, float]:
    norms = (nn.GroupNorm, nn.LayerNorm)
    return {name: module.eps for name, module in network.named_modules() if isinstance(module, norms)}
