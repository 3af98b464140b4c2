"""The denoiser: a UNet whose blocks look at the prompt (UNet2DConditionModel; arXiv:2112.10752, 3.2 and 3.3), with the
attribute names of the published weights. Stable Diffusion XL's (arXiv:2307.01952) is one, too: deeper transformers, and
a second signal beside the time.

Shape letters: B batch, C channels, H height, W width of the latents, N = H * W tokens, S prompt tokens, E prompt width,
P width of the pooled prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.layers import Attention, Downsample2D, ResnetBlock2D, TimestepEmbedding, Upsample2D, timestep_embedding
from minisd.unet_config import UNetConfig


class GEGLU(nn.Module):
    """value * gelu(gate), both halves of one projection (arXiv:2002.05202, 2): the first half is the value.

    [B, N, dim] -> [B, N, inner_dim]. gelu(x) = x Phi(x), exactly, not by tanh.
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer, four times as wide inside: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The Identity stands where training had a Dropout, so that the last layer is "net.2" as in the checkpoint.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention over the prompt, feed-forward; each normalised before and added after.

    Tokens [B, N, dim] and prompt [B, S, context_dim] -> [B, N, dim].
    """

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
    """A transformer over the N = H * W positions of a feature map, plus the input.

    [B, C, H, W] and prompt [B, S, E] -> [B, C, H, W].

    Args:
        config: of the UNet.
        channels: C.
        heads: of every attention.
        depth: number of blocks.
    """

    def __init__(self, config: UNetConfig, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)  # not norm_eps: as published
        # SD1.x projects with 1 x 1 convolutions, later ones with linear layers: the same numbers in another shape.
        self.linear = config.use_linear_projection
        self.proj_in: nn.Module = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, config.cross_attention_dim, heads) for _ in range(depth)
        )
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
    config: UNetConfig, in_channels: Sequence[int], out_channels: int, transformer: tuple[int, int] | None
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The layers of a level: residual blocks, and a transformer of (heads, depth) behind each unless it is None."""
    temb_channels = 4 * config.block_out_channels[0]
    resnets = nn.ModuleList(
        ResnetBlock2D(width, out_channels, temb_channels, config.norm_num_groups, config.norm_eps)
        for width in in_channels
    )
    attentions = nn.ModuleList()
    if transformer is not None:
        attentions.extend(Transformer2DModel(config, out_channels, *transformer) for _ in in_channels)
    return resnets, attentions


class UNetDownBlock(nn.Module):
    """One level on the way down: layers, then half the resolution (not at the last level).

    Args:
        config: of the UNet.
        in_channels: channels that each residual block takes.
        out_channels: channels that each of them gives.
        transformer: (heads, depth) of the one behind each residual block; None for a level without attention.
        downsample: whether half the resolution follows.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: Sequence[int],
        out_channels: int,
        transformer: tuple[int, int] | None,
        *,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets_and_attentions(config, in_channels, out_channels, transformer)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, symmetric=True)] if downsample else [])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """Return what comes out of each layer, for the way up; the last one also goes on.

        From [B, C_in, H, W], the time [B, 4 * block_out_channels[0]] and the prompt [B, S, E]: [B, C_out, H, W] of each
        layer, and of the downsampler [B, C_out, H / 2, W / 2], odd sizes rounded up.
        """
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
    """One level on the way up: layers that each take a skip in, then the next resolution (not at the last level).

    Built like UNetDownBlock; `in_channels` are those of the hidden state and of the skip together.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: Sequence[int],
        out_channels: int,
        transformer: tuple[int, int] | None,
        *,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets_and_attentions(config, in_channels, out_channels, transformer)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        """Take as many skips off the end of the list as there are layers.

        From [B, C, H, W] to [B, C_out, H, W], or to the height and width of the next skip.
        """
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            # The next skip's size, not twice this one: an odd side was rounded up on the way down.
            x = upsample(x, (skips[-1].shape[-2], skips[-1].shape[-1]))
        return x


class UNetMidBlock2DCrossAttn(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, temb_channels = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, temb_channels, config.norm_num_groups, config.norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList([Transformer2DModel(config, channels, config.heads[-1], config.depths[-1])])

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
        if config.is_xl:
            self.add_embedding = TimestepEmbedding(config.pooled_width + 6 * config.size_width, 4 * channels[0])

        transformers = list(zip(config.heads, config.depths, strict=True))
        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        for level, width in enumerate(channels):
            transformer = transformers[level] if config.down_block_types[level] == "CrossAttnDownBlock2D" else None
            before = [skip_channels[-1]] + [width] * (config.layers_per_block - 1)
            is_last = level == levels - 1
            self.down_blocks.append(UNetDownBlock(config, before, width, transformer, downsample=not is_last))
            skip_channels += [width] * (config.layers_per_block + (not is_last))

        self.mid_block = UNetMidBlock2DCrossAttn(config)

        self.up_blocks = nn.ModuleList()
        hidden_channels = channels[-1]
        for level, width in enumerate(reversed(channels)):
            transformer = transformers[~level] if config.up_block_types[level] == "CrossAttnUpBlock2D" else None
            before = []
            for _ in range(config.layers_per_block + 1):
                before.append(hidden_channels + skip_channels.pop())
                hidden_channels = width
            self.up_blocks.append(UNetUpBlock(config, before, width, transformer, upsample=level < levels - 1))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the denoiser.

        Args:
            sample: noisy latents [B, 4, H, W], any H and W.
            timesteps: [B], int or float, in [0, 1000).
            encoder_hidden_states: prompt embeddings [B, S, E].
            text_embeds: XL only: pooled prompt embeddings [B, P].
            time_ids: XL only: sizes in pixels [B, 6]: (height, width) of the original picture, (top, left) of the part
                cut out of it once it was resized, (height, width) of that part.

        Returns:
            [B, 4, H, W]: noise, velocity or x_0, as the model's scheduler config says.
        """
        temb = timestep_embedding(timesteps, self.config.block_out_channels[0]).to(sample.dtype)
        temb = self.time_embedding(temb)
        if self.config.is_xl:
            assert text_embeds is not None, "an XL model needs text_embeds"
            assert time_ids is not None, "an XL model needs time_ids"
            temb = temb + self._size_and_text_embedding(text_embeds, time_ids).to(temb.dtype)

        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, encoder_hidden_states)
        x = self.mid_block(skips[-1], temb, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, skips, temb, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _size_and_text_embedding(self, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        """What XL adds to the time signal (arXiv:2307.01952, 2.2): [B, P], [B, 6] -> [B, 4 * C]."""
        sizes = timestep_embedding(time_ids.flatten(), self.config.size_width)  # [B * 6, width]
        sizes = sizes.unflatten(0, time_ids.shape).flatten(1)  # [B, 6 * width]
        return self.add_embedding(torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=-1))
