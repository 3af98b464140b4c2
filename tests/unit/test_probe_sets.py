"""Laws of what the validation loss is measured on: nothing of it follows from how the run reads its own pictures."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from minisd.batches import TrainingSamples
from minisd.buckets import Geometry
from minisd.data import Example, Survey
from minisd.held_out import Pictures
from minisd.plan import TrainingPlan
from minisd.probe_sets import PLACES, ProbeSet, probe_sets, time_bands

GEOMETRY = Geometry((40, 48), (32, 40))  # 8 rows and 8 columns are cut away


class Cache(dict[str, torch.Tensor]):
    """Has everything, each thing another."""

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.tensor([zlib.crc32(key.encode())])


def pictures(name: str, count: int) -> Pictures:
    examples = [Example(Path(f"{name}{i}.png"), (f"{name} {i}", "again")) for i in range(count)]
    return Pictures(examples, [Survey(f"{name}{i}", (50 + i, 60)) for i in range(count)])


def sets_of(**options: Any) -> dict[str, ProbeSet]:
    """The sets of a run of an XL model, with five pictures and eleven held out."""
    trained, held_out = pictures("train", 5), pictures("held-out", 11)
    settings = {"center_crop": True, "random_flip": False, "caption_dropout": 0.0, "noise_offset": 0.0}
    cache: Any = Cache()
    samples = TrainingSamples(
        trained.examples, trained.surveys, [GEOMETRY] * 5, TrainingPlan([GEOMETRY] * 5, 1, 3), cache,
        text_weights="text", vae_weights="vae", cache_latents=False, **(settings | options), seed=3, latent_channels=4,
        pixels_per_latent=8, num_train_timesteps=1000, is_xl=True,
    )  # fmt: skip
    return probe_sets(samples, held_out, [GEOMETRY] * 11)


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_crops_flips_dropout_and_offset_of_the_run_are_left_out(name: str) -> None:
    """An XL model is told of the middle, though the run cuts anywhere."""
    plain = sets_of()[name]
    other = sets_of(center_crop=False, random_flip=True, caption_dropout=0.9, noise_offset=0.5)[name]
    assert other.content() == plain.content()
    for place in PLACES:
        batch, wanted = other.batch(place), plain.batch(place)
        assert batch.time_ids is not None
        size = plain.samples.surveys[plain.index(place)].size
        assert batch.time_ids.tolist() == [[*size, 4, 4, 32, 40]] * 4
        for part in ("moments", "noise", "posterior_noise", "timesteps", "encoder_hidden_states", "text_embeds"):
            assert torch.equal(getattr(batch, part), getattr(wanted, part)), part


def test_both_sets_have_the_same_times_one_in_each_band_and_the_same_noise() -> None:
    train, held_out = sets_of().values()
    drawn = []
    for place in PLACES:
        batch = train.batch(place)
        for time, (first, last) in zip(batch.timesteps.tolist(), time_bands(1000), strict=True):
            assert first <= time <= last
        assert torch.equal(batch.timesteps, held_out.batch(place).timesteps)
        assert torch.equal(batch.noise, held_out.batch(place).noise)
        drawn += batch.timesteps.tolist()
    assert len(set(drawn)) > 28  # of 32


@pytest.mark.parametrize("steps", [1000, 7, 4])
def test_the_bands_are_all_times_once(steps: int) -> None:
    bands = time_bands(steps)
    assert [time for first, last in bands for time in range(first, last + 1)] == list(range(steps))
    assert len(bands) == 4
