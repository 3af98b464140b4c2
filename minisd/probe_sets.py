"""What the validation loss is measured on: a few samples of the training pictures and as many of held-out ones.

To reimplement: each set has PICTURES places; place k shows picture order[k mod n] of its n pictures, with
order = permutation(seed, -1, n) (draws.py), and is noised at BANDS times, one in each of BANDS equal ranges of the T
diffusion times: [floor(b T / BANDS), floor((b + 1) T / BANDS)). Band b of place k draws its noise, posterior noise and
caption for position -1 - (BANDS k + b), which no sample of a run has; its time is the start of the range plus
timestep(seed, position, length of the range). So both sets have the same times and, where their sizes are equal, the
same noise. Nothing is mirrored or left out, the crop is the middle, and there is no noise offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from minisd import draws
from minisd.batches import Batch, TrainingSamples, collate
from minisd.buckets import Geometry
from minisd.held_out import Pictures
from minisd.latent_cache import View, caption_key

PICTURES = 8  # places of a set; one of fewer pictures shows them several times, with other noise
BANDS = 4  # ranges of diffusion times, from little noise to most
PLACES = range(PICTURES)


def time_bands(num_train_timesteps: int) -> list[tuple[int, int]]:
    """First and last diffusion time of each band."""
    borders = [num_train_timesteps * band // BANDS for band in range(BANDS + 1)]
    return [(first, end - 1) for first, end in pairwise(borders)]


@dataclass(frozen=True)
class ProbeSet:
    """The samples of one set.

    Args:
        samples: of its pictures, as they are: nothing random but noise, time and caption.
        order: of its pictures.
    """

    samples: TrainingSamples
    order: Sequence[int]

    def index(self, place: int) -> int:
        """The picture that a place shows."""
        return self.order[place % len(self.order)]

    def names(self) -> list[str]:
        """Names of the files that are shown, by place."""
        return [self.samples.examples[self.index(place)].path.name for place in PLACES]

    def views(self) -> list[View]:
        """What is read of pictures, by place."""
        return [self.samples.view(self.index(place), flip=False) for place in PLACES]

    def captions(self) -> list[str]:
        """What is read of captions: BANDS of each place, in turn."""
        drawn = [self.samples.caption(self.index(place), at) for place in PLACES for at in _positions(place)]
        return [caption for caption in drawn if caption is not None]  # none is left out

    def batch(self, place: int) -> Batch:
        """The picture of a place at one time of each band: BANDS samples of one shape.

        Raises:
            DiskError: the cache is not what it was.
        """
        samples, bands = self.samples, time_bands(self.samples.num_train_timesteps)
        timesteps = [
            first + draws.timestep(samples.seed, position, last + 1 - first)
            for position, (first, last) in zip(_positions(place), bands, strict=True)
        ]
        drawn = collate([samples.sample(self.index(place), position) for position in _positions(place)])
        return replace(drawn, timesteps=torch.tensor(timesteps))

    def content(self) -> list[Any]:
        """All that its batches follow from, as JSON takes it."""
        samples = self.samples
        pictures = [
            [view.key(samples.vae_weights), samples.surveys[self.index(place)].size]  # an XL model is told the size
            for place, view in enumerate(self.views())
        ]
        captions = [caption_key(caption, samples.text_weights) for caption in self.captions()]
        return [samples.seed, samples.num_train_timesteps, PICTURES, BANDS, pictures, captions]


def probe_sets(training: TrainingSamples, held_out: Pictures, geometries: Sequence[Geometry]) -> dict[str, ProbeSet]:
    """The two sets of a run, "train" and "held_out".

    Args:
        training: the samples of the run.
        held_out: the pictures that it does not see.
        geometries: of those.
    """
    seen = replace(
        training, cache_latents=True, center_crop=True, random_flip=False, caption_dropout=0.0, noise_offset=0.0
    )
    unseen = replace(seen, examples=held_out.examples, surveys=held_out.surveys, geometries=geometries)
    return {
        name: ProbeSet(samples, draws.permutation(training.seed, -1, len(samples.examples)))
        for name, samples in (("train", seen), ("held_out", unseen))
    }


def _positions(place: int) -> list[int]:
    """The positions that a place draws for, by band."""
    return [-1 - (BANDS * place + band) for band in range(BANDS)]
