"""Models of Stable Diffusion 1.5's architecture at several sizes, with random weights: no step is faster for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minisd.training import Precision
from minisd.unet import UNet2DConditionModel
from minisd.unet_config import UNetConfig

Weights = Mapping[str, Tensor]
Layout = Literal["shipped", "contiguous", "channels-last"]

UNET: dict[str, Any] = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Size:
    """The widths of a model of Stable Diffusion 1.5's architecture, and the side of its latents."""

    latent: int
    unet: tuple[int, ...]
    vae: tuple[int, ...]
    prompt: int
    text_layers: int
    heads: int = 8
    groups: int = 32

    @property
    def unet_config(self) -> dict[str, Any]:
        return {
            **UNET,
            "block_out_channels": list(self.unet),
            "cross_attention_dim": self.prompt,
            "attention_head_dim": self.heads,  # the number of them, in spite of its name
            "norm_num_groups": self.groups,
        }


# "small" keeps SD 1.5's proportions: heads as wide as there, not as many, and encoders that take the same share of a
# step.
SIZES = {
    "sd15": Size(64, (320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12),
    "small": Size(32, (64, 128, 256, 256), (24, 56, 112, 112), 192, 2, heads=2, groups=8),
    "tiny": Size(16, (16, 16, 32, 32), (8, 8, 8, 8), 16, 1, heads=2, groups=8),
}


@dataclass(frozen=True)
class Setting:
    """What all contestants of a comparison are given alike."""

    size: Size
    device: torch.device
    precision: Literal["no", "bf16", "fp16"]
    batch_size: int
    compile: bool = False
    layout: Layout = "shipped"

    @property
    def dtype(self) -> torch.dtype:
        return Precision(self.precision, self.device.type).dtype

    def to_layout(self, unet: nn.Module, *, shipped: bool) -> None:
        """Reorder the weights. Args: shipped: whether the program has the channels innermost of its own accord."""
        if self.layout == "channels-last" or (self.layout == "shipped" and shipped):
            unet.to(memory_format=torch.channels_last)


def random_weights(size: Size, device: torch.device, seed: int = 0) -> Weights:
    """The UNet's weights in float32: normal with unit gain, norms that do nothing yet, no biases."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for key, value in unet_on_meta(size).state_dict().items():
        if value.dim() > 1:
            gain = 1 / math.sqrt(value[0].numel())
            weights[key] = torch.randn(value.shape, generator=generator, device=device) * gain
        else:
            weights[key] = torch.full(value.shape, float(key.endswith("weight")), device=device)
    return weights


def unet_on_meta(size: Size) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(UNetConfig.from_json(size.unet_config))


def fill(unet: nn.Module, weights: Weights, setting: Setting) -> None:
    state = {key: value.to(setting.device, setting.dtype, copy=True) for key, value in weights.items()}
    unet.load_state_dict(state, assign=True)
    unet.requires_grad_(False).train()


def encoders(size: Size) -> tuple[diffusers.AutoencoderKL, CLIPTextModel]:
    vae = diffusers.AutoencoderKL(
        **VAE, block_out_channels=size.vae, norm_num_groups=size.groups, sample_size=size.latent * 8
    )
    config = CLIPTextConfig(
        hidden_size=size.prompt,
        intermediate_size=4 * size.prompt,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(1, size.prompt // 64),
        projection_dim=size.prompt,
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=49_407,
    )
    return vae, CLIPTextModel(config)
