"""The autoencoder between pictures and latents (AutoencoderKL; "High-resolution image synthesis with latent diffusion
models", arXiv:2112.10752, 3.1), with the attribute names of the published weights.

Shape letters: B batch, C channels, H height, W width of the picture; f = 2 ** (levels - 1) pixels per latent, 8 in the
published models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.layers import Downsample2D, ResnetBlock2D, Upsample2D, multi_head_attention
from minisd.model_config import check_counts, check_groups, known_fields, refuse_others

# Not in any config: the published VAEs were trained with it, where the UNet has 1e-5.
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """The fields of vae/config.json that vary between Stable Diffusion models, under the Hub's names.

    Attributes:
        block_out_channels: channels of each level, from the pictures to the latents.
        layers_per_block: residual blocks of a level; the decoder has one more.
        latent_channels: of the latents.
        norm_num_groups: of every GroupNorm.
        scaling_factor: what latents are multiplied by to have a standard deviation of about 1.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # absent from the files of SD1.x and SD2.x

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read the Hub's vae/config.json. Raises ValueError naming a field that is not supported."""
        config = cls(**known_fields(raw, cls))
        levels = len(config.block_out_channels)
        fixed = {
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        }
        # The size a model was trained at constrains nothing; force_upcast is the XL pipeline's affair.
        refuse_others(raw, cls, fixed, inert={"sample_size", "force_upcast"})
        check_groups(config.block_out_channels, config.norm_num_groups)
        check_counts({"layers_per_block": config.layers_per_block})
        return config


@dataclass(frozen=True)
class DiagonalGaussian:
    """What the encoder says of a picture: a normal distribution for each latent.

    Args:
        mean: [B, 4, H / f, W / f].
        logvar: logarithm of the variance, same shape, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw latents of the mean's shape with standard normal noise of that shape.

        arXiv:1312.6114, 2.4: the reparameterisation trick.
        """
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class VAEAttention(nn.Module):
    """Self-attention over all positions with one head as wide as the feature map, plus the input.

    [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # "to_out.0", because the checkpoint

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, N, C]
        hidden = self.to_out(multi_head_attention(self.to_q(hidden), self.to_k(hidden), self.to_v(hidden), heads=1))
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[-2:])


class VAEMidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, None, groups, NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEDownBlock(nn.Module):
    """Residual blocks, then half the resolution (not at the last level).

    [B, C_in, H, W] -> [B, C_out, H / 2, W / 2].
    """

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, None, groups, NORM_EPS) for width in widths)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, symmetric=False)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class VAEUpBlock(nn.Module):
    """Residual blocks, then twice the resolution (not at the last level).

    [B, C_in, H, W] -> [B, C_out, 2 H, 2 W].
    """

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, None, groups, NORM_EPS) for width in widths)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] -> [B, 2 * latent_channels, H / f, W / f]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAEDownBlock(before, after, config.layers_per_block, groups, downsample=level < len(channels) - 1)
            for level, (before, after) in enumerate(zip((channels[0], *channels[:-1]), channels, strict=True))
        )
        self.mid_block = VAEMidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, H / f, W / f] -> pictures [B, 3, H, W]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = VAEMidBlock(channels[0], groups)
        # One residual block more than the encoder's levels have, because the checkpoint.
        self.up_blocks = nn.ModuleList(
            VAEUpBlock(before, after, config.layers_per_block + 1, groups, upsample=level < len(channels) - 1)
            for level, (before, after) in enumerate(zip((channels[0], *channels[:-1]), channels, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two 1 x 1 convolutions between. The sole owner of `scaling_factor`."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def pixels_per_latent(self) -> int:
        """f: the side of the square of pixels that one latent stands for."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, pixel_values: Tensor) -> DiagonalGaussian:
        """Encode pictures [B, 3, H, W] in [-1, 1], H and W multiples of f, to a distribution of unscaled latents."""
        mean, logvar = self.quant_conv(self.encoder(pixel_values)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B, 4, H / f, W / f] to pictures [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def scale_latents(vae: AutoencoderKL, posterior: DiagonalGaussian, noise: Tensor) -> Tensor:
    """Sample what the UNet works on: latents [B, 4, H / f, W / f] with a standard deviation of about 1.

    arXiv:2112.10752, appendix G.

    Args:
        vae: only its `scaling_factor` is read.
        posterior: what the encoder says of the pictures.
        noise: standard normal, [B, 4, H / f, W / f].
    """
    return posterior.sample(noise) * vae.config.scaling_factor


@torch.no_grad()
def latents_to_images(vae: AutoencoderKL, latents: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Decode the UNet's latents [B, 4, H / f, W / f] to pictures [B, 3, H, W] float32 in [0, 1].

    Args:
        vae: of any dtype.
        latents: scaled, of any dtype.
        decode: another way to do what `vae.decode` does.
    """
    images = (decode or vae.decode)(latents.to(vae.post_quant_conv.weight.dtype) / vae.config.scaling_factor)
    return (images.float() / 2 + 0.5).clamp(0, 1)
