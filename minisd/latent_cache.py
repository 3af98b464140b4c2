"""What the VAE and the text encoder say of a dataset, computed once, in shares, and kept on disk.

Of a picture the VAE's mean and log-variance are kept, not one sample of them: each time the picture comes up, other
latents are drawn from them. Everything is computed one picture and one caption at a time, so that it does not depend on
what else was in a batch, and is the same to the bit when it is computed on the fly.

Shape letters: H W the picture's sides in pixels, h w those of its latents, S tokens, E prompt width, P width of the
pooled prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minisd.buckets import Geometry
from minisd.data import sha256_of_picture
from minisd.distributed import Distributed, wait_for_all
from minisd.errors import DataError, NonFiniteError
from minisd.images import to_pixel_values
from minisd.picture_files import PictureError, load_image
from minisd.read_ahead import read_ahead
from minisd.tensor_cache import TensorCache
from minisd.text import TextEncoder
from minisd.vae import AutoencoderKL


@dataclass(frozen=True)
class View:
    """One way a picture is shown: the file, the SHA-256 of its content, what is cut out of it, whether mirrored."""

    path: Path
    sha256: str
    geometry: Geometry
    flip: bool

    def pixel_values(self, crop: tuple[float, float] | None = None) -> Tensor:
        """The pixels [3, H, W] float32 in [-1, 1]; `crop` as in `to_pixel_values`.

        Raises:
            DataError: the picture cannot be read, or is not the one that was checked.
        """
        try:
            image, sha256 = load_image(self.path), sha256_of_picture(self.path)
        except PictureError as error:
            raise DataError(str(error)) from error  # from a worker only what is made of one text arrives
        if sha256 != self.sha256:
            raise DataError(f"{str(self.path)!r}: has changed since it was checked. Start again.")
        return to_pixel_values(image, self.geometry, crop=crop, flip=self.flip)

    def key(self, weights: str) -> str:
        """What its moments are kept under. The path is not in it: the content is.

        Args:
            weights: what identifies the VAE, its dtype and its kind of device.
        """
        return _digest(f"latents/1/{weights}/{self.sha256}/{self.geometry.resized}/{self.geometry.size}/{self.flip}")


def caption_key(caption: str | None, weights: str) -> str:
    """What a caption's hidden states are kept under.

    Args:
        caption: None is one that is left out.
        weights: what identifies the text encoder, its dtype, its kind of device, and the number of chunks.
    """
    return _digest(f"text/2/{weights}/{caption!r}")


def pooled_key(caption: str | None, weights: str) -> str:
    """What a caption's pooled state is kept under, of an XL model."""
    return _digest(f"pooled/2/{weights}/{caption!r}")


def identity(weights_id: str, dtype: torch.dtype, device: torch.device) -> str:
    """What a network's outputs depend on beside its input: its weights, its precision, the kind of device."""
    return f"{weights_id}/{dtype}/{device.type}"


def encode_moments(vae: AutoencoderKL, pixel_values: Tensor) -> Tensor:
    """Encode pictures [B, 3, H, W], each alone: mean and log-variance, [B, 2, 4, h, w] in the VAE's dtype."""
    weight = vae.quant_conv.weight
    pixel_values = pixel_values.to(weight.device, weight.dtype)
    with torch.no_grad():
        posteriors = [vae.encode(single) for single in pixel_values.split(1)]
    return torch.cat([torch.stack([posterior.mean, posterior.logvar], dim=1) for posterior in posteriors])


def cache_latents(
    cache: TensorCache,
    views: Sequence[View],
    vae: AutoencoderKL,
    weights: str,
    dist: Distributed,
    *,
    num_workers: int,
    check_stop: Callable[[], None],
) -> None:
    """Compute the moments that are not in the cache yet, every process a share of them.

    Args:
        cache: shared by all processes.
        views: the same on every process.
        vae: on its device.
        weights: see `identity`.
        dist: this process among the others.
        num_workers: processes that read pictures ahead.
        check_stop: called after each picture; raises to break off. What was computed is kept.

    Raises:
        DataError: a picture cannot be read; names it.
        NonFiniteError: a picture's latents are not finite; names it.
        DiskError: the cache cannot be written.
    """
    missing = {key: view for view in views if (key := view.key(weights)) not in cache}
    share = dict(list(missing.items())[dist.rank :: dist.world_size])
    wait_for_all(dist)  # all have looked before one writes

    def moments_of(pixel_values: Tensor) -> Tensor:
        return encode_moments(vae, pixel_values.unsqueeze(0))[0]  # [2, 4, h, w]

    pixels = read_ahead(_Pixels(list(share.values())), batches=None, collate=None, num_workers=num_workers)
    shown = dist.is_main and bool(share)
    bar = tqdm(pixels, desc="encode pictures", unit="picture", total=len(share), disable=not shown)
    try:
        for (key, view), pixel_values in zip(share.items(), bar, strict=True):
            moments = moments_of(pixel_values)
            if not torch.isfinite(moments).all():
                raise NonFiniteError(
                    f"{str(view.path)!r}: its latents are not finite. Use --mixed-precision bf16 or no for this VAE, "
                    "or take the picture out."
                )
            cache.add(key, moments)
            check_stop()
    finally:
        cache.flush()
    wait_for_all(dist)
    cache.refresh()


def cache_captions(
    cache: TensorCache,
    captions: Sequence[str],
    text_encoder: TextEncoder,
    weights: str,
    dist: Distributed,
    *,
    chunks: int,
) -> None:
    """Compute the embeddings of the captions that are not in the cache yet, every process a share of them.

    Each is kept as hidden states [S, E] and, of an XL model, a pooled state [P]. The caption that is left out is always
    among them.

    Args:
        cache: shared by all processes.
        captions: the same on every process.
        text_encoder: on its device.
        weights: see `caption_key`.
        dist: this process among the others.
        chunks: to which every caption is padded or cut, so that any two fit into one batch.

    Raises:
        NonFiniteError: an embedding is not finite; names the caption.
        DiskError: the cache cannot be written.
    """
    wanted: dict[str | None, None] = dict.fromkeys([None, *captions])
    missing = [caption for caption in wanted if caption_key(caption, weights) not in cache]
    share = missing[dist.rank :: dist.world_size]
    wait_for_all(dist)
    try:
        for caption in tqdm(share, desc="encode captions", unit="caption", disable=not (dist.is_main and missing)):
            embeddings = text_encoder([caption], chunks=chunks)
            tensors = [tensor for tensor in (embeddings.hidden_states, embeddings.pooled) if tensor is not None]
            if not all(torch.isfinite(tensor).all() for tensor in tensors):
                raise NonFiniteError(
                    f"the embedding of {(caption or '')[:80]!r} is not finite. Use --mixed-precision bf16 or no."
                )
            if embeddings.pooled is not None:
                cache.add(pooled_key(caption, weights), embeddings.pooled[0])
            cache.add(caption_key(caption, weights), embeddings.hidden_states[0])  # last: it says that both are there
    finally:
        cache.flush()
    wait_for_all(dist)
    cache.refresh()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Pixels(Dataset[Tensor]):
    """The pictures to encode, for worker processes to decode."""

    views: Sequence[View]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Tensor:
        return self.views[index].pixel_values()
