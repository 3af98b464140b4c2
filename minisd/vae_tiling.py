"""Decoding a large picture in overlapping tiles, blended where they meet: memory for one tile instead of the whole.

Each tile sees only itself, so the picture differs a little from one decoded at once; it is what diffusers'
`AutoencoderKL.enable_tiling` decodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisd.vae import AutoencoderKL

_OVERLAP = 0.25  # of a tile's side, as in diffusers


def decode_tiled(vae: AutoencoderKL, latents: Tensor, tile_size: int) -> Tensor:
    """Decode unscaled latents [B, 4, H / f, W / f] to pictures [B, 3, H, W], about [-1, 1], not clamped.

    Args:
        vae: the autoencoder.
        latents: divided by `scaling_factor` already, in the VAE's dtype.
        tile_size: side of a tile in pixels. What is no larger is decoded at once.
    """
    f = vae.pixels_per_latent
    side = tile_size // f
    if max(latents.shape[-2:]) <= side:
        return vae.decode(latents)
    step = int(side * (1 - _OVERLAP))
    overlap = int(tile_size * _OVERLAP)
    kept = tile_size - overlap
    done: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, latents.shape[2], step):
        row: list[Tensor] = []
        for place, left in enumerate(range(0, latents.shape[3], step)):
            tile = vae.decode(latents[:, :, top : top + side, left : left + side])
            if above:
                tile = _blend(above[place], tile, overlap, dim=2)
            if row:
                tile = _blend(row[-1], tile, overlap, dim=3)
            row.append(tile)
        done.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3))
        above = row
    return torch.cat(done, dim=2)


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """Fade from the end of one tile to the start of the next, along rows (dim 2) or columns (dim 3)."""
    n = min(before.shape[dim], after.shape[dim], overlap)
    share = torch.arange(n, dtype=after.dtype, device=after.device) / n
    share = share.view(-1, 1) if dim == 2 else share
    start = before.narrow(dim, before.shape[dim] - n, n) * (1 - share) + after.narrow(dim, 0, n) * share
    return torch.cat([start, after.narrow(dim, n, after.shape[dim] - n)], dim)
