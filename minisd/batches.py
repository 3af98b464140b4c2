"""The samples of a run, by position, and the micro-batches of one process.

All that is random about a sample, and all that is read for it, happens here, off the device's critical path: in worker
processes if there are any, else while the device works on the micro-batch before.

Shape letters: B samples, H W pixels, h w latents, S tokens, E prompt width, P width of the pooled prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minisd import draws
from minisd.buckets import Geometry
from minisd.data import Example, Survey
from minisd.latent_cache import View, caption_key, pooled_key
from minisd.plan import MicroBatches, TrainingPlan
from minisd.read_ahead import read_ahead
from minisd.tensor_cache import TensorCache


@dataclass(frozen=True)
class Batch:
    """Samples of a micro-batch. Either `moments` or `pixel_values` is there.

    Attributes:
        positions: in the run, B of them.
        indices: of the pictures.
        timesteps: diffusion times [B] int64.
        noise: diffusion noise [B, 4, h, w] float32, noise offset included.
        posterior_noise: what the VAE's posterior is sampled with [B, 4, h, w] float32.
        encoder_hidden_states: embeddings of the captions [B, S, E].
        text_embeds: of an XL model: pooled embeddings of the captions [B, P].
        time_ids: of an XL model: sizes and crops [B, 6] float32, as its UNet takes them.
        moments: mean and log-variance of the VAE's posterior [B, 2, 4, h, w].
        pixel_values: the pictures [B, 3, H, W] float32 in [-1, 1].
    """

    positions: list[int]
    indices: list[int]
    timesteps: Tensor
    noise: Tensor
    posterior_noise: Tensor
    encoder_hidden_states: Tensor
    text_embeds: Tensor | None
    time_ids: Tensor | None
    moments: Tensor | None
    pixel_values: Tensor | None

    def conditioning(self, dtype: torch.dtype) -> list[Tensor]:
        """What the UNet reads beside latents and timesteps, in the order of its arguments."""
        texts = [tensor.to(dtype) for tensor in (self.encoder_hidden_states, self.text_embeds) if tensor is not None]
        return texts if self.time_ids is None else [*texts, self.time_ids]

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; from pinned memory without waiting."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Put the tensors into page-locked memory; torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


@dataclass(frozen=True)
class TrainingSamples(Dataset[Batch]):
    """Position of the run -> its sample, as a batch of one.

    Args:
        examples: the pictures and captions, trigger word included.
        surveys: what is known of the pictures.
        geometries: of the pictures.
        plan: which picture a position shows.
        cache: of captions, and of latents.
        text_weights: the text encoder's identity in the cache.
        vae_weights: the VAE's.
        cache_latents: read moments from the cache; else pixels, to be encoded each time.
        center_crop, random_flip, caption_dropout, noise_offset, seed: options of the run.
        latent_channels, pixels_per_latent, num_train_timesteps, is_xl: of the model.
    """

    examples: Sequence[Example]
    surveys: Sequence[Survey]
    geometries: Sequence[Geometry]
    plan: TrainingPlan
    cache: TensorCache
    _: KW_ONLY
    text_weights: str
    vae_weights: str
    cache_latents: bool
    center_crop: bool
    random_flip: bool
    caption_dropout: float
    noise_offset: float
    seed: int
    latent_channels: int
    pixels_per_latent: int
    num_train_timesteps: int
    is_xl: bool

    def path_of(self, position: int) -> Path:
        """The picture that a position of the run shows."""
        return self.examples[self.plan.index(position)].path

    def caption_of(self, position: int) -> str | None:
        """The caption that a position of the run is trained with; None where it is left out."""
        return self.caption(self.plan.index(position), position)

    def caption(self, index: int, position: int) -> str | None:
        """The caption drawn for a position that shows the picture at `index`; None where it is left out."""
        captions = self.examples[index].captions
        if draws.caption_dropout(self.seed, position) < self.caption_dropout:
            return None
        return captions[draws.caption_choice(self.seed, position, len(captions)) if len(captions) > 1 else 0]

    def captions(self) -> list[str]:
        """Every caption of every picture."""
        return [caption for example in self.examples for caption in example.captions]

    def views(self) -> list[View]:
        """Every way a picture is shown in the run: as it is, and mirrored if it may be. None where pixels are read."""
        flips = () if not self.cache_latents else (False, True) if self.random_flip else (False,)
        return [self.view(index, flip) for index in range(len(self.examples)) for flip in flips]

    def view(self, index: int, flip: bool) -> View:
        """One way the picture at `index` is shown."""
        return View(self.examples[index].path, self.surveys[index].sha256, self.geometries[index], flip)

    def _time_ids(self, index: int, crop: tuple[float, float] | None, *, flip: bool) -> Tensor:
        """What XL is told of a picture: its size, the corner of the cut and its size (arXiv:2307.01952, 2.2).

        Returns:
            [1, 6] float32.
        """
        geometry = self.geometries[index]
        top, left = geometry.corner(crop)
        if flip:  # as if the picture had been mirrored before it was cropped
            left = geometry.resized[1] - geometry.size[1] - left
        return torch.tensor([[*self.surveys[index].size, top, left, *geometry.size]], dtype=torch.float32)

    def __getitem__(self, position: int) -> Batch:
        return self.sample(self.plan.index(position), position)

    def sample(self, index: int, position: int) -> Batch:
        """The picture at `index` with what is drawn for a position of the run, as a batch of one.

        Raises:
            DataError: the picture has changed or gone since it was checked.
            DiskError: the cache has.
        """
        seed = self.seed
        view = self.view(index, self.random_flip and draws.flip(seed, position))
        crop = None if self.center_crop else draws.crop(seed, position)
        moments = pixel_values = None
        if self.cache_latents:
            moments = self.cache[view.key(self.vae_weights)].unsqueeze(0)
        else:
            pixel_values = view.pixel_values(crop).unsqueeze(0)
        caption = self.caption(index, position)
        height, width = view.geometry.size
        shape = (self.latent_channels, height // self.pixels_per_latent, width // self.pixels_per_latent)
        noise = draws.noise(seed, position, shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.noise_offset(seed, position, self.latent_channels)
        return Batch(
            positions=[position],
            indices=[index],
            timesteps=torch.tensor([draws.timestep(seed, position, self.num_train_timesteps)]),
            noise=noise.unsqueeze(0),
            posterior_noise=draws.posterior_noise(seed, position, shape).unsqueeze(0),
            encoder_hidden_states=self.cache[caption_key(caption, self.text_weights)].unsqueeze(0),
            text_embeds=self.cache[pooled_key(caption, self.text_weights)].unsqueeze(0) if self.is_xl else None,
            time_ids=self._time_ids(index, crop, flip=view.flip) if self.is_xl else None,
            moments=moments,
            pixel_values=pixel_values,
        )


def collate(samples: Sequence[Batch]) -> Batch:
    """Put samples of one bucket together."""
    columns: dict[str, Any] = {}
    for field in fields(Batch):
        values: list[Any] = [getattr(sample, field.name) for sample in samples]
        if isinstance(values[0], Tensor):
            columns[field.name] = torch.cat(values)
        else:
            columns[field.name] = None if values[0] is None else [item for value in values for item in value]
    return Batch(**columns)


def training_batches(
    samples: TrainingSamples, micro_batches: MicroBatches, *, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The micro-batches of a process, in order, on the CPU.

    Raises:
        DataError: a picture has changed or gone since it was checked.
        DiskError: the cache has.
    """
    return read_ahead(samples, batches=micro_batches, collate=collate, num_workers=num_workers, pin_memory=pin_memory)
