"""The published models at their full size, on the meta device: the same keys and shapes as diffusers builds."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel as ReferenceUNet
from torch import nn

from minisd.unet import UNet2DConditionModel, UNetConfig
from minisd.vae import AutoencoderKL, AutoencoderKLConfig
from tests import hub_configs
from tests.hub_configs import Config


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [
        pytest.param(hub_configs.UNET_SD15, 859_520_964, id="sd15"),
        pytest.param(hub_configs.UNET_SD15_RESAVED, 859_520_964, id="sd15-resaved"),
        pytest.param(hub_configs.UNET_SD21_BASE, 865_910_724, id="sd21-base"),
        pytest.param(hub_configs.UNET_SD21, 865_910_724, id="sd21"),
    ],
)
def test_unet_has_the_keys_and_shapes_of_diffusers(raw: Config, parameters: int) -> None:
    with torch.device("meta"):
        ours, reference = UNet2DConditionModel(UNetConfig.from_json(raw)), ReferenceUNet.from_config(raw)
    assert _shapes(ours) == _shapes(reference)
    # Optimizers, and old LoRA files, count parameters; a buffer or a shared tensor would not show among the keys.
    assert [name for name, _ in ours.named_buffers()] == []
    assert len(ours.state_dict()) == len(list(ours.parameters())) == 686
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


def _heads(network: nn.Module) -> dict[str, int]:
    return {name: module.heads for name, module in network.named_modules() if hasattr(module, "to_q")}


def _norm_eps(network: nn.Module) -> dict[str, float]:
    norms = (nn.GroupNorm, nn.LayerNorm)
    return {name: module.eps for name, module in network.named_modules() if isinstance(module, norms)}
