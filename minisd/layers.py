"""Blocks shared by the UNet and the VAE.

Attribute names are the keys of the published checkpoints, so a state dict loads without a table of names.

Shape letters: B batch, C channels, H height, W width, N = H * W tokens, S context tokens, E width, h heads, d head
width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Embed diffusion times as sinusoids, cosines first ("Attention is all you need", arXiv:1706.03762, 3.5).

    Args:
        timesteps: [B], int or float; may be fractional (Euler with Karras sigmas visits such times).
        dim: even width of the embedding.

    Returns:
        [B, dim] float32, whatever the network's dtype: in bfloat16 angles of t = 999 are wrong by up to half a turn.
    """
    half = dim // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * exponents.exp()  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn the sinusoids into the signal the residual blocks receive.

    [B, in_channels] -> [B, time_embed_dim].
    """

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    """Two convolutions around the time signal, plus a shortcut: [B, C_in, H, W] -> [B, C_out, H, W].

    Args:
        in_channels: C_in.
        out_channels: C_out.
        temb_channels: width of the time embedding [B, temb_channels]; None in the VAE, which knows no time.
        groups: GroupNorm groups.
        eps: GroupNorm epsilon: 1e-5 in the UNet, 1e-6 in the VAE. No checkpoint key records it.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # Exists only where the widths differ, because the checkpoint has it only there.
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in each head, no mask (arXiv:1706.03762, eq. 1).

    Args:
        q: queries [B, N, h * d].
        k: keys [B, S, h * d].
        v: values [B, S, h * d].
        heads: h.

    Returns:
        [B, N, h * d].
    """
    # [B, N, h * d] -> [B, h, N, d]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)  # [B, h, N, d] -> [B, N, h * d]


class Attention(nn.Module):
    """Attention of the UNet's tokens over themselves or over the prompt; LoRA goes into its four projections.

    Tokens [B, N, query_dim] and context [B, S, context_dim] -> [B, N, query_dim].

    Args:
        query_dim: width of the tokens, a multiple of `heads`.
        context_dim: width of what is attended to.
        heads: h.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))  # "to_out.0", because the checkpoint

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out = multi_head_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(out)


class Downsample2D(nn.Module):
    """Halve the resolution by a strided convolution: [B, C, H, W] -> [B, C, H / 2, W / 2].

    Args:
        channels: C.
        symmetric: pad on all sides, as the UNet does, where odd sizes round up. The VAE's encoder pads on the right
            and below only, and they round down: the published weights were trained with that shift.
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbours and a convolution: [B, C, H, W] -> [B, C, 2 H, 2 W].

    Or to the size given, (height, width).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
