"""The denoiser: a UNet whose blocks look at the prompt (UNet2DConditionModel; arXiv:2112.10752, 3.2 and 3.3), with the
attribute names of the published weights.

Shape letters: B batch, C channels, H height, W width of the latents, N = H * W tokens, S prompt tokens, E prompt width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.layers import Attention, Downsample2D, ResnetBlock2D, TimestepEmbedding, Upsample2D, timestep_embedding
from minisd.model_config import check_groups, known_fields, refuse_others


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of unet/config.json that vary between Stable Diffusion models.

    `attention_head_dim` is the NUMBER of heads, one for all levels or one each: the Hub's name, kept by 40,000 files.
    """

    cross_attention_dim: int
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> UNetConfig:
        """Read the Hub's unet/config.json. Raises ValueError naming a field that is not supported.

        SDXL's additions belong here and in __init__: `transformer_layers_per_block` (depth of each level's
        transformers) and `addition_embed_type: "text_time"` (a second embedding added to the time signal).
        """
        config = cls(**known_fields(raw, cls))
        depth, levels = raw.get("transformer_layers_per_block", 1), len(config.block_out_channels)
        fixed = {
            "act_fn": "silu",
            "addition_embed_type_num_heads": 64,
            "attention_type": "default",
            "center_input_sample": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "downsample_padding": 1,
            "dropout": 0.0,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_out_scale_factor": 1.0,
            "resnet_time_scale_shift": "default",
            "time_embedding_type": "positional",
            "transformer_layers_per_block": (1,) * levels if isinstance(depth, list) else 1,
        }
        # diffusers reads upcast_attention only where it computes the softmax by hand, which it no longer does.
        refuse_others(raw, cls, fixed, inert={"upcast_attention"})
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError where the fields contradict each other or name an unknown block."""
        levels = len(self.block_out_channels)
        blocks = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        for name, values in {**blocks, "attention_head_dim": self.heads}.items():
            if len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries, block_out_channels has {levels}")
        for name, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            for block in blocks[name]:
                if block not in (kind, f"CrossAttn{kind}"):
                    raise ValueError(f"{name}: {block!r} is not supported (only {kind} and CrossAttn{kind} are)")
        check_groups(self.block_out_channels, self.norm_num_groups)
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.heads, strict=True)):
            # The middle attends with the last level's heads; a level without attention may name any number.
            attends = level == levels - 1 or "CrossAttn" in self.down_block_types[level] + self.up_block_types[~level]
            if attends and width % heads:
                raise ValueError(f"attention_head_dim: {heads} heads do not divide {width} channels")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads at each level."""
        if isinstance(self.attention_head_dim, tuple):
            return self.attention_head_dim
        return (self.attention_head_dim,) * len(self.block_out_channels)


class GEGLU(nn.Module):
    """value * gelu(gate), both halves of one projection (arXiv:2002.05202, 2): the first half is the value."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The Identity stands where training had a Dropout, so that the last layer is "net.2" as in the checkpoint.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention over the prompt, feed-forward; each normalised before and added after."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """A transformer over the N = H * W positions of a feature map, plus the input."""

    def __init__(self, config: UNetConfig, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # not norm_eps: as published
        # SD1.x projects with 1 x 1 convolutions, SD2.x with linear layers: the same numbers in another shape.
        self.linear = config.use_linear_projection
        self.proj_in: nn.Module = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, config.cross_attention_dim, heads)])
        self.proj_out: nn.Module = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        hidden = self.norm(x)
        if not self.linear:
            hidden = self.proj_in(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, N, C]
        if self.linear:
            hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        if self.linear:
            hidden = self.proj_out(hidden)
        hidden = hidden.transpose(1, 2).unflatten(2, x.shape[-2:])  # [B, N, C] -> [B, C, H, W]
        if not self.linear:
            hidden = self.proj_out(hidden)
        return x + hidden


def _resnets_and_attentions(
    config: UNetConfig, in_channels: Sequence[int], out_channels: int, heads: int | None
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The layers of a level: residual blocks, and a transformer behind each unless heads is None."""
    temb_channels = 4 * config.block_out_channels[0]
    resnets = nn.ModuleList(
        ResnetBlock2D(width, out_channels, temb_channels, config.norm_num_groups, config.norm_eps)
        for width in in_channels
    )
    depth = 0 if heads is None else len(in_channels)
    return resnets, nn.ModuleList(Transformer2DModel(config, out_channels, heads or 1) for _ in range(depth))


class UNetDownBlock(nn.Module):
    """One level on the way down: layers, then half the resolution (not at the last level)."""

    def __init__(
        self, config: UNetConfig, in_channels: Sequence[int], out_channels: int, heads: int | None, *, downsample: bool
    ) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets_and_attentions(config, in_channels, out_channels, heads)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, symmetric=True)] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """Return what comes out of each layer, for the way up; the last one also goes on."""
        outputs = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[index](x, context)
            outputs.append(x)
        for downsample in self.downsamplers:
            outputs.append(downsample(outputs[-1]))
        return outputs


class UNetUpBlock(nn.Module):
    """One level on the way up: layers that each take a skip in, then the next resolution (not at the last level)."""

    def __init__(
        self, config: UNetConfig, in_channels: Sequence[int], out_channels: int, heads: int | None, *, upsample: bool
    ) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets_and_attentions(config, in_channels, out_channels, heads)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        """Take as many skips off the end of the list as there are layers."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            # The next skip's size, not twice this one: an odd side was rounded up on the way down.
            x = upsample(x, (skips[-1].shape[-2], skips[-1].shape[-1]))
        return x


class UNetMidBlock2DCrossAttn(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, temb_channels = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, temb_channels, config.norm_num_groups, config.norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList([Transformer2DModel(config, channels, config.heads[-1])])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, temb), context)
        return self.resnets[1](x, temb)


class UNet2DConditionModel(nn.Module):
    """Predict the noise (or the velocity) in noisy latents, given the time and the prompt."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0])

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        for level, width in enumerate(channels):
            heads = config.heads[level] if config.down_block_types[level] == "CrossAttnDownBlock2D" else None
            before = [skip_channels[-1]] + [width] * (config.layers_per_block - 1)
            is_last = level == levels - 1
            self.down_blocks.append(UNetDownBlock(config, before, width, heads, downsample=not is_last))
            skip_channels += [width] * (config.layers_per_block + (not is_last))

        self.mid_block = UNetMidBlock2DCrossAttn(config)

        self.up_blocks = nn.ModuleList()
        hidden_channels = channels[-1]
        for level, width in enumerate(reversed(channels)):
            heads = config.heads[::-1][level] if config.up_block_types[level] == "CrossAttnUpBlock2D" else None
            before = []
            for _ in range(config.layers_per_block + 1):
                before.append(hidden_channels + skip_channels.pop())
                hidden_channels = width
            self.up_blocks.append(UNetUpBlock(config, before, width, heads, upsample=level < levels - 1))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Run the denoiser.

        Args:
            sample: noisy latents [B, 4, H, W], any H and W.
            timesteps: [B], int or float, in [0, 1000).
            encoder_hidden_states: prompt embeddings [B, S, E].

        Returns:
            [B, 4, H, W]: noise, velocity or x_0, as the model's scheduler config says.
        """
        temb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(sample.dtype)
        temb = self.time_embedding(temb)

        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, encoder_hidden_states)
        x = self.mid_block(skips[-1], temb, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, skips, temb, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
